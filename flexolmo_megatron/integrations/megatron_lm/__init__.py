"""An owner's run, or a new anchor, through Megatron-LM's own ``pretrain()``; command lines: examples/megatron_lm.

    torchrun ... pretrain_gpt.py ARGUMENTS
    torchrun ... -m flexolmo_megatron.integrations.megatron_lm ARGUMENTS --flexolmo-anchor anchor/ ...

arguments.py: options and defaults. model.py: the model provider. specs.py: specs for ``pretrain_gpt.py --spec``.
Needs a checkout of Megatron-LM; importing this package does not.
"""
