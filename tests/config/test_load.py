"""Reading a run's configuration: the order of sources, and what is said about bad ones."""

import pytest
from omegaconf import OmegaConf

from flexolmo_megatron.config.describe import describe
from flexolmo_megatron.config.load import load_config, preset_names, save_config
from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.config.train import TrainConfig
from flexolmo_megatron.errors import FlexOlmoError

NEEDED = ["out=run", "data.train=[a]"]


def test_later_sources_win(tmp_path):
    (tmp_path / "a.yaml").write_text("optimizer:\n  lr: 0.5\n  clip_grad: 2\nseed: 1\n")
    (tmp_path / "b.yaml").write_text("seed: 2\n")
    config = load_config(
        TrainConfig,
        preset="tiny",
        paths=[str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")],
        overrides=[*NEEDED, "optimizer.clip_grad=3"],
    )
    assert (config.optimizer.lr, config.optimizer.clip_grad, config.seed) == (0.5, 3.0, 2)
    assert config.optimizer.min_lr == 3e-4  # the preset's
    assert config.model == ModelConfig()


def test_saved_and_read_again(tmp_path):
    config = load_config(TrainConfig, overrides=[*NEEDED, "expert.name=x", "model.num_layers=2", "stop_after=5"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(TrainConfig, paths=[str(tmp_path / "config.yaml")]) == config


def test_the_presets():
    assert preset_names() == ["37b", "7b-pair", "tiny"]
    large = load_config(TrainConfig, preset="7b-pair", overrides=NEEDED)
    large.validate(data_parallel=1)
    # 50 B tokens in batches of 1,024 x 4,096, as in section 4.1 of the paper.
    assert large.train_iters == round(50e9 / (large.global_batch_size * large.data.seq_length))


def test_text_is_taken_as_it_stands():
    odd = ["out=/tmp/a #b", "anchor='x': [y]", "expert.name=007", "data.cache=no", "optimizer.lr_decay_style=1e3"]
    config = load_config(TrainConfig, overrides=[*odd, "data.train=[007, no, 'c d']", "seed=0x10"])
    assert (config.out, config.anchor, config.expert.name) == ("/tmp/a #b", "'x': [y]", "007")
    assert (config.data.cache, config.optimizer.lr_decay_style) == ("no", "1e3")
    assert config.data.train == ["7", "False", "c d"] and config.seed == 16  # all else is YAML
    assert load_config(TrainConfig, overrides=[*NEEDED, "anchor=null", "expert.name=null"]).anchor is None
    assert load_config(TrainConfig, overrides=[*NEEDED, "expert.name=null"]).expert.name == "null"


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["optimiser.lr=1"], "the command line: unknown option 'optimiser' (did you mean 'optimizer'?)"),
        (["optimizer.lrr=1"], "the command line: unknown option 'optimizer.lrr' (did you mean 'lr'?)"),
        (["model.num_layer=3"], "the command line: unknown option 'model.num_layer' (did you mean 'num_layers'?)"),
        (["model.num_layers=x"], "model.num_layers: Value 'x' of type 'str' could not be converted to Integer"),
        (["model=[1]"], "the command line: model = [1]: expected a mapping of options"),
        (["data={proxies: [a]}"], "the command line: data.proxies = ['a']: expected a mapping of options"),
        (["data.train=a"], "the command line: data.train = 'a': expected a list, in brackets: ['a']"),
        (["data.train={a: 1}"], "the command line: data.train = {'a': 1}: expected a list"),
        (["out"], "'out': expected an override of the form key=value"),
        (["=3"], "'=3': expected an override of the form key=value"),
        (["model.hidden_size=7"], "model.num_attention_heads = 4 does not divide model.hidden_size = 7"),
        (["model.num_query_groups=3"], "model.num_query_groups = 3 does not divide model.num_attention_heads = 4"),
        (["model.hidden_size=12"], "model.hidden_size / model.num_attention_heads = 3: RoPE needs an even head size"),
        (["model.top_k=1"], "model.top_k, model.router_bias and model.router_window need model.num_experts > 0"),
        (["model.num_experts=2", "model.top_k=3"], "model.top_k = 3: expected 1 to model.num_experts = 2"),
        (["model.vocab_size=0"], "model.vocab_size = 0: expected a number of at least 1"),
    ],
)
def test_bad_overrides(overrides, message):
    with pytest.raises(FlexOlmoError) as error:
        load_config(TrainConfig, overrides=[*NEEDED, *overrides])
    assert message in str(error.value)


