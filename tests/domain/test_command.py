"""``flexolmo embed`` from its arguments to its files."""

import argparse
import json

import numpy as np
import pytest
import torch

from flexolmo_megatron.cli import main
from flexolmo_megatron.commands import embed
from flexolmo_megatron.convert.model import open_model
from flexolmo_megatron.domain.publish import dense_digest, owner_router, public_rows, publish_anchor
from flexolmo_megatron.domain.vector import load_vector
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.exchange.digest import model_digest


def flexolmo_embed(*words):
    parser = argparse.ArgumentParser()
    embed.register(parser.add_subparsers())
    args = parser.parse_args(["embed", *map(str, words)])
    args.run(args)


@pytest.fixture
def docs(tmp_path):
    path = tmp_path / "docs.jsonl"
    texts = [f"document {number} " + "abc " * number for number in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_coordinator_publishes_and_owner_embeds(docs, olmo2_dir, tmp_path, capsys):
    flexolmo_embed(docs, "--anchor", olmo2_dir, "--out", tmp_path / "public.npz", "--documents", 10,
                   "--publish", tmp_path / "anchor")
    public = load_vector(tmp_path / "public.npz")
    anchor = open_model(tmp_path / "anchor")
    assert anchor.card.experts[0].router == public.record()
    np.testing.assert_array_equal(public_rows(anchor).numpy(), public.vectors)
    printed = capsys.readouterr().out
    assert f"{tmp_path}/public.npz: 3 rows of 32 numbers with norm 1, by anchor@{public.dense_digest[:12]}\n" in printed
    assert "10 documents averaged, 0 dropped because their embedding was not finite\n" in printed
    assert f"{tmp_path}/anchor: published anchor, digest {model_digest(anchor)}\n" in printed

    flexolmo_embed(docs, "--anchor", tmp_path / "anchor", "--out", tmp_path / "same.npz", "--documents", 10)
    captured = capsys.readouterr()
    assert "cosine similarity with the public row, by layer: 1.0000 1.0000 1.0000\n" in captured.out
    assert "warning" not in captured.err
    same = load_vector(tmp_path / "same.npz")
    np.testing.assert_array_equal(same.vectors, public.vectors)
    assert same.dense_digest == public.dense_digest == dense_digest(open_model(olmo2_dir))
    assert (tmp_path / "same.npz").read_bytes() == (tmp_path / "public.npz").read_bytes()

    flexolmo_embed(docs, "--anchor", tmp_path / "anchor", "--out", tmp_path / "other.npz", "--documents", 10,
                   "--seed", 1)
    other = load_vector(tmp_path / "other.npz")
    assert other.seed == 1 and not np.array_equal(other.vectors, public.vectors)


def test_batch_size_and_scale(docs, olmo2_dir, tmp_path):
    flexolmo_embed(docs, "--anchor", olmo2_dir, "--out", tmp_path / "a.npz", "--batch-size", 1)
    flexolmo_embed(docs, "--anchor", olmo2_dir, "--out", tmp_path / "b.npz", "--batch-size", 64, "--scale", 0.5)
    a, b = load_vector(tmp_path / "a.npz"), load_vector(tmp_path / "b.npz")
    assert a.documents == 40
    np.testing.assert_allclose(a.vectors, 2 * b.vectors, atol=1e-5)


def test_progress_is_shown(docs, olmo2_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("flexolmo_megatron.training.progress.LOG_INTERVAL", 0)
    flexolmo_embed(docs, "--anchor", olmo2_dir, "--out", tmp_path / "a.npz", "--documents", 20, "--batch-size", 10)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" MB,")[0].rsplit(",", 1)[0] for line in lines] == [
        *(f"{number} documents" for number in range(1, 41)), "10 of 20 documents", "20 of 20 documents"]
    assert lines[-1].endswith(" MB/s, 00:00 left")


def test_rows_of_another_embedder_are_warned_about(docs, olmo2_dir, tmp_path, capsys, monkeypatch):
    flexolmo_embed(docs, "--anchor", olmo2_dir, "--out", tmp_path / "a.npz", "--publish", tmp_path / "anchor")
    digest = load_vector(tmp_path / "a.npz").dense_digest

    class Other:
        name, digest, reading = "other", "ab" * 32, "512 tokens"

        def embed(self, texts):
            return np.ones((len(texts), 1, 5), np.float32)

    monkeypatch.setattr("flexolmo_megatron.domain.embed.open_embedder", lambda *_: Other())
    flexolmo_embed(docs, "--anchor", tmp_path / "anchor", "--out", tmp_path / "b.npz", "--embedder", "other")
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == (
        f"warning: the anchor's public row was made with anchor@{digest[:12]}, 512 tokens, this vector with "
        "other@abababababab, 512 tokens: such rows have nothing to do with each other")
    line = captured.out.splitlines()[-1]
    assert line.startswith("cosine similarity with the public row, by layer: ") and len(line.split()) == 8 + 3
    assert load_vector(tmp_path / "b.npz").vectors.shape == (1, 32)


