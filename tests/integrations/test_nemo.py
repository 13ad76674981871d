"""The NeMo plugin in NeMo's own environment (`make .venv-nemo/.installed`), where nemo_runs.py runs."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from glob import glob
from pathlib import Path

import pytest
import torch

from flexolmo_megatron.cli import main
from flexolmo_megatron.config.load import load_config
from flexolmo_megatron.config.train import TrainConfig
from flexolmo_megatron.convert.model import open_model, save_model
from flexolmo_megatron.exchange.digest import model_digest
from flexolmo_megatron.training.freezing import ROUTER, TRAINED_BY_OWNER
from tests.random_models import SIZES, random_model, tensors_of
from tests.slurm.cluster import Cluster, unavailable
from tests.training import runs

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("NEMO_PYTHON", ROOT / ".venv-nemo" / "bin" / "python"))
INSTALLED = (PYTHON.parents[1] / ".installed").exists() or "NEMO_PYTHON" in os.environ
pytestmark = pytest.mark.timeout(1800)  # a machine with other work: most of these are starts of NeMo
needs_nemo = pytest.mark.skipif(not INSTALLED, reason="needs NeMo 2.7.3: make .venv-nemo/.installed")


def in_nemo(*words, cwd):
    """Run tasks of nemo_runs.py."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(PYTHON), str(Path(__file__).with_name("nemo_runs.py")), *map(str, words)], cwd=cwd,
                          env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A trained and published anchor, data and a domain vector (see runs.py)."""
    return runs.make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("names", ["flexolmo_megatron", "flexolmo_megatron.cli"])
def test_the_package_alone_imports_no_framework(names):
    code = (f"import sys, {names}; print([name for name in sys.modules if name.split('.')[0] in "
            "('nemo', 'nemo_run', 'lightning', 'transformers', 'transformer_engine', 'torch') or "
            "name.startswith('megatron.')])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_a_missing_nemo_is_one_sentence_with_the_install_line():
    code = ("from flexolmo_megatron.errors import FlexOlmoError\ntry:\n    import flexolmo_megatron.integrations.nemo\n"
            "except FlexOlmoError as error:\n    print(error)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("nemo_toolkit is not installed; run: pip install --no-deps nemo_toolkit==2.7.3")


@needs_nemo
def test_hugging_face_models_come_and_go_bitwise_with_the_logits_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    multi_head = replace(SIZES, num_query_groups=SIZES.num_attention_heads)
    for name, model in {"olmo2_mha": random_model("dense", sizes=multi_head), "flex_gqa": random_model("moe", 3, 2),
                        "olmo2_gqa": random_model("dense"), "flex_mha": random_model("moe", 3, 2, sizes=multi_head),
                        }.items():
        save_model(model, tmp_path / "hf" / name, "hf")
    tokens = torch.randint(0, SIZES.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1))
    torch.save(tokens, tmp_path / "tokens.pt")
    in_nemo("convert", tmp_path, cwd=tmp_path)
    for path in (tmp_path / "hf").iterdir():
        before, after = tensors_of(open_model(path)), tensors_of(open_model(tmp_path / "out" / path.name))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        reference = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(torch.load(tmp_path / f"{path.name}.logits.pt"), reference(tokens).logits,
                                       rtol=0, atol=2e-4)


COMMAND = """
llm pretrain --yes
--factory flexolmo_expert(anchor={w}/anchor,expert=own,domain_vector={w}/own.npz,paths=['{w}/own'],dir={out},name=cli)
trainer.max_steps=6 model.config.seq_length=32 data.seq_length=32 data.micro_batch_size=2 data.global_batch_size=4
data.num_workers=0 optim.lr_scheduler=None optim.config.lr=5e-3
trainer.accelerator=cpu trainer.devices=1 trainer.plugins=None
optim.config.bf16=False optim.config.use_distributed_optimizer=False
"""


@needs_nemo
def test_expert_run_has_our_losses_resumes_and_is_packed(world, tmp_path):
    in_nemo("train", "expert", world, tmp_path, 3, cwd=tmp_path)
    # Another public row makes another anchor, into whose pair everything would fit.
    assert main(["embed", "--anchor", f"{world}/anchor_run", f"{world}/own.jsonl", "--out", f"{tmp_path}/other.npz",
                 "--publish", f"{world}/other"]) == 0
    (saved,) = (tmp_path / "expert" / "checkpoints").glob("*-last")
    in_nemo("refused", world, tmp_path, "--", "train", "expert", world, tmp_path, 6, "--", "configs", world, tmp_path,
            "--", "export", tmp_path / "expert", tmp_path / "pair",
            "--", "nemo", *COMMAND.format(w=world, out=tmp_path).split(),
            "--", "export", tmp_path / "cli", tmp_path / "cli_pair", cwd=tmp_path)
    before, now = (model_digest(open_model(world / name)) for name in ("anchor", "other"))
    assert (tmp_path / "refused").read_text().startswith(
        f"{saved} belongs to another run: its anchor digest is {before}, this run's is {now}; name a new folder")
    first, second = (json.loads((tmp_path / f"expert_{last}.json").read_text()) for last in (3, 6))
    assert main(runs.expert_options(world, tmp_path / "ours", "optimizer.lr_decay_style=constant")) == 0
    ours = [row["loss"] for row in runs.metrics(tmp_path / "ours")]
    # NeMo adds up token losses in fp32, our loop in fp64.
    assert first["losses"] + second["losses"] == pytest.approx(ours, rel=1e-6)
    assert (first["step"], second["step"]) == (3, 6)

    trained = first["in optimizer"]
    assert trained and all(TRAINED_BY_OWNER.search(name) for name in trained)
    assert len(trained) == 8  # of two layers: two matrices, a row and a bias each
    assert first["frozen"] > 0

    sizes = json.loads((tmp_path / "configs.json").read_text())
    for name, preset, experts in (("FlexOlmoConfig", "7b-pair", 0), ("FlexOlmoConfigPair", "7b-pair", 2),
                                  ("FlexOlmoConfig7x7B", "7b-pair", 7), ("FlexOlmoConfig37B", "37b", 8)):
        model = load_config(TrainConfig, preset=preset, overrides=["out=.", "data.train=[.]"]).model
        assert sizes[name]["num_experts"] == experts
        assert sizes[name]["ffn_hidden_size"] == model.ffn_hidden_size
    assert sizes["transformers"] == {"num_experts": 7, "num_experts_per_tok": sizes["FlexOlmoConfig7x7B"]["top_k"]}
    assert (sizes["upcycled"]["num_experts"], sizes["upcycled"]["top_k"]) == (3, 2)
    assert sizes["upcycled"]["hidden_size"] == open_model(world / "anchor").card.model.hidden_size
    assert sizes["missing"].startswith(f"{tmp_path}/nothing does not exist")
    assert sizes["without"].startswith("start_from has no value: expected the published anchor")

    mine = tensors_of(open_model(tmp_path / "ours"))
    for run in ("pair", "cli_pair"):
        theirs = tensors_of(open_model(tmp_path / run))
        assert theirs.keys() == mine.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(tensor, mine[name], rtol=1e-4, atol=1e-5)
    assert main(["pack", f"{tmp_path}/pair", f"{tmp_path}/package"]) == 0
    assert main(["verify", f"{tmp_path}/package", "--anchor", f"{world}/anchor"]) == 0


@pytest.fixture(scope="module")
def merged(world):
    """The anchor and an owner's expert, merged."""
    assert main(runs.expert_options(world, world / "own_run")) == 0
    assert main(["pack", f"{world}/own_run", f"{world}/package"]) == 0
    assert main(["merge", "--anchor", f"{world}/anchor", f"{world}/package", "--out", f"{world}/merged"]) == 0


