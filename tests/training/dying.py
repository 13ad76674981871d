"""``flexolmo …`` as a process of torchrun; process DIE_LOCAL_RANK of a node (1) sends itself DIE_OF in step DIE_AT_STEP
of the first try."""

import os
import signal
import sys
from typing import Any

from flexolmo_megatron.cli import main

if __name__ == "__main__":
    dying = os.environ["LOCAL_RANK"] == os.environ.get("DIE_LOCAL_RANK", "1")
    if "DIE_AT_STEP" in os.environ and dying and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        from flexolmo_megatron.runtime.setup import prepare

        prepare()
        from flexolmo_megatron.training import loop

        step = loop.Loop._step

        def last_step(run: Any, iterators: Any) -> Any:
            if run.state.step == int(os.environ["DIE_AT_STEP"]):
                os.kill(os.getpid(), signal.Signals[os.environ["DIE_OF"]])
            return step(run, iterators)

        loop.Loop._step = last_step
    sys.exit(main(sys.argv[1:]))
