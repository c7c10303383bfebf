"""Training on patches of tokens first, then on tokens: next-patch prediction (arXiv 2412.15321).

In a stage with patches of p x p tokens a sequence is the condition and all patches but the last, in
raster order: an input row is the mean of the embeddings of a patch, and a row predicts all tokens
of the next patch by one distribution. The last stage, p = 1, is ordinary training. Weights, moments
and average carry over.

Letters: B batch, T tokens, p side of a patch in tokens, M = p * p tokens of a patch.
"""

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

from autoregressive.runtime.entry import between, fraction_above_0
from autoregressive.runtime.schedules import whole_steps

DEFAULT_RATE = 0.5
MAX_LEVEL = 5                   # patches of 16 x 16 tokens


def split_patches(x: Tensor, grid: int, patch: int) -> Tensor:
    """Returns the tokens of every patch, or what belongs to them.

    Args:
        x: (B, T, ...), by token in raster order.
        grid: side of the picture in tokens.
        patch: p, a divisor of it.

    Returns:
        (B, T / M, M, ...), patches and the tokens of each in raster order.
    """
    side = grid // patch
    cells = x.unflatten(1, (side, patch, side, patch)).transpose(2, 3)
    return cells.flatten(3, 4).flatten(1, 2)


def patch_table(table: Tensor, grid: int, patch: int) -> Tensor:
    """Returns the rotary table of patches, which turn by their own row and column.

    Args:
        table: (1 + T, head_dim / 2, 2), of tokens; the condition's row is the first.
        grid: side of the picture in tokens.
        patch: p, a divisor of it.

    Returns:
        (1 + T / M, head_dim / 2, 2).
    """
    side = grid // patch
    cells = table[1:].unflatten(0, (grid, grid))[:side, :side]      # a patch's row and column
    return torch.cat([table[:1], cells.flatten(0, 1)])


@dataclass(frozen=True)
class StageSettings:
    """The flags of a training in stages, under their names.

    Attributes:
        patch_level: n, stages: patches of 2^(n - 1), ..., 2, 1 tokens a side.
        epoch_rate: r, the part of the run that is over when the last stage begins, when the one
            before it begins as a part of that, and so on.
    """

    patch_level: int
    epoch_rate: float

    def check(self, grid: int) -> None:
        """Raises ValueError unless the largest patches divide a grid, or for a rate of no use."""
        if self.patch_level == 1 and self.epoch_rate != DEFAULT_RATE:
            raise ValueError("--epoch-rate: expected --patch-level 2 or more, whose stages it "
                             "divides, got 1; leave it out")
        largest = 2 ** (self.patch_level - 1)
        if grid % largest:
            raise ValueError(f"--patch-level: expected patches that divide a grid of {grid} "
                             f"tokens, got {self.patch_level}, whose first are of {largest} tokens "
                             "a side; lower it")

    def ends(self, epochs: int, max_steps: int, steps_per_epoch: int) -> tuple[int, ...]:
        """Returns the step before which each stage i of n ends, the last being that of the run.

        That is after floor(E r^(n-1-i)) epochs, or if `max_steps` is not 0, as many of its steps.

        Raises:
            ValueError: a stage has no step.
        """
        length, steps = (max_steps, 1) if max_steps else (epochs, steps_per_epoch)
        parts = [self.epoch_rate ** power for power in reversed(range(self.patch_level))]
        ends = tuple(whole_steps(part, length) * steps for part in parts)
        if any(first >= end for first, end in zip((0, *ends), ends, strict=False)):
            raise ValueError(f"--patch-level: expected stages of at least one step, got stages "
                             f"that end before the steps {', '.join(map(str, ends))}; lengthen the "
                             "run, or change --epoch-rate")
        return ends


def patch_at(step: int, ends: tuple[int, ...]) -> int:
    """Returns the side of the patches in tokens at a step, given the ends of the stages."""
    stage = sum(step >= end for end in ends[:-1])
    return 2 ** (len(ends) - 1 - stage)


def describe_stages(ends: tuple[int, ...]) -> str:
    """Returns the patches of every stage, and where it ends, in words."""
    texts = []
    for end in ends:
        patch = patch_at(end - 1, ends)
        texts.append(f"{patch} x {patch} tokens up to step {end}")
    return ", ".join(texts)


def add_stage_args(group: argparse._ActionsContainer) -> None:
    """Declares the flags of StageSettings."""
    group.add_argument("--patch-level", type=between(1, MAX_LEVEL), default=1,
                       help="stages of the training; 2: first on patches of 2 x 2 tokens, which "
                            "cost a quarter, then on tokens; 1: on tokens from the start")
    group.add_argument("--epoch-rate", type=fraction_above_0, default=DEFAULT_RATE,
                       help="part of the run after which the next stage begins")
