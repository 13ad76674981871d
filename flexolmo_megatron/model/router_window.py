"""Routing logits averaged over the last positions: many tokens show what a text is about, where one hardly does.

logits_t = mean of r . x over the positions max(0, t - w + 1) to t, with w = router_window; 1 is the paper's router. It
is causal, and each expert's logits are averaged by themselves, so that leaving one out changes no other's. Like
attention it does not stop where one document of a sequence ends and the next begins.

Legend: s sequence, b batch, E experts.
"""

import contextlib
from collections.abc import Iterator

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor, nn
from torch.distributed import ProcessGroup


def window_mean(logits_sbE: Tensor, window: int, valid_sb: Tensor | None = None) -> Tensor:
    """Average each position with up to ``window`` - 1 positions before it.

    Args:
        logits_sbE: fp32, of whole sequences.
        window: positions, at least 1.
        valid_sb: True where a position counts; None for everywhere.

    Returns:
        `[s, b, E]`; 0 where no position counts.
    """
    window = min(window, len(logits_sbE))
    if valid_sb is None:
        valid_sb = torch.ones_like(logits_sbE[:, :1, 0], dtype=torch.bool)
    sums_sbE = _window_sums(logits_sbE.masked_fill(~valid_sb[..., None], 0), window)
    counts_sb = _window_sums(valid_sb[..., None].to(logits_sbE.dtype), window)
    return sums_sbE / counts_sb.clamp(min=1)


def _window_sums(values_sbE: Tensor, window: int) -> Tensor:
    # A kernel of one column sums along the sequence without another order of dimensions, for which gradients would have
    # to be copied.
    columns = nn.functional.pad(values_sbE.flatten(1)[None, None], (0, 0, window - 1, 0))
    return nn.functional.avg_pool2d(columns, (window, 1), stride=1, divisor_override=1).view_as(values_sbE)


def window_mean_of_part(
    logits_sbE: Tensor, window: int, cp_group: ProcessGroup, sp_group: ProcessGroup | None
) -> Tensor:
    """``window_mean`` where each rank has a part of the sequences, as Megatron splits them.

    All logits are gathered: a few numbers per token, next to the h of its hidden state.

    Args:
        logits_sbE: of this rank's positions.
        window: positions.
        cp_group: context parallelism; its rank r has the parts r and 2 * size - 1 - r of 2 * size.
        sp_group: within that the tensor-parallel group, if sequence parallelism splits it further; else None.
    """
    # Backward, each rank's gradients of all positions are added up, and each keeps those of its own.
    if sp_group is not None:
        whole_sbE = gather_from_sequence_parallel_region(logits_sbE, group=sp_group)
        return window_mean_of_part(whole_sbE, window, cp_group, None).chunk(sp_group.size())[sp_group.rank()]
    if cp_group.size() == 1:
        return window_mean(logits_sbE, window)
    parts = gather_from_sequence_parallel_region(logits_sbE, group=cp_group).chunk(2 * cp_group.size())
    means_sbE = window_mean(torch.cat([*parts[::2], *reversed(parts[1::2])]), window)
    parts = means_sbE.chunk(2 * cp_group.size())
    return torch.cat([parts[cp_group.rank()], parts[-1 - cp_group.rank()]])


class LogitHistory:
    """A router's latest logits within one batch of answers, whose prompts are padded on the left."""

    def __init__(self, window: int, starts_b: Tensor) -> None:
        """``starts_b``: the position of each prompt's first token."""
        self._window, self._starts_b = window, starts_b
        self._end = 0
        self._past_sbE: Tensor | None = None

    def mean(self, logits_sbE: Tensor) -> Tensor:
        """``window_mean`` of the next positions, `[s, b, E]`, with those before them."""
        new = len(logits_sbE)
        self._end += new
        if self._past_sbE is not None:
            logits_sbE = torch.cat([self._past_sbE, logits_sbE])
        positions_s = torch.arange(self._end - len(logits_sbE), self._end, device=logits_sbE.device)
        means_sbE = window_mean(logits_sbE, self._window, positions_s[:, None] >= self._starts_b)
        self._past_sbE = logits_sbE[max(0, len(logits_sbE) - self._window + 1):]
        return means_sbE[-new:]


@contextlib.contextmanager
def remembered(routers: list, starts_b: Tensor) -> Iterator[None]:
    """Let passes within the block go on where the ones before them ended, as with a key/value cache.

    Args:
        routers: ``DomainRouter``s of a model.
        starts_b: the position of each prompt's first token.
    """
    for router in routers:
        router.history = LogitHistory(router.config.router_window, starts_b)
    try:
        yield
    finally:
        for router in routers:
            router.history = None
