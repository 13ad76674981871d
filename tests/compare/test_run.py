"""The whole comparison, once, on tiny texts: every method, the report, resumption; and by several processes."""

import json
import os
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from flexolmo_megatron.cli import main
from flexolmo_megatron.compare.config import load_compare
from flexolmo_megatron.compare.scores import held_out
from flexolmo_megatron.convert.model import open_model
from flexolmo_megatron.evaluation.perplexity import evaluate_documents
from flexolmo_megatron.inference.model import load_model
from tests.compare.conftest import WORDS
from tests.domain.test_text_models import FakeSentenceTransformer
from tests.slurm.cluster import Cluster, unavailable

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def ran(module_config: Path) -> Path:
    """The YAML file of a comparison that is done."""
    assert main(["compare", str(module_config)]) == 0
    return module_config


def table_of(path: Path) -> dict[str, dict]:
    table = json.loads((path.parent / "out" / "report" / "table.json").read_text())
    assert table["columns"] == ["public", "math", "code", "average", "mixed"]
    return {method["name"]: method for method in table["methods"]}


def bits(method: dict) -> dict[str, float]:
    return {column: value["mean"] for column, value in method["bits_per_byte"].items()}


def test_every_method_is_in_the_table(ran: Path) -> None:
    methods = table_of(ran)
    assert {"public", "dense math", "dense code", "soup", "soup weighted oracle", "BTM top-2 oracle",
            "BTM top-2 causal", "prompt routing causal", "BTX", "unrestricted MoE 1x", "unrestricted MoE 2x",
            "pair math", "pair code", "FlexOlmo", "FlexOlmo top-1", "FlexOlmo top-3", "FlexOlmo without math",
            "FlexOlmo tuned", "FlexOlmo tuned without code (strict)", "FlexOlmo, no coordination",
            "FlexOlmo, centred rows", "FlexOlmo, calibrated temperature"} <= set(methods)
    for method in methods.values():
        for value in bits(method).values():
            assert 2 < value < 10, method  # log2(257) is 8.0: little has been learnt


def test_budgets_are_those_of_the_runs(ran: Path) -> None:
    methods = table_of(ran)
    public, owner, router = 4 * 4 * 32, 3 * 4 * 32, 2 * 4 * 32
    assert methods["dense math"]["training_tokens"] == public + owner
    for name in ("FlexOlmo", "BTM top-2 oracle", "soup"):
        assert methods[name]["training_tokens"] == public + 2 * owner
    assert methods["FlexOlmo tuned"]["training_tokens"] == methods["BTX"]["training_tokens"] == (
        public + 2 * owner + router)
    assert methods["FlexOlmo"]["training_flops"] < methods["BTM top-2 oracle"]["training_flops"]


def test_numbers_are_those_of_the_models(ran: Path) -> None:
    """An owner's pair by itself, and what is merged without an owner, against the merged model that leaves experts
    out."""
    out, methods = ran.parent / "out", table_of(ran)
    texts = {one.name: one.texts for one in held_out(load_compare(str(ran)))}
    pair = load_model(out / "seed_1" / "experts" / "math" / "run")
    assert bits(methods["pair math"])["math"] == pytest.approx(
        evaluate_documents(pair, texts["math"]).bits_per_byte, rel=1e-5)
    packages = out / "seed_1" / "merged" / "packages"
    assert main(["merge", "--anchor", str(out / "seed_1" / "anchor" / "model"), str(packages / "code"),
                 "--top-k", "2", "--out", str(ran.parent / "code_alone")]) == 0
    alone = load_model(ran.parent / "code_alone")
    assert bits(methods["FlexOlmo without math"])["mixed"] == pytest.approx(
        evaluate_documents(alone, texts["mixed"]).bits_per_byte, rel=1e-9)
    anchor = load_model(out / "seed_1" / "public" / "run")
    assert bits(methods["public"])["code"] == pytest.approx(
        evaluate_documents(anchor, texts["code"]).bits_per_byte, rel=1e-5)


