import json
import os
import pickle
import resource
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from flexolmo_megatron.convert.huggingface import open_huggingface, save_huggingface
from flexolmo_megatron.convert.lazy import LazyModel, LazyTensor
from flexolmo_megatron.convert.megatron import open_megatron
from flexolmo_megatron.convert.megatron_writer import save_megatron
from flexolmo_megatron.convert.names import MegatronTensor, fill_region, megatron_tensors
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.exchange.inspect import describe
from flexolmo_megatron.runtime.setup import initialize

from .conftest import assert_same_tensors, lazy_model, save_pretrained


@pytest.fixture
def one_rank() -> None:
    """A process group of one, for Megatron's own reader and writer."""
    initialize()


def full_tensors(model: LazyModel) -> dict[str, torch.Tensor]:
    """Every Megatron tensor of a model, whole."""
    return {key: fill_region(tensor, (0,) * len(tensor.shape), tensor.shape, model.tensors)
            for key, tensor in megatron_tensors(model.card.model, model.card.kind).items()}


@pytest.mark.parametrize(("experts", "groups", "shard"), [(0, 4, "12KB"), (0, 2, "1GB"), (1, 4, "1GB"), (3, 2, "12KB")])
def test_round_trip_from_and_to_hugging_face(tmp_path, experts, groups, shard):
    source = save_pretrained(tmp_path / "in", experts, groups, dtype=torch.bfloat16, max_shard_size=shard)
    original = open_huggingface(source)
    save_megatron(original, tmp_path / "megatron")
    found = open_megatron(tmp_path / "megatron")
    assert found.card == original.card
    assert_same_tensors(found, original)
    save_huggingface(found, tmp_path / "out", max_shard_bytes=20_000)
    assert_same_tensors(open_huggingface(tmp_path / "out"), original)


@pytest.mark.parametrize("kind", ["dense", "moe", "pair"])
@pytest.mark.parametrize("bias", [False, True])
def test_every_kind_comes_back(tmp_path, kind, bias):
    model = lazy_model(kind, dtype=torch.bfloat16, router_bias=bias and kind != "dense")
    save_megatron(model, tmp_path / "out")
    found = open_megatron(tmp_path / "out")
    assert found.card == model.card
    assert_same_tensors(found, model)


@pytest.mark.parametrize("kind", ["dense", "moe", "pair"])
def test_megatron_loads_what_was_saved(tmp_path, one_rank, kind):
    model = lazy_model(kind, dtype=torch.bfloat16, router_bias=kind != "dense")
    save_megatron(model, tmp_path / "out")
    expected = full_tensors(model)
    state = {}
    for key, tensor in expected.items():
        if ".experts." in key:  # as a module list of experts asks for them: one by one, with an expert axis in front
            for expert in range(len(tensor)):
                state[f"{key}/{expert}"] = ShardedTensor.from_rank_offsets(
                    key, torch.empty(tensor.shape[1:], dtype=tensor.dtype), (0, expert, len(tensor)),
                    prepend_axis_num=1)
        else:
            state[key] = ShardedTensor.from_rank_offsets(key, torch.empty(tensor.shape, dtype=tensor.dtype))
    loaded = dist_checkpointing.load(state, str(tmp_path / "out"), strict="raise_all")
    for key, tensor in expected.items():
        if ".experts." in key:
            for expert in range(len(tensor)):
                assert torch.equal(loaded[f"{key}/{expert}"], tensor[expert]), (key, expert)
        else:
            assert torch.equal(loaded[key], tensor), key


def test_what_megatron_saved_in_pieces_is_read(tmp_path, one_rank):
    """As tensor parallel 2 and one expert per rank would store it, beside an optimizer's tensors."""
    model = lazy_model("moe", router_bias=True)
    state = {"optimizer": ShardedTensor.from_rank_offsets("optimizer.state.exp_avg.decoder.x", torch.zeros(3))}
    for key, tensor in full_tensors(model).items():
        axis = {"linear_proj.weight": 1, "experts.linear_fc2.weight": 2}.get(
            next((end for end in ("linear_proj.weight", "experts.linear_fc2.weight") if key.endswith(end)), ""), 0)
        if ".experts." in key:
            for expert in range(len(tensor)):
                for half, part in enumerate(tensor[expert].chunk(2, max(axis - 1, 0))):
                    state[f"{key}/{expert}/{half}"] = ShardedTensor.from_rank_offsets(
                        key, part.contiguous(), (0, expert, len(tensor)), (max(axis, 1), half, 2), prepend_axis_num=1)
        elif tensor.shape[axis] % 2 == 0:
            for half, part in enumerate(tensor.chunk(2, axis)):
                state[f"{key}/{half}"] = ShardedTensor.from_rank_offsets(key, part.contiguous(), (axis, half, 2))
        else:
            state[key] = ShardedTensor.from_rank_offsets(key, tensor)
    directory = tmp_path / "out"
    directory.mkdir()
    dist_checkpointing.save(state, str(directory))
    model.card.save(directory)
    assert_same_tensors(open_megatron(directory), model)