@needs_nemo
def test_a_merged_model_with_biases_comes_and_goes_bitwise(world, merged, tmp_path):
    in_nemo("load", f"{world}/merged", tmp_path / "nemo", "--", "export", tmp_path / "nemo", tmp_path / "back",
            "--", "foreign", tmp_path / "nemo", tmp_path / "refused", cwd=tmp_path)
    assert (tmp_path / "refused").read_text() == (
        f"{tmp_path}/nemo has no flexolmo_card: expected a NeMo checkpoint of a FlexOlmoModel")
    before, after = open_model(f"{world}/merged"), open_model(tmp_path / "back")
    assert after.card == before.card and before.card.model.router_bias
    before, after = tensors_of(before), tensors_of(after)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@needs_nemo
@pytest.mark.parametrize(("kind", "ours", "frozen"), [
    ("anchor", ["dense", "anchor={world}/anchor_run"], False),
    ("router", ["router", "merged={world}/merged", "data.proxies.own=[{world}/own]", "optimizer.lr_warmup_iters=0"],
     True),
])
def test_anchor_and_router_runs_have_our_losses_and_are_opened(world, merged, tmp_path, kind, ours, frozen):
    in_nemo("train", kind, world, tmp_path, 6, "--", "export", tmp_path / kind, tmp_path / "theirs", cwd=tmp_path)
    assert main(["train", *(word.format(world=world) for word in ours), *runs.SMALL[7:], f"data.train=[{world}/public]",
                 "optimizer.lr_decay_style=constant", f"out={tmp_path}/ours"]) == 0
    report = json.loads((tmp_path / f"{kind}_6.json").read_text())
    assert report["losses"] == pytest.approx([row["loss"] for row in runs.metrics(tmp_path / "ours")], rel=1e-6)
    assert (report["frozen"] > 0) == frozen
    assert all(ROUTER.search(name) for name in report["in optimizer"]) == frozen
    theirs, mine = open_model(tmp_path / "theirs"), open_model(tmp_path / "ours")
    assert theirs.card.model == mine.card.model
    assert [part.name for part in theirs.card.row_sets] == [part.name for part in mine.card.row_sets]
    theirs, mine = tensors_of(theirs), tensors_of(mine)
    assert theirs.keys() == mine.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(tensor, mine[name], rtol=1e-4, atol=1e-5)


