"""The scripts of `flexolmo launch`, as --dry-run prints them."""

import subprocess
from pathlib import Path

from tests.launch.launches import dry_run, sbatch_options, scripts

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples" / "slurm"


def test_examples_are_what_the_example_configuration_renders(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    rendered = scripts(dry_run(capsys, EXAMPLES / "launch.yaml"))
    kept = {path.name: path.read_text() for path in EXAMPLES.iterdir() if path.suffix in (".sbatch", ".sh")}
    assert set(kept) == {"anchor.sbatch", "experts.sbatch", "merge.sbatch", "router.sbatch", "functions.sh"}
    for name, text in kept.items():
        assert rendered[name] == text, f"write examples/slurm/{name} anew from flexolmo launch --dry-run"


def test_every_script_is_valid_bash(capsys, launch_file):
    for name, text in scripts(dry_run(capsys, launch_file)).items():
        if name.endswith((".sbatch", ".sh")):
            result = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
            assert result.returncode == 0 and not result.stderr, (name, result.stderr)
            assert "{{" not in text and "\n\n\n" not in text


def test_what_is_asked_of_slurm(capsys, launch_file, tmp_path):
    parts = scripts(dry_run(capsys, launch_file, "slurm.account=lab", "experts.slurm={nodes: 1, options: {mem: 0}}",
                            "slurm.options={exclusive: true, hint: null, spread-job: false, comment: 'two words'}"))
    anchor, experts, merge = (sbatch_options(parts[f"{stage}.sbatch"]) for stage in ("anchor", "experts", "merge"))
    assert anchor == {
        "job-name": "out-anchor", "account": "lab", "partition": "long", "time": "1-12:00:00", "nodes": "2",
        "ntasks-per-node": "4", "gpus-per-node": "4", "output": f"{tmp_path}/out/logs/anchor.log",
        "open-mode": "append", "requeue": "", "signal": "USR1@300", "kill-on-invalid-dep": "yes", "exclusive": "",
        "hint": "", "comment": '"two words"'}
    assert experts == {**anchor, "job-name": "out-experts", "nodes": "1", "mem": "0", "array": "0,1",
                       "output": f"{tmp_path}/out/logs/experts_%a.log"}
    assert merge == {**anchor, "job-name": "out-merge", "nodes": "1", "ntasks-per-node": "1", "gpus-per-node": "1",
                     "output": f"{tmp_path}/out/logs/merge.log"}


def test_a_dense_copy_is_packed_with_what_it_does_not_say_itself(capsys, launch_file):
    text = scripts(dry_run(capsys, launch_file, "experts.each.code.options=['data.train=[x]', "
                                                "expert.coordination=false]"))["experts.sbatch"]
    packages = [line.strip() for line in text.splitlines() if line.strip().startswith("package=(")]
    dense = '--name "$name" --anchor "$anchor" --domain-vector "$vector" --router-window 1)'
    assert [line.endswith(dense) for line in packages] == [True, False]


def test_without_gpus_and_names_nothing_of_a_cluster_is_asked_for(capsys, launch_file):
    text = dry_run(capsys, launch_file, "slurm.gpus_per_node=0", "slurm.partition=null", "slurm.time=null")
    for stage in ("anchor", "experts", "merge"):
        options = sbatch_options(scripts(text)[f"{stage}.sbatch"])
        assert not {"partition", "time", "account", "qos", "gpus-per-node", "cpus-per-task"} & set(options)
        assert options["ntasks-per-node"] == "1"


def test_dry_run_says_how_jobs_would_be_submitted_and_writes_nothing(capsys, launch_file, tmp_path):
    text = dry_run(capsys, launch_file)
    folder = f"{tmp_path}/out/slurm"
    assert text.endswith(
        "===== to be submitted with\n"
        f"sbatch --parsable {folder}/anchor.sbatch\n"
        f"sbatch --parsable --dependency=afterok:<number of anchor> {folder}/experts.sbatch\n"
        f"sbatch --parsable --dependency=afterok:<number of experts> {folder}/merge.sbatch\n")
    assert not (tmp_path / "out").exists()
