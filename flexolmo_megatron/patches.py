"""``python -m flexolmo_megatron.patches apply|check|revert TREE``: the diffs of ``patches/`` on a tree of Megatron.

TREE is a checkout of Megatron-LM, or the folder of an installed megatron-core (site-packages). A diff fits one version,
line by line: nothing is searched for nearby. Neither git nor patch is needed; ``patches/README.md`` says what each diff
is for. The package itself runs without any of them.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.files import atomic_file

PATCHES = Path(__file__).parent.parent / "patches"
_HUNK = re.compile(r"@@ -(\d+)(?:,\d+)? \+(\d+)(?:,\d+)? @@")


@dataclass(frozen=True)
class Hunk:
    """One changed place of a file, with its unchanged neighbours."""

    old_start: int
    """First line of the place before, counted from 0."""
    old: list[str]
    new_start: int
    new: list[str]

    def reversed(self) -> "Hunk":
        return Hunk(self.new_start, self.new, self.old_start, self.old)


Patch = dict[str, list[Hunk]]
"""Path within a tree -> its hunks in order. A file belongs to one patch alone."""


class _Mismatch(Exception):
    """The text differs from what a hunk expects, at a line counted from 1."""


def read_patch(path: Path) -> Patch:
    """Read a unified diff, as ``git diff`` writes it."""
    patch: Patch = {}
    hunks: list[Hunk] = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.startswith("diff --git "):
            hunks = []
        elif line.startswith("+++ b/"):
            hunks = patch.setdefault(line.removeprefix("+++ b/").strip(), [])
        elif place := _HUNK.match(line):
            hunks.append(Hunk(int(place[1]) - 1, [], int(place[2]) - 1, []))
        elif hunks and line[0] in " +-":
            if line[0] in " -":
                hunks[-1].old.append(line[1:])
            if line[0] in " +":
                hunks[-1].new.append(line[1:])
    return patch


def rewrite(text: str, hunks: Sequence[Hunk]) -> str:
    """Return the text with every hunk in place.

    Raises:
        _Mismatch: a line is not what a hunk expects there.
    """
    lines = text.splitlines(keepends=True)
    result: list[str] = []
    done = 0
    for hunk in hunks:
        for number, expected in enumerate(hunk.old, hunk.old_start):
            if number >= len(lines) or lines[number] != expected:
                raise _Mismatch(number + 1)
        result += lines[done : hunk.old_start] + hunk.new
        done = hunk.old_start + len(hunk.old)
    return "".join(result + lines[done:])


def core_version(core: Path) -> str:
    """The version of a ``megatron/core`` folder, without importing it.

    Raises:
        FlexOlmoError: it is not such a folder.
    """
    path = core / "package_info.py"
    try:
        values = dict(re.findall(r"^(MAJOR|MINOR|PATCH|PRE_RELEASE) = ['\"]?(\w*)", path.read_text(), re.MULTILINE))
        return f"{values['MAJOR']}.{values['MINOR']}.{values['PATCH']}{values['PRE_RELEASE']}"
    except (OSError, KeyError):
        raise FlexOlmoError(
            f"{path} says no version of megatron-core: expected a checkout of Megatron-LM or a site-packages folder"
        ) from None


def patches_for(tree: Path, folder: Path = PATCHES) -> dict[str, Patch]:
    """The patches for a tree's version, by name.

    Raises:
        FlexOlmoError: there are none, or no patches at all (they are not part of an installed package).
    """
    if not folder.is_dir():
        raise FlexOlmoError(f"{folder} does not exist: expected a checkout of flexolmo_megatron, which holds patches/")
    version = core_version(tree / "megatron" / "core")
    known = sorted(path.name.removeprefix("core_v") for path in folder.glob("core_v*"))
    if version not in known:
        raise FlexOlmoError(f"{tree} holds megatron-core {version}: there are patches for {', '.join(known)} alone")
    return {path.stem: read_patch(path) for path in sorted((folder / f"core_v{version}").glob("*.diff"))}


def is_applied(patch: Patch, tree: Path, name: str) -> bool:
    """Whether a tree has a patch.

    Raises:
        FlexOlmoError: it has neither all of it nor nothing of it; names the file and the first line that differs.
    """
    answers = {_file_has(hunks, tree / path, name) for path, hunks in patch.items()}
    if len(answers) > 1:
        raise FlexOlmoError(f"{tree} has a part of the patch {name}: restore {', '.join(patch)} from upstream")
    return answers.pop()


def _file_has(hunks: list[Hunk], path: Path, name: str) -> bool:
    text = _read(path)
    try:
        rewrite(text, [hunk.reversed() for hunk in hunks])
        return True
    except _Mismatch:
        pass
    try:
        rewrite(text, hunks)
        return False
    except _Mismatch as line:
        raise FlexOlmoError(
            f"{path}, line {line}: the text is not upstream's, so the patch {name} neither is there nor fits; restore "
            "the file from upstream"
        ) from None


def _read(path: Path) -> str:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise FlexOlmoError(f"{path} cannot be read: {error}") from error


def change(tree: Path, apply: bool, folder: Path = PATCHES) -> list[str]:
    """Apply or revert all patches for a tree's version; those that are applied, or not, already are left alone.

    All or nothing: every new text is made before the first file is written, and a failed write restores the others.

    Returns:
        Names of the patches that were applied or reverted.

    Raises:
        FlexOlmoError: a patch does not fit, or a file cannot be written; the tree is as it was.
    """
    changed, texts = [], {}
    for name, patch in patches_for(tree, folder).items():
        if is_applied(patch, tree, name) == apply:
            continue
        changed.append(name)
        for path, hunks in patch.items():
            before = _read(tree / path)
            texts[tree / path] = before, rewrite(before, hunks if apply else [hunk.reversed() for hunk in hunks])
    written = []
    try:
        for path, (_, after) in texts.items():
            _write(path, after)
            written.append(path)
    except FlexOlmoError:
        for path in written:
            _write(path, texts[path][0])
        raise
    return changed


def _write(path: Path, text: str) -> None:
    # A new file in its place: package managers link installed files to their cache.
    with atomic_file(path) as file:
        file.write(text.encode())
        shutil.copymode(path, file.name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 where ``check`` finds a patch that is not applied, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m flexolmo_megatron.patches", description=__doc__.split("\n\n")[1])
    parser.add_argument(
        "action",
        choices=("apply", "check", "revert"),
        help="apply all, say which are applied (exit status 1 if not all are), or restore upstream's text",
    )
    parser.add_argument("tree", type=Path, metavar="TREE", help="folder that holds megatron/core")
    args = parser.parse_args(argv)
    try:
        if args.action == "check":
            patches = patches_for(args.tree)
            states = {name: is_applied(patch, args.tree, name) for name, patch in patches.items()}
            for name, applied in states.items():
                print(f"{name}: {'applied' if applied else 'not applied'}")
            return 0 if all(states.values()) else 1
        changed = change(args.tree, args.action == "apply")
        done = "applied" if args.action == "apply" else "reverted"
        print(f"{args.tree}: {done} {', '.join(changed)}" if changed else f"{args.tree}: nothing to do")
    except FlexOlmoError as error:
        print(f"flexolmo: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
