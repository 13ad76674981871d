"""The YAML file of a comparison: what it refuses, and the training runs that follow from it."""

import pytest

from flexolmo_megatron.compare.config import check_training, flatten, load_compare, owner_options, training_config
from flexolmo_megatron.compare.settings import PAPER_WARMUP
from flexolmo_megatron.config.train import RouterTrainConfig
from flexolmo_megatron.errors import FlexOlmoError


@pytest.mark.parametrize(("override", "message"), [
    ("steps.ownr=3", "unknown option 'steps.ownr' (did you mean 'owner'?)"),
    ("owners.math.trian=[x]", "unknown option 'owners.math.trian' (did you mean 'train'?)"),
    ("slurm.partion=x", "unknown option 'slurm.partion' (did you mean 'partition'?)"),
    ("methods=[soop]", "methods: there is no 'soop' (did you mean 'soup'?)"),
    ("setting=papr", "setting: there is no 'papr' (did you mean 'paper'?)"),
    ("ablations=[no bia]", "ablations: there is no 'no bia' (did you mean 'no bias'?)"),
    ("seeds=[1,1]", "seeds = [1, 1]: expected at least one, and none twice"),
    ("ablations=[x]", "'no bias', 'no embedding init, no bias', 'centred rows'"),
    ("public.train=a.jsonl", "the command line: public.train = 'a.jsonl': expected a list, in brackets: ['a.jsonl']"),
    ("steps.owner=0", "steps.owner = 0: expected at least 1"),
    ("top_k=4", "top_k = 4: expected 1 to 3, all experts"),
    ("owners={}", "owners is empty"),
    ("owners.mixed={train: [a], valid: [b]}", "owners.mixed: expected a name without a dot, and other than average"),
    ("ablations=[no bias, no bias]", "two of them would be in the folder ablations/no_bias: expected none twice"),
    ("variants.paper={expert.bias: false}", "'paper' is the name of a usual ablation"),
    ("variants.x=3", "variants.x = 3: expected options"),
    ("embed.sclae=2", "embed: unrecognized arguments: --sclae 2"),
    ("embed.scale=-1", "--scale -1.0: expected a number above 0"),
    ("embed.documents=abc", "embed: argument --documents: invalid int value: 'abc'"),
    ("embed.delta=1e-9", "--delta 1e-09 is about noise, which --epsilon asks for"),
    ("embed.max_tokens=0", "--max-tokens 0: expected a number of at least 1"),
    ("variants.x={embed.foo: 1}", "variants.x: unrecognized arguments: --foo 1"),
    ("evaluation.max_bytes=0", "evaluation.max_bytes = 0: expected at least 1"),
    ("evaluation.btm_temperatures=[0]", "btm_temperatures = 0.0: expected a number above 0"),
    ("evaluation.prompt_bytes=0", "prompt_bytes = 0: expected at least 1"),
    ("evaluation.classifier_documents=0", "evaluation.classifier_documents = 0: expected at least 1"),
    ("proxy_tokens=-3", "proxy_tokens = -3: expected at least 1"),
    ("variants.x={setting: [1]}", "variants.x.setting = [1]: expected one of default, paper"),
    ("variants.x={calibrate: maybe}", "variants.x.calibrate = 'maybe': expected true or false"),
    ("owner.train_iters=300", "train_iters = 300: expected no such option, it follows from the comparison's steps"),
    ("train.seed=5", "train.seed = 5: expected no such option, it follows from the comparison's seeds"),
    ("dense.model.num_layers=3", "dense.model.num_layers = 3: expected no such option, it follows from"),
    ("variants.x={data: {public: [a]}}", "variants.x.data.public = ['a']: expected no such option, it"),
    ("model={num_experts: 3, top_k: 2}", "model.num_experts = 3: expected none, the anchor is dense"),
    ("owners.math.train=[]", "owners.math.train = []: expected at least one file"),
    ("slurm.nodes=0", "slurm.nodes = 0 (job compare): expected at least 1"),
    ("variants.x={setting: best}", "variants.x.setting = 'best': expected one of default, paper"),
])
def test_impossible_values_are_refused_with_the_nearest(config_file: str, override: str, message: str) -> None:
    with pytest.raises(FlexOlmoError) as refused:
        overrides = [override] if override != "owners={}" else []
        config = load_compare(config_file, overrides)
        if not overrides:
            config.owners = {}
            from flexolmo_megatron.compare.config import _check
            _check(config)
    assert message in str(refused.value)


def test_nested_and_dotted_options_are_the_same() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e.f": 3}) == {"a.b": 1, "a.c.d": [2], "e.f": 3}


def test_the_command_line_wins_over_the_file(config_file: str) -> None:
    config = load_compare(config_file, ["owner.optimizer.lr=5e-4", "steps.owner=7", "train.data.seq_length=16"])
    run = training_config(config, "owner", {"train_iters": config.steps.owner}, owner_options(config, None)[0])
    assert (run.optimizer.lr, run.train_iters, run.data.seq_length) == (5e-4, 7, 16)