def grid(shape: tuple[int, ...], steps: tuple[int, ...]):
    """All boxes of a grid with the given step in each dimension."""
    boxes = [()]
    for size, step in zip(shape, steps, strict=True):
        boxes = [(*box, (first, min(first + step, size))) for box in boxes for first in range(0, size, step)]
    return tuple(boxes)


@pytest.mark.parametrize("steps", [(1, 1000), (5, 7), (1000, 3), (7, 1000), (1000, 1000)])
def test_any_chunking_is_read(tmp_path, monkeypatch, steps):
    """Chunks that split heads, cross from q to k, hold several experts or only some columns."""
    model = lazy_model("moe", dtype=torch.bfloat16, num_layers=1, router_bias=True)
    monkeypatch.setattr(MegatronTensor, "chunks", property(
        lambda self: grid(self.shape, {1: steps[:1], 2: steps, 3: (2, *steps)}[len(self.shape)])))
    save_megatron(model, tmp_path / "out")
    assert_same_tensors(open_megatron(tmp_path / "out"), model)


def test_a_chunk_that_is_not_stored_in_row_order_is_read(tmp_path, monkeypatch):
    model = lazy_model("dense", num_layers=1)
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda value, file: save(
        value.t().contiguous().t() if isinstance(value, torch.Tensor) and value.dim() == 2 else value, file))
    save_megatron(model, tmp_path / "out")
    monkeypatch.undo()
    assert_same_tensors(open_megatron(tmp_path / "out"), model)


def test_chunks_are_those_of_one_megatron_rank(tmp_path):
    save_megatron(lazy_model("moe"), tmp_path / "out")
    metadata = pickle.loads((tmp_path / "out" / ".metadata").read_bytes())
    fc1 = metadata.state_dict_metadata["decoder.layers.0.mlp.experts.experts.linear_fc1.weight"]
    assert tuple(fc1.size) == (3, 48, 32)
    assert sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in fc1.chunks) == [
        ((expert, half * 24, 0), (1, 24, 32)) for expert in range(3) for half in range(2)]
    assert json.loads((tmp_path / "out" / "metadata.json").read_text()) == {
        "sharded_backend": "torch_dist", "sharded_backend_version": 1,
        "common_backend": "torch", "common_backend_version": 1}


def test_large_checkpoints_are_spread_over_files(tmp_path, monkeypatch):
    monkeypatch.setattr("flexolmo_megatron.convert.megatron_writer.MAX_FILE_BYTES", 20_000)
    model = lazy_model("moe")
    save_megatron(model, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.distcp"))
    assert len(files) > 2 and all(file.stat().st_size < 40_000 for file in files)
    assert_same_tensors(open_megatron(tmp_path / "out"), model)


def test_one_tensor_is_alive_at_a_time(tmp_path):
    alive, most = set(), 0

    def track(name, tensor):
        def read():
            nonlocal most
            value = tensor.read()
            alive.add(name)
            most = max(most, len(alive))
            weakref.finalize(value, alive.discard, name)
            return value
        return LazyTensor(tensor.dtype, tensor.shape, read)

    model = lazy_model("moe")
    model = LazyModel(model.card, {name: track(name, tensor) for name, tensor in model.tensors.items()})
    save_megatron(model, tmp_path / "megatron")
    save_huggingface(model, tmp_path / "hf")
    assert most == 1


@pytest.fixture
def checkpoint(tmp_path):
    save_megatron(lazy_model("moe"), tmp_path / "good")
    return tmp_path / "good"


def test_truncated_and_missing_files(checkpoint):
    data = checkpoint / "__0_0.distcp"
    full = data.read_bytes()
    data.write_bytes(full[:-1])
    with pytest.raises(FlexOlmoError, match=f"is truncated: {len(full) - 1} bytes, expected at least {len(full)}"):
        open_megatron(checkpoint)
    data.unlink()
    with pytest.raises(FlexOlmoError, match="good: '__0_0.distcp' is missing: expected it beside .metadata, which"):
        open_megatron(checkpoint)
    metadata = checkpoint / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:-40])
    with pytest.raises(FlexOlmoError, match=".metadata is truncated or damaged"):
        open_megatron(checkpoint)
    metadata.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(FlexOlmoError, match=".metadata (is truncated or damaged|is not the metadata of a torch_dist)"):
        open_megatron(checkpoint)
    metadata.unlink()
    with pytest.raises(FlexOlmoError, match="has no .metadata: expected a complete Megatron checkpoint"):
        open_megatron(checkpoint)
    (checkpoint / "flexolmo.json").unlink()
    with pytest.raises(FlexOlmoError, match="flexolmo.json does not exist; expected the card of a FlexOlmo checkpoint"):
        open_megatron(checkpoint)


