"""The four corpora of the quickstart, from what any Python installation holds: no download, no network.

    python examples/quickstart/corpora.py OUT_DIR [--seed N]

writes OUT_DIR/NAME/train.jsonl and OUT_DIR/NAME/valid.jsonl, one {"text": ...} per line, for

    public      most of it prose: documentation, readme files and licences of the standard library and the installed
                packages; the rest a bit of everything, as on the web: settings, tables, web pages, sums, work orders
    code        an owner's source code: the standard library's, without its documentation strings
    arithmetic  an owner's worksheets: generated problems with worked answers
    clinic      an owner's discharge notes: generated, of a fictional hospital

The same seed on the same installation gives the same files. No document is in two files; documentation is in public
alone and source code in code alone.
"""

import argparse
import ast
import importlib.metadata
import inspect
import json
import random
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from generated import arithmetic_document, clinic_document, sums, work_order

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.files import atomic_file

TRAIN_BYTES = {"public": 2_500_000, "code": 2_000_000, "arithmetic": 2_000_000, "clinic": 2_000_000}
VALID_BYTES = 80_000
PUBLIC_SHARES = {
    (".yaml", ".toml", ".cmake"): 0.04,
    (".json",): 0.04,
    (".csv", ".afm"): 0.04,
    (".js", ".css", ".html"): 0.04,
    sums: 0.12,
    work_order: 0.12,
}
"""What is not prose in the public corpus: files of the installed packages by their suffixes, as far as there is so much
of them, and generated text. A router that has seen only prose beside its owner's text takes all other text for its
own."""
PIECES_OF_A_FILE = 4
"""So that no large file makes up a kind by itself."""
SHORTEST, LONGEST = 300, 4000
"""Bytes of a document."""

# Tables, tests, and what names the machine that Python was built on.
_LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "lib2to3",
    "_bundled",
}
_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_COMMON = re.compile(r"\b(the|of|to|is|and|in|for|that|be|are|with|this|or|as|it)\b", re.IGNORECASE)
# All of them, to pair the quotes rightly; only one that begins a line (group 1) is documentation.
_TRIPLE_QUOTED = re.compile(r"""(^[ \t]*)?[rRbBfFuU]{0,2}("{3}|'{3})(.*?)\2""", re.DOTALL | re.MULTILINE)
_LICENCE = re.compile(r"(licen[sc]e|copying|notice|authors)[^.]*(\.txt|\.md|\.rst)?", re.IGNORECASE)
_CODE = re.compile(r"[{}\[\]=<>_|\\#$@~^*%]|\(\)|::")


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not _LEFT_OUT & set(path.relative_to(root).parts) and not path.name.startswith("_sysconfigdata")
    ]
    if not files:
        raise FlexOlmoError(f"{root} holds no source files; expected those of a full Python installation")
    return files


def _parse(path: Path) -> tuple[str, ast.Module] | None:
    try:
        with warnings.catch_warnings():  # about escapes in strings
            warnings.simplefilter("ignore")
            source = path.read_text(encoding="utf-8")
            return source, ast.parse(source)
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError, RecursionError):
        return None


def _docstrings(node: ast.AST) -> Iterator[ast.Expr]:
    # Statements alone, which hold all of them: ast.walk would visit ten times as many nodes.
    if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False):
        yield node.body[0]
    for inner in ("body", "orelse", "handlers", "finalbody"):
        for statement in getattr(node, inner, ()):
            yield from _docstrings(statement)


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of running English in ``text``, each on one line: no code, examples, tables, headings, lists."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"^.*\n *[-=~^]{3,}$", "", text, flags=re.MULTILINE)  # underlined headings
    for block in re.split(r"\n\s*\n", text.expandtabs()):
        lines = textwrap.dedent(block).strip("\n").splitlines()
        if any(line.startswith((" ", ">>>", "...", "..", "|", ":")) for line in lines):
            continue
        joined = re.sub(r":[\w:]+:`[~!.]?([^`<]*)[^`]*`", r"\1", " ".join(lines))
        joined = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", joined)
        joined = re.sub(r"\s+", " ", joined.replace("`", "").replace("**", ""))
        words = joined.count(" ") + 1
        if (
            len(joined) >= 80
            and joined.isascii()
            and joined[0].isalpha()
            and joined[-1] in ".:!?)"
            and len(_COMMON.findall(joined)) >= words / 8
            and len(_CODE.findall(joined)) <= len(joined) / 80
            and sum(char.isalpha() or char == " " for char in joined) >= 0.9 * len(joined)
        ):
            yield joined.strip()


