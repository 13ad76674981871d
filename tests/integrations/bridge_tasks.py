"""What the tests of the Megatron-Bridge plugin do inside Bridge's environment."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "bridge"))

import without_cuda  # noqa: E402

without_cuda.enable()

import torch  # noqa: E402
from megatron.bridge import AutoBridge  # noqa: E402
from megatron.bridge.training.callbacks import Callback  # noqa: E402
from megatron.bridge.training.initialize import destroy_global_state  # noqa: E402
from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides  # noqa: E402

from flexolmo_megatron.errors import FlexOlmoError  # noqa: E402
from flexolmo_megatron.integrations import bridge  # noqa: E402
from flexolmo_megatron.runtime.setup import initialize, world_size  # noqa: E402

TOKENS = torch.arange(24).view(2, 12) * 7 % 257


def perform(task, *arguments):
    """Perform one task, and leave the process as it was before."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    try:
        return {"convert": convert, "load": load, "train": train}[task](*arguments)
    except FlexOlmoError as error:
        return {"refused": str(error)}
    finally:
        destroy_global_state()


def logits(model):
    """Logits `[b, s, vocab]` of an unsharded model for TOKENS."""
    with torch.no_grad():
        return model[0].eval()(TOKENS, torch.arange(TOKENS.shape[1]).expand_as(TOKENS), None)


def convert(source, out):
    """Hugging Face -> Megatron -> Hugging Face, through AutoBridge; in one process, logits by both."""
    initialize(tensor_parallel=world_size())
    auto = AutoBridge.from_hf_pretrained(source)
    provider = auto.to_megatron_provider()
    provider.tensor_model_parallel_size = world_size()
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    auto.save_hf_pretrained(model, out, show_progress=False)
    report = {"config": auto._model_bridge.megatron_to_hf_config(provider)}
    if world_size() == 1:
        from transformers import AutoModelForCausalLM

        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(TOKENS).logits
        report["difference"] = float((logits(model) - expected).abs().max())
        report["largest"] = float(expected.abs().max())
    return report


def load(path):
    """A model of this package in Bridge, biases and all: its logits against our own inference."""
    import flexolmo_megatron

    initialize()
    provider = bridge.model_provider(path, torch.float32)
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    ours = flexolmo_megatron.load_model(path)
    return {"difference": float((logits(model) - ours.logits(TOKENS)).abs().max()), "experts": ours.expert_names}


class Recorder(Callback):
    """What the optimizer and the gradient buffers hold, and the loss of every step."""

    def __init__(self):
        self.report = {"losses": []}

    def on_train_start(self, context):
        names = {id(value): name for name, value in context.model[0].named_parameters()}
        groups = context.optimizer.param_groups
        self.report["in optimizer"] = sorted(names[id(value)] for group in groups for value in group["params"])
        self.report["buffers"] = sum(buffer.grad_data.numel() for buffer in context.model[0].buffers)
        self.report["frozen"] = sum(not value.requires_grad for value in context.model[0].parameters())

    def on_train_step_end(self, context):
        self.report["losses"].append(float(context.loss_dict["lm loss"]))


def train(mode, options, *overrides):
    """A recipe in Bridge's trainer: options of ours, and overrides of Bridge's own."""
    container = getattr(bridge, f"flexolmo_{mode}")(options)
    process_config_with_overrides(container, cli_overrides=list(overrides))
    recorder = Recorder()
    try:
        bridge.pretrain(container, [recorder])
    except SystemExit as stop:
        recorder.report["exit status"] = stop.code
    return recorder.report
