"""FlexOlmo (arXiv 2507.07024) as a plugin for Megatron-core.

Importing this package imports neither torch nor Megatron; ``load_model`` does.
"""

from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexolmo_megatron.inference.model import Model

__version__ = "0.1.0"


def load_model(path: str | PathLike, **options: Any) -> "Model":
    """Load a model for inference; see ``flexolmo_megatron.inference.model.load_model``."""
    from flexolmo_megatron.runtime.setup import prepare

    prepare()
    from flexolmo_megatron.inference.model import load_model as load

    return load(path, **options)
