"""A uniform sample of a stream of documents of unknown length, in one pass."""

import random
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")

DEFAULT_DOCUMENTS = 1000
"""As in the paper (arXiv 2507.07024, section 3)."""


def reservoir_sample(stream: Iterable[T], size: int, seed: int) -> list[T]:
    """Return ``size`` items of ``stream``, each equally likely, or all of them where there are fewer.

    The same stream and seed give the same sample on any machine. Memory: the sample. Source: Vitter 1985, algorithm R.
    """
    # random() alone is promised to stay the same across Python versions, randrange() is not.
    uniform = random.Random(seed).random
    sample: list[T] = []
    for seen, item in enumerate(stream):
        if seen < size:
            sample.append(item)
        elif (place := int(uniform() * (seen + 1))) < size:
            sample[place] = item
    return sample