def test_centred_rows_are_added_to_the_anchors(docs, olmo2_dir, tmp_path, monkeypatch, capsys):
    flexolmo_embed(docs, "--anchor", olmo2_dir, "--out", tmp_path / "a.npz", "--publish", tmp_path / "anchor",
                   "--scale", 2)
    owner = [docs, "--anchor", tmp_path / "anchor", "--documents", 10, "--out"]
    flexolmo_embed(*owner, tmp_path / "raw.npz")
    flexolmo_embed(*owner, tmp_path / "b.npz", "--centre", "--scale", 3)
    vector, anchor = load_vector(tmp_path / "b.npz"), open_model(tmp_path / "anchor")
    difference = load_vector(tmp_path / "raw.npz").vectors - public_rows(anchor).numpy() / 2
    expected = 3 * difference / np.linalg.norm(difference, axis=1, keepdims=True)
    assert vector.centred
    np.testing.assert_allclose(vector.vectors, expected, atol=1e-4)
    router = owner_router(vector, anchor)
    np.testing.assert_allclose(router.rows.numpy(), public_rows(anchor).numpy() + expected, atol=1e-4)
    assert torch.equal(router.biases, torch.zeros(3))
    with pytest.raises(FlexOlmoError, match="^a centred domain vector is a difference from an anchor's rows: expected"):
        publish_anchor(open_model(olmo2_dir), vector)

    with pytest.raises(FlexOlmoError, match="512 tokens', this vector would be with anchor@.*, 4 tokens: expected"):
        flexolmo_embed(*owner, tmp_path / "c.npz", "--centre", "--max-tokens", 4)

    class Other:
        name, digest, reading = "other", "ab" * 32, "512 tokens"

    monkeypatch.setattr("flexolmo_megatron.domain.embed.open_embedder", lambda *_: Other())
    with pytest.raises(FlexOlmoError, match="this vector would be with other@abababababab, 512 tokens: expected the s"):
        flexolmo_embed(*owner, tmp_path / "c.npz", "--centre", "--embedder", "other")


def test_discriminants_are_where_a_run_starts(docs, olmo2_dir, tmp_path, capsys):
    """With router_lr = 0 also where it ends."""
    public, anchor_path, vector_path = tmp_path / "public.jsonl", tmp_path / "anchor", tmp_path / "b.npz"
    public.write_text("".join(json.dumps({"text": f"{number} xyz" * 9}) + "\n" for number in range(30)))
    flexolmo_embed(public, "--anchor", olmo2_dir, "--out", tmp_path / "a.npz", "--publish", anchor_path)
    flexolmo_embed(docs, "--anchor", anchor_path, "--public", public, "--scale", 1.5, "--out", vector_path)
    assert not list(tmp_path.glob("*.state"))
    printed = capsys.readouterr().out.splitlines()
    assert f"{vector_path}: 3 rows of 32 numbers that are discriminants times 1.5, by anchor@" in printed[-3]
    assert printed[-2].startswith("mean of the owner's logit less the anchor's on the public documents, by layer: -")
    vector, anchor = load_vector(vector_path), open_model(anchor_path)
    assert vector.centred and (vector.biases <= 0).all() and vector.record()["discriminant"] is True

    prefix, run_path = tmp_path / "tokens", tmp_path / "run"
    assert main(["data", str(docs), "--out", str(prefix), "--tokenizer", "byte"]) == 0
    assert main(["train", "expert", f"out={run_path}", f"data.train=[{prefix}]", "data.seq_length=32",
                 f"anchor={anchor_path}", "expert.name=own", f"expert.domain_vector={vector_path}",
                 "expert.router_window=4", "optimizer.router_lr=0", "train_iters=2", "micro_batch_size=2",
                 "global_batch_size=2"]) == 0
    run = open_model(run_path)
    assert run.card.model.router_window == 4
    for layer in range(3):
        gate = f"model.layers.{layer}.mlp.gate."
        row = public_rows(anchor)[layer] + torch.from_numpy(vector.vectors[layer])
        assert torch.equal(run.tensors[gate + "weight"].read()[0], row)
        assert torch.equal(run.tensors[gate + "bias"].read(), torch.from_numpy(vector.biases[layer : layer + 1]))
    capsys.readouterr()
    assert main(["train", "expert", f"out={tmp_path / 'no bias'}", f"data.train=[{prefix}]", "data.seq_length=32",
                 f"anchor={anchor_path}", "expert.name=own", f"expert.domain_vector={vector_path}",
                 "expert.bias=false"]) == 2
    assert f"{vector_path} holds discriminants, which say nothing without their biases" in capsys.readouterr().err
    assert main(["pack", str(run_path), str(tmp_path / "package")]) == 0
    manifest = json.loads((tmp_path / "package" / "manifest.json").read_text())
    assert manifest["architecture"]["router_window"] == 4 and manifest["router"]["discriminant"] is True


