"""Set-up shared by all tests: the CPU runtime before any import of Megatron, and one thread per process."""

import torch

from flexolmo_megatron.runtime.setup import prepare

prepare()
torch.set_num_threads(1)
