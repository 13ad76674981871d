"""``flexolmo.json``: what is written is read again; what a stranger may write into it is refused in one sentence."""

import json
import os
from dataclasses import replace

import pytest

from flexolmo_megatron.config.card import CARD_FILE, MAX_CARD_BYTES, PUBLIC, ExpertRecord, ModelCard, check_expert_name
from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.errors import FlexOlmoError

SIZES = ModelConfig(num_experts=3, top_k=2)
CARD = ModelCard(
    "moe", SIZES,
    [ExpertRecord(PUBLIC, router={"embedder": "anchor@0a1b", "documents": 1000}),
     ExpertRecord("math", "ab" * 32, "Größe\n", "MIT", "a@b.c", {"embedder": "GritLM-7B", "documents": 7}),
     ExpertRecord("code-2.x_y")],
    {"type": "huggingface", "path": "allenai/OLMo-2"}, "cd" * 32, "/anchor", "bfloat16",
    {"tokens": 4, "dp": {"x": []}}, 2,
)


def changed(values, path: str, value):
    """``values`` with the entry at the dotted ``path`` replaced, or deleted for ``...``."""
    values = json.loads(json.dumps(values))
    *outer, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    inner = values
    for key in outer:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return values


@pytest.fixture
def values(tmp_path):
    CARD.save(tmp_path)
    return json.loads((tmp_path / CARD_FILE).read_text())


@pytest.mark.parametrize("card", [
    CARD,
    ModelCard("dense", ModelConfig()),
    ModelCard("pair", replace(SIZES, num_experts=2), [ExpertRecord(PUBLIC), ExpertRecord("a")]),
    ModelCard("moe", replace(SIZES, num_experts=1, top_k=1), [ExpertRecord(PUBLIC)]),
], ids=["merged", "dense", "pair", "anchor"])
def test_what_is_written_is_read(tmp_path, card):
    card.save(tmp_path)
    assert ModelCard.load(tmp_path) == card


def test_only_kind_model_and_version_are_needed(tmp_path):
    (tmp_path / CARD_FILE).write_text('{"format_version": 1, "kind": "dense", "model": {"num_layers": 7}}')
    assert ModelCard.load(tmp_path) == ModelCard("dense", ModelConfig(num_layers=7))


