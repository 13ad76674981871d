"""Megatron-Bridge 0.3: importing this package makes its AutoBridge know FlexOlmo (and Olmo2, the anchor).

    from flexolmo_megatron.integrations import bridge
    model = AutoBridge.from_hf_pretrained(hf_directory).to_megatron_model()       # and save_hf_pretrained back

    container = bridge.flexolmo_expert(["anchor=anchor/", "expert.name=notes", ...])      # options of `flexolmo train`
    bridge.pretrain(container)                                                            # Bridge's own trainer

models.py: providers and conversion. recipes.py: training. Names of tensors are those of ``convert/names.py``, sizes
are read from ``config.json`` as ``convert`` does it, layers are those of ``model/spec.py``; what a run starts from,
freezes and reads is what ``flexolmo train`` does.
"""

from importlib.metadata import PackageNotFoundError, version

from flexolmo_megatron.errors import FlexOlmoError

TESTED = "0.3.1"
_INSTALL = f"pip install 'megatron-bridge=={TESTED}' 'megatron-core==0.16.1' 'transformers~=4.57.0'"
try:
    if version("megatron-bridge") != TESTED:
        raise FlexOlmoError(
            f"megatron-bridge {version('megatron-bridge')} is installed, tested is {TESTED}; run: {_INSTALL}"
        )
    import megatron.bridge.training.pretrain  # noqa: F401
    from transformers import FlexOlmoForCausalLM  # noqa: F401
except PackageNotFoundError:
    raise FlexOlmoError(f"megatron-bridge is not installed; run: {_INSTALL}") from None
except ImportError as error:
    raise FlexOlmoError(
        f"megatron-bridge {TESTED} cannot be imported ({error}): expected transformers 4.57 and Transformer Engine; "
        f"run: {_INSTALL} 'transformer-engine[pytorch]>=2.10,<2.13'"
    ) from error

from flexolmo_megatron.integrations.bridge.models import FlexOlmoProvider, model_provider, provider  # noqa: E402
from flexolmo_megatron.integrations.bridge.recipes import (  # noqa: E402
    flexolmo_anchor,
    flexolmo_expert,
    flexolmo_router,
    pretrain,
)
from flexolmo_megatron.integrations.cards import write_cards  # noqa: E402

__all__ = [
    "FlexOlmoProvider", "flexolmo_anchor", "flexolmo_expert", "flexolmo_router", "model_provider", "pretrain",
    "provider", "write_cards",
]