def test_default_setting_replays_public_documents(config_file: str) -> None:
    config = load_compare(config_file, [])
    run = training_config(config, "owner", {"public_data": ["p"]}, owner_options(config, None)[0])
    assert run.data.public_share > 0 and run.data.public == ["p"] and run.moe_z_loss_coeff == 0


def test_paper_setting_is_the_papers(config_file: str) -> None:
    config = load_compare(config_file, ["setting=paper", "steps.owner=600"])
    run = training_config(config, "owner", {"public_data": ["p"], "train_iters": 600}, owner_options(config, None)[0])
    assert (run.data.public, run.data.public_share, run.expert.domain_loss_coeff) == ([], 0.0, 0.0)
    assert (run.moe_z_loss_coeff, run.optimizer.lr, run.optimizer.min_lr, run.optimizer.weight_decay) == (
        1e-3, 9e-4, 0.0, 0.0)
    # 2,000 steps of 1,024 x 4,096 tokens out of 50 B tokens.
    assert run.optimizer.lr_warmup_iters == int(600 * 2000 * 1024 * 4096 / 50e9)
    assert abs(PAPER_WARMUP - 0.1678) < 1e-4


def test_an_ablation_changes_only_what_it_says(config_file: str) -> None:
    config = load_compare(config_file, ["owner.optimizer.lr=5e-4", "variants.wide={embed: {scale: 3}}",
                                        "variants.share={data.public_share: 0.25}"])
    usual, embed = owner_options(config, None)
    assert owner_options(config, "no window") == (usual | {"expert.router_window": 1}, embed)
    assert owner_options(config, "drift penalty") == (usual | {"expert.drift_coeff": 0.01}, embed)
    trained = owner_options(config, "trained rows")
    assert trained == (usual | {"expert.domain_loss_coeff": 0.025, "optimizer.router_lr": 1e-3},
                       {"documents": 10, "max_tokens": 32})
    assert owner_options(config, "no bias") == (trained[0] | {"expert.bias": False}, trained[1])
    assert owner_options(config, "share") == (usual | {"data.public_share": 0.25}, embed)
    assert owner_options(config, "wide") == (usual, embed | {"scale": 3})
    paper = owner_options(config, "paper")[0]
    assert paper["optimizer.lr"] == 9e-4  # not the section owner's


def test_a_penalty_on_drift_goes_with_discriminants_alone(config_file: str) -> None:
    config = load_compare(config_file, ["owner.expert.drift_coeff=0.5"])
    assert owner_options(config, None)[0]["expert.drift_coeff"] == 0.5
    assert owner_options(config, "no embedding init")[0]["expert.drift_coeff"] == 0
    message = "expert.drift_coeff = 0.5: expected 0 for experts without discriminants"
    for words in (["setting=paper"], ["embed.embedder=some/model"]):
        with pytest.raises(FlexOlmoError, match=message):
            load_compare(config_file, ["owner.expert.drift_coeff=0.5", *words])
    with pytest.raises(FlexOlmoError, match=message):
        load_compare(config_file, ["variants.a={embed.centre: true, expert.drift_coeff: 0.5}"])
    apart = "{expert.coordination: false, expert.routing_noise: 0, expert.router_window: 1}"
    config = load_compare(config_file, ["owner.expert.drift_coeff=0.5", "variants.a={expert.random_row: true}",
                                        f"variants.b={apart}"])
    assert [owner_options(config, name)[0]["expert.drift_coeff"] for name in (None, "a", "b")] == [0.5, 0, 0]


def test_every_ablation_has_a_definition() -> None:
    from flexolmo_megatron.compare.settings import ABLATIONS
    from flexolmo_megatron.evaluation.methods import flexolmo

    assert ABLATIONS.keys() <= flexolmo.ABLATIONS.keys()


def test_router_tuning_has_a_small_learning_rate_a_short_warm_up_and_no_z_loss(config_file: str) -> None:
    config = load_compare(config_file, ["train.optimizer.lr=7e-3"])
    run = training_config(config, "router", {"train_iters": 50})
    assert isinstance(run, RouterTrainConfig)
    assert (run.optimizer.lr, run.optimizer.lr_warmup_iters, run.leave_one_out) == (1e-4, 5, True)
    assert run.moe_z_loss_coeff == 0


def test_an_unknown_training_option_is_refused_by_name(config_file: str) -> None:
    config = load_compare(config_file, ["dense.optimizer.lrr=1"])
    with pytest.raises(FlexOlmoError, match=r"options of the dense run: unknown option 'optimizer.lrr' \(did you mean"):
        training_config(config, "dense", {})


def test_layouts_are_data_parallel_alone(config_file: str) -> None:
    config = load_compare(config_file, [])
    run = training_config(config, "dense", {"train_iters": 30})
    check_training({"dense": run}, processes=1)
    with pytest.raises(FlexOlmoError, match="dense: global_batch_size = 4: expected a multiple of micro_batch"):
        check_training({"dense": run}, processes=2)
    run.parallel.tensor = 2
    with pytest.raises(FlexOlmoError, match="dense: parallel: expected no layout, a comparison's"):
        check_training({"dense": run}, processes=2)
