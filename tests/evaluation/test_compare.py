"""Real, tiny models with random weights, through the library and the command line."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flexolmo_megatron.cli import main
from flexolmo_megatron.config.card import PUBLIC, ExpertRecord, Kind, ModelCard
from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.convert.lazy import LazyModel, LazyTensor
from flexolmo_megatron.convert.model import save_model, select_experts
from flexolmo_megatron.convert.names import expected_tensors
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation import compare as compare_module
from flexolmo_megatron.evaluation.candidates import Candidate
from flexolmo_megatron.evaluation.compare import Options, compare
from flexolmo_megatron.evaluation.perplexity import evaluate_documents
from flexolmo_megatron.evaluation.routing import RoutingRecorder
from flexolmo_megatron.exchange.digest import model_digest
from flexolmo_megatron.inference.attribution import RoutingWeights
from flexolmo_megatron.inference.model import load_model

SIZES = ModelConfig(num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=2, num_query_groups=1,
                    vocab_size=257, max_position_embeddings=32)
TEXTS = {"prose": ["It was a dark night.", "Long " * 20, "Kurz, aber mit Ümläuten."],
         "math": ["1 + 1 = 2", "2 + 2 = 4"]}


def build(kind: Kind, names: list[str], top_k: int = 0, **card: str) -> LazyModel:
    config = replace(SIZES, num_experts=len(names), top_k=top_k)
    generator = torch.Generator().manual_seed(len(names))
    tensors = {}
    for name, shape in expected_tensors(config, kind).items():
        value = torch.randn(shape, generator=generator) * (1.0 if "gate.weight" in name else 0.3)
        tensors[name] = LazyTensor(value.dtype, shape, value.clone)
    return LazyModel(ModelCard(kind, config, [ExpertRecord(name) for name in names], **card), tensors)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, an anchor, its pair, a merged model and a reduced merged model, and text."""
    folder = tmp_path_factory.mktemp("runs")
    merged = build("moe", [PUBLIC, "code", "math"], top_k=2)
    anchor = build("moe", [PUBLIC], top_k=1)
    save_model(build("dense", []), folder / "dense", "hf")
    save_model(anchor, folder / "anchor", "hf")
    save_model(build("pair", [PUBLIC, "code"], top_k=2, anchor_digest=model_digest(anchor),
                     anchor_path=str(folder / "anchor")), folder / "pair", "megatron")
    save_model(merged, folder / "merged", "hf")
    save_model(select_experts(merged, ["code"]), folder / "without math", "hf")
    for domain, texts in TEXTS.items():
        (folder / f"{domain}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture
def domains(runs: Path) -> dict[str, list[str]]:
    return {domain: [str(runs / f"{domain}.jsonl")] for domain in TEXTS}


def test_bits_of_a_document_by_hand(runs: Path) -> None:
    model, text = load_model(runs / "merged"), TEXTS["math"][0]
    tokens = torch.tensor([[256, *text.encode()]])
    logprobs = model.logits(tokens[:, :-1])[0].log_softmax(dim=-1)
    expected = -logprobs.gather(1, tokens[0, 1:, None]).sum().item() / math.log(2)
    assert evaluate_documents(model, [text]).bits == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 90, 8192])
def test_batching_and_padding_change_no_result(runs: Path, batch_tokens: int) -> None:
    model = load_model(runs / "merged")
    alone = [evaluate_documents(model, [text], experts=[PUBLIC, "math"]) for text in TEXTS["prose"]]
    recorder = RoutingRecorder(model.module, model.expert_names)
    with recorder:
        together = evaluate_documents(model, TEXTS["prose"], experts=[PUBLIC, "math"], batch_tokens=batch_tokens,
                                      recorder=recorder)
    assert together.bits == pytest.approx(sum(score.bits for score in alone), rel=1e-5)
    assert recorder._first_LE.sum(dim=1).tolist() == [together.tokens] * SIZES.num_layers


def test_every_kind_of_model_with_all_and_some_experts(
        runs: Path, domains: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture) -> None:
    loaded = []
    monkeypatch.setattr(compare_module, "load_model", lambda path, *args, **options: (
        loaded.append(path), load_model(path, *args, **options))[1])
    candidates = [Candidate("merged", runs / "merged"), Candidate("dense", runs / "dense"),
                  Candidate("pair", runs / "pair"), Candidate("pair, public", runs / "pair", only=(PUBLIC,)),
                  Candidate("opted out", runs / "merged", without=("math",)),
                  Candidate("removed", runs / "without math"), Candidate("anchor", runs / "anchor")]
    results = compare(candidates, domains, Options(routing=True), "dense")

    assert loaded == [runs / name for name in ("merged", "dense", "pair", "without math", "anchor")]
    assert results.models == [candidate.name for candidate in candidates]
    numbers = results.bits_per_byte()
    assert all(0 < number < 100 for row in numbers.values() for number in row.values())
    assert numbers["opted out"] == pytest.approx(numbers["removed"], rel=1e-6)
    assert numbers["pair, public"] == pytest.approx(numbers["anchor"], rel=1e-5)
    assert abs(numbers["opted out"]["math"] - numbers["merged"]["math"]) > 1e-3
    assert abs(numbers["pair"]["math"] - numbers["anchor"]["math"]) > 1e-3
    assert results.setup["models"]["opted out"] == {"path": str(runs / "merged"), "experts": [PUBLIC, "code"]}
    assert results.setup["models"]["pair"]["experts"] == [PUBLIC, "code"]
    score = results.scores["merged"]["prose"]
    assert (score.documents, score.text_bytes) == (3, sum(len(text.encode()) for text in TEXTS["prose"]))

    assert list(results.routing) == [name for name in results.models if name != "dense"]
    for row in results.routing.values():
        for share in row.values():
            for layer in (*share.weight, *share.first_choice):
                assert len(layer) == len(share.experts) and sum(layer) == pytest.approx(1)
    assert results.routing["opted out"]["math"].experts == [PUBLIC, "code", "math"]
    assert [layer[2] for layer in results.routing["opted out"]["math"].weight] == [0, 0]
    assert "merged on prose: " in capsys.readouterr().err


