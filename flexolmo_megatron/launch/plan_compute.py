"""Floating-point operations of one microbatch on one process: a multiplication and an addition are two.

The products of ``training/flops.py``, divided by layout and stage: those that a step needs, without weight gradients of
frozen matrices and without what lies below the first layer that has something to train.
"""

from functools import cache

from flexolmo_megatron.launch.plan_activations import expert_tokens
from flexolmo_megatron.launch.plan_work import Chunk, Layout, Work, reached
from flexolmo_megatron.training.flops import Product, attention_flops, ffn, linear, total


@cache
def _layer(work: Work, layout: Layout, gradient: bool) -> float:
    """One layer; ``gradient`` says whether its input needs one."""
    return total(_products(work, layout, gradient)) + _core_attention(work, layout, gradient)


def _products(work: Work, layout: Layout, gradient: bool) -> list[Product]:
    """The matrix products of one layer, without core attention."""
    model, tokens, every = work.model, layout.tokens(work), work.all_train
    hidden, width = model.hidden_size, model.ffn_hidden_size // layout.tensor
    queries = model.num_attention_heads * model.head_dim // layout.tensor
    groups = model.num_query_groups * model.head_dim // layout.tensor
    products = [
        *linear("qkv", tokens, hidden, queries + 2 * groups, input=gradient, weight=every),
        *linear("proj", tokens, queries, hidden, input=gradient, weight=every),
    ]
    if work.kind == "dense":
        return products + ffn("ffn", tokens, hidden, width, input=gradient, weight=every)
    products += linear("router", tokens // layout.tensor, hidden, model.num_experts, input=gradient, weight=True)
    if work.kind == "pair":
        products += ffn("expert", tokens, hidden, width, input=gradient, weight=True)
        return products + ffn("anchor", tokens, hidden, work.anchor_ffn // layout.tensor, input=gradient, weight=False)
    rows, width = expert_tokens(work, layout), model.ffn_hidden_size // layout.expert_tensor
    products += ffn("experts", rows, hidden, width, input=gradient, weight=work.mode == "moe")
    if work.mode == "router" and not gradient:
        # Also where only the router trains, the scale of the inner state needs its gradient, through the output matrix.
        products.append(Product("experts.fc2 input", rows, hidden, width))
    return products


def _core_attention(work: Work, layout: Layout, gradient: bool) -> float:
    passes = (False, True) if gradient else (False,)
    whole = sum(attention_flops(work.model, layout.micro_batch, work.sequence, 1, backward=back) for back in passes)
    return whole / (layout.tensor * layout.context)


def chunk_flops(work: Work, layout: Layout, chunk: Chunk) -> float:
    """Return the FLOPs of forward and backward pass of one microbatch in a chunk."""
    flops = _layer(work, layout, reached(work, chunk)) + (chunk.layers - 1) * _layer(work, layout, True)
    if chunk.head:
        model, columns = work.model, work.model.vocab_size // layout.tensor
        flops += total(
            linear("head", layout.tokens(work), model.hidden_size, columns, input=True, weight=work.all_train)
        )
    return flops
