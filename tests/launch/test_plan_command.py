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
    assert [row[0] for row in rows] == ["1", "2", "3"] and {len(row) for row in rows} == {20}
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
