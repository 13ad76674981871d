"""What is to be compared, as a user writes it: models with all or some of their experts, and domains."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexolmo_megatron.config.card import PUBLIC
from flexolmo_megatron.convert.model import check_names, open_model
from flexolmo_megatron.errors import FlexOlmoError

_MODEL_SYNTAX = ("expected NAME=PATH, NAME=PATH@EXPERT,... (only these experts) or NAME=PATH@-EXPERT,-EXPERT,... "
                 "(all but these)")


@dataclass(frozen=True)
class Candidate:
    """One row of the table."""

    name: str
    """What the table calls it."""
    path: Path
    """Checkpoint or Hugging Face directory."""
    only: tuple[str, ...] = ()
    """The experts to use beside the public one; empty for all but ``without``."""
    without: tuple[str, ...] = ()
    """The experts to leave out."""

    def experts(self, known: list[str]) -> list[str] | None:
        """The experts to use out of ``known``, in that order; None for all. The public one is always among them.

        Raises:
            FlexOlmoError: an unknown expert, the public one is to be left out, or the model has none.
        """
        if not self.only and not self.without:
            return None
        where = f"--model {self.name}: {self.path}"
        if not known:
            raise FlexOlmoError(f"{where} is a dense model, which has no experts to choose from: expected no @")
        if PUBLIC in self.without:
            raise FlexOlmoError(f"{where}: expert {PUBLIC!r} cannot be left out: it is the anchor that all "
                                "others were trained with")
        try:
            check_names([*self.only, *self.without], known)
        except FlexOlmoError as error:
            raise FlexOlmoError(f"{where}: {error}") from None
        if self.only:
            return [name for name in known if name in self.only or name == PUBLIC]
        return [name for name in known if name not in self.without]


def file_stamp(path: Path) -> str:
    """Names, sizes and times of the files in ``path``, hashed: whether a checkpoint is still the same."""
    files = sorted((str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns)
                   for file in path.rglob("*") if file.is_file())
    return hashlib.sha256(repr(files).encode()).hexdigest()


def check_candidates(candidates: Sequence[Candidate]) -> None:
    """Find, before any model is loaded, what would stop an evaluation half-way; reads no weights.

    Raises:
        FlexOlmoError: a name that comes twice, a missing checkpoint, an unknown expert.
    """
    names = [candidate.name for candidate in candidates]
    for name in names:
        if names.count(name) > 1:
            raise FlexOlmoError(f"--model {name!r} is given {names.count(name)} times: expected a different name "
                                "for each")
    cards = {path: open_model(path).card for path in {candidate.path for candidate in candidates}}
    for candidate in candidates:
        candidate.experts(cards[candidate.path].expert_names)


def candidate_settings(candidates: Sequence[Candidate]) -> dict[str, Any]:
    """What results are kept with, as JSON values: the candidates, and the state of their files; see ``settings.py``."""
    return {
        "models": {candidate.name: {"path": str(candidate.path), "only": list(candidate.only),
                                    "without": list(candidate.without)} for candidate in candidates},
        "files": {str(candidate.path): file_stamp(candidate.path) for candidate in candidates},
    }


def parse_candidate(text: str) -> Candidate:
    """Read ``NAME=PATH``, ``NAME=PATH@EXPERT,EXPERT`` (only these and the public one) or ``NAME=PATH@-EXPERT,-EXPERT``
    (all but these).

    The name ends at the first ``=``, the path at the last ``@`` that no ``/`` follows; an existing path that contains
    such an ``@`` is taken whole.

    Raises:
        FlexOlmoError: the text has another form.
    """
    name, equals, rest = text.partition("=")
    name = name.strip()
    if not equals or not name or not rest:
        raise FlexOlmoError(f"--model {text!r}: {_MODEL_SYNTAX}")
    path, at, chosen = rest.rpartition("@")
    if not at or "/" in chosen or Path(rest).exists():
        return Candidate(name, Path(rest))
    experts = [expert.strip() for expert in chosen.split(",")]
    excluded = [expert.startswith("-") for expert in experts]
    if not path or not all(expert.removeprefix("-") for expert in experts):
        raise FlexOlmoError(f"--model {text!r}: {_MODEL_SYNTAX}")
    if any(excluded) and not all(excluded):
        raise FlexOlmoError(f"--model {text!r} both names experts to use and experts to leave out: {_MODEL_SYNTAX}")
    if all(excluded):
        return Candidate(name, Path(path), without=tuple(expert[1:] for expert in experts))
    return Candidate(name, Path(path), only=tuple(experts))


def parse_domains(texts: Sequence[str], option: str = "--domain") -> dict[str, list[str]]:
    """Read ``NAME=FILES`` items of an option, FILES being a path or a pattern; a name that comes again adds files.

    Raises:
        FlexOlmoError: an item has another form.
    """
    domains: dict[str, list[str]] = {}
    for text in texts:
        name, equals, files = text.partition("=")
        if not equals or not name.strip() or not files:
            raise FlexOlmoError(f"{option} {text!r}: expected NAME=FILES, FILES being a path or a quoted pattern")
        domains.setdefault(name.strip(), []).append(files)
    return domains
