"""What `flexolmo launch` refuses before it is queued, and what it submits."""

import os
import shlex
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

from flexolmo_megatron.cli import main
from flexolmo_megatron.commands.launch import EXAMPLE
from flexolmo_megatron.domain.vector import DomainVector, save_vector
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.launch.slurm import _check_ended
from tests.launch.launches import dry_run, publish, refused, sbatch_options, scripts, touch
from tests.slurm.cluster import unavailable


@pytest.mark.parametrize("overrides, message", [
    (["slurm.partitoin=x"], "unknown option 'slurm.partitoin' (did you mean 'partition'?)"),
    (["expert={}"], "unknown option 'expert' (did you mean 'experts'?)"),
    (["experts.each.code.document=[x]"], "unknown option 'experts.each.code.document' (did you mean 'documents'?)"),
    (["experts.slurm.node=3"], "unknown option 'experts.slurm.node' (did you mean 'nodes'?)"),
    (["slurm=[x]"], "the command line: slurm = ['x']: expected a mapping of options"),
    (["experts.slurm={options: [x]}"], "experts.slurm.options = ['x']: expected a mapping of options"),
    (["slurm={time: 43200}"], "slurm.time = 43200: expected text in quotes, as '12:00:00'"),
    (["slurm.time=43200"], "slurm.time = '43200' (job anchor): expected hours:minutes:seconds"),
    (["slurm.time=00:10:00"], "slurm.time = '00:10:00' (job anchor) is 600 s: expected more than twice "
                              "slurm.warn_seconds = 300"),
    (["slurm.warn_seconds=64800"], "slurm.time = '1-12:00:00' (job anchor) is 129600 s: expected more than"),
    (["experts.slurm={time: '12:30'}", "slurm.warn_seconds=400"], "(job experts) is 750 s: expected more than"),
    (["merge.slurm.time=7200"], "merge.slurm.time = 7200: expected text in quotes"),
    (["slurm.time=soon"], "slurm.time = 'soon' (job anchor): expected hours:minutes:seconds"),
    (["slurm.nodes=two"], "slurm.nodes: Value 'two' of type 'str' could not be converted to Integer"),
    (["merge.slurm.nodes=two"], "merge.slurm.nodes: Value 'two'"),
    (["experts.slurm.nodes=0"], "slurm.nodes = 0 (job experts): expected at least 1"),
    (["slurm.options.partition=x"], "slurm.options.partition: expected slurm.partition instead"),
    (["slurm.options.array=0-3"], "slurm.options.array: expected no such option, the scripts set it"),
    (["slurm.srun_options={export: NONE}"], "slurm.srun_options.export: expected no such option"),
    (["slurm.options.clusters=x"], "slurm.options.clusters: expected no such option, the scripts set it"),
    (["slurm.options={gpus-per-task: 1}"], "slurm.options.gpus-per-task: expected slurm.gpus_per_node instead"),
    (["slurm.options={-p: x}"], "'-p' is not the long name of an option"),
    (["slurm.options={comment: 'a \"b'}"], "expected text without quotation marks"),
    (["slurm.options={mem: [1]}"], "slurm.options.mem = [1]: expected one value"),
    (["published=anchor"], "expected either a section anchor or published="),
    (["anchor=null"], "expected either a section anchor or published="),
    (["anchor.documents=[]"], "anchor.documents is empty"),
    (["experts.each.code.domain_vector=x.npz"], "experts.each.code: expected either documents or domain_vector"),
    (["experts=null"], "merge.packages is empty and there is no section experts"),
    (["out=runs/${x}"], "Interpolation key 'x' not found"),
    (["out=runs/%j"], "out = 'runs/%j': expected a path without %"),
    (["anchor.preset=tinny"], "anchor: unknown preset 'tinny' (did you mean 'tiny'?)"),
    (["anchor.options=[]"], "anchor: data.train has no value"),
    (["experts.options=[optimizer.lrr=1]"], "experts.each.code: the command line: unknown option 'optimizer.lrr'"),
    (["experts.config=[/nowhere.yaml]"], "experts.each.code: /nowhere.yaml does not exist"),
    (["slurm.nodes=3"], "anchor: global_batch_size = "),
    (["anchor.options=['data.train=[x]', parallel.tensor=3]"], "anchor: parallel.tensor = 3"),
    (["experts.slurm={nodes: 1, tasks_per_node: 3}"], "experts.each.code: global_batch_size = "),
    (["embed_arguments=[--sclae, '2']"], "embed_arguments: unrecognized arguments: --sclae 2"),
    (["experts.options=[global_batch_size=32, expert.drift_coeff=0.01]"],
     "out/experts/code/domain.npz: expected a file from `flexolmo embed --public` (experts.embed_arguments), or 0"),
    (["experts.embed_arguments=[--clip, '2']"], "--clip 2 is about noise, which --epsilon asks for"),
    (["experts.embed_arguments=[--scale, x]"], "experts.embed_arguments: argument --scale: invalid float value: 'x'"),
    (["merge.merge_arguments=[--topk, '2']"], "merge.merge_arguments: unrecognized arguments: --topk"),
    (["merge.eval_arguments=[--help]"], "merge.eval_arguments: expected options that run it"),
    (["merge.eval_arguments=[--max-byte, '2', --oops]"], "merge.eval_arguments: "),
    (["embed_arguments=[--public, x]"], "embed_arguments: --public compares with a published anchor, which is for "
                                        "experts alone: expected it in experts.embed_arguments"),
    (["experts.each.code.options=['data.train=[x]', expert.router_window=8]"],
     "expert.router_window = 1, and 8 for code: expected the same for all experts of a model"),
    (["experts.options=[global_batch_size=32, stop_after=3]"], "stop_after = 3: a job ends by its time limit"),
])
def test_what_is_refused(capsys, launch_file, overrides, message):
    assert message in refused(capsys, launch_file, *overrides)


