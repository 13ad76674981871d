import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.runtime.setup import initialize
from flexolmo_megatron.training.dataset_info import DatasetInfo
from flexolmo_megatron.training.datasets import ResumableSampler, batches, build_datasets, parse_blend
from flexolmo_megatron.training.preprocess import preprocess
from flexolmo_megatron.training.tokenizer import ByteTokenizer, load_tokenizer

LENGTH = 16
LOWER = [f"lower {number} " + "abc" * (number % 7) for number in range(60)]
UPPER = [f"UPPER {number} " + "XYZ" * (number % 5) for number in range(30)]


@pytest.fixture(scope="module", autouse=True)
def one_process():
    initialize()


def make(folder: Path, name: str, texts: list[str]) -> str:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    preprocess([str(folder / f"{name}.jsonl")], folder / name, tokenizer={"type": "byte"})
    return str(folder / name)


@pytest.fixture(scope="module")
def lower(tmp_path_factory):
    return make(tmp_path_factory.mktemp("lower"), "lower", LOWER)


@pytest.fixture(scope="module")
def upper(tmp_path_factory):
    return make(tmp_path_factory.mktemp("upper"), "upper", UPPER)


@pytest.fixture
def build(tmp_path):
    def build(**arguments):
        return build_datasets(**{"train": None, "sequence_length": LENGTH, "seed": 7, "tokenizer": ByteTokenizer(),
                                 "vocab_size": 257, "cache_dir": tmp_path / "cache", **arguments})
    return build


def rows(dataset) -> list[list[int]]:
    """Every sample with its last label: sequence_length + 1 tokens."""
    return [[*sample["tokens"].tolist(), int(sample["labels"][-1])] for sample in dataset]


def text_of(dataset) -> str:
    return ByteTokenizer().decode(token for row in rows(dataset) for token in row)


def test_one_pass_reads_every_token_back(lower, build):
    dataset = build(valid=lower).valid
    pieces = rows(dataset)
    info = DatasetInfo.load(lower)
    assert len(pieces) == (info.tokens - 1) // LENGTH
    order = np.argsort(dataset.shuffle_index)  # undone, the samples follow each other in the stream of documents
    stream = [token for position in order for token in pieces[position][:-1]]
    found = [ByteTokenizer().decode(part) for part in split_at(stream, 256)]
    assert set(found[:-1]) <= set(LOWER)
    assert len(set(found[:-1])) == len(found) - 1 >= len(LOWER) - 2  # the last partial sample is dropped
    assert any(text.startswith(found[-1]) for text in LOWER)
    for sample in dataset:
        assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
        assert torch.equal(sample["position_ids"], torch.arange(LENGTH))
        assert sample["loss_mask"].tolist() == [1.0] * LENGTH