def _prose_sources(r: random.Random) -> Iterator[str]:
    """Texts that hold prose, the best first: language reference, standard library, readme files, licences, packages."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    for path in _standard_library():
        yield _documentation(path)
    seen: set[Path] = set()
    modules: list[Path] = []
    for distribution in sorted(importlib.metadata.distributions(), key=lambda item: str(item.metadata["Name"]).lower()):
        yield distribution.read_text("METADATA") or ""
        for file in distribution.files or ():
            path = Path(distribution.locate_file(file))
            if path in seen or set(file.parts) & {"test", "tests", "testing"}:
                continue
            seen.add(path)
            if _LICENCE.fullmatch(path.name) and path.is_file():
                yield path.read_text(encoding="utf-8", errors="replace")
            elif path.suffix == ".py":
                modules.append(path)
    r.shuffle(modules)
    for path in modules:
        yield _documentation(path)


def _documentation(path: Path) -> str:
    """The documentation strings of a source file, found by their quotes: parsing takes ten times as long."""
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    return "\n\n".join(inspect.cleandoc(match[3]) for match in _TRIPLE_QUOTED.finditer(source) if match[1] is not None)


def public_documents(size: int, r: random.Random) -> Iterator[str]:
    """Documents of prose, ``size`` bytes in all or as many as there are; no paragraph comes twice."""
    seen: set[str] = set()
    for text in _prose_sources(r):
        document = ""
        for paragraph in paragraphs(text):
            key = re.sub(r"\W+", "", paragraph).lower()
            if key in seen or len(paragraph) > LONGEST:
                continue
            seen.add(key)
            if len(document) + len(paragraph) + 2 > LONGEST:
                yield document
                size -= len(document)
                document = ""
            document += ("\n\n" if document else "") + paragraph
        if len(document) >= SHORTEST:
            yield document
            size -= len(document)
        if size <= 0:
            return


def structured_documents(suffixes: tuple[str, ...], size: int, r: random.Random) -> Iterator[str]:
    """Pieces of the installed packages' files of one kind, ``size`` bytes in all or as many as there are."""
    files = []
    for distribution in importlib.metadata.distributions():
        for file in distribution.files or ():
            if file.suffix in suffixes and not set(file.parts) & {"test", "tests", "testing"}:
                files.append(Path(distribution.locate_file(file)))
    files.sort()
    r.shuffle(files)
    for path in files:
        try:
            lines = path.read_text(encoding="ascii").splitlines()
        except (OSError, UnicodeDecodeError):
            continue
        if not lines or max(map(len, lines)) > 300:  # written for machines alone
            continue
        pieces, piece = [], ""
        for line in lines:
            if len(piece) + len(line) + 1 > LONGEST // 2:
                pieces.append(piece)
                piece = ""
            piece += line.rstrip() + "\n"
        for piece in r.sample(pieces, min(PIECES_OF_A_FILE, len(pieces))):
            yield piece
            size -= len(piece)
            if size <= 0:
                return


def code_documents(path: Path) -> Iterator[str]:
    """One source file without its documentation strings, in pieces that begin and end at empty lines."""
    parsed = _parse(path)
    if not parsed:
        return
    source, tree = parsed
    lines = source.splitlines()
    for node in _docstrings(tree):
        for number in range(node.lineno - 1, node.end_lineno):
            lines[number] = ""
    piece = ""
    for block in re.split(r"\n\s*\n(?=\s*\S)", "\n".join(line.rstrip() for line in lines)):
        if piece and len(piece.encode()) + len(block.encode()) + 2 > LONGEST:
            yield piece
            piece = ""
        piece += ("\n\n" if piece else "") + block.strip("\n")
    yield piece


def _take(documents: Iterable[str], size: int, taken: set[str]) -> list[str]:
    """New documents of a proper length from ``documents``, ``size`` bytes in all or as many as there are."""
    found = []
    for document in documents:
        length = len(document.encode())
        if SHORTEST <= length <= LONGEST and document not in taken:
            taken.add(document)
            found.append(document)
            size -= length
            if size <= 0:
                break
    return found


def _endless(make: Callable[[random.Random], str], r: random.Random) -> Iterator[str]:
    while True:
        yield make(r)


def build_corpora(out: Path, seed: int = 0) -> dict[str, dict[str, Path]]:
    """Write all corpora under ``out``, over those of an earlier run.

    Returns:
        The files, as ``{"public": {"train": path, "valid": path}, ...}``.

    Raises:
        FlexOlmoError: the standard library's source is missing, or a file cannot be written.
    """
    files = {name: {split: out / name / f"{split}.jsonl" for split in ("train", "valid")} for name in TRAIN_BYTES}
    for name in files:
        try:
            (out / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FlexOlmoError(f"cannot write {out / name}: {error.strerror}") from error
    for name, size in TRAIN_BYTES.items():
        r = random.Random(f"{seed} {name}")  # a corpus does not depend on the others
        if name == "public":
            wanted = size + 2 * VALID_BYTES
            documents = list(public_documents(int(wanted * (1 - sum(PUBLIC_SHARES.values()))), r))
            for kind, share in PUBLIC_SHARES.items():
                pieces = _endless(kind, r) if callable(kind) else structured_documents(kind, int(wanted * share), r)
                documents += _take(pieces, int(wanted * share), set())
            r.shuffle(documents)
        elif name == "code":
            # Whole files on one side or the other, so that validation is not the rest of a training file.
            sources = _standard_library()
            r.shuffle(sources)
            documents = (document for path in sources for document in code_documents(path))
        else:
            documents = _endless({"arithmetic": arithmetic_document, "clinic": clinic_document}[name], r)
        stream = iter(documents)
        taken: set[str] = set()
        valid = _take(stream, VALID_BYTES, taken)
        _write(files[name]["valid"], valid)
        _write(files[name]["train"], _take(stream, size, taken))
    return files


def _write(path: Path, documents: list[str]) -> None:
    with atomic_file(path) as file:
        for document in documents:
            file.write(json.dumps({"text": document}, ensure_ascii=False).encode() + b"\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the quickstart's four corpora from this Python installation.")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="folder to write to; existing corpora are replaced")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of every choice (default: %(default)s)")
    args = parser.parse_args()
    try:
        files = build_corpora(args.out, args.seed)
    except FlexOlmoError as error:
        parser.error(str(error))
    for splits in files.values():
        for path in splits.values():
            print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
