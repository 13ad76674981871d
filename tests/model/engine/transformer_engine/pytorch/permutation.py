"""The fused kernels that reorder tokens, with upstream's rules for room and gradients (pytorch/permutation.py)."""

import torch
from torch import Tensor


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inp, routing_map, num_out_tokens, probs):
        experts, tokens = routing_map.T.nonzero(as_tuple=True)
        ctx.save_for_backward(experts, tokens)
        ctx.shape = routing_map.shape
        # What is not filled is not initialised.
        output = inp.new_full((num_out_tokens, inp.shape[1]), float("nan"))
        permuted_probs = probs.new_full((num_out_tokens,), float("nan"))
        output[: len(tokens)], permuted_probs[: len(tokens)] = inp[tokens], probs[tokens, experts]
        ctx.mark_non_differentiable(tokens)
        return output, tokens, permuted_probs

    @staticmethod
    def backward(ctx, gradient, _, probs_gradient):
        experts, tokens = ctx.saved_tensors
        inp_gradient = probs_result = None
        if ctx.needs_input_grad[0]:  # of the tokens; without, upstream makes none for the probabilities either
            inp_gradient = gradient.new_zeros(ctx.shape[0], gradient.shape[1]).index_add(0, tokens, gradient)
            probs_result = probs_gradient.new_zeros(ctx.shape)
            probs_result[tokens, experts] = probs_gradient
        return inp_gradient, None, None, probs_result


def moe_permute_with_probs(
    inp: Tensor, probs: Tensor, routing_map: Tensor, num_out_tokens: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    output, tokens, permuted_probs = _Permute.apply(inp, routing_map, num_out_tokens, probs)
    return output, permuted_probs, tokens


def moe_permute(inp: Tensor, routing_map: Tensor, num_out_tokens: int = -1) -> tuple[Tensor, Tensor]:
    tokens = routing_map.T.nonzero(as_tuple=True)[1]
    return inp[tokens], tokens


def moe_unpermute(
    inp: Tensor, row_id_map: Tensor, merging_probs: Tensor | None = None, restore_shape: torch.Size | None = None
) -> Tensor:
    assert merging_probs is None
    return inp.new_zeros(restore_shape).index_add(0, row_id_map, inp)


def moe_sort_chunks_by_index(inp: Tensor, split_sizes: Tensor, sorted_index: Tensor) -> Tensor:
    parts = inp.split(split_sizes.tolist())
    return torch.cat([parts[index] for index in sorted_index.tolist()])


def moe_sort_chunks_by_index_with_probs(
    inp: Tensor, probs: Tensor, split_sizes: Tensor, sorted_index: Tensor
) -> tuple[Tensor, Tensor]:
    return tuple(moe_sort_chunks_by_index(tensor, split_sizes, sorted_index) for tensor in (inp, probs))
