"""Small runs for the tests of training: data, an anchor, its publication and an owner's options, made once."""

import json
from pathlib import Path

from flexolmo_megatron.cli import main

SMALL = [
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=48",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.max_position_embeddings=32",
    "model.vocab_size=264",
    "data.seq_length=32",
    "global_batch_size=4",
    "micro_batch_size=2",
    "train_iters=6",
    "eval_iters=1",
    "optimizer.lr=5e-3",
]


def write_documents(path: Path, words: list[str], count: int = 60) -> Path:
    """Write documents that are made of ``words`` in changing order."""
    with open(path, "w") as file:
        for index in range(count):
            text = " ".join(words[(index * 7 + place * place) % len(words)] for place in range(12))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def metrics(run: Path) -> list[dict]:
    """What a run has recorded, step by step."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def make_world(folder: Path) -> Path:
    """Make documents and data of ``public`` and ``own``, a trained and published anchor, and the owner's vectors."""
    texts = {
        "public": ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "the", "moon"],
        "own": ["def", "return", "for", "if", "x", "y", "=", "+", "1", "2"],
    }
    for name, words in texts.items():
        write_documents(folder / f"{name}.jsonl", words)
        assert main(["data", f"{folder}/{name}.jsonl", "--out", f"{folder}/{name}", "--workers", "1"]) == 0
    assert main(["train", "anchor", *SMALL, f"out={folder}/anchor_run", f"data.train=[{folder}/public]"]) == 0
    embed = ["embed", "--anchor"]
    assert (
        main(
            [
                *embed,
                f"{folder}/anchor_run",
                f"{folder}/public.jsonl",
                "--out",
                f"{folder}/public.npz",
                "--publish",
                f"{folder}/anchor",
            ]
        )
        == 0
    )
    assert main([*embed, f"{folder}/anchor", f"{folder}/own.jsonl", "--out", f"{folder}/own.npz"]) == 0
    public = ["--public", f"{folder}/public.jsonl", "--out", f"{folder}/discriminant.npz"]
    assert main([*embed, f"{folder}/anchor", f"{folder}/own.jsonl", *public]) == 0
    return folder


def expert_options(world: Path, out: Path, *options: str) -> list[str]:
    """The command line of the owner's run, writing to ``out``."""
    return [
        "train",
        "expert",
        *SMALL[7:],
        f"anchor={world}/anchor",
        "expert.name=own",
        f"expert.domain_vector={world}/own.npz",
        f"data.train=[{world}/own]",
        f"data.valid=[{world}/public]",
        f"out={out}",
        *options,
    ]