def test_damaged_record(checkpoint):
    data = checkpoint / "__0_0.distcp"
    model = open_megatron(checkpoint)
    data.write_bytes(bytes(data.stat().st_size))
    with pytest.raises(FlexOlmoError, match="the record at byte 0 cannot be read, the file is truncated or damaged"):
        model.tensors["model.embed_tokens.weight"].read()


def test_file_that_goes_after_it_was_opened(checkpoint):
    model = open_megatron(checkpoint)
    model.tensors["lm_head.weight"].read()
    data = checkpoint / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:2000])
    with pytest.raises(FlexOlmoError, match="__0_0.distcp is truncated: 2000 bytes, expected at least"):
        model.tensors["lm_head.weight"].read()
    data.unlink()
    with pytest.raises(FlexOlmoError, match="__0_0.distcp cannot be read: No such file"):
        model.tensors["lm_head.weight"].read()


def edit_metadata(checkpoint, change):
    path = checkpoint / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def test_missing_unexpected_and_misshapen_tensors(checkpoint, tmp_path):
    key = "decoder.final_layernorm.weight"
    copies = [shutil.copytree(checkpoint, tmp_path / f"copy{number}") for number in range(4)]
    edit_metadata(copies[0], lambda metadata: metadata.state_dict_metadata.pop(key))
    with pytest.raises(FlexOlmoError, match=rf"tensor {key} is missing: expected shape \[32\]"):
        open_megatron(copies[0])
    edit_metadata(copies[1], lambda metadata: metadata.state_dict_metadata.update(
        {"decoder.layers.7.mlp.router.weight": metadata.state_dict_metadata[key]}))
    with pytest.raises(FlexOlmoError, match=r"unexpected tensor decoder.layers.7.mlp.router.weight of shape \[32\]"):
        open_megatron(copies[1])
    edit_metadata(copies[2], lambda metadata: setattr(metadata.state_dict_metadata[key], "size", torch.Size([31])))
    with pytest.raises(FlexOlmoError, match=rf"tensor {key} has shape \[31\]: expected \[32\]"):
        open_megatron(copies[2])
    edit_metadata(copies[3], lambda metadata: metadata.state_dict_metadata["output_layer.weight"].chunks.clear())
    with pytest.raises(FlexOlmoError, match="tensor output_layer.weight has 0 of 1696 numbers: expected a complete"):
        open_megatron(copies[3])


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("where", ["alone", "inside"])
def test_metadata_of_a_stranger_runs_no_code(checkpoint, tmp_path, where):
    attack = Attack(tmp_path / "was unpickled")
    if where == "alone":
        (checkpoint / ".metadata").write_bytes(pickle.dumps(attack))
    else:
        edit_metadata(checkpoint, lambda metadata: setattr(metadata, "planner_data", attack))
    for opening in (open_megatron, describe):
        with pytest.raises(FlexOlmoError, match=r"\.metadata names '(posix|os)\.mkdir', which the metadata of a "
                                                "checkpoint never does; it is refused because it could run code"):
            opening(checkpoint)
    assert not attack.marker.exists()


@pytest.mark.parametrize("target", ["cpathlib\nPosixPath\n", "ctorch.serialization\n_get_layout\n"])
def test_metadata_of_a_stranger_changes_no_class(checkpoint, target):
    # The pickle: target, BUILD with (None, {"cache": "x"}), which would be setattr(target, "cache", "x").
    (checkpoint / ".metadata").write_bytes(f"{target}(N(Vcache\nVx\ndtb.".encode())
    cache = torch.serialization._get_layout.cache
    with pytest.raises(FlexOlmoError, match="metadata changes something else than a record of a checkpoint"):
        open_megatron(checkpoint)
    assert torch.serialization._get_layout.cache is cache and not hasattr(Path, "cache")


