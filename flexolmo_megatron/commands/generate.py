"""``flexolmo generate``: text from a model, with all experts or only some of them."""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from flexolmo_megatron.commands.models import add_loading_options, add_sampling_options
from flexolmo_megatron.errors import FlexOlmoError

if TYPE_CHECKING:
    from flexolmo_megatron.inference.generate import Generation


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "generate", help="text, with --experts / --exclude",
        description="Continue prompts with a model, and say how much of the routing weight each expert had in each "
                    "answer.")
    parser.add_argument("model", metavar="MODEL",
                        help="Megatron checkpoint, training run or Hugging Face directory; a pair is joined with its "
                             "anchor")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    source.add_argument("--prompts-file", type=Path, metavar="FILE",
                        help="a prompt per line; if the name ends in .jsonl, a JSON string or an object with the key "
                             "\"prompt\" per line. Without this and --prompt, lines of standard input")
    access = parser.add_mutually_exclusive_group()
    access.add_argument("--experts", metavar="NAME,NAME",
                        help="use only these experts, and public, which is always used")
    access.add_argument("--exclude", metavar="NAME,NAME", help="use all experts but these")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N",
                        help="tokens of an answer, at most (default: %(default)s)")
    add_sampling_options(parser, temperature=0.0, top_k=0, top_p=1.0)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N",
                        help="prompts that are computed at a time (default: %(default)s)")
    add_loading_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object per answer and line")
    parser.set_defaults(run=run)


def parse_prompts(lines: Iterable[str], jsonl: bool, where: str) -> list[str]:
    """Read one prompt per line.

    Raises:
        FlexOlmoError: there is none, or a line of JSON is broken or holds no text.
    """
    prompts = []
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r\n")
        if not jsonl:
            prompts.append(line)
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise FlexOlmoError(f"{where}, line {number} is not JSON: {error}") from None
        prompt = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(prompt, str):
            raise FlexOlmoError(f"{where}, line {number}: expected a JSON string, or an object with a text as "
                                "\"prompt\"")
        prompts.append(prompt)
    if not prompts:
        raise FlexOlmoError(f"{where} holds no prompt: expected at least one line")
    return prompts


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompt is not None:
        return args.prompt
    if args.prompts_file is None:
        try:
            return parse_prompts(sys.stdin, False, "standard input")
        except UnicodeDecodeError as error:
            raise FlexOlmoError(f"standard input cannot be read as text: {error}") from error
    try:
        with open(args.prompts_file, encoding="utf-8") as file:
            return parse_prompts(file, args.prompts_file.suffix == ".jsonl", str(args.prompts_file))
    except FileNotFoundError:
        raise FlexOlmoError(f"--prompts-file {args.prompts_file} does not exist: expected a text file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise FlexOlmoError(f"--prompts-file {args.prompts_file} cannot be read as UTF-8 text: {error}") from error


def chosen_experts(experts: str | None, exclude: str | None, known: list[str]) -> list[str] | None:
    """Turn --experts or --exclude into the list of names to use; None for all.

    Raises:
        FlexOlmoError: an unknown name, the anchor is excluded, or a model without experts.
    """
    from flexolmo_megatron.config.card import PUBLIC
    from flexolmo_megatron.convert.model import check_names

    given = experts if exclude is None else exclude
    if given is None:
        return None
    option = "--experts" if exclude is None else "--exclude"
    names = [name.strip() for name in given.split(",")]
    if not known:
        raise FlexOlmoError(f"{option} {given}: this is a dense model, which has no experts to choose from")
    try:
        check_names(names, known)
    except FlexOlmoError as error:
        raise FlexOlmoError(f"{option} {given}: {error}") from None
    if exclude is None:
        return [name for name in known if name in names or name == PUBLIC]
    if PUBLIC in names:
        raise FlexOlmoError(f"{option} {given}: {PUBLIC!r} cannot be excluded, it is the anchor that all others were "
                            "trained with")
    return [name for name in known if name not in names]


def render(generation: "Generation") -> str:
    """One answer for a reader: the prompt with its continuation, and a line about how it came about."""
    shares = ", ".join(f"{name} {share:.1%}" for name, share in generation.routing_share.items() if share)
    end = "ended by the model" if generation.finish == "eod" else "stopped at --max-new-tokens"
    routing = f"routing weight: {shares}; " if shares else ""
    rows = f"router rows: {generation.rows}; " if generation.rows else ""
    return f"{generation.prompt}{generation.text}\n    [{routing}{rows}{len(generation.tokens)} tokens, {end}]"


def run(args: argparse.Namespace) -> None:
    """Run ``flexolmo generate``."""
    prompts = _prompts(args)

    import torch
    from tqdm import tqdm

    from flexolmo_megatron.inference.model import load_model

    model = load_model(args.model, getattr(torch, args.dtype), anchor=args.anchor, rows=args.rows)
    experts = chosen_experts(args.experts, args.exclude, model.expert_names)
    with tqdm(desc="generate", unit=" tokens", leave=False, disable=None) as bar:
        generations = model.generate(
            prompts, experts=experts, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
            top_k=args.top_k, top_p=args.top_p, seed=args.seed, batch_size=args.batch_size, progress=bar.update)
    for generation in generations:
        if args.json:
            print(json.dumps({**asdict(generation), "experts": experts or model.expert_names}, ensure_ascii=False))
        else:
            print(render(generation))
