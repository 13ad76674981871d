import argparse
import errno
import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from flexolmo_megatron.commands import data as data_command
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.shards.run import Where
from flexolmo_megatron.training import document_pool, preprocess_steps
from flexolmo_megatron.training import preprocess as preprocess_module
from flexolmo_megatron.training.dataset_info import DatasetInfo
from flexolmo_megatron.training.preprocess import preprocess
from flexolmo_megatron.training.tokenizer import load_tokenizer

BYTE = {"type": "byte"}
TEXTS = [f"document {number} of Zürich: " + "word " * (number % 37) for number in range(400)]


def write_jsonl(path: Path, texts=TEXTS) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def documents(prefix: Path, spec=BYTE) -> list[str]:
    """Texts of a data set, after checking that it ends each with one end-of-document token."""
    tokenizer = load_tokenizer(spec)
    dataset = IndexedDataset(str(prefix))
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))
    ids = [dataset[number].tolist() for number in range(len(dataset))]
    assert all(item.count(tokenizer.eod) == 1 and item[-1] == tokenizer.eod for item in ids)
    return [tokenizer.decode(item) for item in ids]


def test_data_set_holds_the_documents(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    written, bad = preprocess([str(path)], tmp_path / "new" / "set", tokenizer=BYTE)
    prefix = tmp_path / "new" / "set"
    assert documents(prefix) == TEXTS
    assert IndexedDataset(str(prefix)).index.dtype is np.uint16
    size = sum(len(text.encode()) for text in TEXTS)
    assert not bad.counts
    assert written == {str(prefix): DatasetInfo(BYTE, 257, 256, documents=400, tokens=size + 400, text_bytes=size,
                                                largest_token=256, skipped={})}
    assert DatasetInfo.load(prefix) == written[str(prefix)]
    assert sorted(item.name for item in prefix.parent.iterdir()) == ["set.bin", "set.idx", "set.json"]


def test_hugging_face_tokenizer(tmp_path, word_tokenizer):
    spec = {"type": "huggingface", "path": str(word_tokenizer)}
    preprocess([str(write_jsonl(tmp_path / "a.jsonl"))], tmp_path / "set", tokenizer=spec, workers=2)
    assert documents(tmp_path / "set", spec) == TEXTS
    assert DatasetInfo.load(tmp_path / "set").tokenizer == spec


def test_output_does_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(document_pool, "CHUNK_BYTES", 500)
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:250])
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"text": ""}\n{broken\n')
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS[250:])
    for workers in (1, 2, 3):
        _, bad = preprocess([str(tmp_path / "*.jsonl*")], tmp_path / str(workers), tokenizer=BYTE, workers=workers,
                            valid_share=0.2)
        assert [(item.kind, item.line) for item in bad.first] == [("empty document", 251), ("broken JSON", 252)]
    for name in ("train.bin", "train.idx", "train.json", "valid.bin", "valid.idx", "valid.json"):
        first, *others = ((tmp_path / f"{workers}_{name}").read_bytes() for workers in (1, 2, 3))
        assert others == [first, first]


def test_files_tokenized_apart_give_bitwise_the_same(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [*TEXTS[:150], " "])
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS[150:])
    (tmp_path / "c.jsonl").touch()
    arguments = {"inputs": [str(tmp_path / "*.jsonl*")], "tokenizer": BYTE, "valid_share": 0.3, "seed": 2}
    expected = preprocess(out=tmp_path / "here", **arguments)
    found = preprocess(out=tmp_path / "apart", shards=Where(2), **arguments)
    assert list(found[0].values()) == list(expected[0].values()) and found[1].counts == expected[1].counts
    for suffix in (".bin", ".idx", ".json"):
        for side in ("train", "valid"):
            assert ((tmp_path / f"apart_{side}{suffix}").read_bytes()
                    == (tmp_path / f"here_{side}{suffix}").read_bytes()), (side, suffix)
    assert not (tmp_path / "apart.state").exists()
    assert found[1].report() == "1 unusable document (1 empty document)"
    write_jsonl(tmp_path / "c.jsonl", ["", "\n"])
    with pytest.raises(FlexOlmoError, match=r"^3 unusable documents \(3 empty document\): more than the 2 that "):
        preprocess(out=tmp_path / "too many", shards=Where(1), max_bad=2, **arguments)


