"""What a launch changes in the folder of its run, and the record of steps that it keeps there."""

import json

import pytest

from flexolmo_megatron.cli import main
from flexolmo_megatron.convert.model import open_model
from flexolmo_megatron.errors import FlexOlmoError, StopRequested
from flexolmo_megatron.training.dataset_info import DatasetInfo, common_tokenizer
from flexolmo_megatron.training.run_log import RunLog
from flexolmo_megatron.training.signals import stay_stopped
from tests.training import runs


def _snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}


def test_a_start_that_fails_changes_nothing(world, tmp_path, capsys):
    run = tmp_path / "run"
    options = runs.expert_options(world, run)
    assert main([*options, "data.valid=[nowhere]"]) == 2
    assert "data.valid: nowhere.idx does not exist" in capsys.readouterr().err
    assert not run.exists()
    assert main([*options, f"expert.domain_vector={world}/public.npz", "stop_after=2"]) == 0
    before = _snapshot(run)
    for option, message in (
        ("data.valid=[nowhere]", "data.valid: nowhere.idx does not exist"),
        ("expert.domain_vector=nowhere", "nowhere"),
        ("expert.name=other", "its experts is ['public', 'own'], this run's is ['public', 'other']"),
    ):
        assert main([*options, "keep=5", option]) == 2
        assert message in capsys.readouterr().err
    assert _snapshot(run) == before


def test_a_start_that_failed_leaves_the_folder_free(world, tmp_path, capsys):
    (tmp_path / "run" / "cache").mkdir(parents=True)
    (tmp_path / "run" / ".mode.elsewhere.7.partial").write_text("expe")
    assert main(runs.expert_options(world, tmp_path / "run", "train_iters=1")) == 0


def test_torn_lines_and_steps_that_are_done_again_leave_the_record(tmp_path):
    rows = [{"step": step, "loss": float(step)} for step in (1, 2, 3)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo' + "\n" + "3\n" + text + '{"step": 2, "loss"')
    log = RunLog(tmp_path, step=2)
    log.write({"step": 3, "loss": float("nan"), "grad_norm": float("inf"), "skipped": "why"})
    log.write({"step": 4, "loss": 0.5})
    log.close()
    assert log.failure is None
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kept == [*rows[:2], {"step": 3, "skipped": "why"}, {"step": 4, "loss": 0.5}]


def test_a_record_that_fails_says_so_and_stays_silent(tmp_path):
    log = RunLog(tmp_path, step=0)
    log._file.close()
    log._file = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    log.write({"step": 1, "loss": 1.0})
    log.write({"step": 2, "loss": 1.0})
    log.close()
    assert log.failure.startswith(f"cannot write {tmp_path}/metrics.jsonl, or tensorboard beside it: No space left")


def test_torchruns_restart_of_a_stopped_run_ends_at_once(tmp_path, monkeypatch):
    stay_stopped(tmp_path)
    (tmp_path / "requeue").write_text("SIGTERM at step 7\n")
    stay_stopped(tmp_path)  # a launch of its own
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(StopRequested, match="was asked to stop; its next launch goes on with it"):
        stay_stopped(tmp_path)
    assert main(["train", "anchor", f"out={tmp_path}", "data.train=[x]"]) == 75
    assert (tmp_path / "requeue").exists()


def test_a_launch_that_fails_leaves_no_mark_of_the_one_before(tmp_path, monkeypatch, capsys):
    (tmp_path / "requeue").write_text("SIGTERM at step 7\n")
    monkeypatch.setenv("RANK", "1")
    command = ["train", "expert", f"out={tmp_path}", "data.train=[x]"]
    assert main(command) == 2
    assert "an expert needs the published anchor" in capsys.readouterr().err
    assert (tmp_path / "requeue").exists()
    monkeypatch.setenv("RANK", "0")
    assert main(command) == 2
    assert not (tmp_path / "requeue").exists()


def test_a_new_anchor_speaks_the_language_of_its_data(word_tokenizer, tmp_path, capsys):
    documents = runs.write_documents(tmp_path / "words.jsonl", ["the", "owner", "trains", "on", "data"], 40)
    command = ["data", str(documents), "--out", str(tmp_path / "words"), "--tokenizer", str(word_tokenizer)]
    assert main([*command, "--workers", "1"]) == 0
    options = ["train", "anchor", *runs.SMALL, f"data.train=[{tmp_path}/words]", f"out={tmp_path}/run", "train_iters=1"]
    assert main(options) == 2
    size = DatasetInfo.load(tmp_path / "words").vocab_size
    assert f"model.vocab_size = 264: expected at least {size}, the ids of the tokenizer of" in capsys.readouterr().err
    assert main([*options, "model.vocab_size=320"]) == 0
    assert open_model(tmp_path / "run").card.tokenizer == {"type": "huggingface", "path": str(word_tokenizer)}


def test_one_tokenizer_for_all_data(tmp_path):
    for name, kind in (("a", {"type": "byte"}), ("b", {"type": "huggingface", "path": "x"})):
        DatasetInfo(kind, 257, 256).save(tmp_path / f"{name}.json")
    assert common_tokenizer([tmp_path / "a", tmp_path / "unknown"], 264) == {"type": "byte"}
    assert common_tokenizer([tmp_path / "unknown"], 264) is None
    with pytest.raises(FlexOlmoError, match=r"b was tokenized with .*, .*a with .*: expected one tokenizer for all"):
        common_tokenizer([tmp_path / "a", tmp_path / "b"], 264)
