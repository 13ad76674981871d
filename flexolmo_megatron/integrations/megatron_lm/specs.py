"""Layer specs for Megatron-LM's ``--spec flexolmo_megatron.integrations.megatron_lm.specs NAME``.

Megatron-LM takes NAME from the module as it is, so these are ModuleSpec objects and not functions that make one.

A spec alone makes no expert: it cannot freeze, load an anchor or set a router row. ``DENSE`` is whole with
``pretrain_gpt.py --spec`` (an anchor, whose checkpoints this package cannot open because they stack the layers).
``PAIR`` and ``MOE`` need a ``FlexOlmoTransformerConfig``: they are for model providers of your own.
"""

from flexolmo_megatron.model.spec import layer_spec

DENSE = layer_spec("dense")
PAIR = layer_spec("pair")
MOE = layer_spec("moe")
