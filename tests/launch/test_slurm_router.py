"""The job of `flexolmo launch` that tunes a merged model's router: its script, what it waits for, what is refused."""

from pathlib import Path

import pytest

from flexolmo_megatron.cli import main
from tests.launch.launches import publish, refused, run_script, sbatch_options, scripts

LAUNCH = """\
out: {out}
slurm: {{partition: long, nodes: 2, gpus_per_node: 4}}
published: anchor
experts:
  preset: tiny
  options: [global_batch_size=32]
  each:
    code: {{documents: [code.jsonl], options: ['data.train=[data/code]']}}
    notes: {{documents: [notes.jsonl], options: ['data.train=[data/notes]']}}
merge: {{domains: {{code: [code_valid.jsonl]}}, eval_arguments: [--max-bytes, '99']}}
router:
  options: ['data.train=[data/public]', 'data.proxies.code=[data/proxies code]', leave_one_out=true,
            global_batch_size=32]
"""


@pytest.fixture
def launch_file(tmp_path) -> Path:
    path = tmp_path / "launch.yaml"
    path.write_text(LAUNCH.format(out=tmp_path / "out"))
    return path


def dry_run(capsys, path: Path) -> dict[str, str]:
    assert main(["launch", str(path), "--dry-run"]) == 0
    return scripts(capsys.readouterr().out)


def test_it_waits_for_the_merge_and_asks_for_what_training_needs(capsys, launch_file, tmp_path):
    parts = dry_run(capsys, launch_file)
    assert parts["to be submitted with"].endswith(
        f"sbatch --parsable --dependency=afterok:<number of merge> {tmp_path}/out/slurm/router.sbatch\n")
    options = sbatch_options(parts["router.sbatch"])
    assert options["job-name"] == "out-router" and options["output"] == f"{tmp_path}/out/logs/router.log"
    assert (options["nodes"], options["ntasks-per-node"], options["gpus-per-node"]) == ("2", "4", "4")
    assert "{{" not in parts["router.sbatch"]


def test_its_commands(capsys, launch_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts, out = dry_run(capsys, launch_file), tmp_path / "out"
    (out / "slurm").mkdir(parents=True)
    (out / "slurm" / "functions.sh").write_text(parts["functions.sh"])
    train, evaluate = run_script(parts["router.sbatch"], tmp_path)
    assert train[train.index("rank") + 1:] == [
        "python", "-m", "flexolmo_megatron.train", "router", "data.train=[data/public]",
        "data.proxies.code=[data/proxies code]", "leave_one_out=true", "global_batch_size=32", f"out={out}/router",
        f"merged={out}/merged"]
    assert evaluate[evaluate.index("eval"):] == [
        "eval", "--out", f"{out}/evaluation_tuned", "--reference", "public", "--routing", "--model", "public=anchor",
        "--model", f"merged={out}/merged", "--model", f"tuned={out}/router/model",
        "--model", f"without code={out}/router/model@-code", "--model", f"without notes={out}/router/model@-notes",
        "--domain", "code=code_valid.jsonl", "--max-bytes", "99"]
    assert f"tuned in {out}/router/model" in (out / "launch.log").read_text()


def test_only_what_is_missing_is_submitted(capsys, launch_file, tmp_path):
    out = tmp_path / "out"
    for folder in ("experts/code/package", "experts/notes/package", "merged", "evaluation"):
        (out / folder).mkdir(parents=True)
    parts = dry_run(capsys, launch_file)
    assert list(parts) == ["functions.sh", "router.sbatch", "to be submitted with"]
    assert parts["to be submitted with"] == f"sbatch --parsable {out}/slurm/router.sbatch\n"
    (out / "router" / "model").mkdir(parents=True)
    (out / "evaluation_tuned").mkdir()
    assert main(["launch", str(launch_file)]) == 0
    assert "everything is there already" in capsys.readouterr().out


@pytest.mark.parametrize(("old", "new", "message"), [
    ("data.proxies.code", "data.proxies.coed", "router: data.proxies.coed: there is no such expert (did you"),
    ("'data.proxies.code=[data/proxies code]', ", "", "router: data.proxies is empty: expected proxies of"),
    ("leave_one_out=true,", "leave_out=true,", "router: the command line: unknown option 'leave_out'"),
    ("leave_one_out=true,", "train_iters=100,", "router: optimizer.lr_warmup_iters = 100: expected 0 to train_iters"),
    ("router:\n  options", "router:\n  option", "unknown option 'router.option' (did you mean 'options'?)"),
])
def test_what_is_refused(capsys, launch_file, old, new, message):
    launch_file.write_text(launch_file.read_text().replace(old, new))
    assert message in refused(capsys, launch_file)


def test_its_layout_is_checked_against_the_merged_model(capsys, launch_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = launch_file.read_text().replace("leave_one_out=true,", "parallel.expert=2,")
    launch_file.write_text(text)
    dry_run(capsys, launch_file)  # no anchor to compare with
    publish(tmp_path / "anchor")
    assert "router: model.num_experts = 3 cannot be split over parallel.expert = 2" in refused(capsys, launch_file)
    launch_file.write_text(text.replace("merge: {", "merge: {packages: [package], "))
    dry_run(capsys, launch_file)


def test_it_needs_a_merge(capsys, launch_file):
    assert "there is a section router and no section merge, whose model it tunes" in refused(capsys, launch_file,
                                                                                             "merge=null")