def test_a_penalty_on_drift_has_what_it_is_measured_by(capsys, launch_file, tmp_path, monkeypatch):
    """A vector that will be made, or one that is there, of which only its moments count."""
    monkeypatch.chdir(tmp_path)
    shape = (2, 4)
    vector = DomainVector(np.ones(shape, np.float32), "anchor", "0" * 64, "0" * 64, 1, 0, 0, 1.0, centred=True,
                          biases=np.zeros(2, np.float32))
    words = ["experts.options=[global_batch_size=32, expert.drift_coeff=0.01]",
             "experts.embed_arguments=[--public, public.jsonl]"]
    save_vector(vector, tmp_path / "notes.npz")
    message = "experts.each.notes: expert.drift_coeff = 0.01 with notes.npz: expected a file from `flexolmo embed --pub"
    assert message in refused(capsys, launch_file, "--dry-run", *words)
    save_vector(replace(vector, moments=np.ones((2, *shape), np.float32)), tmp_path / "notes.npz")
    assert "expert.drift_coeff=0.01" in dry_run(capsys, launch_file, *words)


def test_the_example_of_the_help_is_valid(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = EXAMPLE.partition("has all of it):\n")[2].partition("\noptions of")[0]
    (tmp_path / "launch.yaml").write_text(text)
    (tmp_path / "expert.yaml").write_text("global_batch_size: 64\n")
    assert '"$out"/experts/code/package' in dry_run(capsys, tmp_path / "launch.yaml")


def test_names_of_experts_are_checked(capsys, launch_file):
    launch_file.write_text(launch_file.read_text().replace("    code:", "    'a b':", 1))
    assert "'a b'" in refused(capsys, launch_file)


def test_files_that_are_no_launch_are_refused(capsys, tmp_path):
    assert "nowhere.yaml does not exist" in refused(capsys, tmp_path / "nowhere.yaml")
    path = tmp_path / "launch.yaml"
    for text, message in (("a: [", "is not valid YAML"), ("- a", "expected a mapping of options at the top"),
                          ("out: x", "expected at least one of the sections"),
                          ("out: x\npublished: x\nexperts: {each: {}}", "experts.each is empty"),
                          ("published: x\nmerge: {packages: [x]}", "out has no value")):
        path.write_text(text)
        assert message in refused(capsys, path)


def test_without_slurm_nothing_is_written(capsys, launch_file, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", str(launch_file)]) == 2
    assert "there is no sbatch on this machine" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_where_slurm_is_missing_its_tests_say_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "sbatch").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    reason = unavailable()
    assert reason.startswith("no Slurm here (munged, slurmctld, slurmd, srun,")
    assert reason.endswith("on Debian: slurmctld slurmd slurm-client munge")


INPUTS = ("public/a.jsonl", "data/public.bin", "data/public.idx", "code.jsonl", "data/code.bin", "data/code.idx",
          "notes.npz", "data/notes.bin", "data/notes.idx", "code_valid.jsonl")


@pytest.mark.parametrize("gone, message", [
    ("public/a.jsonl", "anchor.documents: public/*.jsonl does not exist; expected a file or a pattern"),
    ("data/public.idx", "anchor: data.train: data/public.idx does not exist"),
    ("code.jsonl", "experts.each.code.documents: code.jsonl does not exist"),
    ("data/code.bin", "experts.each.code: data.train: data/code.bin does not exist"),
    ("notes.npz", "experts.each.notes.domain_vector = notes.npz does not exist"),
    ("code_valid.jsonl", "merge.domains.code: code_valid.jsonl does not exist"),
    ("package", "merge.packages: package does not exist"),
    ("", "sbatch refused"),
])
def test_what_no_job_makes_must_be_there(capsys, launch_file, tmp_path, monkeypatch, gone, message):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, *INPUTS, "package/manifest.json", "tools/sbatch")
    (tmp_path / "tools" / "sbatch").write_text("#!/bin/bash\nexit 1\n")
    (tmp_path / "tools" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/tools:{os.environ['PATH']}")
    if gone:
        (tmp_path / gone).rename(tmp_path / "gone")
    command = ["launch", str(launch_file), "merge.packages=[package]"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"flexolmo: {message}") and error.count("\n") == 1
    assert (tmp_path / "out").exists() is (not gone)
    assert main([*command, "--dry-run"]) == 0
    notes = capsys.readouterr().err
    assert notes.startswith(f"a launch would be refused now: {message}") if gone else not notes


def test_layouts_are_checked_against_the_anchor(capsys, launch_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = "experts.options=[global_batch_size=32, parallel.tensor=8, parallel.sequence=true]"
    assert "experts.each.code: model.num_attention_heads = 4 cannot be split over parallel.tensor = 8" in refused(
        capsys, launch_file, wrong)  # against the anchor's options
    right = "anchor.options=['data.train=[x]', global_batch_size=32, model.num_attention_heads=8, " \
            "model.num_query_groups=8, model.vocab_size=264]"
    assert "code" in dry_run(capsys, launch_file, wrong, right)
    assert "anchor: parallel.pipeline = 8 does not divide model.num_layers" in refused(
        capsys, launch_file, "anchor.options=['data.train=[x]', global_batch_size=32, parallel.pipeline=8]")
    published = ["anchor=null", "published=anchor"]
    assert "code" in dry_run(capsys, launch_file, wrong, *published)  # not there: nothing to compare with
    publish(tmp_path / "anchor")
    assert "experts.each.code: model.num_attention_heads = 4 cannot be split over" in refused(
        capsys, launch_file, wrong, *published)
    assert "expert.ffn_hidden_size = 99999: expected 1 to the anchor's" in refused(
        capsys, launch_file, "experts.options=[global_batch_size=32, expert.ffn_hidden_size=99999]", *published)
    assert "experts.each.code: data.seq_length = 99999: expected at most" in refused(
        capsys, launch_file, "experts.options=[global_batch_size=32, data.seq_length=99999]", *published)


@pytest.mark.parametrize("code, out, error, message", [
    (1, "", "slurm_load_jobs error: Unable to contact slurm controller", "squeue does not say whether job 17 (anchor)"),
    (1, "", "slurm_load_jobs error: Invalid job id specified", None),
    (0, "COMPLETED", "", None),
    (0, "RUNNING", "", "job 17 (anchor) of an earlier launch into the same folder is still RUNNING"),
])
def test_whether_an_earlier_launch_is_over(tmp_path, monkeypatch, code, out, error, message):
    tool = tmp_path / "squeue"
    tool.write_text(f"#!/bin/bash\necho {out}; echo '{error}' >&2; exit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "jobs.json").write_text('{"anchor": {"job": "17"}}')
    with pytest.raises(FlexOlmoError) if message else nullcontext() as raised:
        _check_ended(tmp_path / "jobs.json")
    assert message is None or str(raised.value).startswith(message)


def test_a_refused_script_is_reported_with_what_was_submitted(capsys, launch_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, *INPUTS)
    tool = tmp_path / "sbatch"
    tool.write_text('#!/bin/bash\nif [[ $* = *anchor.sbatch ]]; then echo 17; else echo "no such" >&2; exit 1; fi\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert main(["launch", str(launch_file)]) == 2
    error = capsys.readouterr().err
    assert f"sbatch refused {tmp_path}/out/slurm/experts.sbatch: no such" in error
    assert "already submitted, to be cancelled with scancel: anchor 17" in error


def test_only_what_is_missing_is_submitted(capsys, launch_file, tmp_path):
    out = tmp_path / "out"
    publish(out / "anchor")
    (out / "experts" / "code" / "package").mkdir(parents=True)
    parts = scripts(dry_run(capsys, launch_file))
    assert "anchor.sbatch" not in parts and sbatch_options(parts["experts.sbatch"])["array"] == "1"
    assert "sbatch --parsable " + shlex.quote(f"{out}/slurm/experts.sbatch") in parts["to be submitted with"]
    (out / "merged").mkdir()
    assert "merged exists already, without notes, still to be trained" in refused(capsys, launch_file)
    (out / "experts" / "notes" / "package").mkdir(parents=True)
    assert list(scripts(dry_run(capsys, launch_file))) == ["functions.sh", "merge.sbatch", "to be submitted with"]
    (out / "evaluation").mkdir()
    assert main(["launch", str(launch_file)]) == 0
    assert capsys.readouterr().out == f"{out}: everything is there already\n"