@pytest.mark.parametrize(
    "override, message",
    [
        ("optimizer.adam_beta1=1", "optimizer.adam_beta1 = 1.0: expected 0 to below 1"),
        ("optimizer.adam_beta2=-0.1", "optimizer.adam_beta2 = -0.1: expected 0 to below 1"),
        ("optimizer.adam_eps=0", "optimizer.adam_eps = 0.0: expected a finite number above 0"),
        ("optimizer.clip_grad=-1", "optimizer.clip_grad = -1.0: expected a finite number, 0 or more"),
        ("optimizer.weight_decay=.nan", "optimizer.weight_decay = nan: expected a finite number, 0 or more"),
        ("optimizer.router_lr=-1", "optimizer.router_lr = -1.0: expected a finite number, 0 or more"),
        ("optimizer.lr=.inf", "optimizer.lr = inf: expected a finite number above 0"),
        ("optimizer.lr=.nan", "optimizer.lr = nan: expected a finite number above 0"),
        ("optimizer.min_lr=1", "optimizer.min_lr = 1.0: expected 0 to optimizer.lr = 0.0009"),
        ("optimizer.min_lr=-1", "optimizer.min_lr = -1.0: expected 0 to optimizer.lr = 0.0009"),
        ("moe_z_loss_coeff=-1", "moe_z_loss_coeff = -1.0: expected a finite number, 0 or more"),
        ("expert.router_window=0", "expert.router_window = 0: expected 1 to 65536"),
        ("expert.router_window=65537", "expert.router_window = 65537: expected 1 to 65536"),
        ("data.seq_length=0", "data.seq_length = 0: expected at least 1"),
        ("seed=-1", "seed = -1: expected 0 to 4294967295"),
        ("seed=4294967296", "seed = 4294967296: expected 0 to 4294967295"),
        ("stop_after=0", "stop_after = 0: expected at least 1"),
        ("max_skipped_steps=0", "max_skipped_steps = 0: expected at least 1"),
        ("save_interval=-1", "save_interval = -1: expected 0 or more"),
    ],
)
def test_numbers_out_of_range(override, message):
    config = load_config(TrainConfig, overrides=[*NEEDED, override])
    with pytest.raises(FlexOlmoError) as error:
        config.validate(data_parallel=1)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "override, message",
    [
        ("out=${nope}", "the options: out: Interpolation key 'nope' not found"),
        ("optimizer=${nope}", "the command line: Interpolation key 'nope' not found"),
        ("seed=${data.train}", "the options: seed: While dereferencing interpolation '${data.train}'"),
    ],
)
def test_references_to_nothing(override, message):
    with pytest.raises(FlexOlmoError) as error:
        load_config(TrainConfig, overrides=[*NEEDED, override])
    assert str(error.value).startswith(message)


def test_what_has_no_default_must_be_given():
    with pytest.raises(FlexOlmoError, match="data.train has no value; set it in a YAML file or with data.train=…"):
        load_config(TrainConfig, overrides=["out=x"])


def test_bad_files(tmp_path):
    with pytest.raises(FlexOlmoError, match="nowhere.yaml does not exist; expected a YAML file"):
        load_config(TrainConfig, paths=["nowhere.yaml"])
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(FlexOlmoError, match="broken.yaml is not valid YAML"):
        load_config(TrainConfig, paths=[str(tmp_path / "broken.yaml")])
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(FlexOlmoError, match="list.yaml: expected a mapping of options at the top"):
        load_config(TrainConfig, paths=[str(tmp_path / "list.yaml")])
    (tmp_path / "key.yaml").write_text("model:\n  num_layrs: 3\n")
    with pytest.raises(
        FlexOlmoError, match=r"key.yaml: unknown option 'model.num_layrs' \(did you mean 'num_layers'\?\)"
    ):
        load_config(TrainConfig, paths=[str(tmp_path / "key.yaml")])


def test_an_unknown_preset():
    with pytest.raises(
        FlexOlmoError, match=r"unknown preset 'tinny' \(did you mean 'tiny'\?\); there are 37b, 7b-pair, tiny"
    ):
        load_config(TrainConfig, preset="tinny")


def test_every_option_is_described():
    text = describe(TrainConfig)
    keys = []

    def collect(node, prefix):
        for key in node:
            inner = None if OmegaConf.is_missing(node, key) else node[key]
            if OmegaConf.is_dict(inner):
                collect(inner, f"{prefix}{key}.")
            else:
                keys.append(f"{prefix}{key}")

    collect(OmegaConf.structured(TrainConfig), "")
    assert len(keys) > 50
    for key in keys:
        paragraph = text.split(f"  {key} (", 1)[1].split("\n", 2)
        assert paragraph[1].strip(), key
