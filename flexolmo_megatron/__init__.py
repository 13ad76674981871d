"""FlexOlmo (arXiv 2507.07024) as a plugin for Megatron-core.

Importing this package imports neither torch nor Megatron; ``load_model`` does.
"""

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from flexolmo_megatron.convert.rows import Choice
    from flexolmo_megatron.inference.model import Model

__version__ = "0.1.0"


def load_model(path: str | PathLike, dtype: "torch.dtype | None" = None, *,
               anchor: str | PathLike | None = None, rows: "Choice" = "strict") -> "Model":
    """Load a model for inference, onto this process's GPU, or without one onto the CPU.

    **Without CUDA this changes the process for good**: Megatron-core takes much from ``torch.cuda``, for which
    ``runtime/cpu.py`` then puts stand-ins into torch and Megatron. Streams, events, the current device and random
    states of ``torch.cuda`` become those of the CPU, tensors that are asked for on CUDA are made on the CPU,
    ``tensor.type()`` says ``torch.cuda.FloatTensor`` for tensors of the CPU, and ``torch.compile`` compiles nothing.
    With CUDA or without, ``torch.distributed`` and Megatron's process groups are initialised, for one process unless
    it runs under torchrun. A program that needs torch as it is should load models in a process of their own.

    Args:
        path: a Hugging Face directory, a Megatron checkpoint of ours, a training run or the folder of a launch through
            Megatron-LM, of which the newest checkpoint with a card is taken, or a run that has tuned a router, of which
            the tuned model is taken. A pair is joined with its anchor.
        dtype: to compute in, ``torch.float32`` (also None) or ``torch.bfloat16``, whatever the type on disk.
        anchor: of a pair, where its anchor is now; None for where it was when the pair was trained. Not used for
            other models.
        rows: of a model whose router was tuned, which rows answers use. strict: the tuned ones; where experts are left
            out, a set that was tuned without them and their owners' proxies, or else the untuned ones, so that nothing
            that was derived from those owners' data is left. tuned: the tuned ones whatever is left out. untuned.
            ``Model.rows_used`` says which these are.

    Returns:
        An object with ``expert_names``, ``logits(tokens, experts=None)``, ``generate(prompts, ...)`` and ``card``.

    Raises:
        FlexOlmoError: there is no such model, it is damaged, or a pair's anchor is missing or another one.
    """
    from flexolmo_megatron.runtime.setup import prepare

    prepare()
    from flexolmo_megatron.inference.model import load_model as load

    options = {"anchor": anchor, "rows": rows}
    return load(path, **options) if dtype is None else load(path, dtype, **options)
