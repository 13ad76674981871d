"""``flexolmo proxy`` from its arguments to its files, with the linear classifier."""

import gzip
import json
import random
import shutil

import numpy as np
import pytest
from matplotlib.image import imread

from flexolmo_megatron import cli
from flexolmo_megatron.domain import proxy
from flexolmo_megatron.domain.proxy_classifier import LinearClassifier, load_classifier, measure, split_documents
from flexolmo_megatron.errors import FlexOlmoError

MATHS = ["sum", "prime", "integer", "proof", "lemma", "theorem", "vector", "matrix", "field", "group", "ring", "root"]
NEWS = ["minister", "vote", "market", "team", "goal", "court", "police", "city", "storm", "price", "bank", "film"]


def document(seed, words, length=40):
    """Mostly of these words, with a number that makes it distinct."""
    chance = random.Random(seed)
    return " ".join([*chance.choices(words, k=length), *chance.choices(["the", "of", "and", "in"], k=20), str(seed)])


def write(path, texts, key="text"):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        file.writelines(json.dumps({key: text}) + "\n" for text in texts)
    return path


OWNER = [document(seed, MATHS) for seed in range(60)]
LIKE = [document(seed, MATHS) for seed in range(1000, 1030)]
UNLIKE = [document(seed, NEWS) for seed in range(2000, 2200)]
NEAR = OWNER[7].replace(OWNER[7].split()[20], "changed", 1)


@pytest.fixture
def corpus(tmp_path):
    """Owner's documents, and two public files with a copy and a near-copy of them."""
    (tmp_path / "public").mkdir()
    write(tmp_path / "owner.jsonl.gz", OWNER)
    write(tmp_path / "public" / "a.jsonl", UNLIKE[:100] + LIKE[:15] + ["  " + OWNER[3].upper()])
    write(tmp_path / "public" / "b.jsonl.gz", LIKE[15:] + [NEAR] + UNLIKE[100:])
    return tmp_path


def run(folder, *words, out="out", status=0):
    arguments = ["proxy", folder / "owner.jsonl.gz", "--public", folder / "public" / "*", "--out", folder / out]
    if "--tokens" not in words:
        arguments += ["--tokens", 100_000]
    if "--workers" not in words:
        arguments += ["--workers", 1]
    assert cli.main([str(word) for word in (*arguments, *words)]) == status


def proxies(folder, out="out"):
    return [json.loads(line) for line in (folder / out / "proxies.jsonl").read_text().splitlines()]


def test_finds_what_looks_like_the_owners(corpus, capsys):
    budget = sum(len(text) + 1 for text in LIKE)  # a byte is a token, and so is the end of a document
    run(corpus, "--tokens", budget)
    found = proxies(corpus)
    assert sorted(one["text"] for one in found) == sorted(LIKE)
    scores = [one["score"] for one in found]
    assert scores == sorted(scores, reverse=True)
    for one in found:
        name, line = one["source"].rsplit(":", 1)
        opener = gzip.open if name.endswith(".gz") else open
        with opener(corpus / "public" / name, "rt") as file:
            assert json.loads(file.readlines()[int(line) - 1])["text"] == one["text"]
    report = json.loads((corpus / "out" / "report.json").read_text())
    assert report["proxies"] | {"highest_score": 0, "lowest_score": 0, "median_score": 0} == {
        "documents": 30, "tokens": budget, "text_bytes": budget - 30, "token_budget": budget,
        "tokenizer": {"type": "byte"}, "exhausted": False, "highest_score": 0, "lowest_score": 0, "median_score": 0}
    assert report["duplicates"] == {"jaccard": 0.7, "shingle_words": 3, "permutations": 128, "copies_excluded": 1,
                                    "near_copies_excluded": 1}
    assert report["owner_documents"] == 60 and report["public_documents"] == 232
    assert report["trained_on"] == {"owner": 54, "public": 208}  # a public copy of an owner's document is not public
    assert report["held_out"] == {"accuracy": pytest.approx(1, abs=0.2), "auc": pytest.approx(1, abs=0.2),
                                  "owner_documents": 6, "public_documents": 23}
    histogram = report["histogram"]
    assert [sum(histogram[key]) for key in ("public", "proxies", "owner_held_out")] == [232, 30, 6]
    assert min(imread(corpus / "out" / "scores.png").shape[:2]) > 200
    printed = capsys.readouterr().out
    assert "classifier linear: held-out accuracy " in printed
    assert "on 6 documents of the owner's and 23 public ones\n" in printed
    assert "scored 232 public documents in " in printed and " documents/s with 1 process\n" in printed
    assert ("excluded, as they are documents of the owner's: copies 1, near-copies 1 (Jaccard similarity of at least "
            "0.7)\n") in printed
    assert f"{corpus}/out: 30 proxies of {budget:,} tokens" in printed
    assert not (corpus / "out.state").exists()


