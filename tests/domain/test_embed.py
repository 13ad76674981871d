import numpy as np
import pytest

from flexolmo_megatron.domain.embed import display_name, domain_vector, mean_embedding
from flexolmo_megatron.domain.projection import orthogonal_projection
from flexolmo_megatron.errors import FlexOlmoError

DIGEST = "cd" * 32


def make(embedder, texts, **keywords):
    return domain_vector(embedder, texts, **{"hidden_size": 4, "dense_digest": DIGEST, "seed": 3, **keywords})


def test_mean_scaled_to_unit_norm(fake_embedder):
    rows = {"a": [[1, 0, 0, 0], [0, 2, 0, 0]], "bbb": [[0, 1, 0, 0], [0, 4, 0, 0]]}
    vector = make(fake_embedder(rows), ["a", "bbb"])
    np.testing.assert_allclose(vector.vectors, [[0.5**0.5, 0.5**0.5, 0, 0], [0, 1, 0, 0]], rtol=1e-6)
    assert vector.vectors.dtype == np.float32
    assert (vector.embedder, vector.embedder_digest, vector.dense_digest) == ("fake", "ab" * 32, DIGEST)
    assert (vector.documents, vector.dropped, vector.seed, vector.norm) == (2, 0, 3, 1.0)
    np.testing.assert_allclose(make(fake_embedder(rows), ["a", "bbb"], norm=4).vectors, 4 * vector.vectors, rtol=1e-6)


def test_batches_are_sorted_by_length_and_do_not_change_the_mean(fake_embedder):
    random = np.random.default_rng(0)
    rows = {"x" * length: random.standard_normal((2, 4)) for length in range(1, 8)}
    texts = list(rows)
    random.shuffle(texts)
    embedder = fake_embedder(rows)
    mean, dropped = mean_embedding(embedder, texts, batch_size=3)
    assert [[len(text) for text in batch] for batch in embedder.batches] == [[7, 6, 5], [4, 3, 2], [1]]
    assert mean.dtype == np.float64 and dropped == 0
    np.testing.assert_allclose(mean, np.mean(list(rows.values()), axis=0), atol=1e-6)
    np.testing.assert_allclose(mean_embedding(embedder, texts, batch_size=100)[0], mean, atol=1e-12)


def test_documents_without_a_finite_embedding_are_dropped_and_counted(fake_embedder):
    rows = {"a": [[3, 0, 0, 0], [0, 1, 0, 0]],
            "b": [[1, 0, 0, 0], [np.nan, 0, 0, 0]],
            "c": [[np.inf, 0, 0, 0], [0, 0, 0, 1]]}
    vector = make(fake_embedder(rows), ["a", "b", "c"])
    assert (vector.documents, vector.dropped) == (1, 2)
    np.testing.assert_allclose(vector.vectors, [[1, 0, 0, 0], [0, 1, 0, 0]])
    with pytest.raises(FlexOlmoError, match="^none of 2 documents has a finite embedding by fake: expected"):
        make(fake_embedder(rows), ["b", "c"])


def test_mean_of_zero_is_refused(fake_embedder):
    rows = {"a": [[1, 0, 0, 0]], "b": [[-1, 0, 0, 0]]}
    with pytest.raises(FlexOlmoError, match="^the embeddings of 2 documents by fake average to zero, which has no d"):
        make(fake_embedder(rows), ["a", "b"])


@pytest.mark.parametrize("dimension", [3, 6])
def test_other_dimension_is_projected_by_the_anchors_digest(fake_embedder, dimension):
    rows = np.random.default_rng(0).standard_normal((2, dimension))
    embedder = fake_embedder({"a": rows[:1], "b": rows[1:]})
    vector = make(embedder, ["a", "b"])
    expected = rows.mean(axis=0) @ orthogonal_projection(dimension, 4, DIGEST)
    np.testing.assert_allclose(vector.vectors, [expected / np.linalg.norm(expected)], atol=1e-6)
    other = make(embedder, ["a", "b"], dense_digest="ef" * 32)
    assert np.abs(other.vectors - vector.vectors).max() > 0.1


@pytest.mark.parametrize(("keywords", "message"), [
    ({"batch_size": 0}, "^--batch-size 0: expected a number of at least 1$"),
    ({"norm": 0.0}, "^--scale 0.0: expected a number above 0$"),
    ({"norm": float("nan")}, "^--scale nan: expected a number above 0$"),
])
def test_impossible_options(fake_embedder, keywords, message):
    with pytest.raises(FlexOlmoError, match=message):
        make(fake_embedder({"a": [[1, 0, 0, 0]]}), ["a"], **keywords)


def test_name_of_a_folder_hides_where_it_is(tmp_path):
    (tmp_path / "model").mkdir()
    assert display_name(str(tmp_path / "model")) == "model"
    assert display_name("GritLM/GritLM-7B") == "GritLM/GritLM-7B"


def test_a_stopped_run_goes_on(fake_embedder, tmp_path, monkeypatch):
    monkeypatch.setattr("flexolmo_megatron.domain.sample_pass.SAVE_INTERVAL", 0)
    random = np.random.default_rng(1)
    rows = {"x" * length: random.standard_normal((2, 4)) for length in range(1, 10)}
    rows["x" * 9][0, 0] = np.nan
    texts, file = list(rows), tmp_path / "v.state"
    expected = mean_embedding(fake_embedder(rows), texts, 2)

    stopped = fake_embedder(rows)
    embed = stopped.embed

    def stop(batch):
        if len(stopped.batches) == 3:
            raise KeyboardInterrupt
        return embed(batch)

    monkeypatch.setattr(stopped, "embed", stop)
    with pytest.raises(KeyboardInterrupt):
        mean_embedding(stopped, texts, 2, resume=file)
    again = fake_embedder(rows)
    mean, dropped = mean_embedding(again, texts, 2, resume=file)
    assert [[len(text) for text in batch] for batch in again.batches] == [[3, 2], [1]]
    np.testing.assert_array_equal(mean, expected[0])
    assert dropped == expected[1] == 1

    other = fake_embedder(rows)
    mean_embedding(other, texts[:-1], 2, resume=file)
    assert len(other.batches) == 4  # another sample: nothing of it was done
    file.write_bytes(b"junk")
    with pytest.raises(FlexOlmoError, match="v.state is not what an earlier start has left"):
        mean_embedding(other, texts, 2, resume=file)


def test_centred_rows_are_the_difference_of_directions(fake_embedder):
    rows = {"a": [[0, 2, 0, 0], [0, 0, 3, 0]]}
    vector = make(fake_embedder(rows), ["a"], norm=2, centre=np.array([[5, 0, 0, 0], [0, 0, 0, 7.0]]))
    np.testing.assert_allclose(vector.vectors, 2 * 0.5**0.5 * np.array([[-1, 1, 0, 0], [0, 0, 1, -1]]), rtol=1e-6)
    assert vector.centred and vector.record()["centred"] is True
    with pytest.raises(FlexOlmoError, match="^the direction of 1 documents differs from the anchor's by zero, which"):
        make(fake_embedder(rows), ["a"], centre=np.array([[0, 1, 0, 0], [0, 0, 1, 0]]))
