import json

import pytest

from flexolmo_megatron.config.card import check_expert_name
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.exchange.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest
from flexolmo_megatron.untrusted import printable

GOOD = {
    "format_version": 1, "name": "math", "anchor_digest": "a" * 64, "sha256": "b" * 64,
    "architecture": {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 12, "dtype": "BF16"},
    "owner": "Größe & Söhne\n[red]", "licence": "", "contact": "",
    "router": {"embedder": "anchor", "documents": 1000},
    "training": {"tokens": 4096, "steps": 8, "lr": 9e-4, "seed": 1, "dp": {"epsilon": 8, "delta": 1e-6}},
}


def parse(values) -> Manifest:
    return parse_manifest(values if isinstance(values, bytes) else json.dumps(values).encode(), "m.json")


def changed(**changes):
    return {key: value for key, value in {**GOOD, **changes}.items() if value is not ...}


def test_round_trip():
    manifest = parse(GOOD)
    assert manifest.to_json() == GOOD
    assert manifest.owner == "Größe & Söhne\n[red]"


def arch(**changes):
    return changed(architecture={**GOOD["architecture"], **changes})


@pytest.mark.parametrize(("values", "message"), [
    (changed(format_version=2), "format_version = 2: this program reads version 1"),
    (changed(format_version=True), "format_version = True: this"),
    (changed(format_version=...), "format_version = None: this"),
    (changed(onwer="x"), r"unknown manifest field 'onwer' \(did you mean 'owner'\?\)"),
    (changed(licence=...), "manifest field 'licence' is missing"),
    (arch(hiden_size=1), r"unknown architecture field 'hiden_size' \(did you mean 'hidden_size'\?\)"),
    (arch(num_layers=0), "architecture.num_layers = 0: expected a whole number from 1"),
    (arch(num_layers=True), "architecture.num_layers = True: expected a whole number"),
    (arch(hidden_size=8.0), "architecture.hidden_size = 8.0: expected a whole number"),
    (arch(hidden_size=10**400), "architecture.hidden_size = 1000.*: expected a whole number"),
    (arch(num_query_groups=0), "architecture.num_query_groups = 0: expected a whole number from 1"),
    (arch(rotary_base="5"), "architecture.rotary_base = '5': expected a number"),
    (arch(router_window=None), "architecture.router_window = None: expected a whole number"),
    (arch(dtype="I8"), "architecture.dtype = 'I8': expected one of BF16, F16, F32"),
    (arch(dtype=["BF16"]), "architecture.dtype = "),
    (changed(architecture=[]), r"architecture: expected a JSON object, got \[\]"),
    (changed(anchor_digest="A" * 64), "anchor_digest = 'AAA.*expected 64 lower-case hexadecimal digits"),
    (changed(sha256="b" * 63), "sha256 = 'bbb"),
    (changed(sha256=None), "sha256 = None"),
    (changed(owner=1), "owner = 1: expected text"),
    (changed(owner="x" * 5000), "owner has 5000 characters: expected at most 4096"),
    (changed(contact="a\x1b[31m"), r"contact holds the control character '\\x1b'"),
    (changed(licence="\ud800"), r"licence holds the control character '\\ud800'"),
    (changed(router={"embeder": "x"}), r"unknown router field 'embeder' \(did you mean 'embedder'\?\)"),
    (changed(router={"documents": -1}), "router.documents = -1: expected a whole number from 0"),
    (changed(router=None), "router: expected a JSON object, got None"),
    (changed(training={"text": "private"}), "unknown training field 'text'"),
    (changed(training={"lr": "1"}), "training.lr = '1': expected a number"),
    (changed(training={"dp": 1}), "training.dp: expected a JSON object, got 1"),
    (changed(training={"dp": {"epsilon": "x"}}), "training.dp.epsilon = 'x': expected a number"),
    ([], "expected a JSON object, got list"),
    (b"", "not valid JSON"),
    (b"\xff\xfe", "not valid JSON"),
    (b'{"name": "a", "name": "b"}', "key 'name' appears twice"),
    (b'{"a": {"b": 1, "b": 2}}', "key 'b' appears twice"),
    (b'{"a": NaN}', "NaN is not a JSON number"),
    (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
    (json.dumps(changed(training={"lr": 1.5})).replace("1.5", "1e999").encode(),
     "training.lr = inf: expected a number"),
    (b"[" * 60_000, "JSON nested too deeply"),
    (b"1" * 5000, "not valid JSON|expected a JSON object"),
    (b" " * (MAX_MANIFEST_BYTES + 1), "larger than 65536 bytes"),
])
def test_refuses(values, message):
    with pytest.raises(FlexOlmoError, match=f"^m.json: .*{message}") as caught:
        parse(values)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 and str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["", "a" * 65, "a/b", "a\\b", "..", "a..b", ".a", "-a", "a b", "a,b", "a\n", "ä",
                                  "a\0", 1, None])
def test_refuses_names(name):
    with pytest.raises(FlexOlmoError, match="expected 1 to 64 of A-Z"):
        check_expert_name(name)


@pytest.mark.parametrize("name", ["public", "PUBLIC"])
def test_refuses_the_reserved_name(name):
    with pytest.raises(FlexOlmoError, match="reserved for the anchor's own expert"):
        check_expert_name(name)


@pytest.mark.parametrize("name", ["a", "math-v1.2_x", "7b", "a" * 64])
def test_accepts_names(name):
    check_expert_name(name)


def test_printable_escapes_what_could_steer_a_terminal():
    assert printable("Söhne 1\x1b[2J\u202e\n") == "Söhne 1\\x1b[2J\\u202e\\n"
