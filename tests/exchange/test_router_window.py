"""The window over which owners' routing logits were averaged: all experts of a model have the same."""

import json

import pytest

from flexolmo_megatron.convert.model import open_model, save_model, select_experts
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.exchange.merge import merge, remove
from flexolmo_megatron.exchange.package import open_package, pack
from flexolmo_megatron.exchange.verify import verify
from tests.exchange.conftest import build_pair


@pytest.fixture
def packed(digest, tmp_path):
    """Pack an expert with this name and window: ``packed("law", 4)``."""
    def write(name: str, window: int):
        path = tmp_path / name
        pack(build_pair(len(name), digest, window=window), digest, path, name=name)
        return path

    return write


def test_a_merged_model_has_the_window_of_its_experts(anchor, packed, tmp_path):
    packages = [verify(packed(name, 4), anchor) for name in ("law", "math")]
    merged = merge(anchor, packages[:1])
    assert merged.card.model.router_window == 4
    both = merge(merged, packages[1:])
    assert both.card.model.router_window == 4
    alone = remove(both, ["law", "math"])
    assert alone.card.model.router_window == 1, "an anchor alone takes any owners"
    assert merge(alone, [verify(packed("code", 7), anchor)]).card.model.router_window == 7
    save_model(both, tmp_path / "merged", "megatron")
    assert open_model(tmp_path / "merged").card.model.router_window == 4


def test_experts_of_other_windows_are_refused(anchor, packed):
    law, math = (verify(packed(name, window), anchor) for name, window in (("law", 4), ("math", 1)))
    message = (rf"^package {math.path} was trained with expert.router_window = 1, but package {law.path} with 4: "
               "expected the same for all experts of a model$")
    with pytest.raises(FlexOlmoError, match=message):
        merge(anchor, [law, math])
    with pytest.raises(FlexOlmoError, match="= 1, but the given model with 4: expected the same"):
        merge(merge(anchor, [law]), [math])


def test_the_papers_window_is_not_named(packed):
    path = packed("law", 1)
    assert "router_window" not in json.loads((path / "manifest.json").read_text())["architecture"]
    assert open_package(path).manifest.architecture.router_window == 1


@pytest.mark.parametrize("window", [0, True, 1.5, "4"])
def test_an_impossible_window_is_refused(packed, window):
    path = packed("law", 4)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["architecture"]["router_window"] = window
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FlexOlmoError, match=r"manifest.json: architecture.router_window = "):
        open_package(path)


@pytest.mark.parametrize("bias", [False, True])
def test_hugging_face_has_no_place_for_it(anchor, digest, tmp_path, bias):
    pack(build_pair(3, digest, window=4, bias=bias), digest, tmp_path / "law", name="law")
    merged = merge(anchor, [verify(tmp_path / "law", anchor)])
    with pytest.raises(FlexOlmoError, match="averaged over 4 positions, which the Hugging Face format has no place"):
        save_model(merged, tmp_path / "hf", "hf")
    assert not (tmp_path / "hf").exists()
    save_model(select_experts(merged, ["public"]), tmp_path / "hf", "hf", drop_bias=True)
    assert open_model(tmp_path / "hf").card.model.router_window == 1
