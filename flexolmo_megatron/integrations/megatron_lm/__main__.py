"""In place of Megatron-LM's ``pretrain_gpt.py``, under torchrun, with all of its arguments and ours.

    python -m flexolmo_megatron.integrations.megatron_lm cards SAVE      # makes checkpoints of a killed run readable

The latter also does that for runs of ``integrations.bridge``.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.patches import core_version
from flexolmo_megatron.runtime.setup import prepare
from flexolmo_megatron.runtime.versions import TESTED

_CHECKOUT = "git clone --branch core_v0.16.1 https://github.com/NVIDIA/Megatron-LM"


def main() -> int:
    """Run the launch that ``sys.argv`` describes; returns the exit status: 0 done, 2 bad input."""
    try:
        if sys.argv[1:2] == ["cards"]:
            _cards(sys.argv[2:])
        else:
            tree = find_tree()
            prepare()
            _pretrain(tree)
    except FlexOlmoError as error:
        print(f"flexolmo: {error}", file=sys.stderr)
        return 2
    return 0


def find_tree() -> Path:
    """The Megatron-LM checkout on the import path; imports nothing of it.

    Raises:
        FlexOlmoError: there is none, it is of another version, or megatron.core comes from elsewhere.
    """
    training = find_spec("megatron.training") if find_spec("megatron") else None
    if training is None:
        raise FlexOlmoError("megatron.training cannot be imported (the megatron-core wheel does not hold it): expected "
                            f"a checkout of Megatron-LM first on PYTHONPATH; run: {_CHECKOUT} && export "
                            "PYTHONPATH=$PWD/Megatron-LM")
    tree = Path(training.origin).parents[2]
    core = Path(find_spec("megatron.core").origin).parent
    if core != tree / "megatron" / "core":
        raise FlexOlmoError(f"megatron.training is in {tree} but megatron.core in {core}: expected both from the "
                            f"checkout; put {tree} first on PYTHONPATH")
    found, tested = core_version(core), TESTED["megatron-core"]
    if not tested.contains(found, prereleases=True):
        raise FlexOlmoError(f"{tree} is Megatron-LM with core {found}: tested is {tested}; run: git -C {tree} checkout "
                            "core_v0.16.1")
    return tree


def _cards(paths: list[str]) -> None:
    from flexolmo_megatron.integrations.cards import write_cards

    if len(paths) != 1 or not Path(paths[0]).is_dir():
        raise FlexOlmoError(f"cards {' '.join(paths)}: expected the folder of a run, with checkpoints iter_*")
    prepare()
    written = write_cards(Path(paths[0]))
    print(f"{paths[0]}: cards of {len(written)} checkpoints written")


def _pretrain(tree: Path) -> None:
    if str(tree) not in sys.path:  # an editable installation does not put the scripts there
        sys.path.append(str(tree))
    import pretrain_gpt as launch

    from flexolmo_megatron.integrations.megatron_lm.arguments import LaunchArguments
    from flexolmo_megatron.integrations.megatron_lm.model import ModelProvider

    arguments = LaunchArguments()
    provider = ModelProvider(arguments)
    launch.train_valid_test_datasets_provider.is_distributed = True
    pretrain, store = launch.inprocess_restart.maybe_wrap_for_inprocess_restart(launch.pretrain)
    leaving = None
    try:
        pretrain(
            launch.train_valid_test_datasets_provider,
            provider,
            launch.ModelType.encoder_or_decoder,
            launch.forward_step,
            args_defaults={"tokenizer_type": "GPT2BPETokenizer"},
            extra_args_provider=arguments,
            store=store,
            get_embedding_ranks=launch.get_embedding_ranks,
        )
    except SystemExit as stop:  # how Megatron-LM ends at --exit-interval, after a signal, or where arguments are bad
        if not provider.chunks:
            raise
        leaving = stop
    provider.finish()
    if leaving is not None:
        raise leaving


if __name__ == "__main__":
    sys.exit(main())
