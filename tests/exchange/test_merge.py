import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch

from flexolmo_megatron.convert.model import open_model, save_model, total_bytes, watch
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.exchange.digest import model_digest
from flexolmo_megatron.exchange.merge import merge, remove, write_merged
from flexolmo_megatron.exchange.package import open_package
from flexolmo_megatron.exchange.verify import AnchorReference, verify


@pytest.fixture
def verified(make_package, anchor, digest):
    """``verified(name, ...)``: a new package that was verified."""
    reference = AnchorReference.of(anchor, digest)
    return lambda name, *args, **options: verify(make_package(name, *args, **options), reference)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def assert_same(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a.reshape(-1)), bits(b.reshape(-1)))


def test_concatenates_experts_and_rows(anchor, digest, verified, new_pair):
    merged = merge(anchor, [verified("math", 1), verified("code", 2)])
    assert merged.card.expert_names == ["public", "math", "code"]
    assert merged.card.anchor_digest == digest
    assert (merged.card.model.num_experts, merged.card.model.top_k, merged.card.model.router_bias) == (3, 3, False)
    pairs = [new_pair(1, digest), new_pair(2, digest)]
    for name, tensor in merged.tensors.items():
        if name.endswith("mlp.gate.weight"):
            assert_same(tensor.read(), torch.cat([model.tensors[name].read() for model in [anchor, *pairs]]))
        elif ".experts.1." in name or ".experts.2." in name:
            number = int(name.split(".experts.")[1][0])
            source = name.replace(f".experts.{number}.", ".experts.1.")
            assert_same(tensor.read(), pairs[number - 1].tensors[source].read())
        else:
            assert_same(tensor.read(), anchor.tensors[name].read())


def test_records_where_each_expert_came_from(anchor, verified):
    package = verified("math")
    record = merge(anchor, [package]).card.experts[1]
    assert record.package_sha256 == hashlib.sha256((package.path / "expert.safetensors").read_bytes()).hexdigest()
    assert (record.owner, record.licence, record.contact) == ("An owner", "CC-BY-4.0", "a@b.c")
    assert record.router == {"embedder": "anchor", "documents": 1000}


def test_bias_is_zero_where_a_package_has_none(anchor, verified, new_pair, digest):
    merged = merge(anchor, [verified("a", 1), verified("b", 2, bias=True)])
    assert merged.card.model.router_bias
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.gate.bias"
        bias = merged.tensors[name].read()
        assert bias.dtype == torch.float32
        assert_same(bias, torch.cat([torch.zeros(2), new_pair(2, digest, bias=True).tensors[name].read()]))