def test_outputs_hold_nothing_of_the_owners_text(corpus, capsys):
    """All public documents are taken, so only the exclusion keeps the owner's copies out."""
    secrets = [f"hush{number:03d}" for number in range(60)]
    write(corpus / "owner.jsonl.gz", [f"{text} {secret} {secret}" for text, secret in zip(OWNER, secrets, strict=True)])
    run(corpus, "--tokens", 10**6)
    outputs = sorted((corpus / "out").iterdir())
    assert [path.name for path in outputs] == ["proxies.jsonl", "report.json", "scores.png"]
    captured = capsys.readouterr()
    for content in [path.read_bytes().lower() for path in outputs] + [(captured.out + captured.err).lower().encode()]:
        assert b"hush" not in content
    report = (corpus / "out" / "report.json").read_text()
    assert "owner.jsonl" not in report and str(corpus) not in report
    texts = [one["text"].split() for one in proxies(corpus)]
    known = {tuple(text.split()[start : start + 15]) for text in OWNER for start in range(45)}
    assert len(texts) == 230
    assert not any(tuple(text[start : start + 15]) in known for text in texts for start in range(len(text)))
    assert "note: all public documents were taken before the budget was used" in captured.err


def test_each_owner_of_a_process_is_compared_with_its_own_documents(corpus):
    """Runs one after the other, under the same name of output."""
    for own in (OWNER, LIKE):
        write(corpus / "owner.jsonl.gz", own)
        run(corpus)
        assert not {one["text"] for one in proxies(corpus)} & set(own)
        shutil.rmtree(corpus / "out")


def test_neither_processes_nor_a_stop_change_the_result(corpus, monkeypatch, capsys):
    run(corpus, out="one")
    run(corpus, "--workers", 2, out="two")
    assert "with 2 processes" in capsys.readouterr().out

    keep = proxy.ProxyState.save_scores

    def stop_after_one(self, file, scores):
        keep(self, file, scores)
        raise KeyboardInterrupt

    monkeypatch.setattr(proxy.ProxyState, "save_scores", stop_after_one)
    run(corpus, out="three", status=130)
    assert not (corpus / "three").exists()
    left = sorted(path.name for path in (corpus / "three.state").iterdir())
    assert left == ["classifier", "owner", "owner.npz", "owner_000000.npz", "parts.npz", "plan.json", "quality.json",
                    "scores_000000.npz", "scoring"]
    monkeypatch.setattr(proxy.ProxyState, "save_scores", keep)

    monkeypatch.setattr(LinearClassifier, "train", None)
    run(corpus, "--seed", 1, out="three", status=2)
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"flexolmo: {corpus}/three.state is what an earlier start with another choice of seed has left: repeat that "
        "choice to go on with it, or remove the folder")
    run(corpus, out="three")
    assert "scored 116 public documents in" in capsys.readouterr().out  # the second file's alone
    for name in ("proxies.jsonl", "report.json", "scores.png"):
        first = (corpus / "one" / name).read_bytes()
        assert first == (corpus / "two" / name).read_bytes() == (corpus / "three" / name).read_bytes(), name


def test_seed_decides(corpus):
    run(corpus, "--documents", 40, out="a")
    run(corpus, "--documents", 40, out="b")
    run(corpus, "--documents", 40, "--seed", 1, out="c")
    reports = [(corpus / name / "report.json").read_bytes() for name in "abc"]
    assert reports[0] == reports[1] != reports[2]


def test_progress_of_sampling_is_shown(corpus, monkeypatch, capsys):
    monkeypatch.setattr("flexolmo_megatron.training.progress.LOG_INTERVAL", 0)
    run(corpus)
    assert capsys.readouterr().err.count(" documents, ") >= 60 + 232  # a line for each; other passes look now and then


def test_several_rounds_give_what_one_gives(corpus, monkeypatch):
    run(corpus, "--tokens", 9000, out="a")
    monkeypatch.setattr("flexolmo_megatron.domain.proxy_selection._ROUND_BYTES", 700)
    run(corpus, "--tokens", 9000, out="b")
    assert (corpus / "a" / "proxies.jsonl").read_bytes() == (corpus / "b" / "proxies.jsonl").read_bytes()
    report = json.loads((corpus / "b" / "report.json").read_text())
    assert 9000 - 500 < report["proxies"]["tokens"] <= 9000
    assert (report["duplicates"]["copies_excluded"], report["duplicates"]["near_copies_excluded"]) == (1, 1)


def test_unusable_documents_are_counted_and_limited(corpus, capsys):
    with (corpus / "public" / "a.jsonl").open("a") as file:
        file.write('{"text": ""}\n{"text"\n')
    run(corpus)
    assert "skipped unusable documents of the public side: 1 broken JSON, 1 empty document\n" in capsys.readouterr().err
    assert json.loads((corpus / "out" / "report.json").read_text())["skipped"] == {
        "owner": {}, "public": {"broken JSON": 1, "empty document": 1}}
    run(corpus, "--max-bad", 1, out="other", status=2)
    assert "a.jsonl:118 (broken JSON): more than the 1 that --max-bad allows" in capsys.readouterr().err


