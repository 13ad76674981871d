"""Data-parallel processes write and read one checkpoint together, each its share."""

from collections import Counter

import pytest

from flexolmo_megatron.convert.model import open_model
from flexolmo_megatron.exchange.digest import model_digest
from tests.training.ranks import Launcher
from tests.training.runs import SMALL

OPTIONS = ["parallel.tensor=1", "global_batch_size=4", "micro_batch_size=2"]


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    launcher = Launcher(tmp_path_factory.mktemp("logs"))
    yield launcher
    launcher.close()


def _bytes_by_file(checkpoint):
    """Bytes of the tensors that a checkpoint names, by the file that they are in."""
    from torch.distributed.checkpoint import FileSystemReader

    sizes = Counter()
    for place in FileSystemReader(checkpoint).read_metadata().storage_data.values():
        sizes[place.relative_path] += place.length
    return sizes


DISTRIBUTED = "optimizer.use_distributed_optimizer=true"
MIXTURE = ["model.num_experts=4", "model.top_k=2", "parallel.expert=2"]


@pytest.mark.parametrize(
    ("mode", "more"),
    [
        ("expert", []),
        ("expert", [DISTRIBUTED]),
        ("expert", [DISTRIBUTED, "bf16=true"]),
        ("moe", [*MIXTURE]),
        ("moe", [*MIXTURE, DISTRIBUTED]),
    ],
)
def test_each_process_writes_half_and_nothing_twice(launcher, world, expert_options, metrics, tmp_path, mode, more):
    options = [*OPTIONS, *more]

    def command(out, *rest):
        if mode == "expert":
            return expert_options(out, *options, *rest)
        return ["train", mode, *SMALL, f"data.train=[{world}/own]", f"out={out}", *options, *rest]

    launcher.start(command(tmp_path / "unbroken"))
    assert launcher.wait() == [0, 0], launcher.output()
    run = tmp_path / "run"
    launcher.start(command(run, "stop_after=3"))
    assert launcher.wait() == [0, 0], launcher.output()
    checkpoint = run / "checkpoints" / "step_00000003"
    named = _bytes_by_file(checkpoint)
    assert named == {path.name: path.stat().st_size for path in checkpoint.glob("*.distcp")}
    shares = [sum(size for name, size in named.items() if name.startswith(f"__{rank}_")) for rank in range(2)]
    assert max(shares) < 1.2 * min(shares), shares
    launcher.start(command(run))
    assert launcher.wait() == [0, 0], launcher.output()
    assert "at step 3" in launcher.output()
    lines = [[(row["step"], row["loss"], row["grad_norm"]) for row in metrics(path)]
             for path in (run, tmp_path / "unbroken")]
    assert lines[0] == lines[1] and len(lines[0]) == 6
    assert model_digest(open_model(run)) == model_digest(open_model(tmp_path / "unbroken"))
