import json
import shutil

import pytest
import safetensors.torch
import torch
import transformers

from flexolmo_megatron.config.card import ModelCard
from flexolmo_megatron.convert.huggingface import describe_bias, open_huggingface, save_huggingface
from flexolmo_megatron.convert.lazy import LazyTensor
from flexolmo_megatron.errors import FlexOlmoError

from .conftest import assert_same_tensors, lazy_model, save_pretrained


def edit_config(directory, remove=(), **changes):
    path = directory / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if key not in remove}))


def saved(directory):
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}


@pytest.mark.parametrize(("experts", "groups", "shard"), [(0, 4, "1GB"), (0, 1, "12KB"), (1, 2, "1GB"), (3, 4, "12KB"),
                                                         (3, 2, "1GB")])
def test_open_has_the_tensors_and_sizes_of_save_pretrained(tmp_path, experts, groups, shard):
    directory = save_pretrained(tmp_path / "in", experts, groups, max_shard_size=shard)
    assert (directory / "model.safetensors.index.json").exists() == (shard == "12KB")
    model = open_huggingface(directory)
    tensors = saved(directory)
    assert model.tensors.keys() == tensors.keys()
    for name, tensor in model.tensors.items():
        assert torch.equal(tensor.read(), tensors[name]), name
    config = model.card.model
    assert (config.num_layers, config.hidden_size, config.ffn_hidden_size, config.num_attention_heads,
            config.num_query_groups, config.vocab_size, config.max_position_embeddings
            ) == (2, 32, 24, 4, groups, 53, 64)
    assert (config.num_experts, config.top_k) == (experts, min(experts, 2))
    assert config.rotary_base == (500_000 if experts else 10_000)
    assert config.layernorm_epsilon == (1e-6 if experts else 1e-5)
    assert model.card.kind == ("moe" if experts else "dense")
    assert model.card.expert_names == ["public", "expert_1", "expert_2"][:experts]


@pytest.mark.parametrize(("experts", "dtype", "max_shard_bytes"), [
    (0, torch.float32, 12_000), (0, torch.bfloat16, 10**9), (1, torch.float32, 10**9), (3, torch.bfloat16, 12_000)])
