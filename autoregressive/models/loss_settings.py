"""How a training computes the loss of cluster_loss.py: its flags, its form, its size of chunks."""

import argparse
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from autoregressive.models.cluster_loss import fused_head_loss, plain_head_loss
from autoregressive.runtime.entry import at_least, may_vary
from autoregressive.runtime.schedules import SCHEDULES, fall

CPU_LOSS_MIB = 16               # a chunk of logits that stays in the caches
GPU_LOSS_MIB = 128              # one that keeps a GPU busy


@dataclass(frozen=True)
class LossSettings:
    """The flags of a training's loss, under their names.

    Attributes:
        lambda_cce: weight of the cluster loss, at the beginning if it follows a schedule.
        lambda_schedule: one of SCHEDULES.
        lambda_end: weight at the end.
        cluster_size: codes per cluster.
        vocab_size: number of codes.
        no_fused_loss: whether to compute all logits at once.
        loss_mib: memory of a chunk of logits in MiB; 0 is that of the device.
    """

    lambda_cce: float
    lambda_schedule: str
    lambda_end: float
    cluster_size: int
    vocab_size: int
    no_fused_loss: bool
    loss_mib: int

    def check(self) -> None:
        """Raises ValueError for settings that contradict each other."""
        if self.lambda_end and not self.changes_lambda:
            raise ValueError("--lambda-end: expected --lambda-schedule cosine or linear, got "
                             "constant, which stays at --lambda-cce; leave one of them out")

    @property
    def changes_lambda(self) -> bool:
        """Whether the weight of the cluster loss follows a schedule."""
        return self.lambda_schedule != "constant"

    @property
    def lambda_text(self) -> str:
        """Lambda in names and logs: `1`, or `1-0` from the beginning to the end."""
        text = f"{self.lambda_cce:g}"
        return f"{text}-{self.lambda_end:g}" if self.changes_lambda else text

    def describe(self) -> str:
        """Returns lambda and where the losses begin, for the log."""
        return (f"lambda {self.lambda_text}; token loss begins at ln V = "
                f"{math.log(self.vocab_size):.2f}, cluster loss at ln K = "
                f"{math.log(self.vocab_size // self.cluster_size):.2f}")

    def lambda_over(self, num_steps: int) -> Callable[[int], float] | None:
        """Returns lambda of a step, from 0, in a run of `num_steps`; None if it is constant."""
        if not self.changes_lambda:
            return None
        return lambda step: fall(self.lambda_cce, self.lambda_end, self.lambda_schedule,
                                 step / num_steps)


def add_loss_args(group: argparse._ActionsContainer) -> None:
    """Declares the flags of LossSettings that concern the loss alone."""
    group.add_argument("--lambda-cce", type=at_least(0.0), default=1.0,
                       help="weight of the cluster loss; 0 is LlamaGen")
    group.add_argument("--lambda-schedule", default="constant", choices=SCHEDULES,
                       help="how that weight goes from --lambda-cce to --lambda-end over the run")
    group.add_argument("--lambda-end", type=at_least(0.0), default=0.0,
                       help="weight of the cluster loss at the end, unless it is constant")
    group.add_argument("--no-fused-loss", action="store_true",
                       help="compute the loss from all logits at once")
    may_vary(group.add_argument("--loss-mib", type=at_least(0), default=0,
                                help="memory of a chunk of logits in the fused loss, MiB; 0: 16 on "
                                     "a CPU, 128 on a GPU"))


def build_head_loss(settings: LossSettings,
                    device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    """Returns the loss of features (N, D), head (V, D) and targets (N,), as in plain_head_loss.

    A lambda that follows a schedule is not bound: the loss takes it as a further lambda_cce.
    """
    bound: dict[str, int | float] = {"cluster_size": settings.cluster_size}
    if not settings.changes_lambda:
        bound["lambda_cce"] = settings.lambda_cce
    if settings.no_fused_loss:
        return functools.partial(plain_head_loss, **bound)
    chunk_mib = settings.loss_mib or (CPU_LOSS_MIB if device.type == "cpu" else GPU_LOSS_MIB)
    bytes_per_row = 4 * settings.vocab_size         # logits in float32
    rows_at_once = max(1, chunk_mib * 2**20 // bytes_per_row)
    return functools.partial(fused_head_loss, rows_at_once=rows_at_once, **bound)