def test_bad_documents_are_reported(docs, olmo2_dir, tmp_path, capsys):
    with docs.open("a") as file:
        file.write("{\n")
    flexolmo_embed(docs, "--anchor", olmo2_dir, "--out", tmp_path / "a.npz")
    assert "skipped 1 unusable document (1 broken JSON)" in capsys.readouterr().err
    with pytest.raises(FlexOlmoError, match="more than the 0 that --max-bad allows"):
        flexolmo_embed(docs, "--anchor", olmo2_dir, "--out", tmp_path / "a.npz", "--max-bad", 0)


def test_bad_input_is_refused_before_the_work(docs, olmo2_dir, tmp_path, monkeypatch):
    flexolmo_embed(docs, "--anchor", olmo2_dir, "--out", tmp_path / "a.npz", "--publish", tmp_path / "anchor")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("flexolmo_megatron.domain.embed.open_embedder", None)

    def refuses(message, *words, anchor=olmo2_dir, out=tmp_path / "a.npz"):
        with pytest.raises(FlexOlmoError) as caught:
            flexolmo_embed(*words, "--anchor", anchor, "--out", out)
        assert message in str(caught.value)

    refuses("--publish needs a dense model", docs, "--publish", tmp_path / "x", anchor=tmp_path / "anchor")
    refuses(f"{tmp_path / 'anchor'} already exists; name a new directory", docs, "--publish", tmp_path / "anchor")
    refuses("a.npz: the folder", docs, out=tmp_path / "no" / "a.npz")
    refuses("is a folder; expected the name of a file", docs, out=tmp_path)
    (tmp_path / "v.npz.state").mkdir()
    refuses("v.npz.state is a folder; expected the name of a file", docs, out=tmp_path / "v.npz")
    (tmp_path / "v.npz.state").rmdir()
    refuses("--centre compares with the rows of a published anchor: expected one, without --publish", docs, "--centre")
    refuses("--public makes discriminants beside a published anchor, of its own hidden states: expected one", docs,
            "--public", docs)
    for words in (["--centre"], ["--epsilon", 1], ["--embedder", "other"], ["--publish", tmp_path / "x"]):
        refuses("neither --publish nor --centre nor --epsilon", docs, *words, "--public", docs,
                anchor=olmo2_dir if "--publish" in words else tmp_path / "anchor")
    refuses("no.jsonl does not exist", docs, "--public", tmp_path / "no.jsonl", anchor=tmp_path / "anchor")
    refuses("no.jsonl does not exist", tmp_path / "no.jsonl")
    refuses("--documents 0: expected a number of at least 1", docs, "--documents", 0)
    refuses("--max-bad -1: expected a number of at least 0", docs, "--max-bad", -1)
    refuses("--delta 1e-09 is about noise, which --epsilon asks for: expected that", docs, "--delta", 1e-9)
    refuses("--clip 0.5 is about noise", docs, "--clip", 0.5)
    refuses(f"{docs} is named both as the owner's and as public: expected different files", docs, "--public",
            tmp_path / "*.jsonl", anchor=tmp_path / "anchor")
    refuses("--seed -1: expected a number of at least 0", docs, "--seed", -1)
    refuses("does not exist", docs, anchor=tmp_path / "nowhere")
    (tmp_path / "empty.jsonl").touch()
    refuses("empty.jsonl: no document; expected at least one", tmp_path / "empty.jsonl")
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "empty.jsonl"])


def test_noise_is_off_by_default_and_recorded(docs, olmo2_dir, tmp_path, capsys):
    flexolmo_embed(docs, "--anchor", olmo2_dir, "--out", tmp_path / "a.npz", "--epsilon", 30)
    printed = capsys.readouterr().out
    assert "private for epsilon 30 and delta 1e-06 if one document is replaced: noise of standard deviation" in printed
    vector = load_vector(tmp_path / "a.npz")
    assert (vector.privacy.epsilon, vector.privacy.delta, vector.privacy.clip) == (30.0, 1e-6, 1.0)
    flexolmo_embed(docs, "--anchor", olmo2_dir, "--out", tmp_path / "b.npz")
    assert load_vector(tmp_path / "b.npz").privacy is None and "private" not in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz", "docs.jsonl"]
    with pytest.raises(FlexOlmoError, match="^delta = 2.0: expected a number above 0 and below 1$"):
        flexolmo_embed(docs, "--anchor", olmo2_dir, "--out", tmp_path / "c.npz", "--epsilon", 1, "--delta", 2)
