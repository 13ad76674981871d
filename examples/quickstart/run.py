"""The whole FlexOlmo path on one machine: `make quickstart`, or `python examples/quickstart/run.py runs/quickstart`.

A public anchor is trained; three owners train an expert each, apart from each other, against it; the experts are merged
without joint training; every owner's data is then switched off in turn. Each step is a `flexolmo` command, printed as
it runs, with its output in OUT/logs. Steps that are done are not repeated, so an interrupted run goes on where it was.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from corpora import build_corpora

from flexolmo_megatron.evaluation.plots import plot_opt_out

OWNERS = ("code", "arithmetic", "clinic")
PROMPTS = {
    "code": "def read_lines(path):\n",
    "arithmetic": "Problem 1: Noor buys 9 bricks for 10 cents each",
    "clinic": "DISCHARGE NOTE  WARD: ROWAN  PT NO: 123456\n",
}
OWNER_OPTIONS = (
    "data.public_share=0.33",
    "optimizer.lr=3e-3",
    "optimizer.min_lr=3e-4",
    "optimizer.router_lr=0",
    "expert.router_window=32",
    "expert.routing_noise=1",
    "moe_z_loss_coeff=0",
)
"""Beyond the paper's setting, the default of `flexolmo compare` (docs/routing.md): a third of an owner's samples are
public text; the router row stays the discriminant that `flexolmo embed --public` made, and its logits are averaged over
a window, since a model this small cannot tell domains apart by one token; noise on them teaches the expert to work when
others take some of the weight. No z-loss: it teaches an expert to push the residual stream against the anchor's row,
which after merging takes tokens from everybody else."""


class Quickstart:
    """The steps and where their results are."""

    def __init__(self, out: Path, anchor_iters: int, documents: int, expert_iters: int, evaluated_bytes: int) -> None:
        self.out, self.anchor_iters, self.documents, self.expert_iters, self.evaluated_bytes = (
            out,
            anchor_iters,
            documents,
            expert_iters,
            evaluated_bytes,
        )
        (out / "logs").mkdir(parents=True, exist_ok=True)
        self.environment = {**os.environ, "HF_HUB_OFFLINE": "1"}

    def _start(self, name: str, *arguments: str, threads: int | None = None) -> tuple[str, subprocess.Popen]:
        command = ["flexolmo", *arguments]
        print(f"$ {shlex.join(command)}", flush=True)
        environment = self.environment if threads is None else {**self.environment, "OMP_NUM_THREADS": str(threads)}
        with open(self.out / "logs" / f"{name}.log", "w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "flexolmo_megatron.cli", *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        return name, process

    def _wait(self, *started: tuple[str, subprocess.Popen]) -> None:
        failed = [name for name, process in started if process.wait()]
        if failed:
            log = self.out / "logs" / f"{failed[0]}.log"
            sys.exit(
                f"{failed[0]} failed; the end of {log}:\n" + "".join(log.read_text().splitlines(keepends=True)[-15:])
            )

    def _once(self, name: str, result: Path, *arguments: str) -> None:
        """Run a command unless its result is there already."""
        if not result.exists():
            self._wait(self._start(name, *arguments))

    def text(self) -> None:
        """Corpora, and their tokens."""
        if not (self.out / "corpora").exists():
            print("building the corpora from this Python installation", flush=True)
            build_corpora(self.out / "corpora")
        for domain in ("public", *OWNERS):
            for split in ("train", "valid"):
                prefix = self.out / "data" / f"{domain}_{split}"
                source = self.out / "corpora" / domain / f"{split}.jsonl"
                self._once(
                    f"data_{domain}_{split}",
                    prefix.with_suffix(".bin"),
                    "data",
                    f"{source}",
                    "--out",
                    f"{prefix}",
                    "--workers",
                    "1",
                )

    def anchor(self) -> None:
        """The public anchor: train, then give it its router row and publish it."""
        arguments = self._training(
            "anchor", self.out / "public_run", [f"{self.out}/data/public_train"], "public", self.anchor_iters
        )
        self._once("anchor", self._checkpoint(self.out / "public_run", self.anchor_iters), *arguments)
        self._once(
            "publish",
            self.out / "anchor",
            "embed",
            f"{self.out}/corpora/public/train.jsonl",
            "--anchor",
            f"{self.out}/public_run",
            "--out",
            f"{self.out}/public.npz",
            "--publish",
            f"{self.out}/anchor",
            "--documents",
            f"{self.documents}",
        )

    def owners(self) -> None:
        """Each owner alone: domain vector, expert, package. They share nothing but the published anchor."""
        for owner in OWNERS:
            self._once(
                f"embed_{owner}",
                self.out / f"{owner}.npz",
                "embed",
                f"{self.out}/corpora/{owner}/train.jsonl",
                "--anchor",
                f"{self.out}/anchor",
                "--out",
                f"{self.out}/{owner}.npz",
                "--public",
                f"{self.out}/corpora/public/train.jsonl",
                "--scale",
                "1.5",
                "--documents",
                f"{self.documents}",
            )
        running = []
        for owner in OWNERS:
            run = self.out / f"{owner}_run"
            if not self._checkpoint(run, self.expert_iters).exists():
                arguments = self._training("expert", run, [f"{self.out}/data/{owner}_train"], owner, self.expert_iters)
                arguments += [
                    f"anchor={self.out}/anchor",
                    f"expert.name={owner}",
                    f"expert.domain_vector={self.out}/{owner}.npz",
                    f"data.public=[{self.out}/data/public_train]",
                    *OWNER_OPTIONS,
                ]
                running.append(self._start(f"train_{owner}", *arguments, threads=1))
        self._wait(*running)
        for owner in OWNERS:
            package = self.out / "packages" / owner
            package.parent.mkdir(exist_ok=True)
            self._once(
                f"pack_{owner}",
                package,
                "pack",
                f"{self.out}/{owner}_run",
                f"{package}",
                "--owner",
                f"the {owner} owner",
            )

    def coordinator(self) -> None:
        """Verify what the owners handed over and put it together."""
        packages = [f"{self.out}/packages/{owner}" for owner in OWNERS]
        if not (self.out / "merged").exists():
            for owner, package in zip(OWNERS, packages, strict=True):
                self._wait(self._start(f"verify_{owner}", "verify", package, "--anchor", f"{self.out}/anchor"))
        self._once(
            "merge",
            self.out / "merged",
            "merge",
            "--anchor",
            f"{self.out}/anchor",
            *packages,
            "--top-k",
            f"{len(OWNERS) + 1}",
            "--out",
            f"{self.out}/merged",
        )

    def evaluate(self) -> None:
        """Every model on every domain, with pictures, and some text."""
        models = {"public": self.out / "anchor"}
        models |= {f"pair {owner}": self.out / f"{owner}_run" for owner in OWNERS}
        models |= {"merged": self.out / "merged"}
        models |= {f"without {owner}": f"{self.out}/merged@-{owner}" for owner in OWNERS}
        domains = {domain: self.out / "corpora" / domain / "valid.jsonl" for domain in ("public", *OWNERS)}
        self._once(
            "eval",
            self.out / "evaluation" / "results.json",
            "eval",
            "--out",
            f"{self.out}/evaluation",
            "--reference",
            "public",
            "--routing",
            "--max-bytes",
            f"{self.evaluated_bytes}",
            *(word for name, path in models.items() for word in ("--model", f"{name}={path}")),
            *(word for name, path in domains.items() for word in ("--domain", f"{name}={path}")),
        )
        runs = [f"{self.out}/{name}_run" for name in ("public", *OWNERS)]
        self._once("plot", self.out / "training.png", "plot", *runs, "--out", f"{self.out}/training.png")
        for owner, prompt in PROMPTS.items():
            words = ("generate", f"{self.out}/merged", "--prompt", prompt, "--max-new-tokens", "120")
            self._wait(
                self._start(f"generate_{owner}", *words),
                self._start(f"generate_without_{owner}", *words, "--exclude", owner),
            )

    def report(self) -> None:
        """What a newcomer should look at."""
        print((self.out / "logs" / "eval.log").read_text())
        for owner in OWNERS:
            for title, name in (("merged", f"generate_{owner}"), (f"without {owner}", f"generate_without_{owner}")):
                print(f"--- {owner} prompt, {title}\n{(self.out / 'logs' / f'{name}.log').read_text().rstrip()}\n")
        results = json.loads((self.out / "evaluation" / "results.json").read_text())
        (self.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        bits = results["bits_per_byte"]
        plot_opt_out(
            bits,
            self.out / "evaluation" / "opt_out.png",
            public="public",
            merged="merged",
            opted_out={owner: f"without {owner}" for owner in OWNERS},
        )
        print("bits per byte (lower is better): what the owners' experts bring, and what switching one off takes away")
        for owner in OWNERS:
            print(
                f"  {owner:<12} public model {bits['public'][owner]:.3f}   merged {bits['merged'][owner]:.3f}   "
                f"merged without {owner} {bits[f'without {owner}'][owner]:.3f}"
            )
        print(f"  {'public':<12} public model {bits['public']['public']:.3f}   merged {bits['merged']['public']:.3f}")
        print("\npictures:")
        for picture in [*sorted((self.out / "evaluation").glob("*.png")), self.out / "training.png"]:
            print(f"  {picture}")
        print(f"results: {self.out / 'results.json'}")

    def _training(self, mode: str, run: Path, blend: list[str], valid: str, iters: int) -> list[str]:
        return [
            "train",
            mode,
            "--preset",
            "tiny",
            f"out={run}",
            f"data.train=[{','.join(blend)}]",
            f"data.valid=[{self.out}/data/{valid}_valid]",
            "data.seq_length=256",
            "model.max_position_embeddings=256",
            "micro_batch_size=16",
            "global_batch_size=16",
            f"train_iters={iters}",
            f"optimizer.lr_warmup_iters={min(20, iters - 1)}",
            "eval_iters=4",
            "log_interval=50",
        ]

    def _checkpoint(self, run: Path, step: int) -> Path:
        return run / "checkpoints" / f"step_{step:08d}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for everything that is made")
    parser.add_argument(
        "--anchor-iters",
        type=int,
        default=800,
        metavar="STEPS",
        help="of the anchor, 4,096 tokens each (default: %(default)s)",
    )
    parser.add_argument(
        "--documents",
        type=int,
        default=500,
        metavar="N",
        help="of each domain, to make router rows from (default: %(default)s)",
    )
    parser.add_argument(
        "--expert-iters",
        type=int,
        default=250,
        metavar="STEPS",
        help="of each expert, 4,096 tokens each (default: %(default)s)",
    )
    parser.add_argument(
        "--evaluated-bytes",
        type=int,
        default=12_000,
        metavar="N",
        help="of each domain's validation text (default: %(default)s)",
    )
    args = parser.parse_args()
    began = time.monotonic()
    quickstart = Quickstart(args.out, args.anchor_iters, args.documents, args.expert_iters, args.evaluated_bytes)
    for step in (quickstart.text, quickstart.anchor, quickstart.owners, quickstart.coordinator, quickstart.evaluate):
        step()
        print(f"[{(time.monotonic() - began) / 60:.1f} min]", flush=True)
    quickstart.report()


if __name__ == "__main__":
    main()
