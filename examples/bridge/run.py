"""An expert trained by Megatron-Bridge, merged, and the merged model in Bridge: python examples/bridge/run.py OUT

Everything is tiny and made up here, so that it runs without a GPU. Yours differ in their paths and sizes alone.
"""

import json
import os
import shutil
import sys
from multiprocessing import get_context
from pathlib import Path

import torch

from flexolmo_megatron import cli

SIZES = ["data.seq_length=32", "train_iters=20", "global_batch_size=4", "micro_batch_size=4", "optimizer.lr=5e-3"]
MODEL = ["model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.vocab_size=264"]
TEXTS = {"public": "the cat sat on a mat and looked at the moon", "notes": "Dx: fever. Rx: rest, fluids."}


def flexolmo(*arguments: str) -> None:
    """Run one command of this package, as in a shell."""
    print("$ flexolmo", *arguments, flush=True)
    if status := cli.main(list(arguments)):
        sys.exit(status)


def publish_anchor() -> None:
    """What a coordinator has done before an owner begins: an anchor, and here also the owner's data and vector."""
    for name, text in TEXTS.items():
        Path(f"{name}.jsonl").write_text(f"{json.dumps({'text': text})}\n" * 100)
        flexolmo("data", f"{name}.jsonl", "--out", name, "--workers", "1")
    flexolmo("train", "anchor", *SIZES, *MODEL, "out=anchor_run", "data.train=[public]")
    flexolmo("embed", "public.jsonl", "--anchor", "anchor_run", "--out", "public.npz", "--publish", "anchor")
    flexolmo("embed", "notes.jsonl", "--anchor", "anchor", "--out", "notes.npz")


def train_expert() -> None:
    """The owner's run in Bridge's trainer, with one of Bridge's own options changed."""
    from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

    from flexolmo_megatron.integrations import bridge

    container = bridge.flexolmo_expert([*SIZES, "anchor=anchor", "expert.name=notes", "out=run", "data.train=[notes]",
                                        "expert.domain_vector=notes.npz"])
    process_config_with_overrides(container, cli_overrides=["logger.log_interval=10"])
    bridge.pretrain(container)


def convert() -> None:
    """The merged model, exported for transformers, through Bridge's AutoBridge and back."""
    from megatron.bridge import AutoBridge
    from megatron.core import parallel_state

    from flexolmo_megatron.convert.model import open_model
    from flexolmo_megatron.exchange.digest import model_digest
    from flexolmo_megatron.runtime.setup import initialize

    parallel_state.destroy_model_parallel()  # Bridge's trainer leaves the names of process groups that are gone
    initialize()
    auto = AutoBridge.from_hf_pretrained("exported")
    provider = auto.to_megatron_provider()
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    auto.save_hf_weights(model, "back", show_progress=False)  # save_hf_pretrained wants a tokenizer; here are bytes
    shutil.copy("exported/config.json", "back")
    same = model_digest(open_model("exported")) == model_digest(open_model("back"))
    print(f"exported -> Megatron -> back: {'the same to the last bit' if same else 'different'}")


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True)
    os.chdir(out)
    coordinator = get_context("spawn").Process(target=publish_anchor)  # Bridge's trainer wants a process for itself
    coordinator.start()
    coordinator.join()
    if coordinator.exitcode:
        sys.exit(coordinator.exitcode)
    if not torch.cuda.is_available():
        import without_cuda

        without_cuda.enable()
    train_expert()
    flexolmo("pack", "run", "package", "--owner", "Ward 7")
    flexolmo("verify", "package", "--anchor", "anchor")
    flexolmo("merge", "--anchor", "anchor", "package", "--out", "merged")
    flexolmo("export", "merged", "exported", "--drop-bias")
    convert()


if __name__ == "__main__":
    main()
