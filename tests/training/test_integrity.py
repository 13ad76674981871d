"""Damaged checkpoints are found before they are loaded, and never picked; what killed processes left is swept."""

import errno
import json
import os
import shutil
from types import SimpleNamespace

import pytest

from flexolmo_megatron.cli import main
from flexolmo_megatron.convert.model import open_model
from flexolmo_megatron.exchange.digest import model_digest
from tests.training import runs


@pytest.fixture(scope="module")
def broken_off(world, tmp_path_factory):
    """A run of the owner with checkpoints of steps 2 and 3, and the digest and losses of its unbroken twin."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(runs.expert_options(world, folder / "unbroken")) == 0
    assert main(runs.expert_options(world, folder / "run", "save_interval=1", "stop_after=3")) == 0
    return folder


def _losses(run):
    return [row["loss"] for row in runs.metrics(run)]


def _truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _empty_record(path):
    path.write_text("{}")


DAMAGES = {
    "a missing tensor file": ("__0_1.distcp", os.remove, "__0_1.distcp is missing"),
    "a truncated tensor file": ("__0_0.distcp", _truncate, "__0_0.distcp has "),
    "a flipped bit of a tensor": ("__0_0.distcp", _flip, "__0_0.distcp is not what was written (its sha256 differs)"),
    "truncated metadata": (".metadata", _truncate, ".metadata has "),
    "a flipped bit of metadata": (".metadata", _flip, ".metadata is not what was written"),
    "missing common values": ("common.pt", os.remove, "common.pt is missing"),
    "a missing card": ("flexolmo.json", os.remove, "flexolmo.json is missing"),
    "a truncated record": ("integrity.json", _truncate, "integrity.json is damaged"),
    "an empty record": ("integrity.json", _empty_record, "integrity.json is damaged"),
    "a missing record": ("integrity.json", os.remove, "integrity.json is missing"),
}


@pytest.mark.parametrize("name, damage, problem", DAMAGES.values(), ids=DAMAGES)
def test_the_last_intact_one_is_picked(world, broken_off, tmp_path, capsys, name, damage, problem):
    run = tmp_path / "run"
    shutil.copytree(broken_off / "run", run)
    damage(run / "checkpoints" / "step_00000003" / name)
    assert main(runs.expert_options(world, run)) == 0
    said = capsys.readouterr().out
    assert f"step_00000003 is damaged and not used: {problem}" in said
    assert f"resuming from {run}/checkpoints/step_00000002 at step 2" in said
    assert (run / "checkpoints" / "damaged_step_00000003").is_dir()
    assert _losses(run) == _losses(broken_off / "unbroken")
    assert model_digest(open_model(run)) == model_digest(open_model(broken_off / "unbroken"))


def test_without_hashes_sizes_are_compared(world, broken_off, tmp_path, capsys):
    run = tmp_path / "run"
    options = runs.expert_options(world, run, "checkpoint_hash=false", "save_interval=1", "stop_after=3")
    assert main(options) == 0
    newest = run / "checkpoints" / "step_00000003"
    files = json.loads((newest / "integrity.json").read_text())["files"]
    assert {name for name in files if files[name]["sha256"] is None} == {"__0_0.distcp", "__0_1.distcp"}
    _flip(newest / "common.pt")  # small files are hashed all the same
    _truncate(run / "checkpoints" / "step_00000002" / "__0_0.distcp")
    before = sorted(path for path in run.rglob("*"))
    assert main(options) == 2
    error = capsys.readouterr().err
    assert f"no checkpoint of {run} is intact: step_00000003: common.pt is not what was written (its sha256" in error
    assert "; step_00000002: __0_0.distcp has " in error and "Traceback" not in error
    assert sorted(path for path in run.rglob("*")) == before


def test_a_record_cannot_name_files_elsewhere(world, broken_off, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(broken_off / "run", run)
    record = run / "checkpoints" / "step_00000003" / "integrity.json"
    content = json.loads(record.read_text())
    content["files"]["../step_00000002/common.pt"] = content["files"]["common.pt"]
    record.write_text(json.dumps(content))
    assert main(runs.expert_options(world, run)) == 0
    said = capsys.readouterr().out
    assert "integrity.json names '../step_00000002/common.pt', which is no file in the folder" in said


def test_a_checkpoint_of_a_later_version_is_not_called_damaged(world, broken_off, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(broken_off / "run", run)
    record = run / "checkpoints" / "step_00000003" / "integrity.json"
    record.write_text(json.dumps({"format_version": 2, "contents": []}))
    before = sorted(run.rglob("*"))
    assert main(runs.expert_options(world, run)) == 2
    error = capsys.readouterr().err
    assert f"{record}: format_version = 2: expected 1; a later version of flexolmo-megatron has written this" in error
    assert sorted(run.rglob("*")) == before


def test_only_what_killed_writers_of_checkpoints_left_is_swept(world, broken_off, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(broken_off / "run", run)
    host, dead = os.uname().nodename, 2**22 - 1
    swept = [f".step_00000003.{host}.{dead}.partial", ".step_00000002.elsewhere.7.partial", ".step_00000001.7.partial"]
    kept = [f".step_00000009.{host}.{os.getppid()}.partial", ".notes.elsewhere.7.partial", "notes", ".step_00000003"]
    for name in swept + kept:
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / "file").write_text("x")
    assert main(runs.expert_options(world, run)) == 0
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"step_00000003", "step_00000006", *kept}


def test_a_checkpoint_that_cannot_be_deleted_ends_no_run(world, tmp_path, monkeypatch):
    """As on NFS, where a file that somebody still reads keeps its folder from being removed."""
    run, options = tmp_path / "run", ["save_interval=1", "keep=1"]
    folder = run / "checkpoints"

    def busy(path, *args, **kwargs):
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    def left():
        return sorted(path.name.split(".")[1] for path in folder.glob(".*.partial"))

    with monkeypatch.context() as patch:
        patch.setattr("flexolmo_megatron.training.checkpoint.shutil", SimpleNamespace(rmtree=busy))
        assert main(runs.expert_options(world, run, *options, "stop_after=3")) == 0
        assert left() == ["step_00000001", "step_00000002"]
        shutil.copytree(folder / "step_00000003", folder / "step_00000004")
        _truncate(folder / "step_00000004" / "common.pt")
        shutil.copytree(folder / "step_00000004", folder / "damaged_step_00000004")
        assert main(runs.expert_options(world, run, *options, "stop_after=1")) == 0
        assert left() == ["damaged_step_00000004", "step_00000003"]
    assert main(runs.expert_options(world, run, *options)) == 0
    assert left() == []
    assert [path.name for path in sorted(folder.iterdir())] == ["damaged_step_00000004", "step_00000006"]


def test_a_parameter_without_a_place_in_the_checkpoint_is_a_defect(world, tmp_path, monkeypatch):
    from megatron.core.models.gpt import GPTModel

    whole = GPTModel.sharded_state_dict

    def lacking(self, *args, **options):
        content = whole(self, *args, **options)
        return {name: value for name, value in content.items() if not name.endswith("0.mlp.router.row")}

    monkeypatch.setattr(GPTModel, "sharded_state_dict", lacking)
    with pytest.raises(RuntimeError, match="would not hold decoder.layers.0.mlp.router.row, which trains"):
        main(runs.expert_options(world, tmp_path / "run"))
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


def test_a_frozen_parameter_that_has_changed_is_not_saved(world, tmp_path, monkeypatch):
    from flexolmo_megatron.training import freezing

    fingerprints = iter("ab")
    monkeypatch.setattr(freezing, "frozen_fingerprint", lambda chunk: next(fingerprints))
    with pytest.raises(RuntimeError, match="a frozen parameter has changed on rank 0"):
        main(runs.expert_options(world, tmp_path / "run"))
    assert not list((tmp_path / "run").glob("checkpoints/*"))
