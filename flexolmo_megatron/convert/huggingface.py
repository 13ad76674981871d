"""A Hugging Face directory of an Olmo2 or FlexOlmo model, in and out, one tensor at a time.

Only safetensors files are read: pickled weights (.bin) are refused, because loading a pickle runs code from it.
"""

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from flexolmo_megatron.config.card import CARD_FILE, Kind, ModelCard, numbered_experts
from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.convert.huggingface_config import SPECIAL_TOKENS, parse_config, render_config
from flexolmo_megatron.convert.lazy import LazyModel, LazyTensor
from flexolmo_megatron.convert.names import check_tensors, expected_tensors
from flexolmo_megatron.convert.rows import open_rows, save_rows, without_bias
from flexolmo_megatron.convert.safetensors_io import open_file, write_shards
from flexolmo_megatron.convert.tokenizer_files import copy_tokenizer, tokenizer_folder, tokenizer_in
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.files import atomic_directory, read_json, write_json

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 5_000_000_000

WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BYTE_VOCABULARY = 512
"""Largest vocabulary that is taken for the 257 ids of the byte tokenizer, padded."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def _open_sharded(directory: Path) -> dict[str, LazyTensor]:
    path = directory / INDEX_FILE
    index = read_json(path, "the index of a sharded model")
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        raise FlexOlmoError(f"{path} has no weight_map: expected an object of tensor name to file name")
    tensors: dict[str, LazyTensor] = {}
    for file_name in sorted(set(weight_map.values())):
        if Path(file_name).name != file_name or not file_name.endswith(".safetensors"):
            raise FlexOlmoError(f"{path} names the file {file_name!r}: expected a .safetensors file in the same "
                                "directory")
        shard = open_file(directory / file_name)
        listed = {name for name, target in weight_map.items() if target == file_name}
        if absent := sorted(listed - shard.keys()):
            raise FlexOlmoError(f"{directory / file_name}: tensor {absent[0]} is missing, which {INDEX_FILE} places "
                                "there")
        if extra := sorted(shard.keys() - listed):
            raise FlexOlmoError(f"{directory / file_name}: unexpected tensor {extra[0]}, which {INDEX_FILE} does not "
                                "place there")
        tensors |= shard
    return tensors


def _open_tensors(directory: Path) -> dict[str, LazyTensor]:
    if (directory / SINGLE_FILE).exists():
        return open_file(directory / SINGLE_FILE)
    if (directory / INDEX_FILE).exists():
        return _open_sharded(directory)
    pickled = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLES)
    if pickled:
        raise FlexOlmoError(f"{directory} has its weights in {pickled[0]}, a pickle, which can run code when it is "
                            f"loaded: expected {SINGLE_FILE} or {INDEX_FILE}")
    raise FlexOlmoError(f"{directory} has no weights: expected {SINGLE_FILE} or {INDEX_FILE}")


def _check_count(config: ModelConfig, tensors: dict[str, LazyTensor], where: str) -> None:
    """Refuse sizes that the files cannot hold before lists of that many experts and tensors are made."""
    count = config.num_layers * max(1, config.num_experts)
    if count > len(tensors):
        raise FlexOlmoError(f"{where}: {config.num_layers} layers with {config.num_experts} experts each: expected no "
                            f"more of them than tensors, of which the files have {len(tensors)}")


def _card(directory: Path, config: ModelConfig, kind: Kind) -> ModelCard:
    """Return the directory's own card, or a new one with numbered experts."""
    where = str(directory / CONFIG_FILE)
    if not (directory / CARD_FILE).exists():
        card = ModelCard(kind, config, numbered_experts(config.num_experts))
        # A larger vocabulary is not one of bytes: loading a tokenizer that is not there then says so.
        missing = {"type": "huggingface", "path": str(directory.resolve())}
        usual = card.tokenizer if config.vocab_size <= _BYTE_VOCABULARY else missing
        return replace(card, tokenizer=tokenizer_in(directory) or usual)
    card = ModelCard.load(directory)
    if card.kind != kind:
        raise FlexOlmoError(f"{directory / CARD_FILE} has kind {card.kind!r}: expected {kind!r}, as {where} says")
    ours, theirs = asdict(card.model), asdict(config)
    for key, value in theirs.items():
        if ours[key] != value:
            raise FlexOlmoError(f"{directory / CARD_FILE} has model.{key} = {ours[key]!r}: expected {value!r}, as "
                                f"{where} says")
    return replace(card, tokenizer=tokenizer_in(directory) or card.tokenizer)


