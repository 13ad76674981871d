"""A stand-in for Transformer Engine 2.11 that computes on the CPU, for tests of what this package hands to it.

It has the constructors' and forwards' signatures of the modules that megatron-core 0.16.1 subclasses, computes the same
products with torch, rounds to FP8 for real (torch's float8 types) and follows upstream's rules for cached weights and
weights without gradient (pytorch/module/base.py get_weight_workspace, linear.py, grouped_linear.py). It says nothing
about kernels, speed or memory.
"""

from transformer_engine import common, pytorch  # noqa: F401

__version__ = "2.11.0"
