"""Running a recipe on the sources that the user has: filtered documents and a report on what each filter dropped."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from shutil import rmtree
from typing import Any

from flexolmo_megatron.errors import FlexOlmoError, nearest
from flexolmo_megatron.files import atomic_directory, check_free, write_json
from flexolmo_megatron.mix.recipe import Recipe, Source
from flexolmo_megatron.shards import require_datatrove
from flexolmo_megatron.shards.run import Where, kept_if_begun, open_state, progress_folder, run_shards, step_counts
from flexolmo_megatron.training.documents import DEFAULT_MAX_BAD, find_files

FORMAT_VERSION = 1
REPORT, RECIPE = "report.json", "recipe.yaml"
SOURCES = "sources"
"""Folder in the state: a source may have the name of any file."""
_MISSING = ("missing", "no_url")
"""What filters say of documents that lack what they look at."""


def mix(recipe: Recipe, sources: Mapping[str, Sequence[str]], out: str | os.PathLike, *, where: Where,
        text_key: str = "text", max_bad: int = DEFAULT_MAX_BAD) -> dict[str, Any]:
    """Write the folder ``out``: ``SOURCE-NNNNNN.jsonl`` for each file of a source, report.json and recipe.yaml.

    A run that was stopped goes on where it was, if it is started with the same arguments: ``OUT.state`` holds the files
    that are done, and goes when ``out`` is complete.

    Args:
        recipe: see there.
        sources: JSONL and Parquet files, and patterns of such, of the sources that there are.
        out: new folder, created whole or not at all.
        where: files are worked on. It does not change the result.
        text_key: key or column of the text, where the recipe names none.
        max_bad: unusable documents of a file that are skipped before the run stops; not of files that are done.

    Returns:
        The report.

    Raises:
        FlexOlmoError: an unknown source, bad input, or what a filter needs is missing, in all documents or at all.
    """
    require_datatrove("flexolmo mix")
    for name in sources:
        if name not in recipe.sources:
            raise FlexOlmoError(f"--source {name}: recipe {recipe.name} has no such source"
                                f"{nearest(name, recipe.sources)}; it has {', '.join(recipe.sources)}")
    out = Path(out)
    check_free(out)
    files = {name: find_files(patterns) for name, patterns in sources.items()}
    pipelines = {name: [spec.build() for spec in recipe.sources[name].filters] for name in files}
    models = {f"model of {name}": found for name in files
              if (found := [spec.model for spec in recipe.sources[name].filters if spec.model])}
    state = open_state(out, {"recipe": recipe.text, "text_key": text_key}, files | models)
    report: dict[str, Any] = {"format_version": FORMAT_VERSION, "recipe": recipe.name, "sources": {},
                              "absent": [name for name in recipe.sources if name not in files]}
    with kept_if_begun(state):
        for name, steps in pipelines.items():
            report["sources"][name] = _run_source(recipe.sources[name], name, files[name], steps,
                                                  state / SOURCES / name, where, text_key, max_bad)
            _check_fields(name, recipe.sources[name], report["sources"][name], state / SOURCES / name)
    with atomic_directory(out) as folder:
        for name, paths in files.items():
            for shard in range(len(paths)):
                done = state / SOURCES / name / f"{shard:06d}.jsonl"
                if done.stat().st_size:
                    os.link(done, folder / f"{name}-{shard:06d}.jsonl")
        write_json(folder / REPORT, report)
        (folder / RECIPE).write_text(recipe.text, encoding="utf-8")
    rmtree(state)
    return report


def _check_fields(name: str, source: Source, report: dict[str, Any], folder: Path) -> None:
    """Refuse a source of which no document has what a filter looks at: a wrong field, or files of another kind."""
    for spec, row in zip(source.filters, report["filters"], strict=True):
        missing = sum(row["reasons"].get(reason, 0) for reason in _MISSING)
        if spec.keys and missing and missing == row["kept"] + row["dropped"]:
            rmtree(folder)  # nothing to go on with: other files, or another recipe, are needed
            raise FlexOlmoError(f"--source {name}: none of {missing:,} documents has a field {spec.keys[0]!r} that the "
                                f"filter {spec.name} can use: expected files with it, or a recipe without that filter")


def _run_source(source: Source, name: str, files: list[Path], filters: list[Any], folder: Path, where: Where,
                text_key: str, max_bad: int) -> dict[str, Any]:
    from flexolmo_megatron.mix.steps import WriteDocuments
    from flexolmo_megatron.shards.documents import ReadDocuments

    keys = sorted({key for spec in source.filters for key in spec.keys})
    reader = ReadDocuments(files, 1, source.text_key or text_key, max_bad, progress_folder(folder), keys=keys)
    run_shards([reader, *filters, WriteDocuments(folder, name)], len(files), folder, where, f"mix {name}")
    read, *steps, written = step_counts(folder)
    rows = []
    for spec, counts in zip(source.filters, steps, strict=True):
        reasons = {key.removeprefix("dropped_"): value for key, value in sorted(counts.items())
                   if key.startswith("dropped_")}
        rows.append({**asdict(spec), "kept": counts.get("forwarded", 0), "dropped": counts.get("dropped", 0),
                     "reasons": reasons})
    return {
        "what": source.what, "licence": source.licence, "before": source.before, "files": len(files),
        "documents": read.get("documents", 0),
        "unusable": {key.removeprefix("unusable "): value for key, value in sorted(read.items())
                     if key.startswith("unusable ")},
        "filters": rows, "written": written.get("written", 0), "text_bytes": written.get("text_bytes", 0),
    }