def test_what_is_saved_loads_in_transformers_with_equal_weights(tmp_path, experts, dtype, max_shard_bytes):
    source = save_pretrained(tmp_path / "in", experts, 2, dtype=dtype)
    model = open_huggingface(source)
    save_huggingface(model, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    assert saved(tmp_path / "out").keys() == saved(source).keys()
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    expected = transformers.AutoModelForCausalLM.from_pretrained(source)
    assert type(loaded) is type(expected) and loaded.dtype == expected.dtype == dtype
    state = loaded.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name
    tokens = torch.arange(10)[None]
    assert torch.equal(loaded(tokens).logits, expected(tokens).logits)
    assert_same_tensors(open_huggingface(tmp_path / "out"), model)


def test_config_holds_what_transformers_4_and_5_need(tmp_path, flex_olmo):
    save_huggingface(open_huggingface(flex_olmo), tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    theirs = json.loads((flex_olmo / "config.json").read_text())
    assert theirs.keys() - values.keys() == {"transformers_version"}
    assert {key: values[key] for key in theirs.keys() - {"transformers_version", "eos_token_id"}} == {
        key: value for key, value in theirs.items() if key not in ("transformers_version", "eos_token_id")}
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 500_000  # 4.57 reads the first
    assert values["torch_dtype"] == values["dtype"] == "float32"
    assert values["pad_token_id"] is None  # the default, 100277, is outside a small vocabulary


def test_config_of_transformers_4(flex_olmo):
    edit_config(flex_olmo, remove=("rope_parameters", "dtype"), rope_theta=12_345.0, rope_scaling=None,
                torch_dtype="float32")
    assert open_huggingface(flex_olmo).card.model.rotary_base == 12_345
    edit_config(flex_olmo, remove=("rope_theta", "rms_norm_eps"))
    assert open_huggingface(flex_olmo).card.model.rotary_base == 500_000
    edit_config(flex_olmo, model_type="flex_olmo", rms_norm_eps=1e-4)
    assert open_huggingface(flex_olmo).card.model.layernorm_epsilon == 1e-4


def test_omitted_keys_of_olmo2_mean_what_transformers_takes(olmo2):
    edit_config(olmo2, remove=("rope_parameters", "rms_norm_eps", "num_key_value_heads"))
    config = open_huggingface(olmo2).card.model
    assert (config.rotary_base, config.layernorm_epsilon, config.num_query_groups) == (10_000, 1e-5, 4)


REFUSED = {
    "tied": ({"tie_word_embeddings": True}, "tie_word_embeddings = True: expected False"),
    "bias": ({"attention_bias": True}, "attention_bias = True: expected False"),
    "renormalised": ({"norm_topk_prob": True}, "norm_topk_prob = True: expected False"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu': expected 'silu'"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config = .*: expected None"),
    "window": ({"sliding_window": 32}, "sliding_window = 32: expected None"),
    "rope scaling": ({"rope_scaling": {"type": "linear", "factor": 2}},
                     "rope_scaling.type = 'linear': expected plain RoPE"),
    "rope parameters": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
                        "rope_parameters.rope_type = 'yarn': expected plain RoPE, without scaling"),
    "partial rope": ({"rope_parameters": {"partial_rotary_factor": 0.5}},
                     "partial_rotary_factor = 0.5: expected plain RoPE"),
    "rope list": ({"rope_parameters": [1]}, r"rope_parameters = \[1\]: expected an object or null"),
    "two thetas": ({"rope_theta": 1e4},
                   "rope_theta = 10000.0 but rope_parameters.rope_theta = 500000.0: expected the same"),
    "theta": ({"rope_theta": "x", "rope_parameters": None}, "rope_theta = 'x': expected a positive number"),
    "model type": ({"model_type": "llama"}, "model_type 'llama': expected one of olmo2, flex_olmo"),
    "no size": ({"hidden_size": None}, "hidden_size = None: expected a positive integer"),
    "bool size": ({"vocab_size": True}, "vocab_size = True: expected a positive integer"),
    "infinite": ({"rms_norm_eps": float("inf")}, "rms_norm_eps = inf: expected a positive number"),
    "top-k": ({"num_experts_per_tok": 4}, "model.top_k = 4: expected 1 to model.num_experts = 3"),
    "heads": ({"num_attention_heads": 5}, "model.num_attention_heads = 5 does not divide model.hidden_size = 32"),
    "head size": ({"head_dim": 16}, "head_dim = 16: expected hidden_size / num_attention_heads = 8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_config_refused(flex_olmo, name):
    changes, message = REFUSED[name]
    edit_config(flex_olmo, **changes)
    with pytest.raises(FlexOlmoError, match=message) as error:
        open_huggingface(flex_olmo)
    assert str(error.value).startswith(f"{flex_olmo / 'config.json'}: ")


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_experts"])
def test_sizes_that_the_files_cannot_hold_cost_nothing(flex_olmo, key):
    edit_config(flex_olmo, **{key: 10**15})
    with pytest.raises(FlexOlmoError, match=r"config.json: \d+ layers with \d+ experts each: expected no more of them "
                                            r"than tensors, of which the files have \d+"):
        open_huggingface(flex_olmo)


def test_config_missing_or_broken(flex_olmo):
    (flex_olmo / "config.json").write_text("{")
    with pytest.raises(FlexOlmoError, match="config.json cannot be read as the config.json of a Hugging Face model"):
        open_huggingface(flex_olmo)
    (flex_olmo / "config.json").write_text('{"model_type": [1]}')
    with pytest.raises(FlexOlmoError, match=r"model_type \[1\]: expected one of olmo2, flex_olmo"):
        open_huggingface(flex_olmo)
    (flex_olmo / "config.json").write_text("[]")
    with pytest.raises(FlexOlmoError, match=r"model_type \[\]: expected one of olmo2, flex_olmo"):
        open_huggingface(flex_olmo)
    (flex_olmo / "config.json").unlink()
    with pytest.raises(FlexOlmoError, match="config.json does not exist; expected the config.json of a Hugging Face"):
        open_huggingface(flex_olmo)


def test_pickled_and_missing_weights(flex_olmo):
    (flex_olmo / "model.safetensors").unlink()
    with pytest.raises(FlexOlmoError, match="has no weights: expected model.safetensors or model.safetensors.index"):
        open_huggingface(flex_olmo)
    torch.save({}, flex_olmo / "pytorch_model.bin")
    with pytest.raises(FlexOlmoError, match="has its weights in pytorch_model.bin, a pickle, which can run code"):
        open_huggingface(flex_olmo)


def test_missing_unexpected_and_misshapen_tensors(flex_olmo):
    file = flex_olmo / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    safetensors.torch.save_file({key: value for key, value in tensors.items() if key != name}, file)
    with pytest.raises(FlexOlmoError, match=rf"tensor {name} is missing: expected shape \[24, 32\]"):
        open_huggingface(flex_olmo)
    safetensors.torch.save_file({**tensors, name: torch.zeros(32, 24)}, file)
    with pytest.raises(FlexOlmoError, match=rf"tensor {name} has shape \[32, 24\]: expected \[24, 32\]"):
        open_huggingface(flex_olmo)
    safetensors.torch.save_file({**tensors, "model.layers.2.mlp.gate.weight": torch.zeros(3, 32)}, file)
    with pytest.raises(FlexOlmoError, match=r"unexpected tensor model.layers.2.mlp.gate.weight of shape \[3, 32\]"):
        open_huggingface(flex_olmo)
    safetensors.torch.save_file({**tensors, name: torch.zeros(24, 32, dtype=torch.int8)}, file)
    with pytest.raises(FlexOlmoError, match=f"tensor {name} has dtype int8: expected bfloat16, float16 or float32"):
        open_huggingface(flex_olmo)


def test_broken_index(tmp_path):
    directory = save_pretrained(tmp_path / "in", 3, max_shard_size="12KB")
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())

    def write(**changes):
        path.write_text(json.dumps({"weight_map": {**index["weight_map"], **changes}}))

    some, file = next(iter(index["weight_map"].items()))
    write(**{some: "../model.safetensors"})
    with pytest.raises(FlexOlmoError, match="names the file '../model.safetensors': expected a .safetensors file in"):
        open_huggingface(directory)
    write(**{some: "pytorch_model.bin"})
    with pytest.raises(FlexOlmoError, match="names the file 'pytorch_model.bin': expected a .safetensors file"):
        open_huggingface(directory)
    write(other=file)
    with pytest.raises(FlexOlmoError, match="tensor other is missing, which model.safetensors.index.json places there"):
        open_huggingface(directory)
    write(**{some: sorted(set(index["weight_map"].values()))[-1]})
    with pytest.raises(FlexOlmoError, match="(unexpected )?tensor .*, which model.safetensors.index.json"):
        open_huggingface(directory)
    path.write_text("{}")
    with pytest.raises(FlexOlmoError, match="has no weight_map: expected an object of tensor name to file name"):
        open_huggingface(directory)
    write()
    (directory / file).unlink()
    with pytest.raises(FlexOlmoError, match=f"{file} does not exist; expected a safetensors file"):
        open_huggingface(directory)


def test_card_gives_the_names_and_must_agree_with_the_config(tmp_path):
    model = lazy_model("moe")
    save_huggingface(model, tmp_path / "out")
    assert open_huggingface(tmp_path / "out").card == model.card
    assert model.card.experts[1].owner == "owner of code"
    edit_config(tmp_path / "out", num_experts_per_tok=1)
    with pytest.raises(FlexOlmoError, match="flexolmo.json has model.top_k = 2: expected 1, as .*config.json says"):
        open_huggingface(tmp_path / "out")
    lazy_model("dense").card.save(tmp_path / "out")
    with pytest.raises(FlexOlmoError, match="flexolmo.json has kind 'dense': expected 'moe', as .*config.json says"):
        open_huggingface(tmp_path / "out")


def with_bias(model, values):
    """The model with each layer's router bias set."""
    bias = torch.tensor(values)
    return type(model)(model.card, {
        name: LazyTensor(bias.dtype, tuple(bias.shape), bias.clone) if name.endswith("gate.bias") else tensor
        for name, tensor in model.tensors.items()})


def test_a_learned_bias_is_refused_unless_dropped(tmp_path):
    model = with_bias(lazy_model("moe", router_bias=True), [0.0, -0.25, 0.5])
    with pytest.raises(FlexOlmoError, match=r"learned router bias, .*: dropping it raises the routing logit of 1 of 3 "
                                            r"experts \(code\) by -b, at most 0.25, .*; export it with --drop-b"):
        save_huggingface(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save_huggingface(model, tmp_path / "out", drop_bias=True)
    found = open_huggingface(tmp_path / "out")
    assert not found.card.model.router_bias
    assert found.tensors.keys() == model.tensors.keys() - {f"model.layers.{layer}.mlp.gate.bias" for layer in range(2)}
    assert not ModelCard.load(tmp_path / "out").model.router_bias


def test_a_bias_without_effect_is_described_as_such():
    model = with_bias(lazy_model("moe", router_bias=True), [0.0, 0.0, 0.5])
    assert describe_bias(model) == "no expert of any layer has a bias below 0, so dropping it changes no output"


def test_a_pair_is_no_whole_model(tmp_path):
    with pytest.raises(FlexOlmoError, match="this checkpoint is a pair, .*: expected a dense or merged one"):
        save_huggingface(lazy_model("pair"), tmp_path / "out")


def test_tokenizer_and_its_special_tokens_travel_along(tmp_path, flex_olmo):
    (flex_olmo / "tokenizer.json").write_text("{}")
    (flex_olmo / "tokenizer_config.json").write_text('{"a": 1}')
    model = open_huggingface(flex_olmo)
    assert model.card.tokenizer == {"type": "huggingface", "path": str(flex_olmo.resolve())}
    save_huggingface(model, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"a": 1}'
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 7
    assert open_huggingface(tmp_path / "out").card.tokenizer["path"] == str((tmp_path / "out").resolve())
    shutil.rmtree(flex_olmo)
    moved = lazy_model("moe")
    moved.card.tokenizer.update(type="huggingface", path=str(flex_olmo))
    save_huggingface(moved, tmp_path / "other")
    assert json.loads((tmp_path / "other" / "config.json").read_text())["eos_token_id"] is None


def test_a_taken_destination_is_left_alone(tmp_path, olmo2):
    before = (olmo2 / "config.json").read_text()
    with pytest.raises(FlexOlmoError, match="already exists"):
        save_huggingface(lazy_model("dense"), olmo2)
    assert (olmo2 / "config.json").read_text() == before
