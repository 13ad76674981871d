"""Serving a model on many GPUs: weights, key/value cache and what memory bandwidth allows.

``flexolmo generate`` runs on one process (TP 1, EP 1, with every layer's weights there); the other layouts are for a
serving engine that loads the exported model. Decoding reads all weights that its tokens touch once per token, so
memory bandwidth bounds it; communication and everything that an engine adds are left out.
"""

import math
from dataclasses import dataclass

from flexolmo_megatron.config.layout import split_problems
from flexolmo_megatron.config.train import ParallelConfig
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.launch.plan_hardware import GB, Hardware
from flexolmo_megatron.launch.plan_state import chunk_parameters
from flexolmo_megatron.launch.plan_work import Layout, Work, chunks


@dataclass(frozen=True)
class Serving:
    """One way to serve; bytes are per GPU."""

    tensor: int
    """GPUs that share each matrix."""
    expert: int
    """GPUs, or groups of ``tensor`` GPUs, that share a layer's experts; each has its own sequences."""
    copies: int
    """Independent groups of tensor x expert GPUs."""
    weights: int
    cache_per_token: float
    """Bytes of keys and values of one token of a sequence."""
    sequences: int
    """Full-length sequences whose cache fits beside the weights, per group of ``tensor`` GPUs."""
    alone: float
    """Tokens per second of a single sequence, estimated."""
    together: float
    """Tokens per second of all GPUs with all sequences, estimated."""
    prefill: float
    """Tokens per second of all GPUs while prompts are read, estimated from the share of peak."""


def plan_inference(work: Work, hardware: Hardware, gpus: int, memory_limit: float) -> list[Serving]:
    """Return the ways to serve that fit, those with the most tokens per second first.

    Raises:
        FlexOlmoError: the model fits in none, or has no layout on so many GPUs.
    """
    found, smallest = [], math.inf
    for tensor in range(1, min(gpus, hardware.gpus_per_node) + 1):
        for expert in range(1, work.model.num_experts + 1) if work.kind == "moe" else (1,):
            parallel = ParallelConfig(tensor=tensor, expert=expert)
            if gpus % (tensor * expert) or any(split_problems(work.model, work.kind, parallel)):
                continue
            serving = _serving(work, hardware, gpus, memory_limit, tensor, expert)
            smallest = min(smallest, serving.weights + work.sequence * serving.cache_per_token)
            if serving.sequences:
                found.append(serving)
    if not found:
        needed = f"the smallest layout needs {smallest / GB:.1f} GB" if smallest < math.inf else "it cannot be divided"
        raise FlexOlmoError(
            f"the model with one sequence of {work.sequence} tokens does not fit: {needed} per GPU, of which "
            f"{memory_limit / GB:.1f} GB are free"
        )
    return sorted(found, key=lambda serving: -serving.together)


def _serving(work: Work, hardware: Hardware, gpus: int, limit: float, tensor: int, expert: int) -> Serving:
    model = work.model
    layout = Layout(tensor * expert, tensor=tensor, expert=expert)
    parameters = chunk_parameters(work, layout, chunks(work, layout, 0)[0])
    sizes = {p.name: p.size * work.element for p in parameters}
    weights = sum(sizes.values())
    experts = sum(size for name, size in sizes.items() if ".local_experts." in name)
    cache = 2 * model.num_layers * model.num_query_groups * model.head_dim / tensor * work.element
    sequences = max(0, int((limit - weights) / (cache * work.sequence)))
    embedding = sizes["embedding.word_embeddings.weight"]  # one row per token is read

    def seconds(held: int) -> float:
        """Of one token for each of ``held`` sequences per group, half of the greatest length on average."""
        # A token misses an expert with probability 1 - k / E; all tokens of the groups that share experts count.
        missed = (1 - model.top_k / model.num_experts) ** (held * expert) if model.num_experts else 0.0
        read = weights - embedding - experts * missed + held * cache * work.sequence / 2
        return read / (hardware.memory_bandwidth * GB)

    return Serving(
        tensor,
        expert,
        gpus // (tensor * expert),
        weights,
        cache,
        sequences,
        1 / seconds(1),
        gpus / tensor * sequences / seconds(sequences) if sequences else 0.0,
        gpus * hardware.flops / _forward_flops(work),
    )


def _forward_flops(work: Work) -> float:
    """FLOPs of one token of a prompt: two per active weight, and attention over half of the length on average."""
    whole = Layout(1)
    parameters = chunk_parameters(work, whole, chunks(work, whole, 0)[0])
    active = work.model.top_k / work.model.num_experts if work.model.num_experts else 1.0
    weights = sum(
        p.size * (active if ".local_experts." in p.name else 1) for p in parameters if "word_embeddings" not in p.name
    )
    return 2 * weights + 2 * work.model.num_layers * work.sequence * work.model.hidden_size