BAD = {
    "format_version": [(2, "format_version 2: expected 1"), (True, "format_version True"), ("1", "format_version '1'"),
                       (..., "format_version None: expected 1")],
    "kind": [("mo", "kind = 'mo': expected one of dense, moe, pair"), (["moe"], "kind ="), (..., "'kind' is missing"),
             ("dense", "a dense model with model.num_experts = 3"),
             ("pair", "model.num_experts = 3, model.top_k = 2: expected 2 and 2 for a model of kind 'pair'")],
    "expert": [([], "unknown field 'expert' (did you mean 'experts'?)")],
    "model": [([], "model = []: expected a JSON object"), (..., "field 'model' is missing"), (None, "model = None")],
    "model.num_layers": [("4", "model field num_layers = '4': expected int"), (0, "model.num_layers = 0"),
                         (True, "num_layers = True: expected int"), (10**400, "from 0 to 2147483648"),
                         (-1, "model.num_layers = -1")],
    "model.num_layer": [(4, "unknown model field 'num_layer' (did you mean 'num_layers'?)")],
    "model.top_k": [(4, "model.top_k = 4: expected 1 to model.num_experts = 3")],
    "model.num_experts": [(2, "3 expert names for model.num_experts = 2"), (0, "model.top_k, model.router_bias and")],
    "model.rotary_base": [(0, "model.rotary_base = 0: expected a number above 0"), (-5.5, "model.rotary_base = -5.5"),
                          (1e300, "model.rotary_base = 1e+300: expected a number from 0 to")],
    "model.layernorm_epsilon": [(0.0, "model.layernorm_epsilon = 0.0: expected a number above 0")],
    "experts": [({}, "experts = {}: expected a list"), (None, "experts = None"), ("public", "experts = 'public'"),
                (..., "0 expert names for model.num_experts = 3: expected one each")],
    "experts.1": [("math", "experts[1] = 'math': expected a JSON object")],
    "experts.0.name": [("anchor", "experts[0].name = 'anchor': expected 'public', the anchor's own expert"),
                       ("Public", "experts[0].name"), (..., "field 'experts[0].name' is missing")],
    "experts.1.name": [("../x", "experts[1]: expert name '../x': expected 1 to 64 of"),
                       (7, "experts[1]: expert name 7"),
                       ("a,b", "experts[1]: expert name 'a,b'"), ("\x1b[2J", "experts[1]: expert name '\\x1b[2J'"),
                       ("public", "experts[1]: expert name 'public' is reserved"), ("PUBLIC", "is reserved for"),
                       ("CODE-2.X_y", "expert name 'code-2.x_y' appears twice"), ("", "expert name ''"),
                       ("x" * 10_000, "experts[1]: expert name 'xxxxx")],
    "experts.1.names": [("a", "unknown field 'experts[1].names' (did you mean 'name'?)")],
    "experts.1.owner": [("\x1b[2J", "experts[1].owner holds the control character '\\x1b'"),
                        (None, "experts[1].owner ="),
                        ("x" * 5000, "experts[1].owner has 5000 characters: expected at most 4096")],
    "experts.2.licence": [(["MIT"], "experts[2].licence = ['MIT']: expected text")],
    "experts.2.contact": [(1, "experts[2].contact = 1: expected text")],
    "experts.1.package_sha256": [("AB" * 32, "experts[1].package_sha256 = 'ABAB"),
                                 (0, "package_sha256 = 0: expected 64")],
    "experts.1.router": [("anchor", "experts[1].router: expected a JSON object, got 'anchor'"),
                         (None, "router: expected")],
    "experts.1.router.embedder": [(3, "experts[1].router.embedder = 3: expected text")],
    "experts.1.router.documents": [(-1, "experts[1].router.documents = -1: expected a whole number"),
                                   (1.5, "router.documents = 1.5"), (True, "router.documents = True")],
    "experts.1.router.text": [("private", "unknown experts[1].router field 'text'")],
    "tokenizer": [("byte", "tokenizer = 'byte': expected {'type': 'byte'}, or 'huggingface' and a 'path'"),
                  ({"type": "bytes"}, "tokenizer = {'type': 'bytes'}"), ({}, "tokenizer = {}"),
                  (None, "tokenizer = None"),
                  ({"type": "huggingface"}, "expected {'type': 'byte'}, or 'huggingface' and a 'path'"),
                  ({"type": "byte", "path": "x"}, "tokenizer = {'type'")],
    "tokenizer.path": [(5, "tokenizer.path = 5: expected text"),
                       ("a\0b", "tokenizer.path holds the control character")],
    "anchor_digest": [("abc", "anchor_digest = 'abc': expected 64 lower-case hexadecimal digits"),
                      (1, "anchor_digest = 1")],
    "anchor_path": [(3, "anchor_path = 3: expected text"), ("a\nb\0", "anchor_path holds the control character")],
    "anchor_dtype": [("load", "anchor_dtype = 'load': expected one of bfloat16, float16, float32"),
                     ("int8", "anchor_dtype = 'int8'"), ({}, "anchor_dtype = {}")],
    "training": [([], "training = []: expected a JSON object"), (None, "training = None")],
    "chosen_top_k": [(0, "chosen_top_k = 0: expected a whole number from 1"), ("4", "chosen_top_k = '4'")],
}


@pytest.mark.parametrize(("path", "value", "message"), [(path, *case) for path, cases in BAD.items() for case in cases])
def test_impossible_values_are_refused_in_one_sentence(tmp_path, values, path, value, message):
    (tmp_path / CARD_FILE).write_text(json.dumps(changed(values, path, value)))
    with pytest.raises(FlexOlmoError) as error:
        ModelCard.load(tmp_path)
    text = str(error.value)
    assert text.startswith(f"{tmp_path / CARD_FILE}: ") and message in text
    assert "\n" not in text and len(text) - len(str(tmp_path)) < 300


@pytest.mark.parametrize(("text", "message"), [
    (b"", "not valid JSON"), (b"[1]", "expected a JSON object, got [1]"), (b"\xff", "not valid JSON"),
    (b'{"kind": "moe", "kind": "pair"}', "key 'kind' appears twice"), (b'{"kind": NaN}', "NaN is not a JSON number"),
    (b"[" * 100_000, "JSON nested too deeply"), (b" " * (MAX_CARD_BYTES + 1), f"is larger than {MAX_CARD_BYTES} bytes"),
])
def test_no_card_at_all(tmp_path, text, message):
    (tmp_path / CARD_FILE).write_bytes(text)
    with pytest.raises(FlexOlmoError) as error:
        ModelCard.load(tmp_path)
    assert message in str(error.value)


def test_missing_and_special_files(tmp_path):
    with pytest.raises(FlexOlmoError, match="flexolmo.json does not exist; expected the card of a FlexOlmo checkpoint"):
        ModelCard.load(tmp_path)
    os.mkfifo(tmp_path / CARD_FILE)  # opening it would wait for ever
    with pytest.raises(FlexOlmoError, match="flexolmo.json is no regular file; expected the card of a FlexOlmo"):
        ModelCard.load(tmp_path)


def test_expert_names():
    for name in ("a", "A1", "math-v2.1_x", "x" * 64):
        check_expert_name(name)
    for name in ("", ".a", "-a", "a..b", "a b", "a/b", "é", "x" * 65, None, "public", "pUBLIC"):
        with pytest.raises(FlexOlmoError, match="expert name"):
            check_expert_name(name)