def test_bad_input_is_one_sentence(corpus, capsys):
    write(corpus / "few.jsonl", UNLIKE[:5] + OWNER)

    def refuses(message, *words, out="out"):
        run(corpus, *words, out=out, status=2)
        error = capsys.readouterr().err
        assert error.startswith("flexolmo: ") and message in error and error.count("\n") == 1, error

    (corpus / "taken").mkdir()
    (corpus / "taken" / "file").touch()
    refuses("taken already exists; name a new directory", out="taken")
    refuses("nowhere.jsonl does not exist", "--public", corpus / "nowhere.jsonl")
    refuses("owner.jsonl.gz is named both as the owner's and as public", "--public", corpus / "owner.jsonl.gz")
    refuses("--tokens 0: expected a number of at least 1", "--tokens", 0)
    refuses("--documents 0: expected a number of at least 1", "--documents", 0)
    refuses("--workers 0: expected", "--workers", 0)
    refuses("--jaccard 2.0: expected a number above 0, at most 1", "--jaccard", 2)
    refuses("5 distinct documents on the public side: expected at least 10 to train a classifier",
            "--public", corpus / "few.jsonl", out="x")
    refuses("--tokens 10: expected at least ", "--tokens", 10, out="y")
    refuses(f"cannot load the tokenizer '{corpus}/public'", "--tokenizer", corpus / "public")
    assert not (corpus / "y").exists()


def test_a_public_side_that_has_nothing_like_the_owners_is_said(corpus, capsys):
    note = "note: no public document looks like the owner's: the classifier takes all of these proxies for public ones"
    run(corpus, "--tokens", 2000, out="some")
    assert note not in capsys.readouterr().err
    write(corpus / "news.jsonl", UNLIKE)
    run(corpus, "--tokens", 2000, "--public", corpus / "news.jsonl", out="none")
    assert note in capsys.readouterr().err.splitlines()


def test_a_start_that_did_nothing_does_not_bind(corpus, capsys):
    for limit, message in (("1", "more than the 1 that --max-bad allows"),
                           ("100", "the owner's files have no usable document (60 unusable documents (60 missing text))"
                                   ": expected text under --text-key foo\n")):
        run(corpus, "--text-key", "foo", "--max-bad", limit, status=2)
        assert message in capsys.readouterr().err and not (corpus / "out.state").exists()
    run(corpus)


def test_all_public_documents_are_the_owners(corpus, capsys):
    write(corpus / "same.jsonl", [text.upper() for text in OWNER[:20]])
    run(corpus, "--public", corpus / "same.jsonl", status=2)
    assert "0 distinct documents on the public side" in capsys.readouterr().err


def test_split_keeps_copies_together_and_labels_clean():
    owner = [f"owner {number}" for number in range(50)] * 3 + ["shared thing"]
    public = [f"public {number}" for number in range(30)] + ["Shared, THING!"]
    split = split_documents(owner, public, seed=0)
    assert len(split.held_out) == 5 + 3 and split.held_out_labels.tolist() == [1] * 5 + [0] * 3
    assert len(split.train) == 46 + 27 and split.train_labels.sum() == 46
    assert not set(split.train) & set(split.held_out)
    labels = dict(zip(split.train + split.held_out, [*split.train_labels, *split.held_out_labels], strict=True))
    assert all(label == (not text.startswith("public")) for text, label in labels.items()) and len(labels) == 81
    assert split_documents(owner, public, seed=1).held_out != split.held_out


def test_measures():
    logits = np.array([3.0, 1.0, -1.0, 0.5, -2.0, -3.0, -4.0, -5.0], np.float32)
    labels = np.array([1, 1, 1, 0, 0, 0, 0, 0])
    quality = measure(logits, labels)
    assert quality.accuracy == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert quality.auc == pytest.approx(14 / 15)  # of 15 pairs, -1 loses to 0.5
    assert (quality.owner_documents, quality.public_documents) == (3, 5)


def test_a_linear_classifier_is_kept_exactly(tmp_path):
    texts, labels = OWNER + UNLIKE, np.repeat([1, 0], [len(OWNER), len(UNLIKE)])
    trained = LinearClassifier.train(texts, labels, seed=2)
    trained.save(tmp_path)
    logits = load_classifier("linear", tmp_path).logits(texts)
    np.testing.assert_array_equal(logits, trained.logits(texts))
    np.testing.assert_allclose(logits[::7], [trained.logits([text])[0] for text in texts[::7]], rtol=1e-6)
    assert ((logits > 0) == labels).all()


def test_changed_files_are_noticed(corpus, monkeypatch):
    options = proxy.ProxyOptions(tokens=1000, tokenizer={"type": "byte"})
    original = proxy.select

    def shrink(*arguments, **keywords):
        write(corpus / "public" / "a.jsonl", UNLIKE[:3])
        return original(*arguments, **keywords)

    monkeypatch.setattr(proxy, "select", shrink)
    with pytest.raises(FlexOlmoError, match="documents are no longer in the public files: they have changed since"):
        proxy.select_proxies([str(corpus / "owner.jsonl.gz")], [str(corpus / "public" / "*")], corpus / "out", options)
