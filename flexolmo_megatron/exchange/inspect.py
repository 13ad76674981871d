"""What is in a checkpoint, a Hugging Face directory, a training run or an expert package.

Only headers and cards are read, unless a digest is asked for. Free text of owners is shown with control characters
escaped and without markup.
"""

import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from flexolmo_megatron.config.card import CARD_FILE, TUNED_MODEL, ModelCard
from flexolmo_megatron.convert.huggingface import CONFIG_FILE
from flexolmo_megatron.convert.lazy import LazyModel
from flexolmo_megatron.convert.model import checkpoints, open_model, total_bytes
from flexolmo_megatron.convert.rows import choose
from flexolmo_megatron.exchange.digest import DTYPE_NAMES, model_digest
from flexolmo_megatron.exchange.manifest import MANIFEST_FILE
from flexolmo_megatron.exchange.package import open_package
from flexolmo_megatron.exchange.progress import Progress, no_progress
from flexolmo_megatron.untrusted import printable


def describe(path: str | os.PathLike, *, digest: bool = False,
             progress: Progress = no_progress) -> dict[str, Any]:
    """Describe what lies at ``path``, as values that JSON can hold.

    Args:
        digest: also read all tensors: the digest of a model; of a package, whether it is intact.
        progress: shows how far reading has got, see ``Progress``.

    Raises:
        FlexOlmoError: there is nothing that can be described, or it is damaged.
    """
    path = Path(path)
    if (path / MANIFEST_FILE).exists():
        return _describe_package(path, digest, progress)
    return _describe_model(path, digest, progress)


def _describe_model(path: Path, digest: bool, progress: Progress) -> dict[str, Any]:
    model = open_model(path)
    result: dict[str, Any] = {"path": str(path), "kind": model.card.kind}
    if (path / CONFIG_FILE).exists():
        result["format"] = "hf"
    else:
        result["format"] = "megatron"
        if (path / TUNED_MODEL / CARD_FILE).exists():
            result["described_checkpoint"] = TUNED_MODEL
        elif found := [folder.name for folder in checkpoints(path)]:
            result["checkpoints"] = found
            result["described_checkpoint"] = found[-1]
    result["architecture"] = asdict(model.card.model)
    result |= _sizes(model)
    result["experts"] = [asdict(expert) for expert in model.card.experts]
    if model.card.row_sets:
        result["row_sets"] = [asdict(rows) for rows in model.card.row_sets]
        result["opt_out"] = _opt_outs(model.card)
    for field in ("chosen_top_k", "anchor_digest", "anchor_path", "tokenizer", "training"):
        result[field] = getattr(model.card, field)
    if digest:
        with progress(total_bytes(model)) as add:
            result["digest"] = model_digest(model, add)
    return result


def _opt_outs(card: ModelCard) -> dict[str, dict[str, Any]]:
    """For each owner's expert that the model has, or that has left its mark on the rows, what leaving it out means."""
    named = [name for rows in card.row_sets for name in (*rows.experts, *rows.proxies)]
    result = {}
    for name in dict.fromkeys([*card.expert_names[1:], *named]):
        present = name in card.expert_names
        chosen = choose(card.row_sets, [name]) if present else card.row_sets[0]
        result[name] = {"in_model": present, "rows": chosen.name,
                        "guarantee": "expert-only" if chosen.depends_on([name]) else "strict",
                        "strict": [rows.name for rows in card.row_sets if not rows.depends_on([name])],
                        "expert_only": [rows.name for rows in card.row_sets if rows.depends_on([name])]}
    return result


def _sizes(model: LazyModel) -> dict[str, Any]:
    counts = {name: math.prod(tensor.shape) for name, tensor in model.tensors.items()}
    config, total = model.card.model, sum(counts.values())
    inactive = 0
    if model.card.kind == "moe":
        inactive = ((config.num_experts - config.top_k) * config.num_layers * 3 * config.hidden_size
                    * config.ffn_hidden_size)
    dtypes: dict[str, int] = {}
    for name, tensor in model.tensors.items():
        dtypes[DTYPE_NAMES[tensor.dtype]] = dtypes.get(DTYPE_NAMES[tensor.dtype], 0) + counts[name]
    return {"parameters": total, "active_parameters": total - inactive, "bytes": total_bytes(model), "dtypes": dtypes}


def _describe_package(path: Path, digest: bool, progress: Progress) -> dict[str, Any]:
    package = open_package(path)
    if digest:
        with progress(package.num_bytes) as add:
            package.check_contents(add)
    parameters = sum(math.prod(entry.shape) for entry in package.file.entries.values())
    return {"path": str(path), "kind": "package", "parameters": parameters, "bytes": package.num_bytes,
            "router_bias": package.has_bias, "contents": "match sha256" if digest else "not read",
            "manifest": package.manifest.to_json()}


def render(description: dict[str, Any]) -> Group:
    """Return a description as tables for a rich console."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in _rows(description):
        table.add_row(key.replace("_", " "), _shown(value))
    experts = description.get("experts")
    if not experts:
        return Group(table)
    columns = ("name", "owner", "licence", "contact", "router", "package_sha256")
    listing = Table(title="experts, in the order of the router's rows", title_justify="left")
    for column in columns:
        listing.add_column(column.replace("_", " "), overflow="fold")
    for expert in experts:
        listing.add_row(*(_shown(expert[column]) for column in columns))
    parts = [table, Text(""), listing]
    if "opt_out" in description:
        parts += [Text(""), _row_sets(description["row_sets"]), Text(""), _opt_out(description["opt_out"])]
    return Group(*parts)


def _row_sets(sets: list[dict[str, Any]]) -> Table:
    table = Table(title="sets of router rows, the model's own first", title_justify="left")
    for column in ("name", "tuned with the experts", "on proxies of", "training"):
        table.add_column(column, overflow="fold")
    for rows in sets:
        table.add_row(*(_shown(rows[key]) for key in ("name", "experts", "proxies", "training")))
    return table


def _opt_out(opt_outs: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="leaving out an expert (strict: nothing derived from its owner's data remains; expert-only: "
                        "the expert is gone, but has shaped the rows)", title_justify="left")
    for column in ("expert", "rows by default", "guarantee", "strict with", "expert-only with"):
        table.add_column(column, overflow="fold")
    for name, found in opt_outs.items():
        shown = name if found["in_model"] else f"{name} (left out already)"
        table.add_row(*(_shown(value) for value in (shown, found["rows"], found["guarantee"], found["strict"],
                                                    found["expert_only"])))
    return table


def _rows(values: dict[str, Any]) -> list[tuple[str, Any]]:
    """Flatten nested objects into rows; empty values and experts are left out."""
    rows = []
    for key, value in values.items():
        if key in ("experts", "row_sets", "opt_out") or value in (None, "", {}, []):
            continue
        if isinstance(value, dict) and key in ("architecture", "manifest"):
            rows += _rows(value)
        else:
            rows.append((key, value))
    return rows


def _shown(value: Any) -> Text:
    if isinstance(value, dict):
        text = ", ".join(f"{key}: {_shown(item)}" for key, item in value.items())
    elif isinstance(value, list):
        text = ", ".join(str(item) for item in value)
    elif isinstance(value, int) and not isinstance(value, bool):
        text = f"{value:,}"
    else:
        text = "" if value is None else str(value)
    return Text(printable(text))
