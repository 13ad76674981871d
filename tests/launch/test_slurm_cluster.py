"""`flexolmo launch` on a real Slurm of two nodes: experts, merge and router, interruptions, a failure."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from omegaconf import OmegaConf

from flexolmo_megatron.convert.model import open_model
from flexolmo_megatron.convert.rows import untuned
from flexolmo_megatron.exchange.digest import model_digest
from tests.slurm.cluster import Cluster, unavailable, wait_for
from tests.training.runs import SMALL, metrics, write_documents

ROOT = Path(__file__).parent.parent.parent
WORDS = {
    "public": ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "the", "moon"],
    "code": ["def", "return", "for", "if", "x", "y", "=", "+", "1", "2"],
    "sums": ["one", "plus", "two", "is", "three", "times", "four"],
    "notes": ["pt", "seen", "dx", "rx", "ward", "home", "today"],
}
STEPS = 150

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(1800),  # a machine with other work: these are some fifty starts of Python, on processors alone
    pytest.mark.skipif(unavailable() is not None, reason=unavailable() or ""),
]


@pytest.fixture(scope="module")
def cluster():
    with Cluster() as running:
        yield running


def launch_yaml(path: Path, out: Path, experts: dict, **sections) -> Path:
    """The YAML file of a launch of tiny models, one process on each of the two nodes."""
    world = path.parent
    # Of eight microbatches: steps must be slow beside the tests' commands, which interrupt runs at chosen steps.
    options = [*SMALL[7:], f"train_iters={STEPS}", "save_interval=30", "data.seq_length=32", "global_batch_size=16",
               "micro_batch_size=1"]
    each = {name: {"documents": [f"{world}/{name}.jsonl"], "options": [f"data.train=[{world}/{name}]"], **other}
            for name, other in experts.items()}
    OmegaConf.save(OmegaConf.create({
        "out": str(out),
        "slurm": {"nodes": 2, "time": "00:50:00", "warn_seconds": 60, "python": sys.executable,
                  "setup": [f"export OMP_NUM_THREADS=1 PYTHONPATH={ROOT}"]},
        "experts": {"options": options, "each": each},
        **sections,
    }), path)
    return path


def launch(cluster: Cluster, path: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "flexolmo_megatron.cli", "launch", str(path), *arguments],
                          env=cluster.environment, cwd=path.parent, capture_output=True, text=True, timeout=120)


def numbers(out: Path) -> dict[str, str]:
    return {stage: entry["job"] for stage, entry in json.loads((out / "slurm" / "jobs.json").read_text()).items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Documents and data of the public and of three owners."""
    from flexolmo_megatron.cli import main

    folder = tmp_path_factory.mktemp("world")
    for name, words in WORDS.items():
        write_documents(folder / f"{name}.jsonl", words)
        assert main(["data", f"{folder}/{name}.jsonl", "--out", f"{folder}/{name}", "--workers", "1"]) == 0
    return folder


@pytest.fixture(scope="module")
def whole(cluster, world) -> Path:
    """The folder of an undisturbed launch of everything, once it has ended."""
    out = world / "whole"
    path = launch_yaml(
        world / "whole.yaml", out, {"code": {}, "sums": {}, "notes": {"owner": "Ward 7"}},
        anchor={"documents": [f"{world}/public.jsonl"], "options": [*SMALL, f"data.train=[{world}/public]"]},
        merge={"domains": {"code": [f"{world}/code.jsonl"], "sums": [f"{world}/sums.jsonl"]},
               "eval_arguments": ["--max-bytes", "500"]},
        router={"options": [*SMALL[7:], "optimizer.lr_warmup_iters=0", f"data.train=[{world}/public]",
                            *(f"data.proxies.{name}=[{world}/{name}]" for name in ("code", "sums", "notes"))]})
    result = launch(cluster, path)
    assert result.returncode == 0, result.stderr
    assert f"what happens is in {out}/launch.log" in result.stdout
    again = launch(cluster, path)
    assert again.returncode == 2 and "of an earlier launch into the same folder is still" in again.stderr
    jobs = numbers(out)
    assert cluster.show(jobs["merge"])["Dependency"].startswith(f"afterok:{jobs['experts']}_*")
    for stage in ("anchor", "experts", "merge", "router"):
        cluster.wait(jobs[stage])
    return out


def logs(out: Path) -> str:
    """Everything that a launch has logged, for a failed assertion."""
    return "\n".join(f"--- {path}\n{path.read_text()[-1500:]}"
                     for path in [out / "launch.log", *sorted((out / "logs").rglob("*.log"))])


def essence(run: Path) -> list[dict]:
    """What a run has measured, without its speed."""
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in metrics(run)]


