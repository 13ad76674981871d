"""What one process really keeps and sends in one microbatch of a tiny model, for comparison with the plan.

``trace_cases`` and ``trace_expert_parallel`` run in processes of their own (``run_distributed``).
"""

import weakref
from dataclasses import dataclass
from typing import Any

from flexolmo_megatron.config.model import ModelConfig
from flexolmo_megatron.launch.plan_work import Layout, Work


@dataclass(frozen=True)
class Case:
    """A tiny run."""

    mode: str
    element: int = 4
    tensor: int = 1
    expert: int = 1
    expert_tensor: int = 0
    layers: int = 3
    groups: int = 4
    bias: bool = False
    stage: int = 0
    """Of two pipeline stages; only where ``pipeline`` is 2."""
    pipeline: int = 1
    narrow: int = 176
    """Inner width of the owner's expert; the anchor's is 176."""

    @property
    def kind(self) -> str:
        return {"expert": "pair", "anchor": "dense"}.get(self.mode, "moe")

    def model(self) -> ModelConfig:
        experts = {"dense": {}, "pair": dict(num_experts=2, top_k=2), "moe": dict(num_experts=4, top_k=2)}[self.kind]
        return ModelConfig(
            num_layers=self.layers, hidden_size=64, ffn_hidden_size=self.narrow, num_attention_heads=4,
            num_query_groups=self.groups, vocab_size=512, max_position_embeddings=32, router_bias=self.bias, **experts,
        )  # fmt: skip

    def work(self) -> Work:
        return Work(self.mode, self.kind, self.model(), 176, 32, 2 * self.pipeline, self.element, "local")

    def layout(self) -> Layout:
        return Layout(
            max(self.tensor, self.expert * (self.expert_tensor or self.tensor)) * self.pipeline, tensor=self.tensor,
            pipeline=self.pipeline, expert=self.expert, expert_tensor=self.expert_tensor, micro_batch=2,
        )  # fmt: skip


class Kept:
    """A tensor that autograd keeps for as long as it keeps this."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor


class Sent:
    """Bytes that this process sends in collectives of more than one process, by name of the collective."""

    def __init__(self) -> None:
        self.bytes: dict[str, float] = {}

    def watch(self) -> None:
        """To be called before Megatron is imported: it keeps references to some of torch's functions."""
        import torch.distributed as dist

        def note(name: str, tensors: Any, group: Any) -> None:
            tensors = tensors if isinstance(tensors, list | tuple) else [tensors]
            size = dist.get_world_size(group)
            for tensor in tensors:
                if size > 1 and tensor.dim() > 1 and tensor.shape[-1] == 64:  # hidden states, not statistics
                    whole = tensor.numel() * tensor.element_size()
                    self.bytes[name] = self.bytes.get(name, 0.0) + whole * (size - 1) / size

        def wrap(name: str, which: int) -> None:
            """Count argument number ``which``, the whole tensor that all ranks have or make together."""
            original = getattr(dist, name)

            def counted(*args: Any, **kwargs: Any) -> Any:
                note("ring", args[which], kwargs.get("group"))
                return original(*args, **kwargs)

            setattr(dist, name, counted)

        for name, which in (("all_gather_into_tensor", 0), ("all_gather", 0), ("reduce_scatter_tensor", 1),
                            ("reduce_scatter", 1)):  # fmt: skip
            wrap(name, which)
        exchange = dist.all_to_all_single

        def counted_exchange(output: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
            note("exchange", input, kwargs["group"])
            return exchange(output, input, *args, **kwargs)

        dist.all_to_all_single = counted_exchange


def _trace(case: Case, sent: Sent) -> dict[str, Any]:
    """Build this rank's model and run one microbatch; process groups exist."""
    import torch
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    from flexolmo_megatron.model.builder import build_model
    from flexolmo_megatron.model.config import transformer_config
    from flexolmo_megatron.training.freezing import freeze_anchor

    layout, model = case.layout(), case.model()
    config = transformer_config(
        model,
        case.kind,
        dtype=torch.bfloat16 if case.element == 2 else torch.float32,
        anchor_ffn_hidden_size=176 if case.kind == "pair" else None,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        sequence_parallel=layout.tensor > 1,
        **({} if case.kind == "dense" else {"moe_z_loss_coeff": 1e-3}),
    )
    last = case.stage == case.pipeline - 1
    module = build_model(model, case.kind, config, pre_process=case.stage == 0, post_process=last)
    if case.mode == "expert":
        freeze_anchor(module)
    if case.mode == "router":
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(".mlp.router." in name)
    if case.stage:
        module.set_input_tensor(torch.randn(32 // layout.tensor, 2, 64, requires_grad=True))
    weights = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    alive = weakref.WeakSet()

    def pack(tensor: Any) -> Kept:
        held = Kept(tensor)
        alive.add(held)
        return held

    tokens = torch.randint(512, (2, 32))
    sent.bytes = {}
    get_moe_layer_wise_logging_tracker().clear()  # made for the number of layers of the case before
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        output = module(tokens, torch.arange(32).expand(2, 32), None, labels=tokens if last else None)
    storages = {held.tensor.untyped_storage()._cdata: held.tensor.untyped_storage().nbytes() for held in alive}
    saved = sum(size for storage, size in storages.items() if storage not in weights)
    output.float().mean().backward()
    return {"saved": saved, "sent": dict(sent.bytes)}


def trace_cases(cases: list[Case]) -> list[dict[str, Any]]:
    """Trace cases one after the other; the other processes of their layouts do not exist (torch's fake group)."""
    import warnings

    sent = Sent()
    sent.watch()
    from flexolmo_megatron.runtime.setup import prepare

    prepare()
    import torch
    from megatron.core import parallel_state, tensor_parallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    warnings.simplefilter("ignore")
    results = []
    for case in cases:
        layout = case.layout()
        if torch.distributed.is_initialized():
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()
        rank = case.stage * layout.world // layout.pipeline
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=layout.expert_tensor,
            create_gloo_process_groups=False,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        results.append(_trace(case, sent))
    return results


def trace_expert_parallel(case: Case) -> dict[str, Any]:
    """Trace a case whose processes all exist: how many tokens an expert gets is decided among them."""
    sent = Sent()
    sent.watch()
    import torch

    from flexolmo_megatron.runtime.setup import initialize

    layout = case.layout()
    initialize(
        tensor_parallel=layout.tensor, expert_parallel=layout.expert, expert_tensor_parallel=layout.expert_tensor
    )
    torch.manual_seed(torch.distributed.get_rank())
    return _trace(case, sent)
