"""The steps of a comparison, their inputs and budgets, and their jobs on Slurm."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from flexolmo_megatron.cli import main
from flexolmo_megatron.compare import work
from flexolmo_megatron.compare.config import check_training, load_compare
from flexolmo_megatron.compare.listing import list_steps
from flexolmo_megatron.compare.plan import Comparison, build_comparison
from flexolmo_megatron.compare.settings import ABLATIONS
from flexolmo_megatron.compare.slurm import plan_arrays
from flexolmo_megatron.config.load import save_config
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.methods import build_methods


def planned(config_file: str, *overrides: str) -> Comparison:
    return build_comparison(load_compare(config_file, overrides))


def test_all_methods_by_default(config_file: str) -> None:
    plan = planned(config_file).plan
    assert [name for name in plan.steps if name.startswith("seed_1")] == [f"seed_1/{name}" for name in (
        "public", "anchor", "dense/math", "dense/code", "soup", "btx_start", "btx", "unrestricted_1x",
        "unrestricted_2x", "vectors/math", "vectors/code", "experts/math", "experts/code", "merged", "router",
        "ablations/no_coordination/experts/math", "ablations/no_coordination/experts/code",
        "ablations/no_coordination/merged",
        "ablations/centred_rows/vectors/math", "ablations/centred_rows/vectors/code",
        "ablations/centred_rows/experts/math", "ablations/centred_rows/experts/code", "ablations/centred_rows/merged",
        "ablations/calibrated_temperature/calibrated", "scores")]
    assert set(plan.steps["seed_1/scores"].inputs) >= {"seed_1/anchor", "seed_1/btx", "seed_1/router", "seed_1/soup"}


def test_only_what_the_methods_need(config_file: str) -> None:
    plan = planned(config_file, "methods=[public,btm]").plan
    assert list(plan.steps) == ["data/public", "data/math", "data/code", "seed_1/public", "seed_1/anchor",
                                "seed_1/dense/math", "seed_1/dense/code", "seed_1/scores", "report"]
    assert "seed_1/router" not in planned(config_file, "steps.router=0").plan.steps


def test_each_seed_has_runs_of_its_own(config_file: str) -> None:
    comparison = planned(config_file, "seeds=[3,4]", "methods=[public]")
    assert [run.seed for run in comparison.runs.values()] == [3, 4]
    assert comparison.plan.steps["report"].inputs == ("seed_3/scores", "seed_4/scores")


def test_an_ablation_like_the_setting_is_left_out(config_file: str) -> None:
    usual = planned(config_file, "ablations=[paper]", "setting=paper", "methods=[flexolmo,ablations]")
    assert usual.models[1].ablations == {} and usual.same == ["paper"]
    console = Console(file=io.StringIO(), width=200)
    console.print(list_steps(usual, []))
    assert "The same as FlexOlmo in this setting, so not trained again: 'paper'.\n" in console.file.getvalue()
    other = planned(config_file, "ablations=[paper]")
    assert list(other.models[1].ablations) == ["paper"] and other.same == []


def test_other_embeddings_have_an_anchor_of_their_own(config_file: str) -> None:
    comparison = planned(config_file, "variants.long rows={embed.scale: 2}", "methods=[ablations]", "ablations=[]")
    steps = comparison.plan.steps
    assert steps["seed_1/ablations/long_rows/anchor"].options == {"embed": {"documents": 10, "max_tokens": 32,
                                                                            "scale": 2}}
    assert "seed_1/ablations/long_rows/anchor" in steps["seed_1/ablations/long_rows/experts/math"].inputs
    assert steps["seed_1/ablations/long_rows/vectors/math"].options == {
        "embed": {"discriminant": True, "documents": 10, "max_tokens": 32, "scale": 2}}
    assert "data/public" in steps["seed_1/ablations/long_rows/vectors/math"].inputs


def test_what_a_setting_asks_of_owners_rows_is_not_for_the_anchors(config_file: str) -> None:
    steps = planned(config_file, "methods=[flexolmo]").plan.steps
    assert steps["seed_1/anchor"].options == {"embed": {"documents": 10, "max_tokens": 32}}
    assert steps["seed_1/vectors/math"].options == {
        "embed": {"discriminant": True, "documents": 10, "max_tokens": 32, "scale": 1.5}}


def test_rows_of_another_embedder_train(config_file: str) -> None:
    comparison = planned(config_file, "embed.embedder=some/model", "methods=[flexolmo]")
    assert "discriminant" not in comparison.plan.steps["seed_1/vectors/math"].options["embed"]
    run = comparison.runs["seed_1/experts/math"]
    assert run.optimizer.router_lr == 1e-3 and run.expert.domain_loss_coeff == 0.025
    own = planned(config_file, "embed.epsilon=4", "owner.optimizer.router_lr=1e-2", "methods=[flexolmo]")
    assert own.runs["seed_1/experts/math"].optimizer.router_lr == 1e-2
    assert "discriminant" not in own.plan.steps["seed_1/vectors/math"].options["embed"]


def test_ablations_of_the_rows_change_what_the_setting_has(config_file: str) -> None:
    words = ["methods=[flexolmo,ablations]", "ablations=[trained rows,centred rows]"]
    runs = planned(config_file, *words).runs
    usual, trained = runs["seed_1/experts/math"], runs["seed_1/ablations/trained_rows/experts/math"]
    assert (usual.optimizer.router_lr, trained.optimizer.router_lr) == (0, 1e-3)
    assert (usual.expert.router_window, trained.expert.router_window) == (32, 32)
    paper = planned(config_file, *words, "setting=paper")
    assert list(paper.models[1].ablations) == ["centred rows"]
    words[1] = "ablations=[centred rows,drift penalty]"
    assert list(planned(config_file, *words).models[1].ablations) == ["centred rows", "drift penalty"]
    assert list(planned(config_file, *words, "setting=paper").models[1].ablations) == ["centred rows"]
    centred = paper.runs["seed_1/ablations/centred_rows/experts/math"]
    assert centred.expert.domain_loss_coeff == 0 and not centred.data.public


def test_dense_copies_are_merged_with_the_window_of_pairs(config_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = []
    monkeypatch.setattr("flexolmo_megatron.compare.work.merge", lambda *arguments: windows.append(arguments[3]))
    words = ["methods=[flexolmo,ablations]", "ablations=[no coordination]"]
    steps = planned(config_file, *words).plan.steps
    assert windows == [None, 32]
    assert steps["seed_1/merged"].options == {"top_k": 3}
    assert steps["seed_1/ablations/no_coordination/merged"].options == {"top_k": 3, "router_window": 32}


def test_what_comes_after_the_merge_needs_no_other_runs(config_file: str) -> None:
    steps = planned(config_file, "ablations=[calibrated temperature]", "methods=[flexolmo,ablations]").plan.steps
    assert steps["seed_1/ablations/calibrated_temperature/calibrated"].inputs == ("seed_1/merged", "data/public")
    assert "seed_1/ablations/calibrated_temperature/merged" not in steps
    alone = planned(config_file, "ablations=[calibrated temperature]", "methods=[ablations]").plan.steps
    assert "seed_1/ablations/calibrated_temperature/merged" in alone and "seed_1/merged" not in alone


def test_every_usual_ablation_is_a_run_in_every_setting(config_file: str) -> None:
    for setting in ("default", "paper"):
        comparison = planned(config_file, f"ablations={json.dumps(list(ABLATIONS))}", f"setting={setting}")
        check_training(comparison.runs, 1)


def test_budgets(config_file: str) -> None:
    comparison = planned(config_file, "steps.owner=40")
    tokens, flops = comparison.tokens, comparison.flops
    assert (tokens["public"], tokens["owner"], tokens["dense"]) == (4 * 4 * 32, 40 * 4 * 32, 40 * 4 * 32)
    assert tokens["btx"] == tokens["router"] == 2 * 4 * 32  # one budget after the merge
    assert flops["unrestricted-1x"] == pytest.approx(2 * flops["owner"], rel=0.02)
    assert flops["unrestricted-2x"] == pytest.approx(4 * flops["owner"], rel=0.02)
    assert comparison.plan.steps["seed_1/router"].tokens == 3 * tokens["router"]  # for all, and without each owner


def test_each_method_counts_its_own_runs(config_file: str) -> None:
    dense = planned(config_file, "methods=[public,dense,btm]", "steps.owner=40")
    method = next(method for method in build_methods(dense.models[1], families=["btm"]))
    assert dense.budget_of(method) == (dense.tokens["public"] + 2 * 40 * 4 * 32,
                                       dense.flops["public"] + 2 * dense.flops["dense"])


def test_what_has_no_part_in_a_result_is_not_recorded(config_file: str) -> None:
    first, second = planned(config_file), planned(config_file, "train.log_interval=7", "train.micro_batch_size=2")
    assert first.plan.digest("seed_1/router") == second.plan.digest("seed_1/router")
    other = planned(config_file, "train.optimizer.clip_grad=0.5")
    assert first.plan.digest("seed_1/router") != other.plan.digest("seed_1/router")
    assert "optimizer.clip_grad" in other.plan.steps["seed_1/public"].options


def test_missing_documents_are_found_before_anything_runs(config_file: str) -> None:
    with pytest.raises(FlexOlmoError, match=r"nothing\.jsonl does not exist"):
        planned(config_file, "owners.math.valid=[nothing.jsonl]")


def test_texts_that_cannot_be_scored_are_found_before_anything_runs(config_file: str, tmp_path: Path) -> None:
    config = load_compare(config_file, [])
    config.public.valid = config.public.train
    with pytest.raises(FlexOlmoError, match="public: .* is in train and in valid: expected other documents in valid"):
        build_comparison(config)
    shutil.copy(config.public.train[0], tmp_path / "copy.jsonl")
    with pytest.raises(FlexOlmoError, match=r"public: \S*/copy.jsonl of valid is a copy of \S*/public.train.jsonl of"):
        planned(config_file, f"public.valid=[{tmp_path}/copy.jsonl]")
    with pytest.raises(FlexOlmoError, match="math: .*math.valid.jsonl is in proxy_public and in valid: expected other"):
        planned(config_file, f"proxy_public={config.owners['math'].valid}")
    with pytest.raises(FlexOlmoError, match=r"math.train.jsonl is named both as the owner's and as public"):
        planned(config_file, f"proxy_public={config.owners['math'].train}", "methods=[flexolmo]")
    with pytest.raises(FlexOlmoError, match=r"more or longer documents \(texts are cut at evaluation.max_bytes "
                                            r"= 100\), or evaluation.mixed=false"):
        planned(config_file, "evaluation.max_bytes=100")
    with pytest.raises(FlexOlmoError, match=r"public: \S*/public.valid.jsonl: 6 unusable documents \(6 missing text\), "
                                            r"first .*; expected text at text_key = 'nope' and at most 100 unusable"):
        planned(config_file, "text_key=nope")


def test_skipped_held_out_documents_are_counted(config_file: str, texts: Path, tmp_path: Path,
                                                capsys: pytest.CaptureFixture) -> None:
    lines = ['{"text": 5}', "garbage", '{"foo": "x"}', (texts / "math.valid.jsonl").read_text()]
    (tmp_path / "valid.jsonl").write_text("\n".join(lines))
    assert main(["compare", config_file, f"owners.math.valid=[{tmp_path}/valid.jsonl]", "--dry-run"]) == 0
    assert capsys.readouterr().err.startswith(
        "held-out text of math: skipped 3 unusable documents (1 broken JSON, 1 missing text, 1 text is not a string), ")
    (tmp_path / "valid.jsonl").write_text("\n".join([*lines, *["garbage"] * 98]))
    with pytest.raises(FlexOlmoError, match="math: .*: 101 unusable documents .* and at most 100 unusable documents"):
        planned(config_file, f"owners.math.valid=[{tmp_path}/valid.jsonl]", "evaluation.max_bytes=null")


@pytest.mark.parametrize(("override", "message"), [
    ("tokenizer=no/such", "cannot load the tokenizer 'no/such'"),
    ("model.vocab_size=256", "model.vocab_size = 256: expected at least 257, the ids of the tokenizer byte"),
    ("variants.x={embed.embedder: some/model}", "the embedder 'some/model' needs sentence-transformers; install it"),
])
def test_what_cannot_be_loaded_is_found_before_anything_runs(
        config_file: str, override: str, message: str, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["compare", config_file, override, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_proxies_that_would_come_out_the_same_are_kept(config_file: str) -> None:
    out = Path(config_file).parent / "out"
    for path, value in (("data/public/tokens.json", {"tokens": 100_000, "documents": 1000}),
                        ("proxies/math/step.json", {"options": {"tokens": 85}})):
        (out / path).parent.mkdir(parents=True)
        (out / path).write_text(json.dumps(value))
    for asked, recorded in ((1000, 85), (2000, 85), (2001, 2001)):  # at least those of twenty documents, 2000
        plan = planned(config_file, f"proxy_tokens={asked}", "methods=[flexolmo]").plan
        assert plan.steps["proxies/math"].options["tokens"] == recorded
        assert plan.steps["proxies/code"].options["tokens"] == asked
        assert [path.name for path in plan.steps["proxies/code"].files] == ["pool.jsonl"]
    assert [work.proxy_budget(tokens, out / "data" / "public" / "tokens") for tokens in (5, 5000, 10**6)] == [
        2000, 5000, 20_000]


def test_another_text_key_is_other_data(config_file: str) -> None:
    steps = planned(config_file).plan.steps
    assert all(steps[name].options["text_key"] == "text" for name in ("data/math", "seed_1/scores"))


def test_a_variant_named_like_a_kind_of_run_has_its_own_budget(config_file: str) -> None:
    comparison = planned(config_file, "variants.dense={expert.anchor_kl_coeff: 1.0}")
    assert comparison.flops["FlexOlmo, dense"] > comparison.flops["owner"] != comparison.flops["dense"]


def test_slurm_arrays_follow_the_levels(config_file: str, tmp_path: Path) -> None:
    comparison = planned(config_file, "slurm.partition=gpu", "slurm.time=02:00:00", "methods=[public,dense,flexolmo]")
    jobs = plan_arrays(comparison)
    assert [job.after for job in jobs] == [[], *([job.stage] for job in jobs[:-1])]
    second = jobs[2].text
    assert "#SBATCH --partition=gpu" in second and "#SBATCH --array=0-0" in second and "seed_1/anchor" in second
    experts = next(job.text for job in jobs if "seed_1/experts/math" in job.text)
    assert "#SBATCH --array=0-1\n" in experts
    assert 'train compare "$out/slurm/launch.yaml" --only "$step"' in experts
    for job in jobs:
        script = tmp_path / "job.sh"
        script.write_text(job.text)
        subprocess.run(["bash", "-n", str(script)], check=True)
    assert sum(job.text.count("\n    seed_1/") + job.text.count("\n    data/") + job.text.count("\n    proxies/")
               for job in jobs) == len(comparison.plan.steps) - 1  # and the report


def test_jobs_read_the_same_comparison_from_what_is_saved(config_file: str, tmp_path: Path) -> None:
    config = load_compare(config_file, ["variants.no noise={expert.routing_noise: 0}", "owner.optimizer.lr=1e-4"])
    save_config(config, tmp_path / "launch.yaml")
    first, second = build_comparison(config), build_comparison(load_compare(str(tmp_path / "launch.yaml")))
    assert [first.plan.digest(name) for name in first.plan.steps] == [
        second.plan.digest(name) for name in second.plan.steps]
