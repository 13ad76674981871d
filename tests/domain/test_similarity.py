import json
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.image import imread

from flexolmo_megatron import cli
from flexolmo_megatron.domain.privacy import GaussianMechanism
from flexolmo_megatron.domain.similarity import project
from flexolmo_megatron.domain.vector import DomainVector, save_vector
from flexolmo_megatron.errors import FlexOlmoError

DIGESTS = {"embedder_digest": "ab" * 32, "dense_digest": "cd" * 32}


def vector(rows, norm=1.0, **changes):
    rows = np.array(rows, np.float32)
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True) * norm).astype(np.float32)
    return replace(DomainVector(rows, "anchor", **DIGESTS, documents=1000, dropped=2, seed=7, norm=norm), **changes)


@pytest.fixture
def files(tmp_path):
    vectors = {
        "news": vector([[1, 0, 0], [1, 0, 0]]),
        "math": vector([[0, 1, 0], [1, 1, 0]], norm=4.0),
        "law": vector([[1, 1, 0], [1, 0, 0]], seed=8, privacy=GaussianMechanism(2.0, 1e-6, 1.0)),
        "other": vector([[1, 0, 0]], embedder="GritLM/GritLM-7B", embedder_digest="ef" * 32),
    }
    for name, one in vectors.items():
        save_vector(one, tmp_path / f"{name}.npz")
    return {name: str(tmp_path / f"{name}.npz") for name in vectors}


def test_table(files, capsys):
    assert cli.main(["inspect", *files.values()]) == 0
    printed = capsys.readouterr().out
    lines = [line.replace("│", " ").split() for line in printed.splitlines()]
    half = f"{0.5**0.5:.4f}"
    mean = f"{(0 + 0.5**0.5) / 2:.4f}"
    high = f"{(0.5**0.5 + 1) / 2:.4f}"
    assert ["news", "1", mean, high, "-"] in lines
    assert ["math", mean, "1", half, "-"] in lines
    assert ["other", "-", "-", "-", "1"] in lines
    assert ["news", "2", "x", "3", "anchor@abababababab", "cdcdcdcdcdcd", "1,000", "2", "7", "1", "none"] in lines
    law = " ".join(next(line for line in lines if line[:2] == ["law", "2"]))
    assert "2 8 1 epsilon 2, delta 1e-06, clip 1, sigma 0.00" in law
    assert "- : vectors of different embedders, or of one that reads otherwise, of different" in printed


def test_vectors_that_were_read_in_other_ways(files, tmp_path, capsys):
    for name, reading in (("short", "4 tokens"), ("long", "512 tokens"), ("early", None)):
        save_vector(vector([[1, 0, 0], [1, 0, 0]], reading=reading), tmp_path / f"{name}.npz")
    paths = [str(tmp_path / f"{name}.npz") for name in ("early", "short", "long")]
    assert cli.main(["inspect", *paths]) == 0
    printed = capsys.readouterr().out
    lines = [line.replace("│", " ").split() for line in printed.splitlines()]
    assert ["short", "1.0000", "1", "-"] in lines and ["long", "1.0000", "-", "1"] in lines
    assert cli.main(["inspect", *paths, "--plot", str(tmp_path / "no.png")]) == 2
    assert f"{paths[2]} and {paths[1]} cannot be in one picture" in capsys.readouterr().err


def test_json(files, capsys):
    assert cli.main(["inspect", files["news"], files["math"], "--json"]) == 0
    description = json.loads(capsys.readouterr().out)
    (pair,) = description["similarities"]
    assert (pair["a"], pair["b"]) == (files["news"], files["math"]) and description["incomparable_pairs"] == 0
    assert pair["by_layer"] == pytest.approx([0, 0.5**0.5], abs=1e-6)
    assert pair["cosine"] == pytest.approx(0.5**1.5, abs=1e-6)
    assert description["vectors"][0] == {
        "path": files["news"], "rows": 2, "width": 3, "embedder": "anchor", **DIGESTS, "documents": 1000, "dropped": 2,
        "seed": 7, "norm": 1.0, "privacy": None, "centred": False, "reading": None,
        "discriminant": False}


def test_one_vector_has_no_table_of_similarities(files, capsys):
    assert cli.main(["inspect", files["law"]]) == 0
    assert "cosine" not in capsys.readouterr().out


def test_projection_keeps_the_distances_of_three(files):
    rng = np.random.default_rng(0)
    vectors = [vector(rng.standard_normal((4, 20)), norm=norm) for norm in (1.0, 2.0, 5.0)]
    coordinates, shares = project(vectors)
    for a in range(3):
        for b in range(3):
            rows = vectors[a].vectors / vectors[a].norm - vectors[b].vectors / vectors[b].norm
            expected = np.sqrt((rows**2).sum(axis=1).mean())
            assert np.linalg.norm(coordinates[a] - coordinates[b]) == pytest.approx(expected, abs=1e-5)
    assert sum(shares) == pytest.approx(1) and shares[0] >= shares[1] > 0
    same, shares = project([vectors[0]] * 2)
    assert np.abs(same).max() < 1e-6 and all(np.isfinite(shares))
    with pytest.raises(FlexOlmoError, match="^--plot shows domains relative to each other: expected at least 2 vect"):
        project(vectors[:1])


def test_picture(files, tmp_path, capsys):
    picture = tmp_path / "domains.png"
    assert cli.main(["inspect", files["news"], files["math"], files["law"], "--plot", str(picture)]) == 0
    pixels = imread(picture)
    assert min(pixels.shape[:2]) > 200 and len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 20
    assert cli.main(["inspect", *files.values(), "--plot", str(tmp_path / "no.png")]) == 2
    assert f"{files['other']} and {files['news']} cannot be in one picture" in capsys.readouterr().err
    assert not (tmp_path / "no.png").exists()


def test_bad_input(files, tmp_path, capsys):
    for words in ([files["news"], str(tmp_path)], [str(tmp_path), "--plot", "a.png"]):
        assert cli.main(["inspect", *words]) == 2
        assert "expected one checkpoint or package, or else domain vectors (.npz) alone" in capsys.readouterr().err
    assert cli.main(["inspect", files["news"], "no.npz"]) == 2
    assert "no.npz: no such file" in capsys.readouterr().err