def test_report_has_tables_and_pictures(ran: Path) -> None:
    report = ran.parent / "out" / "report"
    assert {path.name for path in report.iterdir()} == {
        "table.md", "table.csv", "table.json", "step.json", "routing_share.png", "active_experts.png",
        "active_experts_tuned.png", "opt_out.png", "opt_out_tuned.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in report.glob("*.png"))
    assert "## Opt-outs" in (report / "table.md").read_text()


def test_proxies_are_picked_from_the_documents_that_are_named(ran: Path) -> None:
    proxies = (ran.parent / "out" / "proxies" / "math" / "proxies" / "proxies.jsonl").read_text().splitlines()
    words = [json.loads(line)["text"].split()[0] for line in proxies]
    assert all(json.loads(line)["source"].startswith("pool.jsonl:") for line in proxies)
    assert set(words) <= set(WORDS["math"].split())


def test_a_second_start_does_nothing(ran: Path, capsys: pytest.CaptureFixture) -> None:
    record = ran.parent / "out" / "seed_1" / "router" / "step.json"
    before = record.stat().st_mtime_ns
    assert main(["compare", str(ran)]) == 0
    assert record.stat().st_mtime_ns == before
    assert "[" not in capsys.readouterr().out.split("## Methods")[0]


def test_what_is_gone_is_made_anew(ran: Path, capsys: pytest.CaptureFixture) -> None:
    report, scores = ran.parent / "out" / "report", ran.parent / "out" / "seed_1" / "scores" / "scores.json"
    before = {path: path.read_text() for path in (report / "table.md", scores)}
    for path in (*before, report / "opt_out.png"):
        path.unlink()
    assert main(["compare", str(ran)]) == 0
    assert {path: path.read_text() for path in before} == before and (report / "opt_out.png").exists()
    scores.write_text("{")
    assert main(["compare", str(ran)]) == 2
    assert f"remove {scores.parent}/step.json to evaluate this seed again" in capsys.readouterr().err
    scores.write_text(before[scores])


def test_a_new_variant_is_all_that_is_trained(ran: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["compare", str(ran), "variants.no noise={expert.routing_noise: 0}", "--dry-run"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "seed_1" in line or "report" in line]
    missing = [line.split()[1] for line in lines if " yes " not in line]
    assert missing == [f"seed_1/{name}" for name in (
        "ablations/no_noise/experts/math", "ablations/no_noise/experts/code", "ablations/no_noise/merged", "scores")
        ] + ["report"]


def test_rows_can_start_at_another_models_embeddings(ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("sentence_transformers")
    module.SentenceTransformer, module.__spec__ = FakeSentenceTransformer, ModuleSpec(module.__name__, None)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    steps = [f"seed_1/ablations/embedder_init/{name}" for name in
             ("anchor", "vectors/math", "vectors/code", "experts/math", "experts/code", "merged")]
    assert main(["compare", str(ran), "variants.embedder init={embed.embedder: some/model}",
                 *(word for step in steps for word in ("--only", step))]) == 0
    card = open_model(ran.parent / "out" / steps[-1] / "model").card
    assert all(expert.router["embedder"].startswith("some/model@") for expert in card.experts)


def test_other_options_are_refused(ran: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["compare", str(ran), "owner.optimizer.lr=1e-3"]) == 2
    assert "seed_1/experts/math was made with optimizer.lr = 0.003, which is 0.001 now: remove this folder" in (
        capsys.readouterr().err)


def test_processes_of_torchrun_come_to_the_same_numbers(ran: Path, config_file: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
         "flexolmo_megatron.cli", "compare", config_file, "methods=[public,flexolmo]", "train.micro_batch_size=2"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = table_of(ran), table_of(Path(config_file))
    assert {"public", "FlexOlmo", "FlexOlmo tuned"} <= set(theirs)
    for name, method in theirs.items():  # gradients are summed in another order
        assert bits(method) == pytest.approx(bits(ours[name]), rel=1e-4), name


@pytest.mark.slurm
@pytest.mark.timeout(1200)  # a machine with other work
@pytest.mark.skipif(unavailable() is not None, reason=unavailable() or "")
def test_arrays_of_slurm_make_the_same_table(ran: Path, config_file: str, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture) -> None:
    words = ["compare", config_file, "--slurm", "methods=[public,dense,soup]", f"slurm.python={sys.executable}",
             f"slurm.setup=[export OMP_NUM_THREADS=1 PYTHONPATH={ROOT}]"]
    out = Path(config_file).parent / "out"
    for done in ("data", "seed_1/public", "seed_1/anchor"):  # the jobs do what is missing
        shutil.copytree(ran.parent / "out" / done, out / done)
    with Cluster() as cluster:
        monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
        assert main(words) == 0
        jobs = json.loads((out / "slurm" / "jobs.json").read_text())
        last = cluster.wait(jobs["steps_3"]["job"])
    log = (out / "launch.log").read_text()
    assert last["JobState"] == "COMPLETED", log
    assert (len(jobs), log.count("): done\n")) == (4, 5)  # both dense models at once, soup, scores, report
    ours, theirs = table_of(ran), table_of(Path(config_file))
    assert set(theirs) == {"public", "dense math", "dense code", "soup", "soup weighted oracle"}
    assert theirs == {name: ours[name] for name in theirs}
    capsys.readouterr()
    assert main(words) == 0
    assert capsys.readouterr().out == f"{out}: everything is there already\n"