def assert_same_expert(out: Path, name: str, whole: Path) -> None:
    """A run and its package equal those of the undisturbed launch to the last bit."""
    assert essence(out / "experts" / name / "run") == essence(whole / "experts" / name / "run")
    assert [row["step"] for row in metrics(out / "experts" / name / "run")] == list(range(1, STEPS + 1))
    runs = [model_digest(open_model(folder / "experts" / name / "run")) for folder in (out, whole)]
    packages = [(folder / "experts" / name / "package" / "expert.safetensors").read_bytes() for folder in (out, whole)]
    assert runs[0] == runs[1] and packages[0] == packages[1]


def wait_for_steps(out: Path, name: str, steps: int = 10) -> None:
    """Wait until an expert's run is on its way, far from its end."""
    path = out / "experts" / name / "run" / "metrics.jsonl"
    wait_for(f"step {steps} of {name}", lambda: path.exists() and path.read_text().count("\n") >= steps, 300)


def test_everything_from_the_anchor_to_the_evaluation(whole, cluster):
    jobs = numbers(whole)
    tasks = [cluster.show(f"{jobs['experts']}_{index}") for index in range(3)]
    merge, router = cluster.show(jobs["merge"]), cluster.show(jobs["router"])
    for job in (cluster.show(jobs["anchor"]), *tasks, merge, router):
        assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "0"), logs(whole)
    assert all(job["NumNodes"] == "2" for job in (*tasks, router))
    # The tasks of the array ran at the same time, after the anchor and before the merge, and the router's job last.
    assert max(task["StartTime"] for task in tasks) < min(task["EndTime"] for task in tasks)
    assert cluster.show(jobs["anchor"])["EndTime"] <= min(task["StartTime"] for task in tasks)
    assert max(task["EndTime"] for task in tasks) <= merge["StartTime"]
    assert merge["EndTime"] <= router["StartTime"]
    merged = open_model(whole / "merged")
    assert merged.card.expert_names == ["public", "code", "sums", "notes"]
    assert merged.card.anchor_digest == model_digest(open_model(whole / "anchor"))
    tuned = open_model(whole / "router" / "model")
    assert model_digest(untuned(tuned)) == model_digest(merged) != model_digest(tuned)
    without = {"without code", "without sums", "without notes"}
    for folder, models in (("evaluation", {"merged"}), ("evaluation_tuned", {"merged", "tuned"})):
        results = json.loads((whole / folder / "results.json").read_text())["bits_per_byte"]
        assert set(results) == {"public", *models, *without}
    manifest = json.loads((whole / "experts" / "notes" / "package" / "manifest.json").read_text())
    assert manifest["owner"] == "Ward 7"


def test_every_rank_has_a_log_and_every_job_a_line(whole):
    for name in ("code", "sums", "notes"):
        ranks = sorted(path.name for path in (whole / "logs" / "experts" / name).glob("train.*"))
        assert ranks == ["train.rank_0.log", "train.rank_1.log"]
        assert f"step {STEPS}/{STEPS}" in (whole / "logs" / "experts" / name / "train.rank_0.log").read_text()
    lines = (whole / "launch.log").read_text().splitlines()
    jobs = numbers(whole)
    assert lines[1].endswith(f"experts: submitted as job {jobs['experts']}, experts code, sums, notes, after job "
                             f"{jobs['anchor']}")
    ends = {jobs["anchor"]: "published in", f"{jobs['experts']}_2": "packed in", jobs["merge"]: "merged in",
            jobs["router"]: "tuned in"}
    for job, end in ends.items():
        assert any(f"(job {job}): {end} {whole}" in line for line in lines)


def test_a_second_launch_has_nothing_to_do(whole, cluster, world):
    result = launch(cluster, world / "whole.yaml")
    assert (result.returncode, result.stdout) == (0, f"{whole}: everything is there already\n")


def vectors_of(whole: Path, *names: str) -> dict[str, dict]:
    """Experts of the undisturbed launch, to be trained again."""
    return {name: {"documents": [], "domain_vector": f"{whole}/experts/{name}/domain.npz"} for name in names}


def kill_rank(rank: int, run: Path) -> None:
    """``kill -9`` one process of a training run."""
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "flexolmo_megatron.train" in command and f"out={run}" in command and process.name() != "srun" \
                and process.environ().get("RANK") == str(rank):
            process.kill()
            return
    raise AssertionError(f"no process of rank {rank} of {run}")