def split_at(stream: list[int], end: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in stream:
        if token == end:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def test_more_samples_than_one_pass_holds(lower, build):
    single = len(build(train=lower).train)
    assert len(build(train=lower, train_samples=3 * single + 1).train) >= 3 * single + 1


def test_data_shorter_than_a_sample(tmp_path, build):
    prefix = make(tmp_path, "tiny", ["abc", "de"])
    dataset = build(train=prefix, train_samples=9).train
    assert len(dataset) >= 9 and all(len(row) == LENGTH + 1 for row in rows(dataset))
    with pytest.raises(FlexOlmoError, match=r"^data.valid: .*tiny holds 7 tokens, which is less than one sample of 16"):
        build(valid=prefix)


@pytest.mark.parametrize(("weights", "share"), [((0.75, 0.25), 0.75), ((1, 9), 0.1)])
def test_weighted_blend(lower, upper, build, weights, share):
    dataset = build(train=[weights[0], lower, str(weights[1]), upper], train_samples=400).train
    assert len(dataset) >= 400
    ids = [int(sample["dataset_id"]) for sample in dataset]
    assert ids.count(0) / len(ids) == pytest.approx(share, abs=0.01)
    for number, row in zip(ids, rows(dataset), strict=True):
        letters = "".join(filter(str.isalpha, ByteTokenizer().decode(row)))
        assert letters == (letters.lower() if number == 0 else letters.upper())


def test_blend_without_weights_is_in_proportion_to_tokens_over_any_number_of_passes(lower, upper, build):
    tokens = [DatasetInfo.load(prefix).tokens for prefix in (lower, upper)]
    dataset = build(train=[lower, upper], train_samples=500).train
    assert len(dataset) >= 500
    share = [sample["dataset_id"] for sample in dataset].count(0) / len(dataset)
    assert share == pytest.approx(tokens[0] / sum(tokens), abs=0.01)
    once = build(valid=[lower, upper]).valid
    assert len(once) == sum((count - 1) // LENGTH for count in tokens)


def test_order_depends_on_the_seed_alone(lower, build, tmp_path):
    first = rows(build(train=lower, train_samples=100).train)
    assert rows(build(train=lower, train_samples=100).train) == first  # from the cache
    assert rows(build(train=lower, train_samples=100, cache_dir=tmp_path / "other").train) == first
    other = rows(build(train=lower, train_samples=100, seed=8).train)
    assert other != first


def test_cache_is_complete_outside_of_the_data_and_follows_the_data(tmp_path, build):
    prefix = make(tmp_path, "set", LOWER)
    before = set(tmp_path.iterdir())
    build(train=prefix, train_samples=10)
    assert set(tmp_path.iterdir()) - before == {tmp_path / "cache"}
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [""]
    for suffix in ("bin", "idx", "json"):
        Path(f"{prefix}.{suffix}").unlink()
    make(tmp_path, "set", UPPER)  # other documents under the same name
    text = text_of(build(train=prefix, train_samples=10).train)
    assert "UPPER" in text and "lower" not in text


def test_indices_of_a_killed_build_are_not_used(lower, build, tmp_path):
    expected = rows(build(train=lower, train_samples=50).train)
    (complete,) = (tmp_path / "cache").iterdir()
    leftover = complete.rename(complete.with_name(f".{complete.name}.{os.uname().nodename}.{2**22 - 1}.partial"))
    for path in leftover.iterdir():
        path.write_bytes(path.read_bytes()[:20])
    assert rows(build(train=lower, train_samples=50).train) == expected
    assert list((tmp_path / "cache").iterdir()) == [complete]


def flat(loader) -> list[list[int]]:
    return [row for batch in loader for row in batch["tokens"].tolist()]


def test_resumed_run_sees_what_an_unbroken_run_would(lower, build):
    dataset = build(train=lower, train_samples=48).train
    unbroken = [list(batches(dataset, micro_batch_size=2, data_parallel_rank=rank, data_parallel_size=3))
                for rank in range(3)]
    for stop in range(len(unbroken[0]) + 1):
        for rank in range(3):
            resumed = list(batches(dataset, consumed_samples=stop * 6, micro_batch_size=2, data_parallel_rank=rank,
                                   data_parallel_size=3))
            assert len(resumed) == len(unbroken[rank]) - stop
            for one, other in zip(resumed, unbroken[rank][stop:], strict=True):
                assert one.keys() == other.keys()
                assert all(torch.equal(one[key], other[key]) for key in one if key != "attention_mask")


def test_ranks_share_the_samples_whatever_their_number(lower, build):
    dataset = build(train=lower, train_samples=48).train
    alone = flat(batches(dataset, micro_batch_size=6))
    ranks = [list(batches(dataset, micro_batch_size=2, data_parallel_rank=rank, data_parallel_size=3))
             for rank in range(3)]
    together = [row for step in zip(*ranks, strict=True) for batch in step for row in batch["tokens"].tolist()]
    assert together == alone == [sample["tokens"].tolist() for sample in dataset][:len(alone)]


def test_batches_in_other_processes_are_the_same_and_leave_the_random_state(lower, build):
    dataset = build(train=lower, train_samples=20).train
    state = torch.get_rng_state()
    here = flat(batches(dataset, micro_batch_size=2))
    assert flat(batches(dataset, micro_batch_size=2, num_workers=2)) == here
    assert torch.equal(torch.get_rng_state(), state)


def test_batch(lower, build):
    batch = next(iter(batches(build(train=lower, train_samples=20).train, micro_batch_size=3)))
    assert set(batch) == {"tokens", "labels", "loss_mask", "position_ids", "attention_mask"}
    assert batch.pop("attention_mask") is None
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
        "tokens": ((3, LENGTH), torch.int64), "labels": ((3, LENGTH), torch.int64),
        "position_ids": ((3, LENGTH), torch.int64), "loss_mask": ((3, LENGTH), torch.float32)}


def test_sampler_ends_before_a_batch_that_some_rank_could_not_fill():
    samplers = [ResumableSampler(11, 1, 2, rank, 2) for rank in range(2)]
    assert [[list(batch) for batch in sampler] for sampler in samplers] == [[[1, 2], [5, 6]], [[3, 4], [7, 8]]]
    assert [len(sampler) for sampler in samplers] == [2, 2]
    assert list(ResumableSampler(11, 11, 2, 1, 2)) == []


def test_parse_blend():
    assert parse_blend("7") == (["7"], None)
    assert parse_blend(["a", "b"]) == (["a", "b"], None)
    assert parse_blend(["0.7", "a", 3, "b"]) == (["a", "b"], [0.7, 3.0])


@pytest.mark.parametrize(("blend", "message"), [
    ([], "^data.train is empty: expected the prefix of a data set, or several$"),
    (["0.5", "a", "b"], r"^data.train = \['0.5', 'a', 'b'\]: expected prefixes alone, or a weight before every prefix"),
    (["a", "0.5"], "a weight before every prefix"),
    (["0.5", "0.5"], "a weight before every prefix"),
    (["-1", "a"], "^data.train: weight -1.0 of a: expected a number above 0$"),
    (["nan", "a"], "^data.train: weight nan of a: expected a number above 0$"),
    (["1", "no/such"], "^data.train: no/such.idx does not exist; expected a data set that flexolmo data wrote"),
])
def test_wrong_blend(build, blend, message):
    with pytest.raises(FlexOlmoError, match=message):
        build(train=blend, train_samples=1)


def test_weights_need_a_number_of_samples(lower, build):
    with pytest.raises(FlexOlmoError, match="^data.valid has weights, so one pass through it has no meaning"):
        build(valid=["1", lower])


@pytest.mark.parametrize(("damage", "message"), [
    (lambda prefix: Path(f"{prefix}.bin").unlink(), "set.bin does not exist; expected"),
    (lambda prefix: Path(f"{prefix}.idx").write_bytes(b""), "set.idx is not the index of a Megatron data set"),
    (lambda prefix: Path(f"{prefix}.idx").write_bytes(b"x" * 100), "set.idx is not the index of a Megatron data set"),
    (lambda prefix: os.truncate(f"{prefix}.idx", 100), "set.idx is not the index of a Megatron data set, or is trunc"),
    (lambda prefix: os.truncate(f"{prefix}.bin", 100),
     r"set.bin has 100 bytes; expected 2,\d\d\d \(1,\d\d\d tokens of uint16\) by its index$"),
    (lambda prefix: (Path(f"{prefix}.bin").write_bytes(b""),
                     Path(f"{prefix}.idx").write_bytes(struct.pack("<9sQBQQQ", b"MMIDIDX\0\0", 1, 8, 0, 1, 0))),
     "set holds no tokens$"),
])
def test_damaged_data_set(tmp_path, build, damage, message):
    prefix = make(tmp_path, "set", LOWER)
    damage(prefix)
    with pytest.raises(FlexOlmoError, match=f"^data.train: .*{message}"):
        build(train=prefix, train_samples=1)


@pytest.mark.parametrize("described", [True, False])
def test_token_outside_of_the_vocabulary(tmp_path, build, described):
    prefix = make(tmp_path, "set", LOWER)
    if not described:
        Path(f"{prefix}.json").unlink()
    build(train=prefix, train_samples=1)
    with pytest.raises(FlexOlmoError, match=f"^{prefix}.bin holds token id 256; expected ids below the model's "
                                            "vocabulary size, 256: was it made with another tokenizer"):
        build(train=prefix, train_samples=1, vocab_size=256)


def test_data_of_another_tokenizer(lower, build, word_tokenizer):
    tokenizer = load_tokenizer({"type": "huggingface", "path": str(word_tokenizer)})
    with pytest.raises(FlexOlmoError, match=rf"^{lower} was tokenized with {{'type': 'byte'}} \(257 ids, end of docum"):
        build(train=lower, train_samples=1, tokenizer=tokenizer, vocab_size=1000)


def test_cache_that_cannot_be_written(lower, build):
    with pytest.raises(FlexOlmoError, match="^cannot write the indices of the data to /proc/nowhere: "):
        build(train=lower, train_samples=1, cache_dir="/proc/nowhere")


def test_missing_compiled_helpers(lower, build, monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.core.datasets.helpers_cpp", None)
    with pytest.raises(FlexOlmoError, match="^megatron-core's compiled helpers for data sets are missing; install"):
        build(train=lower, train_samples=1)


SCRIPT = """
import sys, torch
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.training.datasets import batches, build_datasets
from flexolmo_megatron.training.tokenizer import ByteTokenizer
rank, folder, good = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
def build(train):
    return build_datasets(train=train, train_samples=20, sequence_length=16, seed=7, tokenizer=ByteTokenizer(),
                          vocab_size=257, cache_dir=f"{folder}/cache").train
try:
    build("no/such")
except FlexOlmoError as error:
    print(error)
for batch in batches(build(["1", good, "1", good]), micro_batch_size=2, data_parallel_rank=rank, data_parallel_size=2):
    print(batch["tokens"].tolist())
"""


def test_two_ranks(lower, build, tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    ranks = [subprocess.Popen([sys.executable, "-W", "ignore", tmp_path / "run.py", str(rank), tmp_path, lower],
                              stdout=subprocess.PIPE, text=True) for rank in range(2)]
    printed = [rank.communicate(timeout=120)[0].splitlines() for rank in ranks]
    assert [lines.pop(0) for lines in printed] == [
        "data.train: no/such.idx does not exist; expected a data set that flexolmo data wrote, named without its "
        "suffix"] * 2
    dataset = build(train=["1", lower, "1", lower], train_samples=20).train
    expected = [str(batch["tokens"].tolist()) for batch in batches(dataset, micro_batch_size=2)]
    assert [line for step in zip(*printed, strict=True) for line in step] == expected
