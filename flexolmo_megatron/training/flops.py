"""Floating-point operations of a training step, product by product: what it needs, whatever is launched.

One product of `[m, k]` by `[k, n]` counts 2 m k n. A linear layer has three: forward, the gradient of its input and the
gradient of its weight; only those that the step needs are counted. In an owner's run (everything but expert and router
rows is frozen) frozen weights have no weight gradient, and the first layer, whose input is the frozen embedding, has no
gradient of its input either. Core attention counts its products over the causal half. Elementwise work, norms, softmax
and the embedding are not counted.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from flexolmo_megatron.config.model import ModelConfig


@dataclass(frozen=True)
class Product:
    """A matrix product `[rows, inner]` by `[inner, columns]`."""

    name: str
    """What for, as ``layers.0.expert.fc1 weight``; the last word is forward, input or weight."""
    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns


def linear(name: str, rows: int, inner: int, columns: int, *, input: bool, weight: bool) -> list[Product]:
    """The products of a linear layer on ``rows`` tokens.

    Args:
        name: of the layer.
        rows: tokens.
        inner: input width.
        columns: output width.
        input: whether the gradient of its input is needed.
        weight: whether the gradient of its weight is needed.
    """
    products = [Product(f"{name} forward", rows, inner, columns)]
    if input:
        products.append(Product(f"{name} input", rows, columns, inner))
    if weight:
        products.append(Product(f"{name} weight", columns, rows, inner))
    return products


def ffn(name: str, rows: int, hidden: int, inner: int, *, input: bool, weight: bool) -> list[Product]:
    """The products of a gated FFN; to reach the first matrix, a gradient must pass the second."""
    return [
        *linear(f"{name}.fc1", rows, hidden, 2 * inner, input=input, weight=weight),
        *linear(f"{name}.fc2", rows, inner, hidden, input=input or weight, weight=weight),
    ]


def pair_products(model: ModelConfig, tokens: int) -> list[Product]:
    """The matrix products of one step of an owner's run, without core attention.

    Args:
        model: the pair; expert and anchor have the same width.
        tokens: in the step.
    """
    hidden, inner, heads = model.hidden_size, model.ffn_hidden_size, model.num_attention_heads * model.head_dim
    projected = heads + 2 * model.num_query_groups * model.head_dim
    products = []
    for layer in range(model.num_layers):
        prefix, reached = f"layers.{layer}", layer > 0
        products += [
            *linear(f"{prefix}.qkv", tokens, hidden, projected, input=reached, weight=False),
            *linear(f"{prefix}.proj", tokens, heads, hidden, input=reached, weight=False),
            *ffn(f"{prefix}.anchor", tokens, hidden, inner, input=reached, weight=False),
            *ffn(f"{prefix}.expert", tokens, hidden, inner, input=reached, weight=True),
            *linear(f"{prefix}.router", tokens, hidden, 2, input=reached, weight=True),
        ]
    return products + linear("head", tokens, hidden, model.vocab_size, input=True, weight=False)


def mixture_products(model: ModelConfig, tokens: int) -> list[Product]:
    """The matrix products of one merged FFN layer, forward and backward, with all of its weights trained.

    Args:
        model: the merged model; each token goes to top_k of num_experts experts.
        tokens: that enter the layer.
    """
    rows = tokens * model.top_k
    return [
        *ffn("experts", rows, model.hidden_size, model.ffn_hidden_size, input=True, weight=True),
        *linear("router", tokens, model.hidden_size, model.num_experts, input=True, weight=True),
    ]


def attention_flops(model: ModelConfig, sequences: int, length: int, layers: int, *, backward: bool) -> int:
    """Core attention's products in ``layers`` layers: two forward; five backward, where the scores are made again.

    Args:
        model: the architecture.
        sequences: in the step.
        length: tokens in a sequence; a token attends to itself and those before it, (length + 1) / 2 on average.
        layers: how many.
        backward: count the backward pass instead of the forward pass.
    """
    one = sequences * length * (length + 1) * model.num_attention_heads * model.head_dim
    return layers * one * (5 if backward else 2)


def pair_flops(model: ModelConfig, sequences: int, length: int) -> int:
    """All counted operations of one step of an owner's run."""
    return (
        total(pair_products(model, sequences * length))
        + attention_flops(model, sequences, length, model.num_layers, backward=False)
        + attention_flops(model, sequences, length, model.num_layers - 1, backward=True)
    )


def forward_flops(model: ModelConfig, sequences: int, length: int) -> int:
    """All counted operations of a dense model's forward pass."""
    hidden, heads = model.hidden_size, model.num_attention_heads * model.head_dim
    tokens, none = sequences * length, {"input": False, "weight": False}
    layer = [
        *linear("qkv", tokens, hidden, heads + 2 * model.num_query_groups * model.head_dim, **none),
        *linear("proj", tokens, heads, hidden, **none),
        *ffn("ffn", tokens, hidden, model.ffn_hidden_size, **none),
    ]
    return (
        model.num_layers * total(layer)
        + total(linear("head", tokens, hidden, model.vocab_size, **none))
        + attention_flops(model, sequences, length, model.num_layers, backward=False)
    )


def total(products: Iterable[Product]) -> int:
    """Sum of operations."""
    return sum(product.flops for product in products)
