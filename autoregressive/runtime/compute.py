"""In which precision a model computes, and whether it is compiled."""

import importlib.util

import torch

from autoregressive.runtime.log import LOGGER

PRECISIONS = {"none": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Returns a context that computes in one of PRECISIONS; "none" leaves everything as it is."""
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "none")


def can_compile(device: torch.device, wanted: bool) -> bool:
    """Says whether to compile: on a GPU, if it is wanted and Triton is there; its absence is said once, in the log."""
    if device.type != "cuda" or not wanted:
        return False
    if importlib.util.find_spec("triton") is None:
        LOGGER.warning("torch.compile needs the package triton, which is not installed: running without it, slower")
        return False
    torch._dynamo.config.suppress_errors = True     # what cannot be compiled runs as it is, with a warning
    return True
