"""What the steps of a comparison do, each in its folder: training runs, and `flexolmo` commands within this process.

Everything that a step writes appears whole or not at all; what is there already is left as it is.
"""

import gc
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexolmo_megatron.config.train import TrainConfig
from flexolmo_megatron.words import as_words

Work = Callable[[Path], None]


def command(*words: str) -> None:
    """Run `flexolmo WORDS…` within this process, and show it.

    Raises:
        FlexOlmoError: what the command raises.
    """
    from flexolmo_megatron.cli import build_parser

    print(f"$ flexolmo {shlex.join(words)}", flush=True)
    args = build_parser().parse_args(words)
    args.run(args)


def tokenize(files: Sequence[str], tokenizer: str, text_key: str) -> Work:
    """Documents to a Megatron data set ``tokens``."""
    def work(folder: Path) -> None:
        if not (folder / "tokens.idx").exists():
            command("data", *files, "--out", str(folder / "tokens"), "--tokenizer", tokenizer, "--text-key", text_key)

    return work


def proxy_budget(tokens: int, public_data: Path) -> int:
    """Return the tokens of an owner's proxies where ``tokens`` are asked for: at least those of twenty documents and at
    most a fifth of the public data, which is tokenized."""
    info = json.loads(public_data.with_suffix(".json").read_text())
    return min(max(tokens, 20 * info["tokens"] // info["documents"]), info["tokens"] // 5)


def proxies(owner: Sequence[str], public: Sequence[str], public_data: Path, tokens: int, tokenizer: str,
            text_key: str) -> Work:
    """An owner's proxies, ``proxy_budget``; then as a Megatron data set ``tokens``."""
    def work(folder: Path) -> None:
        if not (folder / "proxies").exists():
            command("proxy", *owner, "--public", *public, "--out", str(folder / "proxies"), "--tokens",
                    str(proxy_budget(tokens, public_data)), "--tokenizer", tokenizer, "--text-key", text_key)
        tokenize([str(folder / "proxies" / "proxies.jsonl")], tokenizer, "text")(folder)

    return work


def training(mode: str, config: TrainConfig) -> Work:
    """A training run in its folder ``run``, by all processes."""
    def work(folder: Path) -> None:
        from flexolmo_megatron.training.run import train

        train(mode, config)
        gc.collect()  # modules and their hooks refer to one another

    return work


def publish(run: Path, documents: Sequence[str], text_key: str, embed: Mapping[str, Any]) -> Work:
    """The public domain vector ``public.npz`` and the published anchor ``model``."""
    def work(folder: Path) -> None:
        if not (folder / "model").exists():
            command("embed", *documents, "--text-key", text_key, "--anchor", str(run), "--out",
                    str(folder / "public.npz"), "--publish", str(folder / "model"), *as_words(embed))

    return work


def vector(anchor: Path, documents: Sequence[str], public: Sequence[str], text_key: str,
           embed: Mapping[str, Any]) -> Work:
    """An owner's domain vector ``domain.npz``; discriminants against ``public`` where ``embed`` asks for them."""
    options = dict(embed)
    against = ["--public", *public] if options.pop("discriminant", False) else []

    def work(folder: Path) -> None:
        command("embed", *documents, *against, "--text-key", text_key, "--anchor", str(anchor), "--out",
                str(folder / "domain.npz"), *as_words(options))

    return work


def merge(anchor: Path, experts: Mapping[str, Path], vectors: Mapping[str, Path], window: int | None,
          top_k: int) -> Work:
    """The owners' packages ``packages/NAME``, and what is merged from them, ``model``.

    Args:
        anchor: published.
        experts: by owner, the training run.
        vectors: by owner, the domain vector.
        window: router_window of dense copies, trained without coordination; None for pairs.
        top_k: active experts of the result.
    """
    def work(folder: Path) -> None:
        (folder / "packages").mkdir(exist_ok=True)
        for owner, run in experts.items():
            if not (folder / "packages" / owner).exists():
                dense = ["--name", owner, "--anchor", str(anchor), "--domain-vector", str(vectors[owner]),
                         "--router-window", str(window)]
                command("pack", str(run), str(folder / "packages" / owner), *([] if window is None else dense))
        if not (folder / "model").exists():
            command("merge", "--anchor", str(anchor), *(str(folder / "packages" / owner) for owner in experts),
                    "--top-k", str(top_k), "--out", str(folder / "model"))

    return work


def calibrate(merged: Path, public: Sequence[str], text_key: str) -> Work:
    """A merged model with a temperature chosen on public documents, ``model``."""
    def work(folder: Path) -> None:
        if not (folder / "model").exists():
            command("calibrate", str(merged), "--public", *public, "--text-key", text_key, "--out",
                    str(folder / "model"))

    return work


def soup(paths: Sequence[Path]) -> Work:
    """The average of models, ``model``."""
    def work(folder: Path) -> None:
        from flexolmo_megatron.evaluation.methods.soup import write_soup

        if not (folder / "model").exists():
            write_soup(paths, folder / "model")

    return work


def btx(public: Path, dense: Mapping[str, Path], top_k: int, seed: int) -> Work:
    """BTX before its training, ``model``."""
    def work(folder: Path) -> None:
        from flexolmo_megatron.evaluation.methods.btx import write_btx

        if not (folder / "model").exists():
            write_btx(public, dense, folder / "model", top_k=top_k, seed=seed)

    return work
