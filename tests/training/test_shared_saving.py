"""Data-parallel processes write and read one checkpoint together, each its share."""

from collections import Counter

import pytest

from flexolmo_megatron.convert.model import open_model
from flexolmo_megatron.exchange.digest import model_digest
from tests.training.ranks import Launcher

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


@pytest.mark.parametrize("distributed", ["false", "true"])
def test_each_process_writes_half_and_nothing_twice(launcher, expert_options, metrics, tmp_path, distributed):
    options = [*OPTIONS, f"optimizer.use_distributed_optimizer={distributed}"]
    launcher.start(expert_options(tmp_path / "unbroken", *options))
    assert launcher.wait() == [0, 0], launcher.output()
    run = tmp_path / "run"
    launcher.start(expert_options(run, *options, "stop_after=3"))
    assert launcher.wait() == [0, 0], launcher.output()
    checkpoint = run / "checkpoints" / "step_00000003"
    named = _bytes_by_file(checkpoint)
    assert named == {path.name: path.stat().st_size for path in checkpoint.glob("*.distcp")}
    shares = [sum(size for name, size in named.items() if name.startswith(f"__{rank}_")) for rank in range(2)]
    assert max(shares) < 1.2 * min(shares), shares
    launcher.start(expert_options(run, *options))
    assert launcher.wait() == [0, 0], launcher.output()
    assert "at step 3" in launcher.output()
    lines = [[(row["step"], row["loss"], row["grad_norm"]) for row in metrics(path)]
             for path in (run, tmp_path / "unbroken")]
    assert lines[0] == lines[1] and len(lines[0]) == 6
    assert model_digest(open_model(run)) == model_digest(open_model(tmp_path / "unbroken"))
