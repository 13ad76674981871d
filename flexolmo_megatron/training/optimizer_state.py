"""What a checkpoint keeps of an optimizer, whatever the layout.

Megatron chains one optimizer for the experts to that of the rest where parallel.expert is above 1, its optimizers with
and without master weights and the distributed one nest their states differently, and its checkpoints keep parameter
groups in that structure: they load only where it is the same. Of the groups nothing but the number of steps is needed,
since learning rates and the like come from the run's options and its schedule. So a checkpoint has the step, and the
moments and master weights under the names of their parameters, with no structure.
"""

from typing import Any

import torch
from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer

from flexolmo_megatron.training.optimization import parts

_FORMAT = "param_state_sharding_type"
"""Says which of upstream's formats a distributed optimizer's state has; here always the same (``checkpoint.py``)."""


def take_out_groups(sharded: dict[Any, Any]) -> int:
    """Remove parameter groups and steps from an optimizer's (nested) state; returns the step, 0 before the first."""
    step = 0
    for key in list(sharded):
        if key == "param_groups":
            step = max([step, *(int(group.get("step") or 0) for group in sharded.pop(key))])
        elif key == "common_step":
            step = max(step, int(sharded.pop(key)))
        elif key == _FORMAT:
            sharded.pop(key)
        elif isinstance(sharded[key], dict):
            step = max(step, take_out_groups(sharded[key]))
    return step


def put_back_groups(loaded: dict[Any, Any], optimizer: MegatronOptimizer, step: int) -> None:
    """Give a loaded state the parameter groups of this run's optimizer at ``step``, where it looks for them."""
    chain = parts(optimizer)
    for number, part in enumerate(chain):
        state = loaded if len(chain) == 1 else loaded.setdefault(number, {})
        if part.optimizer is None:  # this rank has none of its parameters
            continue
        if isinstance(part, DistributedOptimizer):
            state[_FORMAT] = "fully_reshardable"
        if not isinstance(part, FP32Optimizer):
            state = state.setdefault("optimizer", {})
        state["param_groups"] = part.optimizer.state_dict()["param_groups"]
        if USING_PYTORCH_OPTIMIZER and not isinstance(part, DistributedOptimizer):
            state["state"]["common_step"] = torch.tensor(float(step))  # AdamW counts per parameter
        else:
            for group in state["param_groups"]:
                group["step"] = step