def test_routing_share_against_single_documents(runs: Path) -> None:
    model, texts = load_model(runs / "merged"), TEXTS["math"]
    with RoutingRecorder(model.module, model.expert_names) as recorder:
        evaluate_documents(model, texts, recorder=recorder)
    weight, first, count = torch.zeros(3), torch.zeros(3), 0
    with RoutingWeights(model.module) as routing:
        for text in texts:
            model.logits(torch.tensor([[256, *text.encode()[:-1]]]))
            weight += routing.mean_over_layers().sum(dim=(0, 1))
            first += sum(shares.argmax(dim=-1).flatten().bincount(minlength=3) for shares in routing._layers) / 2
            count += len(text)
    share = recorder.share()
    assert torch.tensor(share.weight).mean(dim=0).tolist() == pytest.approx((weight / count).tolist(), abs=1e-5)
    assert torch.tensor(share.first_choice).mean(dim=0).tolist() == pytest.approx((first / count).tolist(), abs=1e-6)


@pytest.mark.parametrize(("candidates", "reference", "message"), [
    ([Candidate("a", Path("merged")), Candidate("b", Path("nowhere"))], None, "nowhere does not exist"),
    ([Candidate("a", Path("merged")), Candidate("a", Path("dense"))], None, "--model 'a' is given 2 times"),
    ([Candidate("a", Path("merged")), Candidate("b", Path("merged"), without=("law",))], None,
     "unknown expert 'law': expected one of public, code, math"),
    ([Candidate("a", Path("merged"))], "b", "--reference 'b' is none of the models: expected one of a"),
    ([], None, "nothing to evaluate"),
])
def test_bad_input_is_found_before_anything_is_loaded(
        runs: Path, domains: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, candidates: list[Candidate],
        reference: str | None, message: str) -> None:
    monkeypatch.setattr(compare_module, "load_model", None)
    with pytest.raises(FlexOlmoError, match=message):
        compare([replace(candidate, path=runs / candidate.path) for candidate in candidates], domains, None, reference)


def test_missing_and_broken_documents(runs: Path, tmp_path: Path) -> None:
    candidates = [Candidate("merged", runs / "merged")]
    with pytest.raises(FlexOlmoError, match="none.jsonl does not exist"):
        compare(candidates, {"math": [str(tmp_path / "none.jsonl")]})
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"txt": "lost"}\n')
    with pytest.raises(FlexOlmoError, match=r"merged on math: 1 unusable document .*a.jsonl:2 \(missing text\)"):
        compare(candidates, {"math": [str(tmp_path / "a.jsonl")]}, Options(max_bad=0))
    with pytest.raises(FlexOlmoError, match="merged on math: no document to evaluate"):
        compare(candidates, {"math": [str(tmp_path / "a.jsonl")]}, Options(text_key="other"))
    assert compare(candidates, {"math": [str(tmp_path / "a.jsonl")]}).scores["merged"]["math"].documents == 1


@pytest.mark.parametrize(("option", "message"), [({"max_bytes": 0}, "--max-bytes 0: expected at least 1"),
                                                 ({"batch_tokens": 0}, "--batch-tokens 0: expected at least 1"),
                                                 ({"max_bad": -1}, "--max-bad -1: expected at least 0")])
def test_impossible_options(option: dict[str, int], message: str) -> None:
    with pytest.raises(FlexOlmoError, match=message):
        Options(**option)


@pytest.fixture
def only_our_verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexolmo_megatron.cli.COMMANDS", ("evaluation",))


@pytest.mark.usefixtures("only_our_verbs")
def test_command_line(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["eval", "--model", f"public={runs / 'anchor'}", "--model", f"no math={runs / 'merged'}@-math",
                 "--domain", f"prose={runs / 'prose.jsonl'}", "--domain", f"math={runs / 'ma*.jsonl'}",
                 "--max-bytes", "50", "--batch-tokens", "64", "--routing", "--reference", "public",
                 "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "no math" in output and "change from public" in output
    for name in ("results.json", "results.csv", "results.md", "bits_per_byte.png", "routing_share.png"):
        assert str(tmp_path / "out" / name) in output
        assert (tmp_path / "out" / name).stat().st_size
    values = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {model: list(row) for model, row in values["bits_per_byte"].items()} == {
        "public": ["prose", "math"], "no math": ["prose", "math"]}
    assert values["text_bytes"]["public"] == {"prose": 50, "math": 18}
    assert values["setup"]["max_bytes"] == 50
    assert list(values["routing_share"]) == ["public", "no math"]

    assert main(arguments) == 2
    assert "already exists" in capsys.readouterr().err
    assert main([*arguments[:-1], str(tmp_path / "other"), "--model", f"x={runs / 'merged'}@law"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"flexolmo: --model x: {runs / 'merged'}: unknown expert 'law': expected one of public, code, math")
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("only_our_verbs")
def test_plot_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n')
    assert main(["plot", str(tmp_path), "--out", str(tmp_path / "a.png")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.png'}\n"
    assert (tmp_path / "a.png").stat().st_size
    assert main(["plot", str(tmp_path / "nowhere"), "--out", str(tmp_path / "b.png")]) == 2
    assert "expected the folder of a training run" in capsys.readouterr().err
