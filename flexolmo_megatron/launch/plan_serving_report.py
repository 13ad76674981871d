"""A plan for inference as a table, and what its figures are made of."""

from collections.abc import Sequence

from rich.table import Table

from flexolmo_megatron.launch.plan_hardware import GB
from flexolmo_megatron.launch.plan_inference import Serving
from flexolmo_megatron.launch.plan_report import plan_table

EXPLANATION = """\
weights     all matrices of this GPU: attention, FFNs and vocabulary / TP, experts / EP.
cache       2 x layers x key/value groups x head size / TP x bytes of a number, per token of a sequence.
sequences   (memory less --reserve less weights) / (cache x data.seq_length), of each group of TP GPUs.
one         1 / seconds to read, from memory, the weights that one token touches (all but the embedding; of E experts
            top-k, more with EP, where other groups' tokens come too) and the cache of half a sequence.
all         the same with all sequences that fit: each expert is read unless all tokens miss it, (1 - k / E) ^ tokens.
prompts     GPUs x peak x share / FLOPs of one token forward.
Left out: communication, latencies, scheduling; activations, which --reserve covers."""


def serving_table(found: Sequence[Serving], title: str) -> Table:
    """Ways to serve as rows, the greatest throughput first."""
    table = plan_table(title)
    heads = ("#", "TP", "EP", "copies", "weights\nGB", "cache\nkB/token", "sequences", "one\ntokens/s", "all\ntokens/s",
             "prompts\ntokens/s")  # fmt: skip
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for number, serving in enumerate(found, 1):
        table.add_row(
            str(number),
            str(serving.tensor),
            str(serving.expert),
            str(serving.copies),
            f"{serving.weights / GB:.1f}",
            f"{serving.cache_per_token / 1e3:,.0f}",
            f"{serving.sequences:,}",
            f"{serving.alone:,.0f}",
            f"{serving.together:,.0f}",
            f"{serving.prefill:,.0f}",
        )
    return table