def run_example(out, *words, environment=os.environ):
    """What examples/nemo/run.py prints."""
    run = subprocess.run([PYTHON, "-W", "ignore", ROOT / "examples/nemo/run.py", out, *words], capture_output=True,
                         env={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                         text=True, timeout=1500)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return run.stdout


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The folder of the example, run on this machine, and what it has printed."""
    out = tmp_path_factory.mktemp("example") / "out"
    return out, run_example(out)


SAME = "exported -> NeMo -> back: the same to the last bit"


@needs_nemo
def test_the_example_prints_what_its_readme_shows(example):
    *_, last = lines = example[1].splitlines()
    assert last == SAME
    shown = (ROOT / "examples/nemo/README.md").read_text()
    assert all(line in shown for line in lines if line.startswith("$ flexolmo"))


@needs_nemo
@pytest.mark.slurm
@pytest.mark.skipif(unavailable() is not None, reason=unavailable() or "")
def test_the_example_as_jobs_of_two_nodes_ends_with_the_same_expert(example, tmp_path):
    for path in [example[0] / "anchor", *example[0].glob("notes.*")]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    with Cluster() as cluster:
        run_example(tmp_path, "--account", "wards", "--nodes", "2", "--gpus-per-node", "0",
                    environment=cluster.environment)
        jobs = cluster.client("squeue", "--noheader", "--states=all", "--format=%j %i").splitlines()
        expert, convert = (dict(line.split() for line in jobs)[f"wards-wards.{name}"] for name in ("expert", "convert"))
        logs = f"{tmp_path}/jobs/experiments/owner/*/*/log-*"
        after, before = cluster.wait(convert, 1500), cluster.show(expert)
        said = {Path(path).parent.name: Path(path).read_text() for path in glob(logs)}
        assert (before["JobState"], before["NumNodes"], after["JobState"]) == ("COMPLETED", "2", "COMPLETED"), said
        assert before["EndTime"] <= after["StartTime"]
    assert said["convert"].splitlines()[-1] == SAME
    here, there = (tensors_of(open_model(folder / "pair")) for folder in (example[0], tmp_path))
    for name, tensor in there.items():
        torch.testing.assert_close(tensor, here[name], rtol=1e-4, atol=1e-5)
