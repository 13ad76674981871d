"""FlexOlmo in NeMo 2.7: models, connectors and recipes for whoever trains with ``nemo.collections.llm``.

    from flexolmo_megatron.integrations.nemo import FlexOlmoModel, recipes
    llm.import_ckpt(FlexOlmoModel(), "hf:///path/to/hf_dir", output_path="nemo_dir")     # or "flexolmo:///merged"
    recipe = recipes.flexolmo_expert(anchor="anchor/", expert="notes", domain_vector="notes.npz", paths=["data/notes"])

connectors.py: Hugging Face and this package's checkpoints, in and out. recipes.py: also what ``nemo llm pretrain
--help`` lists, through the entry point ``nemo_run.cli`` in setup.py.
Layers, key mappings and freezing are those of the rest of the package. On a machine without CUDA call
``flexolmo_megatron.runtime.setup.prepare()`` first.
"""

from importlib.metadata import PackageNotFoundError, version

from flexolmo_megatron.errors import FlexOlmoError

TESTED = "2.7.3"
_INSTALL = ("pip install --no-deps nemo_toolkit==2.7.3 megatron-core==0.16.1 && pip install --requirement "
            "requirements-nemo.txt")

try:
    if version("nemo_toolkit") != TESTED:
        raise FlexOlmoError(f"nemo_toolkit {version('nemo_toolkit')} is installed, tested is {TESTED} (3.0 has no "
                            f"nemo.collections.llm); run: {_INSTALL}")
    import modelopt  # noqa: F401  without it NeMo imports, but silently lacks its api and recipes
    import nemo.collections.llm  # noqa: F401
except PackageNotFoundError:
    raise FlexOlmoError(f"nemo_toolkit is not installed; run: {_INSTALL}") from None
except ImportError as error:
    raise FlexOlmoError(f"nemo_toolkit {TESTED} cannot be imported ({error}); run: {_INSTALL}") from error

from flexolmo_megatron.integrations.nemo import connectors, recipes  # noqa: E402, F401
from flexolmo_megatron.integrations.nemo.config import (  # noqa: E402, F401
    FlexOlmoConfig,
    FlexOlmoConfig7x7B,
    FlexOlmoConfig37B,
    FlexOlmoConfigPair,
)
from flexolmo_megatron.integrations.nemo.data import FlexOlmoData  # noqa: E402, F401
from flexolmo_megatron.integrations.nemo.model import FlexOlmoModel, FlexOlmoOptimizer  # noqa: E402, F401
