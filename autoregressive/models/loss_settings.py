"""How a training computes the loss of cluster_loss.py: its flags, its form, its size of chunks."""

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from autoregressive.models.cluster_loss import fused_head_loss, plain_head_loss
from autoregressive.runtime.entry import at_least, may_vary

CPU_LOSS_MIB = 16               # a chunk of logits that stays in the caches
GPU_LOSS_MIB = 128              # one that keeps a GPU busy


@dataclass(frozen=True)
class LossSettings:
    """The flags of a training's loss, under their names.

    Attributes:
        lambda_cce: weight of the cluster loss.
        cluster_size: codes per cluster.
        vocab_size: number of codes.
        no_fused_loss: whether to compute all logits at once.
        loss_mib: memory of a chunk of logits in MiB; 0 is that of the device.
    """

    lambda_cce: float
    cluster_size: int
    vocab_size: int
    no_fused_loss: bool
    loss_mib: int


def add_loss_memory_args(group: argparse._ActionsContainer) -> None:
    """Declares the flags of the loss that choose between speed and memory."""
    group.add_argument("--no-fused-loss", action="store_true",
                       help="compute the loss from all logits at once")
    may_vary(group.add_argument("--loss-mib", type=at_least(0), default=0,
                                help="memory of a chunk of logits in the fused loss, MiB; 0: 16 on "
                                     "a CPU, 128 on a GPU"))


def build_head_loss(settings: LossSettings,
                    device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    """Returns the loss of features (N, D), head (V, D) and targets (N,), as in plain_head_loss."""
    weights = {"cluster_size": settings.cluster_size, "lambda_cce": settings.lambda_cce}
    if settings.no_fused_loss:
        return functools.partial(plain_head_loss, **weights)
    chunk_mib = settings.loss_mib or (CPU_LOSS_MIB if device.type == "cpu" else GPU_LOSS_MIB)
    bytes_per_row = 4 * settings.vocab_size         # logits in float32
    rows_at_once = max(1, chunk_mib * 2**20 // bytes_per_row)
    return functools.partial(fused_head_loss, rows_at_once=rows_at_once, **weights)
