"""Who may use which expert: from the names in a request to masks on the routers, and to the rows that fit them.

An expert that a sequence may not use gets the routing logit -inf and no token, so nothing that it holds (weights,
router row, bias, be they NaN) can reach that sequence. What it has left in the other experts' rows of a tuned router is
gone where another set of rows is used (``convert/rows.py``).

Legend: b sequences, E experts.
"""

import contextlib
from collections.abc import Iterator, Sequence, Set
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flexolmo_megatron.config.card import PUBLIC
from flexolmo_megatron.convert.model import check_names
from flexolmo_megatron.errors import FlexOlmoError

if TYPE_CHECKING:
    from flexolmo_megatron.model.router import DomainRouter

Names = Sequence[str] | Set[str]
Experts = Names | Sequence[Names] | None
"""Names of the experts to use: one list (or set) for a whole batch, one per sequence, or None for all."""


def _check_list(names: Names, known: Sequence[str], where: str) -> None:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise FlexOlmoError(f"{where} = {names!r}: expected a list of expert names, or one list per sequence")
    try:
        check_names(names, list(known))
    except FlexOlmoError as error:
        raise FlexOlmoError(f"{where}: {error}") from None
    if PUBLIC not in names:
        raise FlexOlmoError(f"{where} = {list(names)} leaves out {PUBLIC!r}: the anchor cannot be excluded, all others "
                            "were trained with it")


def allowed_experts(experts: Experts, known: Sequence[str], batch_size: int) -> Tensor | None:
    """Translate names to a mask.

    Args:
        experts: what the sequences may use.
        known: the model's expert names, in the order of its router's rows; empty for a dense model.
        batch_size: b.

    Returns:
        Boolean `[b, E]`, True where a sequence may use an expert; None for all experts.

    Raises:
        FlexOlmoError: an unknown name (the known ones are listed), a list without the anchor, a number of lists other
            than b, or a dense model.
    """
    if experts is None:
        return None
    if not known:
        raise FlexOlmoError("experts were named, but this is a dense model, which has none to choose from")
    if isinstance(experts, str) or not isinstance(experts, Sequence | Set):
        raise FlexOlmoError(f"experts = {experts!r}: expected a list of expert names, or one list per sequence")
    nested = [not isinstance(entry, str) for entry in experts]
    if experts and all(nested):
        if len(experts) != batch_size:
            raise FlexOlmoError(f"experts has {len(experts)} lists for {batch_size} sequences: expected one per "
                                "sequence, or a single list of names for all")
        for index, names in enumerate(experts):
            if not isinstance(names, Sequence | Set):
                raise FlexOlmoError(f"experts[{index}] = {names!r}: expected a list of expert names")
            _check_list(names, known, f"experts[{index}]")
        lists = experts
    else:
        _check_list(experts, known, "experts")
        lists = [experts] * batch_size
    return torch.tensor([[name in names for name in known] for names in lists])


def named(allowed_E: Tensor, known: Sequence[str]) -> list[str]:
    """Translate a sequence's mask back to names: those of ``known`` that ``allowed_E`` marks."""
    return [name for name, allowed in zip(known, allowed_E.tolist(), strict=True) if allowed]


def routers_of(model: nn.Module) -> "list[DomainRouter]":
    """Return the routers of a model, by layer; none for a dense one."""
    # Not at the top: Megatron is to be imported after runtime.setup.initialize.
    from flexolmo_megatron.model.router import DomainRouter

    return [module for module in model.modules() if isinstance(module, DomainRouter)]


Rows = list[tuple[Tensor, Tensor | None]]
"""One set of router rows `[E, H]` and biases `[E]` (or None), by layer."""


@contextlib.contextmanager
def using_rows(model: nn.Module, rows: Rows | None) -> Iterator[None]:
    """Let forward passes of ``model`` within the block use other router rows; None for its own.

    Not for several threads that share a model.
    """
    routers = routers_of(model) if rows else []
    before = [(router.weight.data, None if router.bias is None else router.bias.data) for router in routers]

    def put(values: Rows) -> None:
        for router, (weight, bias) in zip(routers, values, strict=True):
            router.weight.data = weight
            if bias is not None:
                router.bias.data = bias

    put(rows or [])
    try:
        yield
    finally:
        put(before)


@contextlib.contextmanager
def only_allowed(model: nn.Module, allowed_BE: Tensor | None) -> Iterator[None]:
    """Let forward passes of ``model`` within the block use only the experts that ``allowed_BE`` marks.

    The mask's b must be the batch size of those passes. Not for several threads that share a model.
    """
    routers = routers_of(model)
    before = [router.allowed_BE for router in routers]
    for router in routers:
        router.allowed_BE = None if allowed_BE is None else allowed_BE.to(router.weight.device)
    try:
        yield
    finally:
        for router, mask in zip(routers, before, strict=True):
            router.allowed_BE = mask
