"""The domain router: one row per expert, a bias that never favours an owner, and experts that can be switched off.

logits_e = r_e . x + min(b_e, 0); p = softmax over the allowed experts; top-k of p without renormalisation
(arXiv 2507.07024, section 3). Computed in fp32. With a router_window above 1 the logits are averaged over positions:
``model/router_window.py``.

Legend: s sequence, b batch, T = s * b tokens, H hidden, E experts.
"""

from typing import TYPE_CHECKING

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    router_gating_linear,
    save_to_aux_losses_tracker,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.model.config import FlexOlmoTransformerConfig
from flexolmo_megatron.model.router_window import LogitHistory, window_mean_of_part

if TYPE_CHECKING:
    from flexolmo_megatron.model.mean_drift import MeanDrift

_UPSTREAM = {"moe_router_pre_softmax": True, "moe_router_score_function": "softmax", "moe_router_num_groups": None,
             "moe_router_topk_scaling_factor": None, "moe_router_enable_expert_bias": False,
             "moe_expert_capacity_factor": None}
"""Options of upstream's router that would make another one of it, in training alone."""


class _NonPositive(torch.autograd.Function):
    """min(b, 0), with the gradient of b: a bias at or above 0 can come down again. See ``hold_biases_at_zero``."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, bias: Tensor) -> Tensor:
        return bias.clamp(max=0)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        return gradient


def hold_biases_at_zero(model: nn.Module) -> None:
    """Take out of the final gradients what would raise a bias that is at 0 or above, where raising it has no effect.

    Only the sum over all microbatches and processes can be judged: the parts differ with the layout. Without this call
    (trainers that own the step) biases can rise above 0, and take as many steps to have an effect again.

    Args:
        model: wrapped in Megatron's DistributedDataParallel, after ``finalize_model_grads``.
    """
    for module in model.modules():
        if isinstance(module, DomainRouter) and module.bias is not None and module.bias.requires_grad:
            gradient = module.bias.main_grad
            gradient.masked_fill_((module.bias >= 0) & (gradient < 0), 0)


def forget_router_gradients(model: nn.Module) -> None:
    """Take out of the final gradients those of rows and biases that stay as they start (optimizer.router_lr=0): they
    would count in the norm that all gradients are clipped by.

    Args:
        model: see ``hold_biases_at_zero``.
    """
    for module in model.modules():
        if isinstance(module, DomainRouter):
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.main_grad.zero_()


def _routing_of_a_smaller_router(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Softmax and top-k as upstream's, rounded so that columns of -inf change no bit of the others.

    A softmax over E columns adds them up in an order that depends on E, and exp may depend on where a number lies: so
    one column at a time, and equal logits in the order of the experts.

    Returns:
        Probabilities, 0 where an expert is not chosen, and the boolean map, both `[T, E]`.
    """
    largest_T = logits_TE.amax(dim=-1)
    columns = [(column - largest_T).exp() for column in logits_TE.unbind(dim=-1)]
    probs_TE = torch.stack(columns, dim=-1) / sum(columns).unsqueeze(-1)
    # By logits: probabilities of 0 would tie with those of -inf.
    chosen = logits_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    routing_map = torch.zeros_like(probs_TE, dtype=torch.bool).scatter_(-1, chosen, True)
    return probs_TE.where(routing_map, 0), routing_map