@pytest.mark.parametrize("offsets, sizes", [([0, 0], [-53, -32]), ([0, 0], [53.0, 32.0]), ([1, 0], [53, 32])])
def test_parts_that_are_none_are_refused(checkpoint, offsets, sizes):
    def change(metadata):
        tensor = metadata.state_dict_metadata["output_layer.weight"]
        vars(tensor.chunks[0]).update(offsets=offsets, sizes=sizes)

    edit_metadata(checkpoint, change)
    with pytest.raises(FlexOlmoError, match=r"a part of output_layer.weight is said to be at .*: expected a part of"):
        open_megatron(checkpoint)


@pytest.mark.parametrize("change, message", [
    ({"relative_path": "../good/__0_0.distcp"}, r"at 0 of '\.\./good/__0_0\.distcp': expected a place in a file of"),
    ({"relative_path": ".."}, r"'\.\.' is missing: expected it beside \.metadata"),
    ({"offset": -1}, "at -1 of '__0_0.distcp': expected a place in a file of this folder"),
    ({"offset": "0"}, r"what \.metadata says about embedding\.word_embeddings\.weight is damaged: '<' not supp"),
    ({"relative_path": None}, r"what \.metadata says about embedding\.word_embeddings\.weight is damaged: "),
])
def test_places_outside_the_folder_are_refused(checkpoint, change, message):
    def move(metadata):
        place = next(place for index, place in metadata.storage_data.items() if "word_embeddings" in index.fqn)
        vars(place).update(change)

    edit_metadata(checkpoint, move)
    with pytest.raises(FlexOlmoError, match=message):
        open_megatron(checkpoint)


def test_tensors_without_a_size_are_refused(checkpoint):
    edit_metadata(checkpoint, lambda metadata: setattr(
        metadata.state_dict_metadata["decoder.final_layernorm.weight"], "size", 32))
    with pytest.raises(FlexOlmoError, match="is not the metadata of a torch_dist checkpoint"):
        open_megatron(checkpoint)


def test_a_chunk_without_a_place_and_a_record_of_another_shape(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    edit_metadata(copy, lambda metadata: metadata.storage_data.clear())
    with pytest.raises(FlexOlmoError, match=r"the part of embedding.word_embeddings.weight at \[0, 0\] is missing"):
        open_megatron(copy)

    def swap(metadata):
        places = {index.fqn: index for index in metadata.storage_data}
        norm, head = places["decoder.final_layernorm.weight"], places["output_layer.weight"]
        metadata.storage_data[head] = metadata.storage_data[norm]

    edit_metadata(checkpoint, swap)
    with pytest.raises(FlexOlmoError, match=r"holds torch.float32 \[32\]: expected torch.float32 \[53, 32\], as"):
        open_megatron(checkpoint).tensors["lm_head.weight"].read()


def test_tensors_to_save_are_checked(tmp_path):
    model = lazy_model("dense")
    del model.tensors["model.norm.weight"]
    with pytest.raises(FlexOlmoError, match="the model to save: tensor model.norm.weight is missing"):
        save_megatron(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("save", [save_megatron, save_huggingface])
def test_a_full_disk_leaves_nothing(tmp_path, save):
    model = lazy_model("dense", vocab_size=300_000)  # larger than Python's buffer: torch writes it straight to the file
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, limits[1]))
    try:
        with pytest.raises(FlexOlmoError, match="cannot write .*out: File too large; nothing was changed there"):
            save(model, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_a_moved_checkpoint_has_its_tokenizer_with_it(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    model = lazy_model("moe")
    named = replace(model, card=replace(model.card, tokenizer={"type": "huggingface", "path": str(folder)}))
    save_megatron(named, tmp_path / "a")
    assert open_megatron(tmp_path / "a").card.tokenizer["path"] == str(folder)
    folder.rename(tmp_path / "gone")
    (tmp_path / "a").rename(tmp_path / "b")
    assert open_megatron(tmp_path / "b").card.tokenizer == {"type": "huggingface", "path": str(tmp_path / "b")}
    save_megatron(open_megatron(tmp_path / "b"), tmp_path / "c")
    assert (tmp_path / "c" / "tokenizer.json").read_text() == "{}"
