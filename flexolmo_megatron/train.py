"""``torchrun --nproc-per-node N -m flexolmo_megatron.train MODE KEY=VALUE …``: the same as ``flexolmo train``."""

import sys

from flexolmo_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
