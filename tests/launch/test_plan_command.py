"""``flexolmo plan`` on the command line."""

import json

import pytest

from flexolmo_megatron.cli import main

PLAN = ["plan", "--preset", "37b", "--gpus", "64", "--gpu-memory", "80"]


def test_table(capsys):
    assert main([*PLAN, "--top", "3", "--explain"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("moe run, 64 GPUs with 72 GB free, 4,194,304 tokens per step")
    lines = out.splitlines()
    assert max(len(line) for line in lines if not line.startswith(("options of", "Explained"))) <= 120
    rows = [line.split() for line in lines if line.startswith("  ") and line.split()[:1] in (["1"], ["2"], ["3"])]
    assert [row[0] for row in rows] == ["1", "2", "3"] and {len(row) for row in rows} == {19}
    texts = ("are estimates at 40 % of 989 TFLOP/s, not", "EP all-to-all of tokens", "options of layout 1: parallel.",
             "  bubble        ", "  days          ")  # fmt: skip
    assert [text for text in texts if text not in " ".join([out, *out.split()])] == []


def test_json_and_picture(capsys, tmp_path):
    picture = tmp_path / "plan.png"
    options = ["--json", "--top", "2", "--plot", str(picture), "--tokens", "5", "--mode", "router"]
    assert main([*PLAN, *options, "global_batch_size=512"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["mode"], record["tokens"], record["memory_limit_bytes"]) == ("router", 5e9, 72e9)
    assert record["fitting"] >= len(record["layouts"]) == 2
    best = record["layouts"][0]
    seconds = best["estimated"]
    assert seconds["days"] == pytest.approx(5e9 / (512 * 4096) * seconds["step_seconds"] / 86400)
    stage = best["stages"][0]
    parts = ("weight_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes", "passing_bytes")
    assert stage["total_bytes"] == sum(stage[part] for part in parts) <= 72e9
    assert stage["trained_parameters"] <= 32 * 8 * 4096
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_given_cluster_counts(capsys):
    def step(*options: str) -> float:
        assert main(["plan", "--preset", "7b-pair", "--gpus", "64", "--json", "--top", "1", *options]) == 0
        return json.loads(capsys.readouterr().out)["layouts"][0]["estimated"]["step_seconds"]

    usual = step()
    assert step("--share", "0.2") > 1.8 * usual
    assert step("--peak-tflops", "100") > 5 * usual
    assert step("--inter-bandwidth", "0.1") > usual
    assert step("--gpu", "b200") < usual


def test_given_options_are_kept(capsys, tmp_path):
    def layouts(*options: str) -> list[dict]:
        assert main(["plan", "--preset", "7b-pair", "--gpus", "64", "--json", "--gpu-memory", "400", *options]) == 0
        return json.loads(capsys.readouterr().out)["layouts"]

    assert len({layout["tensor"] for layout in layouts()}) > 1  # the preset's is a start
    path = tmp_path / "run.yaml"
    path.write_text("parallel: {tensor: 2, pipeline: 4, virtual_pipeline: 2, sequence: true}\n"
                    "micro_batch_size: 16\noptimizer: {use_distributed_optimizer: false}\n")
    [only] = layouts("--config", str(path), "parallel.context=1")
    names = ("tensor", "pipeline", "virtual_pipeline", "context", "micro_batch_size", "use_distributed_optimizer")
    assert [only[name] for name in names] == [2, 4, 2, 1, 16, False]
    [shared] = layouts("--config", str(path), "parallel.context=1", "optimizer.use_distributed_optimizer=true")
    assert shared["stages"][0]["optimizer_bytes"] < only["stages"][0]["optimizer_bytes"] / 4
    assert {layout["tensor"] for layout in layouts("parallel.tensor=4")} == {4}
    assert {layout["tensor"] for layout in layouts("parallel.sequence=false")} == {1}
    assert main(["plan", "--preset", "7b-pair", "--gpus", "64", "parallel.tensor=4", "--explain"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Given, not chosen: tensor = 4. Leave such options out" in out
    assert "(activations of Transformer Engine from its source, not measured)" in out
    assert "from their source and was not measured, unlike that of the local ones" in out


def test_router_tuning_is_the_papers_five_billion_tokens_unless_steps_are_given(capsys):
    for options, tokens in (([], 5e9), (["train_iters=10"], 10 * 1024 * 4096), (["--tokens", "2"], 2e9)):
        assert main([*PLAN, "--mode", "router", "--json", "--top", "1", *options]) == 0
        assert json.loads(capsys.readouterr().out)["tokens"] == tokens


def test_small_models_have_small_units(capsys):
    assert main(["plan", "--preset", "tiny", "--gpus", "1", "--peak-tflops", "60", "--mode", "anchor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    units = next(line.split() for line in lines if "batch" in line)
    row = next(line.split() for line in lines if line.split()[:1] == ["1"])
    assert units.count("MB") == 6 and "GB" not in units
    assert len(row) == 19 and all(float(value) > 0 for value in (*row[9:14], *row[-3:-2]))


def test_inference(capsys):
    assert main(["plan", "--preset", "37b", "--gpus", "8", "--mode", "inference", "--explain"]) == 0
    out = capsys.readouterr().out
    assert "inference, 8 GPUs with 72 GB free, sequences of 4,096 tokens" in out
    assert "estimates, not measurements" in " ".join(out.split())
    assert max(len(line) for line in out.splitlines()) <= 120


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "0"], "--gpus 0: expected at least 1"),
        (["--gpus", "8", "--gpu-memory", "inf"], "--gpu-memory inf: expected a finite number of GB above 0"),
        (["--gpus", "8", "bf16=false"], "bf16 = false: the GPU's peak is bfloat16's, and fp32 is slower"),
        (["--gpus", "8", "parallel.tensor=3"], "the given layout cannot run on 8 GPUs: parallel.tensor = 3 times"),
        (["--gpus", "8", "parallel.pipeline=0"], "parallel.pipeline = 0: expected at least 1"),
        (["--gpus", "8", "micro_batch_size=0"], "micro_batch_size = 0: expected at least 1"),
        (["--gpus", "8", "micro_batch_size=3"], "cannot run on 8 GPUs: global_batch_size = 1024 is no multiple"),
        (["--gpus", "8", "parallel={tensor: 2, sequence: false}"], "parallel.sequence = false with parallel.tensor"),
        (["--gpus", "8", "--backend", "local", "parallel.context=2"], "parallel.context = 2 with --backend local"),
        (["--gpus", "8", "--share", "1.5"], "--share 1.5: expected a number above 0 and at most 1"),
        (["--gpus", "8", "--reserve", "80"], "--reserve 80 GB: expected 0 to below the GPU's 80 GB"),
        (["--gpus", "8", "--intra-bandwidth", "0"], "--intra-bandwidth 0: expected a number above 0"),
        (["--gpus", "8", "--tokens", "-1"], "--tokens -1: expected a number of 1e9 tokens above 0"),
        (["--gpus", "8", "data.seq_length=8192"], "data.seq_length = 8192: expected 1 to "
         "model.max_position_embeddings = 4096"),
        (["--gpus", "8", "global_batch_size=0"], "global_batch_size = 0: expected at least 1"),
        (["--gpus", "8", "fp8.recipe=delayed"], "fp8.recipe = delayed: the plan counts bf16 and fp32 only"),
        (["--gpus", "8", "--mode", "moe"], "model.num_experts = 0: expected 2 or more for --mode moe"),
        (["--gpus", "8", "--mode", "inference", "--plot", "x.png"], "--plot: there is no picture"),
        (["--gpus", "1", "--gpu-memory", "20"], "no layout of 1 GPUs fits: the smallest"),
        (["--gpus", "8", "--plot", "/no/such/folder/x.png"], "/no/such/folder"),
    ],
)  # fmt: skip
def test_bad_input(capsys, options, message):
    assert main(["plan", "--preset", "7b-pair", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("flexolmo: ") and message in error and error.count("\n") == 1
