"""Shards on this machine: how files are divided, and what is refused before any work."""

import json
from collections import Counter

import numpy as np
import pytest

from flexolmo_megatron import shards
from flexolmo_megatron.cli import main
from flexolmo_megatron.domain.proxy_state import ProxyState
from flexolmo_megatron.domain.proxy_steps import SaveScores
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.shards.documents import ReadDocuments, by_chunk, progress_of
from flexolmo_megatron.shards.run import Where, open_state, progress_folder, run_shards
from flexolmo_megatron.shards.slurm import SlurmOptions, load_slurm_options
from flexolmo_megatron.training import document_pool


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Two files, cut into chunks of 4 and 1 documents or so, with one unusable document."""
    monkeypatch.setattr(document_pool, "CHUNK_BYTES", 100)
    texts = [f"document {number:03d}" for number in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "{\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "é" * 200}) + "\n" + json.dumps({"text": "end"}) + "\n")
    return [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]


def test_parts_are_the_whole(corpus, tmp_path):
    def read(parts):
        reader = [ReadDocuments(corpus, parts, "text", 1, progress_folder(tmp_path / str(parts)))
                  for _ in range(2 * parts)]
        return [list(one.run(rank=rank)) for rank, one in enumerate(reader)], reader

    (first, second), _ = read(1)
    assert [document.metadata["line"] for document in first] == list(range(1, 21))
    assert [(document.text, document.id, document.metadata) for document in second] == [
        ("é" * 200, "b.jsonl:1", {"line": 1, "bytes": 400, "chunk": 0}),
        ("end", "b.jsonl:2", {"line": 2, "bytes": 3, "chunk": 1})]
    assert progress_of(tmp_path / "1" / "progress") == (22, 20 * 12 + 403)
    divided, readers = read(3)
    assert all(divided[:3]) and [len(part) for part in divided[3:]] == [1, 1, 0]
    for whole, parts in ((first, divided[:3]), (second, divided[3:])):
        assert sorted(sum(parts, []), key=lambda document: document.metadata["line"]) == whole
        batches = [batch for part in parts for batch in by_chunk(iter(part))]
        assert {tuple(document.id for document in batch) for batch in batches} == {
            tuple(document.id for document in batch) for batch in by_chunk(iter(whole))}
    assert sum((one.bad.counts for one in readers), Counter()) == {"broken JSON": 1}


def test_a_folder_of_something_else_is_left_alone(corpus, tmp_path):
    folder = tmp_path / "out.state"
    folder.mkdir()
    (folder / ".plan.json.host.1.partial").touch()  # of a start that was killed
    assert open_state(tmp_path / "out", {}, {"files": corpus}) == folder
    (folder / "plan.json").rename(folder / "thesis.txt")
    with pytest.raises(FlexOlmoError, match=r"out.state is no folder of an earlier start, and would be removed"):
        open_state(tmp_path / "out", {}, {"files": corpus})
    assert (folder / "thesis.txt").exists()


def test_scores_of_parts_are_joined_in_the_order_of_the_file(corpus, tmp_path):
    class Mark(ReadDocuments):
        def run(self, data=None, rank=0, world_size=1):
            for document in super().run(data, rank, world_size):
                document.metadata["logit"] = -document.metadata["line"] / 2
                yield document

    state = ProxyState(tmp_path / "out", {}, {"files": corpus})
    folder = tmp_path / "run"
    reader = Mark(corpus, 2, "text", 1, progress_folder(folder))
    run_shards([reader, SaveScores(state, reader)], 4, folder, Where(1), "marking")
    first, second = state.scores(2, 2)
    assert first.lines.tolist() == list(range(1, 21)) and second.lines.tolist() == [1, 2]
    np.testing.assert_array_equal(first.logits, -np.arange(1, 21) / 2)
    assert first.sizes.tolist() == [12] * 20 and first.bad == {"broken JSON": 1} and second.bad == {}
    assert (state.parts(3), state.parts(5)) == (3, 3)  # a later start with more processes keeps the division


@pytest.mark.parametrize("text, message", [
    ("partition: x\ntime: 12:00:00", r": time = 43200: expected text in quotes, as '12:00:00'"),
    ("partition: x\ntime: 1\ntask: 3", r": unknown option 'task' \(did you mean 'tasks'\?\)$"),
    ("partition: x", "^time has no value; set it in a YAML file or with time="),
    ("partition: x\ntime: 1-00:00:00\ntasks: 0", ": tasks = 0: expected a number of at least 1$"),
])
def test_bad_options_of_slurm(tmp_path, text, message):
    (tmp_path / "slurm.yaml").write_text(text)
    with pytest.raises(FlexOlmoError, match=message):
        load_slurm_options(str(tmp_path / "slurm.yaml"))


def test_where_slurm_is_not(corpus, tmp_path, monkeypatch):
    where = Where(1, SlurmOptions("batch", "01:00:00"))
    reader = ReadDocuments(corpus, 1, "text", 1, progress_folder(tmp_path / "run"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FlexOlmoError, match="^--slurm: sbatch was not found; expected the clients of Slurm on this m"):
        run_shards([reader], 2, tmp_path / "run", where, "x")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with pytest.raises(FlexOlmoError, match="^--slurm cannot be used within a task of a Slurm job array: "):
        run_shards([reader], 2, tmp_path / "run", where, "x")


def test_without_datatrove(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shards.importlib.util, "find_spec", lambda name: None)
    assert main(["mix", "news"]) == 2
    assert capsys.readouterr().err == ("flexolmo: flexolmo mix needs datatrove; install it with: pip install "
                                       "'flexolmo-megatron[datatrove]'\n")