def test_smaller_ffn_is_padded_and_computes_the_same(anchor, verified):
    package = verified("small", ffn=8)
    merged = merge(anchor, [package])
    gate, up, down = (merged.tensors[f"model.layers.0.mlp.experts.1.{kind}_proj.weight"].read().double()
                      for kind in ("gate", "up", "down"))
    assert gate.shape == up.shape == (12, 8) and down.shape == (8, 12)
    assert not gate[8:].any() and not up[8:].any() and not down[:, 8:].any()
    x = torch.randn(5, 8, dtype=torch.float64)
    small = [package.tensors[f"layers.0.{kind}_proj"].read().double() for kind in ("gate", "up", "down")]
    assert torch.equal(gate[:8], small[0]) and torch.equal(up[:8], small[1]) and torch.equal(down[:, :8], small[2])
    torch.testing.assert_close((torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T,
                               (torch.nn.functional.silu(x @ small[0].T) * (x @ small[1].T)) @ small[2].T,
                               rtol=1e-14, atol=1e-14)  # only the order of the additions may differ


@pytest.mark.parametrize(("count", "top_k", "expected"), [(1, None, 2), (3, None, 4), (5, None, 4), (5, 2, 2),
                                                          (5, 6, 6)])
def test_top_k(anchor, verified, count, top_k, expected):
    packages = [verified(f"e{number}", number) for number in range(count)]
    assert merge(anchor, packages, top_k=top_k).card.model.top_k == expected


def test_impossible_top_k(anchor, verified):
    with pytest.raises(FlexOlmoError, match="model.top_k = 3: expected 1 to model.num_experts = 2"):
        merge(anchor, [verified("a")], top_k=3)


def test_adding_later_is_merging_at_once(anchor, verified):
    a, b = verified("a", 1), verified("b", 2, bias=True)
    at_once, later = merge(anchor, [a, b]), merge(merge(anchor, [a]), [b])
    assert later.card == at_once.card
    assert model_digest(later) == model_digest(at_once)


def test_adding_keeps_a_chosen_top_k(anchor, verified):
    chosen = merge(anchor, [verified("a"), verified("b")], top_k=1)
    assert merge(chosen, [verified("c")]).card.model.top_k == 1


def test_a_chosen_top_k_outlives_removing_and_adding_again(anchor, verified, tmp_path):
    a, b, c, d, e = (verified(name, number) for number, name in enumerate("abcde"))
    many = merge(anchor, [a, b, c, d, e], top_k=5)
    few = remove(many, ["a", "b", "c", "d"])
    assert (few.card.model.num_experts, few.card.model.top_k) == (2, 2)
    save_model(few, tmp_path / "few", format="hf")
    assert merge(open_model(tmp_path / "few"), [a, b, c, d]).card.model.top_k == 5
    assert merge(few, [a]).card.model.top_k == 3
    assert merge(few, [a, b, c, d], top_k=4).card.chosen_top_k == 4
    # 2 active of 6, and of the 2 that are left: the same number as by default, but chosen
    two = remove(merge(anchor, [a, b, c, d, e], top_k=2), ["a", "b", "c", "d"])
    assert two.card.model.top_k == 2 and merge(two, [a, b, c]).card.model.top_k == 2
    # nobody chose
    rest = remove(merge(anchor, [a, b, c, d, e]), ["a", "b", "c"])
    assert rest.card.model.top_k == 3 and merge(rest, [a, b]).card.model.top_k == 4


def test_top_k_of_a_model_merged_elsewhere_counts_as_chosen(anchor, verified):
    merged = merge(anchor, [verified(name, number) for number, name in enumerate("abc")], top_k=2)
    elsewhere = replace(merged, card=replace(merged.card, chosen_top_k=None))
    d = verified("d", 4)
    assert merge(elsewhere, [d]).card.model.top_k == 2
    assert merge(remove(elsewhere, ["a", "b", "c"]), [d]).card.model.top_k == 2


def test_removing_is_never_having_merged(anchor, verified):
    a, b, c = verified("a", 1), verified("b", 2, bias=True), verified("c", 3)
    rest = remove(merge(anchor, [a, b, c]), ["b"])
    assert rest.card == merge(anchor, [a, c]).card  # b's bias is gone with it
    assert model_digest(rest) == model_digest(merge(anchor, [a, c]))
    assert model_digest(remove(merge(anchor, [b, a]), ["a"])) == model_digest(merge(anchor, [b]))
    assert model_digest(remove(merge(anchor, [a]), ["a"])) == model_digest(anchor)


@pytest.mark.parametrize(("name", "message"), [
    ("public", "expert 'public' cannot be excluded"),
    ("mth", r"unknown expert 'mth' \(did you mean 'math'\?\): expected one of public, math"),
])
def test_remove_refuses(anchor, verified, name, message):
    with pytest.raises(FlexOlmoError, match=message):
        remove(merge(anchor, [verified("math")]), [name])


def test_names_must_be_unique(anchor, verified, make_package, new_pair, digest, tmp_path):
    from flexolmo_megatron.exchange.package import pack
    a = verified("math")
    pack(new_pair(2, digest), None, tmp_path / "other", name="Math")
    b = verify(tmp_path / "other", anchor)
    with pytest.raises(FlexOlmoError, match="expert name 'Math' appears twice"):
        merge(anchor, [a, b])
    with pytest.raises(FlexOlmoError, match="expert name 'math' appears twice"):
        merge(merge(anchor, [a]), [a])


def test_packages_of_another_anchor(anchor, new_anchor, new_pair, verified, tmp_path):
    from flexolmo_megatron.exchange.package import pack
    other = new_anchor(seed=5)
    pack(new_pair(2, model_digest(other)), None, tmp_path / "theirs", name="theirs")
    with pytest.raises(FlexOlmoError, match=r"theirs was trained against anchor \w+, but package \S* belongs to "):
        merge(anchor, [verified("a"), verify(tmp_path / "theirs", other)])
    with pytest.raises(FlexOlmoError, match="but the given model belongs to"):
        merge(merge(anchor, [verified("b")]), [verify(tmp_path / "theirs", other)])


def test_what_a_package_was_verified_against_is_not_relied_on(anchor, new_anchor, make_package, digest):
    other = new_anchor(seed=5)
    package = verify(make_package("a"), AnchorReference.of(other, digest))  # another anchor with a false digest
    with pytest.raises(FlexOlmoError, match=f"package_a was trained against anchor {digest}, but this anchor is "
                                            f"{model_digest(other)}"):
        merge(other, [package])
    liar = replace(other, card=replace(other.card, anchor_digest=digest))
    with pytest.raises(FlexOlmoError, match=f"but this anchor is {model_digest(other)}"):
        merge(liar, [package])
    merged = merge(anchor, [verify(make_package("b", 2), anchor)])
    tampered = {**merged.tensors, "lm_head.weight": other.tensors["lm_head.weight"]}
    with pytest.raises(FlexOlmoError, match="package_a was trained against anchor .* but this anchor is "):
        merge(replace(merged, tensors=tampered), [package])


def test_the_anchor_is_read_once(anchor, verified):
    counts = []
    packages = [verified("a", 1), verified("b", 2)]
    merge(watch(anchor, counts.append), packages)
    assert sum(counts) == total_bytes(anchor)


def test_takes_only_what_was_verified(anchor, make_package):
    with pytest.raises(TypeError, match="from verify"):
        merge(anchor, [open_package(make_package("a"))])


@pytest.mark.parametrize("format", ["hf", "megatron"])
def test_write_merged(anchor, verified, tmp_path, format):
    packages = [verified("a", 1, ffn=8), verified("b", 2)]
    counts = []
    report = write_merged(anchor, [package.path for package in packages], tmp_path / "out", format=format,
                          progress=lambda total: contextlib.nullcontext(counts.append))
    expected, written = merge(anchor, packages), open_model(tmp_path / "out")
    assert written.card.experts == expected.card.experts and written.card.anchor_digest == expected.card.anchor_digest
    assert model_digest(written) == model_digest(expected)
    assert report.num_bytes == sum(counts) == total_bytes(expected)
    again = write_merged(written, [verified("c", 3).path], tmp_path / "more", format=format)
    assert again.card.expert_names == ["public", "a", "b", "c"]
    for name, tensor in expected.tensors.items():
        if "mlp.gate" not in name:
            assert_same(open_model(tmp_path / "more").tensors[name].read(), tensor.read())


def test_bias_needs_a_format_that_holds_it(anchor, make_package, tmp_path, raw_package):
    raw = raw_package(make_package("a", bias=True))
    start, end = raw.header["layers.1.bias"]["data_offsets"]
    raw.data[start:end] = torch.tensor(0.5).numpy().tobytes()
    path = raw.write(tmp_path / "positive")
    with pytest.raises(FlexOlmoError, match="learned router bias.*--drop-bias"):
        write_merged(anchor, [path], tmp_path / "out", format="hf")
    report = write_merged(anchor, [path], tmp_path / "out", format="hf", drop_bias=True)
    assert report.positive_bias_layers == {"a": [1]}
    assert not any(name.endswith("gate.bias") for name in open_model(tmp_path / "out").tensors)


def test_wrong_anchor_is_noticed_although_its_digest_comes_late(make_package, new_anchor, tmp_path):
    with pytest.raises(FlexOlmoError, match="was trained against anchor [0-9a-f]+, but this anchor is [0-9a-f]{64}$"):
        write_merged(new_anchor(seed=5), [make_package("a")], tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("format", ["hf", "megatron"])
def test_nothing_is_left_when_contents_are_refused_after_they_were_written(anchor, make_package, raw_package, tmp_path,
                                                                           format):
    raw = raw_package(make_package("bad"))
    raw.data[-2:] = b"\xc0\x7f"
    (tmp_path / "new").mkdir()
    with pytest.raises(FlexOlmoError, match="tensor layers.1.down_proj holds NaN"):
        write_merged(anchor, [make_package("good"), raw.write(tmp_path / "nan")], tmp_path / "new" / "out",
                     format=format)
    assert not list((tmp_path / "new").iterdir())


def test_existing_results_are_not_touched(anchor, make_package, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(FlexOlmoError, match="out already exists"):
        write_merged(anchor, [make_package("a")], tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "x"


def test_a_change_while_merging_is_noticed(anchor, make_package, tmp_path):
    path = make_package("a")

    def overwrite(_):
        with open(path / "expert.safetensors", "r+b") as file:
            file.seek(-2, os.SEEK_END)
            file.write(b"\x11\x22")

    with pytest.raises(FlexOlmoError, match="is damaged or was changed"):
        write_merged(anchor, [path], tmp_path / "out", progress=lambda total: contextlib.nullcontext(overwrite))
    assert not (tmp_path / "out").exists()


WRITER = """
    import contextlib, resource, sys, time
    from pathlib import Path
    from flexolmo_megatron.convert.model import open_model
    from flexolmo_megatron.exchange.merge import write_merged

    where, format, limit, pause = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    anchor = open_model(where / "anchor")
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    count = 0

    def count_reads(_):
        global count
        count += 1
        if pause and count == 20:
            print("half way", flush=True)
            time.sleep(pause)

    write_merged(anchor, [where / "package_a"], where / "new" / "out", format=format,
                 progress=lambda total: contextlib.nullcontext(count_reads))
"""


@pytest.fixture
def start_writer(anchor, make_package, tmp_path):
    """Start a merge in another process: ``start_writer(format, limit, pause)``; its destination is new/out."""
    save_model(anchor, tmp_path / "anchor", format="hf")
    make_package("a")
    (tmp_path / "new").mkdir()

    def start(format, limit, pause):
        command = [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path), format, str(limit), str(pause)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


@pytest.mark.parametrize("format", ["hf", "megatron"])
def test_full_disk(start_writer, tmp_path, format):
    _, errors = start_writer(format, 6000, 0).communicate(timeout=120)
    last = errors.strip().splitlines()[-1]
    assert last.startswith("flexolmo_megatron.errors.FlexOlmoError: cannot write "), errors
    assert "File too large; nothing was changed there" in last
    assert not list((tmp_path / "new").iterdir())


def test_kill_leaves_no_destination(start_writer, tmp_path):
    process = start_writer("megatron", 0, 60)
    assert process.stdout.readline() == "half way\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "new" / "out").exists()
    report = write_merged(open_model(tmp_path / "anchor"), [tmp_path / "package_a"], tmp_path / "new" / "out")
    assert report.card.expert_names == ["public", "a"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]  # what the killed process left is gone