def test_a_job_near_its_time_limit_and_one_that_lost_a_rank_end_with_the_same_result(whole, cluster, world):
    out = world / "warned"
    experts = vectors_of(whole, "notes", "sums", "code")
    path = launch_yaml(world / "warned.yaml", out, experts, published=f"{whole}/anchor")
    assert launch(cluster, path).returncode == 0
    job = numbers(out)["experts"]
    # code is the array's last task, whose bare number stands for the whole array.
    wait_for_steps(out, "code")
    cluster.client("scancel", "--signal=USR1", f"{job}_2")  # what --signal=USR1@… does: to the steps, not to the script
    wait_for_steps(out, "sums", 35)
    kill_rank(1, out / "experts" / "sums" / "run")
    assert cluster.wait(f"{job}_2")["Restarts"] == "1", logs(out)
    log = (out / "launch.log").read_text()
    assert f"expert code (job {job}_2): interrupted in train (exit status 75): back into the queue" in log
    assert "resuming from" in (out / "logs" / "experts" / "code" / "train.rank_0.log").read_text()
    assert_same_expert(out, "code", whole)
    assert cluster.wait(f"{job}_1")["Restarts"] == "1", logs(out)
    log = (out / "launch.log").read_text()
    assert f"expert sums (job {job}_1): crashed after step_00000030" in log
    assert_same_expert(out, "sums", whole)
    other = cluster.wait(f"{job}_0")
    assert (other["JobState"], other["Restarts"]) == ("COMPLETED", "0")
    assert_same_expert(out, "notes", whole)


def test_a_preempted_job_goes_on_and_its_merge_waits(whole, cluster, world):
    out = world / "preempted"
    path = launch_yaml(world / "preempted.yaml", out, vectors_of(whole, "sums"), published=f"{whole}/anchor", merge={})
    assert launch(cluster, path).returncode == 0
    jobs = numbers(out)
    wait_for_steps(out, "sums")
    urgent = cluster.client("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive",
                            "--output=/dev/null", "--wrap=true")
    assert cluster.wait(urgent)["JobState"] == "COMPLETED"
    assert cluster.show(jobs["merge"])["Reason"] == "Dependency"
    assert cluster.wait(jobs["merge"])["JobState"] == "COMPLETED", logs(out)
    expert = cluster.show(f"{jobs['experts']}_0")
    assert (expert["JobState"], expert["Restarts"]) == ("COMPLETED", "1")
    assert_same_expert(out, "sums", whole)
    assert open_model(out / "merged").card.expert_names == ["public", "sums"]


def test_a_cancelled_job_does_not_come_back(whole, cluster, world):
    out = world / "cancelled"
    path = launch_yaml(world / "cancelled.yaml", out, vectors_of(whole, "code"), published=f"{whole}/anchor")
    assert launch(cluster, path).returncode == 0
    job = numbers(out)["experts"]
    wait_for_steps(out, "code", 1)
    cluster.client("scancel", job)
    wait_for("end of all jobs", lambda: not cluster.client("squeue", "--noheader"), 60)
    state = cluster.show(f"{job}_0")
    assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "0")
    assert "back into the queue" not in (out / "launch.log").read_text()


def test_a_failing_expert_stops_its_merge_with_the_reason(whole, cluster, world):
    out = world / "failing"
    experts = vectors_of(whole, "notes", "sums")
    experts["sums"]["options"] = [f"data.train=[{world}/nowhere]"]
    for suffix in (".bin", ".idx"):  # there, so that the launch goes on, and of no use
        (world / f"nowhere{suffix}").touch()
    experts["notes"]["options"] = [f"data.train=[{world}/notes]", "train_iters=5"]
    path = launch_yaml(world / "failing.yaml", out, experts, published=f"{whole}/anchor", merge={})
    assert launch(cluster, path).returncode == 0
    jobs = numbers(out)
    merge = cluster.wait(jobs["merge"])
    assert (merge["JobState"], merge["Reason"]) == ("CANCELLED", "DependencyNeverSatisfied"), logs(out)
    failed = cluster.wait(f"{jobs['experts']}_1")
    assert (failed["JobState"], failed["ExitCode"]) == ("FAILED", "2:0")
    (line,) = [line for line in (out / "launch.log").read_text().splitlines() if "FAILED" in line]
    assert f"expert sums (job {jobs['experts']}_1): FAILED in train with exit status 2: " in line
    assert f"{world}/nowhere" in line and "Slurm cancels the jobs that wait for it (DependencyNeverSatisfied)" in line
    assert cluster.wait(f"{jobs['experts']}_0")["JobState"] == "COMPLETED"
    assert not (out / "merged").exists()
    # What is done is not done again.
    again = launch(cluster, path, "--dry-run").stdout
    assert "#SBATCH --array=1\n" in again and "--dependency=afterok:<number of experts>" in again
