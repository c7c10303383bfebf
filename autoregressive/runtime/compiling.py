"""torch.compile where it is wanted and can be had."""

import importlib.util

import torch

from autoregressive.runtime.log import LOGGER


def can_compile(device, wanted):
    """Says whether to compile: on a GPU, if it is wanted and Triton is there; its absence is said once, in the log."""
    if device.type != "cuda" or not wanted:
        return False
    if importlib.util.find_spec("triton") is None:
        LOGGER.warning("torch.compile needs the package triton, which is not installed: running without it, slower")
        return False
    torch._dynamo.config.suppress_errors = True     # what cannot be compiled runs as it is, with a warning
    return True
