"""An expert trained by NeMo, merged, and the merged model in NeMo: python examples/nemo/run.py OUT [--account NAME]

The owner's run is a job of NeMo-Run: here, or with --account on Slurm, where a second job then does what follows it.
Everything is tiny and made up here, so that it runs without a GPU. Yours differ in their paths and sizes alone.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
if not torch.cuda.is_available():  # also in the processes that NeMo-Run starts, which read this file first
    import without_cuda  # noqa: F401

SIZES = ["data.seq_length=32", "train_iters=20", "global_batch_size=4", "micro_batch_size=4", "optimizer.lr=5e-3"]
MODEL = ["model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.vocab_size=264"]
TEXTS = {"public": "the cat sat on a mat and looked at the moon", "notes": "Dx: fever. Rx: rest, fluids."}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train an expert with NeMo and merge it.")
    parser.add_argument("out", type=Path, help="folder of everything that is written; goes on from an anchor in it")
    parser.add_argument("--account", help="Slurm account; without one everything runs on this machine")
    parser.add_argument("--partition", help="Slurm partition (default: the cluster's)")
    parser.add_argument("--time", default="00:30:00", help="Slurm time limit per job, HH:MM:SS (default: %(default)s)")
    parser.add_argument("--nodes", type=int, default=1, help="nodes of the owner's run (default: %(default)s)")
    parser.add_argument("--gpus-per-node", type=int, default=torch.cuda.device_count(),
                        help="GPUs per node, 0 for one process per node on the CPU (default: this machine's)")
    parser.add_argument("--convert", action="store_true", help="only what follows the owner's run")
    return parser.parse_args()


def flexolmo(*words: str) -> None:
    """Run one command of this package, as in a shell."""
    print("$ flexolmo", *words, flush=True)
    subprocess.run([sys.executable, "-W", "ignore", "-m", "flexolmo_megatron.cli", *words], check=True)


def publish_anchor() -> None:
    """What a coordinator has done before an owner begins: an anchor, and here also the owner's data and vector."""
    for name, text in TEXTS.items():
        Path(f"{name}.jsonl").write_text(f"{json.dumps({'text': text})}\n" * 100)
        flexolmo("data", f"{name}.jsonl", "--out", name, "--workers", "1")
    flexolmo("train", "anchor", *SIZES, *MODEL, "out=anchor_run", "data.train=[public]")
    flexolmo("embed", "public.jsonl", "--anchor", "anchor_run", "--out", "public.npz", "--publish", "anchor")
    flexolmo("embed", "notes.jsonl", "--anchor", "anchor", "--out", "notes.npz")


def owners_run(args: argparse.Namespace) -> Any:
    """The recipe. A job starts in a folder of its own, so that all paths are absolute."""
    from flexolmo_megatron.integrations.nemo import recipes

    recipe = recipes.flexolmo_expert(
        anchor=f"{args.out}/anchor", expert="notes", domain_vector=f"{args.out}/notes.npz", paths=[f"{args.out}/notes"],
        dir=str(args.out), name="run", num_nodes=args.nodes, num_gpus_per_node=args.gpus_per_node)
    if args.gpus_per_node == 0:
        from without_cuda import on_cpu

        on_cpu(recipe)
    # Without these, the sizes are the paper's. A batch of 16 is for up to 8 processes.
    recipe.trainer.max_steps = 20
    recipe.optim.config.lr, recipe.optim.lr_scheduler.warmup_steps = 5e-3, 2
    recipe.model.config.seq_length = recipe.data.seq_length = 32
    recipe.data.micro_batch_size, recipe.data.global_batch_size = 2, 16
    return recipe


def executor(args: argparse.Namespace, nodes: int, processes: int) -> Any:
    """Where a job runs: of several processes here by torchrun, on Slurm by srun."""
    import nemo_run as run

    found = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
             "PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}"}
    if args.account is None:
        return run.LocalExecutor(ntasks_per_node=processes, launcher="torchrun", env_vars=found)
    return run.SlurmExecutor(
        account=args.account, partition=args.partition, time=args.time, nodes=nodes, ntasks_per_node=processes,
        gpus_per_node=args.gpus_per_node or None, env_vars=found,
        additional_parameters={"kill-on-invalid-dep": "yes"},  # else what follows a failed job waits for ever
        container_image=None,  # the environment of this script is on a file system that the nodes share
        packager=run.Packager(), tunnel=run.LocalTunnel(job_dir=""))


def convert(out: Path) -> None:
    """NeMo's checkpoint as a run of this package, packed and merged; the merged model through NeMo and back."""
    from nemo.collections import llm

    from flexolmo_megatron.convert.model import open_model
    from flexolmo_megatron.exchange.digest import model_digest
    from flexolmo_megatron.integrations.nemo import FlexOlmoModel

    last = next(out.glob("run/checkpoints/*-last"), None)
    if last is None:
        sys.exit(f"{out}/run/checkpoints has no *-last: the owner's run has failed; see what it printed")
    llm.export_ckpt(last, "flexolmo", output_path=out / "pair")
    flexolmo("pack", "pair", "package", "--owner", "Ward 7")
    flexolmo("verify", "package", "--anchor", "anchor")
    flexolmo("merge", "--anchor", "anchor", "package", "--out", "merged")
    flexolmo("export", "merged", "exported", "--drop-bias")
    llm.import_ckpt(FlexOlmoModel(), f"hf://{out}/exported", output_path=out / "nemo")
    llm.export_ckpt(out / "nemo", "hf", output_path=out / "back")
    same = model_digest(open_model("exported")) == model_digest(open_model("back"))
    print(f"exported -> NeMo -> back: {'the same to the last bit' if same else 'different'}")


def main() -> None:
    args = arguments()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    os.chdir(args.out)
    if args.convert:
        convert(args.out)
        return
    if not Path("anchor").exists():
        publish_anchor()
    import nemo_run as run

    run.config.set_nemorun_home(f"{args.out}/jobs")  # no path may have /nemo_run in it, which NeMo-Run replaces
    with run.Experiment("owner") as experiment:
        training = experiment.add(owners_run(args), executor(args, args.nodes, max(args.gpus_per_node, 1)),
                                  name="expert", tail_logs=args.account is None)
        if args.account is not None:
            follow = run.Script(inline=f"python -W ignore {Path(__file__).resolve()} {args.out} --convert")
            experiment.add(follow, executor(args, 1, 1), name="convert", dependencies=[training])
        experiment.run(detach=args.account is not None)
    if args.account is None:
        convert(args.out)


if __name__ == "__main__":
    main()