def test_tokenizing_apart_goes_on_after_a_stop(tmp_path, monkeypatch):
    for name in "abc":
        write_jsonl(tmp_path / f"{name}.jsonl", TEXTS[:20])
    arguments = {"inputs": [str(tmp_path / "*.jsonl")], "tokenizer": BYTE, "shards": Where(1)}
    tokenized = []
    run = preprocess_steps.Tokenize.run
    finish = preprocess_module.Output.finish

    def no_space(self, skipped):
        if self.prefix == tmp_path / "set":  # not those of single files
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finish(self, skipped)

    def stop_at_the_second(self, data, rank=0, world_size=1):
        tokenized.append(rank)
        if tokenized == [0, 1]:
            raise KeyboardInterrupt
        return run(self, data, rank, world_size)

    monkeypatch.setattr(preprocess_steps.Tokenize, "run", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        preprocess(out=tmp_path / "set", **arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "c.jsonl", "set.state"]
    with pytest.raises(FlexOlmoError, match="set.state is what an earlier start with another choice of seed has left"):
        preprocess(out=tmp_path / "set", seed=1, **arguments)
    with monkeypatch.context() as patch, pytest.raises(FlexOlmoError, match="set.bin: No space left on device; noth"):
        patch.setattr(preprocess_module.Output, "finish", no_space)
        preprocess(out=tmp_path / "set", **arguments)
    preprocess(out=tmp_path / "set", **arguments)
    assert tokenized == [0, 1, 1, 2]
    assert documents(tmp_path / "set") == TEXTS[:20] * 3


def test_valid_share_splits_by_text_and_seed(tmp_path):
    texts = [*TEXTS, *TEXTS[:100]]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    written, _ = preprocess([str(path)], tmp_path / "set", tokenizer=BYTE, valid_share=0.2)
    train, valid = documents(tmp_path / "set_train"), documents(tmp_path / "set_valid")
    assert list(written) == [f"{tmp_path}/set_train", f"{tmp_path}/set_valid"]
    assert not set(train) & set(valid)
    assert train == [text for text in texts if text in set(train)]
    assert valid == [text for text in texts if text in set(valid)]
    assert 0.12 < len(set(valid)) / len(TEXTS) < 0.28
    preprocess([str(path)], tmp_path / "other", tokenizer=BYTE, valid_share=0.2, seed=1)
    assert documents(tmp_path / "other_valid") != valid


def test_existing_output_is_left_alone(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "set.idx").write_text("mine")
    with pytest.raises(FlexOlmoError, match="/set.idx already exists; name another --out or remove it first$"):
        preprocess([str(path)], tmp_path / "set", tokenizer=BYTE)
    assert (tmp_path / "set.idx").read_text() == "mine"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.jsonl", "set.idx"]


@pytest.mark.parametrize("workers", [1, 2])
def test_too_many_bad_documents_leave_nothing(tmp_path, workers):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": ""}\n{\n')
    with pytest.raises(FlexOlmoError) as caught:
        preprocess([str(path)], tmp_path / "set", tokenizer=BYTE, workers=workers, max_bad=1)
    assert str(caught.value) == (
        f"2 unusable documents (1 broken JSON, 1 empty document), first {path}:2 (empty document), {path}:3 "
        "(broken JSON): more than the 1 that --max-bad allows")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("arguments", "message"), [
    ({"workers": 0}, "^--workers 0: expected a number of at least 1$"),
    ({"max_bad": -1}, "^--max-bad -1: expected a number of at least 0$"),
    ({"valid_share": 1.0}, "^--valid-share 1.0: expected a number from 0 to below 1, as in 0.05$"),
    ({"valid_share": 1e-9}, "^no document for .*set_valid among the 400 usable ones of 1 file$"),
    ({"text_key": "body"}, r"^101 unusable documents \(101 missing text\), first "),
    ({"text_key": "body", "max_bad": 400}, r"^no document for .*set among the 0 usable ones of 1 file; 400 unusable"),
    ({"out": "/proc/nowhere/set"}, "^cannot write /proc/nowhere/set.bin: .+; nothing was changed there$"),
    ({"out": "/"}, "^--out /: expected a folder and a name, as in data/mine$"),
])
def test_bad_arguments(tmp_path, arguments, message):
    path = write_jsonl(tmp_path / "a.jsonl")
    with pytest.raises(FlexOlmoError, match=message):
        preprocess([str(path)], **{"out": tmp_path / "set", "tokenizer": BYTE, **arguments})
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_leaves_nothing(tmp_path):
    """A limit on the size of files gives the same OSError in the midst of a write as a full disk does."""
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS * 10)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(FlexOlmoError, match="^cannot write .*/set.bin: File too large; nothing was changed"):
            preprocess([str(path)], tmp_path / "set", tokenizer=BYTE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("out", ["set", "new/folder/set"])
def test_failure_while_the_files_appear_takes_them_back(tmp_path, monkeypatch, out):
    path = write_jsonl(tmp_path / "a.jsonl")
    rename = os.rename

    def fail_at_the_index(source, target):
        if str(target).endswith(".idx"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_at_the_index)
    with pytest.raises(FlexOlmoError, match="set.bin: No space left on device; nothing was changed there$"):
        preprocess([str(path)], tmp_path / out, tokenizer=BYTE)
    assert list(tmp_path.iterdir()) == [path]


SCRIPT = """
from flexolmo_megatron.training.preprocess import preprocess
if __name__ == "__main__":
    preprocess(["{folder}/pipe.jsonl"], "{folder}/set", tokenizer={{"type": "byte"}}, workers=2)
"""


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_killed_run_leaves_no_data_set_and_no_process(tmp_path):
    """The input is a pipe that stays open, so the run is always in its midst when the kill comes."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "run.py").write_text(SCRIPT.format(folder=tmp_path))
    process = subprocess.Popen([sys.executable, tmp_path / "run.py"], stderr=subprocess.DEVNULL)
    try:
        with open(tmp_path / "pipe.jsonl", "w") as pipe:
            pipe.writelines(json.dumps({"text": text * 20}) + "\n" for text in TEXTS * 10)
            pipe.flush()
            deadline = time.monotonic() + 60
            while not any(tmp_path.glob(".*partial/set.bin")) or len(workers := children(process.pid)) < 3:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert not list(tmp_path.glob("set*"))
        while any(Path(f"/proc/{worker}/cmdline").exists() and Path(f"/proc/{worker}/cmdline").read_bytes()
                  for worker in workers):
            assert time.monotonic() < deadline, "tokenizing processes outlive the run"
            time.sleep(0.05)
    finally:
        process.kill()
    path = write_jsonl(tmp_path / "a.jsonl")
    preprocess([str(path)], tmp_path / "set", tokenizer=BYTE)
    assert not list(tmp_path.glob(".*partial"))  # what the killed one left


def test_killed_worker_is_one_sentence(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl")
    monkeypatch.setattr(document_pool, "_call", os.abort)
    monkeypatch.setattr(document_pool, "_start_worker", os.abort)
    with pytest.raises(FlexOlmoError, match=r"^a tokenizing process was killed \(out of memory\?\); --workers 2 "):
        preprocess([str(path)], tmp_path / "set", tokenizer=BYTE, workers=2)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["[]", "{}", '{"format_version": 2}'])
def test_broken_description(tmp_path, text):
    assert DatasetInfo.load(tmp_path / "set") is None
    (tmp_path / "set.json").write_text(text)
    with pytest.raises(FlexOlmoError, match="set.json is not the description of a tokenized data set in format"):
        DatasetInfo.load(tmp_path / "set")


def test_command(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", ["ab", " ", "cde"])
    parser = argparse.ArgumentParser()
    data_command.register(parser.add_subparsers())
    args = parser.parse_args(["data", str(path), "--out", str(tmp_path / "set"), "--workers", "1"])
    args.run(args)
    out, err = capsys.readouterr()
    assert out == f"{tmp_path}/set: 2 documents, 7 tokens, 0.0 MB of text\n"
    assert err == f"skipped 1 unusable document (1 empty document), first {path}:2 (empty document)\n"
    assert documents(tmp_path / "set") == ["ab", "cde"]