def check_dtypes(tensors: dict[str, LazyTensor], where: str) -> None:
    """Refuse quantised and integer weights, which no part of this package can compute with."""
    for name, tensor in tensors.items():
        if tensor.dtype not in WEIGHT_DTYPES:
            raise FlexOlmoError(f"{where}: tensor {name} has dtype {str(tensor.dtype).removeprefix('torch.')}: "
                                "expected bfloat16, float16 or float32")


def open_huggingface(directory: str | os.PathLike) -> LazyModel:
    """Open a directory that ``save_pretrained`` wrote (Olmo2ForCausalLM or FlexOlmoForCausalLM), or our own export.

    Expert names come from its ``flexolmo.json`` if it has one; otherwise they are public, expert_1, expert_2 and so on.

    Raises:
        FlexOlmoError: a file is missing, broken or pickled; the architecture has an option that is not supported;
            a tensor is missing, unexpected, or of the wrong shape or dtype.
    """
    directory = Path(directory)
    where = str(directory / CONFIG_FILE)
    config, kind = parse_config(read_json(where, "the config.json of a Hugging Face model"), where)
    tensors = _open_tensors(directory)
    _check_count(config, tensors, where)
    card = _card(directory, config, kind)
    expected = expected_tensors(card.model, card.kind)
    check_tensors(tensors, expected, str(directory))
    check_dtypes(tensors, str(directory))
    return LazyModel(card, {name: tensors[name] for name in expected}, open_rows(directory, card))


def describe_bias(model: LazyModel) -> str:
    """Say in one sentence what leaving out the learned router bias changes; reads the biases."""
    biases = {name: tensor.read().float().clamp(max=0) for name, tensor in model.tensors.items()
              if name.endswith(".mlp.gate.bias")}
    names = model.card.expert_names
    moved = [names[expert] for expert in range(len(names)) if any(bias[expert] for bias in biases.values())]
    if not moved:
        return "no expert of any layer has a bias below 0, so dropping it changes no output"
    largest = max(float(bias.abs().max()) for bias in biases.values())
    return (f"dropping it raises the routing logit of {len(moved)} of {len(names)} experts ({', '.join(moved)}) by "
            f"-b, at most {largest:.4g}, so that they are chosen more often and weigh more")


def _special_tokens(tokenizer: dict[str, str]) -> dict[str, Any]:
    """Return the ids that the config.json beside the tokenizer gives; none if there is no such file."""
    folder = tokenizer_folder(tokenizer)
    if folder is None or not (folder / CONFIG_FILE).is_file():
        return {}
    values = read_json(folder / CONFIG_FILE, "the config.json of a Hugging Face model")
    return {key: values[key] for key in SPECIAL_TOKENS if key in values}


def save_huggingface(model: LazyModel, path: str | os.PathLike, drop_bias: bool = False,
                     max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
    """Write a directory that transformers 4.57 and 5.x load: config.json, safetensors, and our flexolmo.json.

    Args:
        model: kind dense or moe.
        path: a new directory, created whole or not at all.
        drop_bias: leave out a learned router bias, for which the format has no place.
        max_shard_bytes: files do not get larger, except for a single larger tensor.

    Raises:
        FlexOlmoError: the model is a pair, has a router_window or a learned bias and drop_bias is not set, or ``path``
            cannot be written.
    """
    if model.card.kind == "pair":
        raise FlexOlmoError("this checkpoint is a pair, which holds only what its owner trained and is no whole "
                            "model: expected a dense or merged one (pack the pair and merge it into its anchor first)")
    card = model.card
    check_tensors(model.tensors, expected_tensors(card.model, card.kind), "the model to save")
    # Before the bias: no option helps where the format has no place for the router itself.
    dtype = model.tensors["lm_head.weight"].dtype
    config = render_config(card.model, card.kind, dtype, _special_tokens(card.tokenizer))
    if card.model.router_bias:
        if not drop_bias:
            raise FlexOlmoError("the model has a learned router bias, for which the Hugging Face format has no place: "
                                f"{describe_bias(model)}; export it with --drop-bias if that is acceptable")
        model = without_bias(model)
    with atomic_directory(path) as directory:
        write_json(directory / CONFIG_FILE, config)
        model.card.save(directory)
        copy_tokenizer(card.tokenizer, directory)
        save_rows(model, directory)
        write_shards(directory, model.tensors, max_shard_bytes)
