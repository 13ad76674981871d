"""Models on disk."""

from pathlib import Path

import pytest

from flexolmo_megatron.convert.lazy import LazyModel
from flexolmo_megatron.convert.model import save_model
from flexolmo_megatron.inference.model import Model, load_model
from tests.random_models import random_model


@pytest.fixture(scope="session")
def merged() -> LazyModel:
    """Experts public, code, math and law, of which 2 are active, with a bias."""
    return random_model("moe", 4, 2, bias=True)


@pytest.fixture(scope="session")
def merged_path(merged, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "merged"
    save_model(merged, path, "megatron")
    return path


@pytest.fixture(scope="session")
def model(merged_path) -> Model:
    return load_model(merged_path)


@pytest.fixture(scope="session")
def dense_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "dense"
    save_model(random_model("dense"), path, "megatron")
    return path


@pytest.fixture(scope="session")
def dense(dense_path) -> Model:
    return load_model(dense_path)
