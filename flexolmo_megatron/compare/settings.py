"""Named settings of the owners' runs, and the ablations: options of `flexolmo train expert`, with dotted names, and
after "embed." those of `flexolmo embed`."""

from collections.abc import Callable, Mapping
from typing import Any

PAPER_WARMUP = 2000 * 4_194_304 / 50e9
"""Share of an owner's run that is warm-up: 2,000 steps of 4 M tokens, of 50 B (arXiv 2507.07024, section 4.1)."""


def _paper(steps: int) -> dict[str, Any]:
    return {
        "data.public_share": 0.0,
        "expert.bias": True,
        "expert.domain_loss_coeff": 0.0,
        "expert.routing_noise": 0.0,
        "expert.anchor_kl_coeff": 0.0,
        "expert.drift_coeff": 0.0,
        "expert.router_window": 1,
        "moe_z_loss_coeff": 1e-3,
        "optimizer.lr": 9e-4,
        "optimizer.min_lr": 0.0,
        "optimizer.router_lr": None,
        "optimizer.lr_decay_style": "cosine",
        "optimizer.lr_warmup_iters": int(PAPER_WARMUP * steps),
        "optimizer.weight_decay": 0.0,
        "optimizer.adam_beta1": 0.9,
        "optimizer.adam_beta2": 0.95,
        "optimizer.clip_grad": 1.0,
    }


def _default(steps: int) -> dict[str, Any]:
    return {
        "data.public_share": 0.33,
        "embed.discriminant": True,
        "embed.max_tokens": 2048,
        "embed.scale": 1.5,
        "expert.router_window": 32,
        "expert.routing_noise": 1.0,
        "moe_z_loss_coeff": 0.0,
        "optimizer.lr": 3e-3,
        "optimizer.min_lr": 3e-4,
        "optimizer.router_lr": 0.0,
    }


TRAINED_ROWS = {"embed.discriminant": False, "embed.max_tokens": None, "embed.scale": None,
                "expert.domain_loss_coeff": 0.025, "optimizer.router_lr": 1e-3}
"""What a setting with discriminants becomes where there are none: rows start at domain vectors and learn a margin."""


SETTINGS: Mapping[str, Callable[[int], dict[str, Any]]] = {"default": _default, "paper": _paper}
"""From the number of steps of an owner's run to its options. default: public documents are replayed, router rows are
discriminants that do not train, their logits are averaged over a window, experts learn beside noise on them, no z-loss.
paper: section 4.1 of arXiv 2507.07024, all of it."""

ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "no coordination": {"expert.coordination": False, "expert.domain_loss_coeff": 0.0, "expert.routing_noise": 0.0,
                        "expert.anchor_kl_coeff": 0.0, "expert.drift_coeff": 0.0, "expert.router_window": 1},
    "no window": {"expert.router_window": 1},
    "trained rows": {"embed.discriminant": False},
    "no embedding init": {"embed.discriminant": False, "expert.random_row": True},
    "no bias": {"embed.discriminant": False, "expert.bias": False},
    "no embedding init, no bias": {"embed.discriminant": False, "expert.random_row": True, "expert.bias": False},
    "centred rows": {"embed.centre": True},
    "no routing noise": {"expert.routing_noise": 0.0},
    "drift penalty": {"expert.drift_coeff": 0.01},
    "anchor KL": {"data.public_share": 0.5, "expert.anchor_kl_coeff": 1.0},
    "calibrated temperature": {"calibrate": True},
    "no replay": {"data.public_share": 0.0, "expert.domain_loss_coeff": 0.0},
    "paper": {"setting": "paper"},
}
"""What each usual ablation changes; setting replaces the whole setting, and the options of the section owner; calibrate
is a step after the merge."""


def _router(steps: int) -> dict[str, Any]:
    return {"optimizer.lr": 1e-4, "optimizer.min_lr": 0.0, "optimizer.lr_warmup_iters": min(100, steps // 10),
            "leave_one_out": True}


ROLE_DEFAULTS: Mapping[str, Callable[[int], dict[str, Any]]] = {"router": _router}
"""Options of a kind of run that win over those of all runs and yield to its own section. Router tuning: at the paper's
learning rate rows forget what proxies do not show (docs/routing.md), so a 20th of it; a warm-up as short as few steps
ask for; rows for each opt-out."""

DECIDED: Mapping[str, str] = {
    "out": "out", "model": "model", "train_iters": "steps", "seed": "seeds", "anchor": "methods", "merged": "methods",
    "data.train": "public and owners", "data.public": "public", "data.proxies": "proxy_tokens",
    "expert.name": "owners", "expert.domain_vector": "embed",
}
"""Options of training runs, with all below them, that the comparison sets itself, and its options that they follow
from."""