class DomainRouter(TopKRouter):
    """Megatron's top-k router with the paper's bias and with expert exclusion."""

    allowed_BE: Tensor | None = None
    """Boolean `[b, E]`, or `[1, E]` for all sequences, True where a sequence may use an expert; None for all. Set by
    ``inference/access.py``, and for a whole run by ``training/router_run.py``."""
    history: LogitHistory | None = None
    """What an answer's earlier passes have left, set by ``remembered``; None where each pass has whole sequences."""

    def __init__(self, config: FlexOlmoTransformerConfig, pg_collection: ProcessGroupCollection | None = None) -> None:
        for name, only in _UPSTREAM.items():
            if getattr(config, name) != only:
                raise FlexOlmoError(f"{name} = {getattr(config, name)!r}: expected {only!r}, the paper's router")
        super().__init__(config=config, pg_collection=pg_collection)
        if config.router_bias:
            self.bias = self._new_bias(self.num_experts, self.weight.device)

    def _new_bias(self, size: int, device: torch.device) -> nn.Parameter:
        # fp32 also beside bf16 weights; in a bf16 run Float16Module casts it, and the optimizer's copy stays fp32.
        bias = nn.Parameter(torch.zeros(size, dtype=torch.float32, device=device))
        bias.sequence_parallel = self.config.sequence_parallel
        return bias

    def gating(self, input: Tensor) -> Tensor:
        """Map hidden states `[s, b, H]` to fp32 logits `[s, b, E]`; -inf for the experts a sequence may not use."""
        if self.training:
            logits = router_gating_linear(input, self.weight, None, torch.float32)
        else:
            # A matrix product rounds differently with another number of rows. One product per expert makes its logit
            # bitwise that of a model from which other experts were removed.
            hidden = input.float()
            logits = torch.stack([hidden @ row for row in self.weight.float()], dim=-1)
        if self.bias is not None:
            # The anchor's bias is 0 by definition, also where all experts train together: it gets no gradient.
            bias_E = torch.cat([self.bias[:1].detach(), self.bias[1:]])
            logits = logits + _NonPositive.apply(bias_E.float())
        logits = self._averaged(logits)
        if self.allowed_BE is not None:
            # Replaces whatever an excluded row gave, also NaN.
            logits = logits.masked_fill(~self.allowed_BE, float("-inf"))
        return logits

    def _averaged(self, logits: Tensor) -> Tensor:
        """Average `[s, b, E]` over the router's window."""
        window = self.config.router_window
        if window == 1:
            return logits
        if self.history is not None:
            return self.history.mean(logits)
        sp_group = self.tp_group if self.config.sequence_parallel else None
        return window_mean_of_part(logits, window, self.cp_group, sp_group)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map logits `[s, b, E]` to probabilities and a boolean map, both `[T, E]`, with at most top-k True per
        token."""
        if self.training:
            probs, routing_map = super().routing(logits, padding_mask)
        else:
            probs, routing_map = _routing_of_a_smaller_router(logits.flatten(0, 1), self.topk)
        if self.allowed_BE is not None:
            # Where fewer than top-k experts are allowed, top-k has filled up with excluded ones at probability 0.
            # They must not be computed at all: 0 times a NaN weight is NaN.
            routing_map = routing_map & self.allowed_BE.expand_as(logits).reshape_as(routing_map)
        return probs, routing_map


class PairRouter(DomainRouter):
    """The router of anchor-coupled training: the anchor's row is frozen, the owner's row and bias train."""

    own_B: Tensor | None = None
    """Boolean `[b]`, True for the owner's documents, False for public ones; set for each microbatch of a run with a
    domain loss or a penalty on drift, else None."""
    drift: "MeanDrift | None" = None
    """The penalty on what the layers below do to the owner's documents; None for none."""
    noise_B: Tensor | None = None
    """fp32 `[b]`, added to the owner's logits while training; set for each microbatch of a run with routing noise, else
    None."""

    def __init__(self, config: FlexOlmoTransformerConfig, pg_collection: ProcessGroupCollection | None = None) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        rows = self.weight.data
        # Two parameters instead of one, so that no gradient or optimizer state exists for the anchor's row.
        del self.weight
        self.public_row = nn.Parameter(rows[:1].clone())
        self.row = nn.Parameter(rows[1:].clone())
        for parameter in (self.public_row, self.row):
            parameter.sequence_parallel = config.sequence_parallel
        if not config.sequence_parallel:
            # Upstream's z-loss is divided over the ranks that share a sequence; here each of them sees all of it.
            self.tp_cp_group = self.cp_group
        if config.router_bias:
            self.bias = self._new_bias(1, rows.device)

    def gating(self, input: Tensor) -> Tensor:
        """Map hidden states `[s, b, H]` to fp32 logits `[s, b, 2]`, the anchor's first."""
        logits = router_gating_linear(input, torch.cat([self.public_row, self.row]), None, torch.float32)
        if self.bias is not None:
            logits = logits + nn.functional.pad(_NonPositive.apply(self.bias), (1, 0))
        return self._averaged(logits)

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Return the owner's share of the routing weight `[s, b, 1]` in fp32; the anchor's is one minus it."""
        logits = self.gating(input)
        logits = self.apply_z_loss(logits.flatten(0, 1), padding_mask).view_as(logits)
        if self.own_B is not None and self.training and torch.is_grad_enabled():
            if self.config.domain_loss_coeff:
                logits = self._apply_domain_loss(logits, input)
            if self.drift is not None:
                logits = self._apply_drift_penalty(logits, input)
        if self.noise_B is not None and self.training:
            logits = logits + nn.functional.pad(self.noise_B[:, None], (1, 0))
        return logits.softmax(dim=-1)[..., 1:]

    def _apply_domain_loss(self, logits: Tensor, input: Tensor) -> Tensor:
        """Attach the squared distance of the owner's logit from domain_margin above the anchor's on the owner's
        documents, and as far below it on public ones.

        It reaches the row and the bias alone, not the layers below. A fixed margin, unlike a cross-entropy, gives the
        rows of owners who never meet a common scale: none can outbid the others by training for longer.
        """
        public_SB, owner_SB = self.gating(input.detach()).unbind(-1)
        wanted_B = torch.where(self.own_B, self.config.domain_margin, -self.config.domain_margin)
        loss = (owner_SB - public_SB - wanted_B).square().mean()
        save_to_aux_losses_tracker("domain_loss", loss.detach(), self.layer_number, self.config.num_layers)
        return MoEAuxLossAutoScaler.apply(logits, loss * self.config.domain_loss_coeff / self.tp_cp_group.size())

    def _apply_drift_penalty(self, logits: Tensor, input: Tensor) -> Tensor:
        """Attach ``MeanDrift.penalty``, which reaches the experts of the layers below."""
        penalty = self.drift.penalty(input, self.own_B)
        save_to_aux_losses_tracker("mean_drift", penalty.detach(), self.layer_number, self.config.num_layers)
        return MoEAuxLossAutoScaler.apply(logits, penalty * 2 * self.drift.coefficient / self.tp_cp_group.size())
