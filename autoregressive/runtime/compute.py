"""In which precision a model computes, and whether it is compiled."""

import argparse
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoregressive.runtime.entry import Parser, may_vary
from autoregressive.runtime.log import LOGGER

PRECISIONS = {"none": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
COMPILE_ERRORS = ("warn", "raise")
MAX_VARIANTS = 64               # of one function that are compiled; any more run uncompiled


def add_compute_args(parser: Parser) -> None:
    """Declares the flags of how a GPU computes what is trained."""
    group = parser.add_argument_group("computing")
    may_vary(group.add_argument("--no-compile", action="store_true",
                                help="do not compile (a GPU compiles by default)"))
    add_compile_errors_arg(group)
    group.add_argument("--tf32", action=argparse.BooleanOptionalAction, default=True,
                       help="multiply float32 matrices on a GPU's tensor cores, with 10 bits of "
                            "mantissa")
    may_vary(group.add_argument("--cudnn-attention", action="store_true",
                                help="let torch take cuDNN's attention where it prefers it, as on "
                                     "an H100; else it is flash attention, which has been tested"))


def add_compile_errors_arg(parser: argparse._ActionsContainer) -> None:
    """Declares what is done about errors in compiling, on a parser or a group of flags."""
    may_vary(parser.add_argument("--compile-errors", default="warn", choices=COMPILE_ERRORS,
                                 help="warn: what cannot be compiled runs uncompiled, slower; "
                                      "raise: it ends the run"))


def set_up_gpu(tf32: bool, cudnn_attention: bool) -> None:
    """Sets how a GPU computes in this process.

    Args:
        tf32: whether it multiplies float32 matrices in TF32.
        cudnn_attention: whether torch may take cuDNN's attention.
    """
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    # torch 2.14 ranks it above flash attention on an H100; until someone has trained with it, it
    # has to be asked for.
    torch.backends.cuda.enable_cudnn_sdp(cudnn_attention)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Returns a copy of an array on a device; the host does not wait until a GPU has it."""
    tensor = torch.tensor(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Returns a context that computes in one of PRECISIONS; "none" leaves everything as it is.

    Products of matrices and attention are computed in it, from weights rounded to it. The weights
    themselves, the residual stream, norms, the rotary table, losses and the sums of gradients over
    processes are float32, with DDP as with FSDP. One thing differs: FSDP gathers the weights of a
    block rounded, its two norm weights with them, which changes gradients as much as bf16 itself
    does.
    """
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "none")


def set_up_compiler(device: torch.device, errors: str) -> bool:
    """Sets up torch.compile for this process; returns whether it can compile.

    Args:
        device: where the compiled code runs; on a GPU it needs Triton, without which a warning is
            logged.
        errors: one of COMPILE_ERRORS.
    """
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        LOGGER.warning("torch.compile needs the package triton, which is not installed: running "
                       "without it, slower")
        return False
    # Older versions of torch advise TF32 wherever float32 is exact, which was asked for.
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
    config = torch._dynamo.config
    config.suppress_errors = errors == "warn"
    config.fail_on_recompile_limit_hit = errors == "raise"
    # Each bucket of a decode step is compiled for itself. torch allows 8 such variants; 24 x 24
    # tokens need 9.
    config.recompile_limit = MAX_VARIANTS
    # It would split the graph of a block at DDP's buckets; their gradients are averaged between
    # blocks anyway.
    config.optimize_ddp = False
    return True


class BlockCompiler:
    """Compiles the blocks of a model, and counts how many of them run compiled.

    Attributes:
        graphs: how many were compiled; one, if the blocks are alike.
        calls: how often one of them ran forward.
    """

    def __init__(self, blocks: Iterable[nn.Module],
                 backend: str | Callable[..., Any] = "inductor") -> None:
        """Has `blocks` compiled when they first run, in place, by a backend of torch.compile."""
        self._blocks = list(blocks)
        self._backend = torch._dynamo.lookup_backend(backend)
        self.graphs = 0
        self.calls = 0
        for block in self._blocks:
            block.compile(backend=self._compile, dynamic=False)

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """Is a backend of torch.compile: compiles a graph to a function that counts its calls."""
        run = self._backend(graph, inputs)
        self.graphs += 1

        def counted(*arguments: object) -> object:
            self.calls += 1
            return run(*arguments)

        return counted

    def report(self, forwards: int) -> None:
        """Logs how many blocks ran compiled in the first `forwards` forward passes of the model."""
        # Imported here: it takes seconds, which a run that compiles nothing is spared.
        from torch._inductor import metrics

        compiled = self.calls // forwards
        level = logging.INFO if compiled == len(self._blocks) else logging.WARNING
        LOGGER.log(level, "%d of %d blocks run compiled; graphs of blocks: %d, kernels generated "
                   "with the loss: %d", compiled, len(self._blocks), self.graphs,
                   metrics.generated_kernel_count)
