"""What the tests of the NeMo plugin do inside NeMo's environment; nemo_runs.py starts it."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "nemo"))
from without_cuda import on_cpu  # noqa: E402, I001  first, before anything imports Megatron

import fiddle  # noqa: E402
import torch  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402
from nemo.collections import llm  # noqa: E402
from nemo_run.cli.api import create_cli  # noqa: E402

from flexolmo_megatron.errors import FlexOlmoError  # noqa: E402
from flexolmo_megatron.integrations.nemo import (  # noqa: E402
    FlexOlmoConfig,
    FlexOlmoConfig7x7B,
    FlexOlmoConfig37B,
    FlexOlmoConfigPair,
    FlexOlmoModel,
    connectors,
    recipes,
)


class Recorder(Callback):
    """Records losses and what the optimizer has; stops after ``last`` steps as a time limit would."""

    def __init__(self, out, last):
        self.out, self.last, self.losses, self.report = out, last, [], {}

    def on_train_start(self, trainer, module):
        parameters = {id(value): name for name, value in module.module.named_parameters()}
        groups = trainer.optimizers[0].param_groups
        self.report["in optimizer"] = sorted(parameters[id(value)] for group in groups for value in group["params"])
        self.report["buffers"] = sum(buffer.grad_data.numel() for buffer in module.module.buffers)
        self.report["frozen"] = sum(not value.requires_grad for value in module.module.parameters())

    def on_train_batch_end(self, trainer, module, *_):
        self.losses.append(float(trainer.callback_metrics["reduced_train_loss"]))
        if trainer.global_step >= self.last:
            trainer.should_stop = True

    def on_train_end(self, trainer, module):
        Path(self.out).write_text(json.dumps(self.report | {"losses": self.losses, "step": trainer.global_step}))


def train(kind, world, folder, last, anchor="anchor"):
    """Train up to step ``last`` of 6; again, to go on."""
    if kind == "expert":
        recipe = recipes.flexolmo_expert(f"{world}/{anchor}", "own", f"{world}/own.npz", [f"{world}/own"], folder, kind)
    elif kind == "router":
        recipe = recipes.flexolmo_router(f"{world}/merged", [f"{world}/public"], {"own": [f"{world}/own"]},
                                         folder, kind)
    else:
        recipe = recipes.flexolmo_anchor([f"{world}/public"], folder, kind)
        recipe.model.config.start_from = f"{world}/anchor_run"
    recipe.optim.lr_scheduler = None
    on_cpu(recipe)
    recipe.trainer.max_steps, recipe.trainer.log_every_n_steps = 6, 1
    recipe.optim.config.lr = 5e-3
    recipe.model.config.seq_length = recipe.data.seq_length = 32
    recipe.data.micro_batch_size, recipe.data.global_batch_size = 2, 4
    built = fiddle.build(recipe)
    built.keywords["trainer"].callbacks.append(Recorder(f"{folder}/{kind}_{last}.json", int(last)))
    built()


def nemo(*words):
    """NeMo's command line."""
    sys.argv = ["nemo", *words]  # by which it chooses its subcommands
    assert not create_cli()(standalone_mode=False)  # an exit status


def refused(world, folder):
    """Go on with the owner's run, with another anchor."""
    Path(folder, "refused").write_text(refusal(lambda: train("expert", world, folder, 6, "other")))


def refusal(call):
    """What ``call`` says when it refuses."""
    try:
        call()
    except FlexOlmoError as error:
        return str(error)


def convert(folder):
    """Import every model of ``folder``/hf, note its logits, and export it again."""
    for path in sorted(Path(folder, "hf").iterdir()):
        nemo = Path(folder, "nemo", path.name)
        llm.import_ckpt(FlexOlmoModel(), f"hf://{path}", output_path=nemo)
        model, _, _ = FlexOlmoModel.exporter("flexolmo", nemo).read()
        tokens = torch.load(Path(folder, "tokens.pt"))
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        model.eval()
        with torch.no_grad():
            torch.save(model.forward(tokens, positions).float(), Path(folder, f"{path.name}.logits.pt"))
        llm.export_ckpt(nemo, "hf", output_path=Path(folder, "out", path.name))


def export(source, out):
    """NeMo checkpoint, or the last of a run -> checkpoint of this package."""
    last = next(Path(source).glob("checkpoints/*-last"), Path(source))
    llm.export_ckpt(last, "flexolmo", output_path=Path(out))


def load(source, out):
    """Checkpoint of this package -> NeMo checkpoint."""
    llm.import_ckpt(FlexOlmoModel(), f"flexolmo://{source}", output_path=Path(out))


def foreign(checkpoint, out):
    """Export a NeMo checkpoint that another model wrote: of ours without its card."""
    path = Path(checkpoint, "weights", "common.pt")
    common = torch.load(path, weights_only=False)
    del common["flexolmo_card"]
    torch.save(common, path)
    Path(out).write_text(refusal(lambda: export(checkpoint, "nowhere")))


def configs(world, out):
    """Sizes of the variants, and what refuses."""
    found = {}
    for made in (FlexOlmoConfig(), FlexOlmoConfigPair(), FlexOlmoConfig7x7B(), FlexOlmoConfig37B()):
        found[type(made).__name__] = vars(made.model_config())
    from transformers import FlexOlmoConfig as Transformers

    found["transformers"] = {name: getattr(Transformers(), name) for name in ("num_experts", "num_experts_per_tok")}
    upcycled = FlexOlmoConfig(kind="moe", num_moe_experts=3, start_from=f"{world}/anchor_run")
    found["upcycled"] = vars(upcycled.model_config())
    found["missing"] = refusal(lambda: FlexOlmoConfig(kind="moe", start_from=f"{out}/nothing"))
    found["without"] = refusal(lambda: FlexOlmoConfigPair().fill_and_freeze(None))
    Path(out, "configs.json").write_text(json.dumps(found))


def main():
    """Run the tasks of the command line, separated by ``--``, in this one process."""
    assert connectors
    tasks = [[]]
    for word in sys.argv[1:]:
        if word == "--":
            tasks.append([])
        else:
            tasks[-1].append(word)
    for name, *arguments in tasks:
        globals()[name](*arguments)
