"""Reading a model's next tensor while its writer still writes the one before."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch

from flexolmo_megatron.convert.lazy import LazyModel


class ReadAhead:
    """A model whose tensors are all read by one thread, which goes one tensor ahead in the order of the model's table.

    Correct for any order of reads; one that leaves the order reads a tensor in vain.
    """

    def __init__(self, model: LazyModel) -> None:
        self._source = model
        names = list(model.tensors)
        self._next = dict(zip(names, names[1:], strict=False))
        self._ahead: tuple[str, Future[torch.Tensor]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read")
        self.model = replace(model, tensors={name: replace(tensor, read=partial(self._read, name))
                                             for name, tensor in model.tensors.items()})

    def __enter__(self) -> LazyModel:
        return self.model

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _start(self, name: str) -> "Future[torch.Tensor]":
        return self._thread.submit(self._source.tensors[name].read)

    def _read(self, name: str) -> torch.Tensor:
        ahead, self._ahead = self._ahead, None
        future = ahead[1] if ahead is not None and ahead[0] == name else self._start(name)
        del ahead
        if name in self._next:
            following = self._next[name]
            self._ahead = following, self._start(following)
        return future.result()
