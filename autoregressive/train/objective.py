"""What is optimised when a GPT is trained, and one step of it.

Letters: B batch, T tokens, D width, V codes, N = B * T rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from autoregressive.runtime.compute import BlockCompiler, autocast
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.meter import Meter
from autoregressive.runtime.optim import ModelOptimizer
from autoregressive.runtime.parallel import sync_gradients

LOSSES = ("token_loss", "cluster_loss", "cluster_accuracy")
# From features (N, D), head (V, D) and targets (N,) to the loss and its statistics (3,), as LOSSES.
HeadLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class ValBatches(Protocol):
    """The batches that a GPT is validated on: data.batches.TokenBatches.

    Attributes:
        per_epoch: number of batches.
        batch_size: images of a batch, over all processes.
    """

    per_epoch: int
    batch_size: int

    def __getitem__(self, key: tuple[int, range]) -> tuple[Tensor, Tensor]:
        """Returns tokens (B, T) and labels (B,) at a range of places of a batch, on the CPU."""


class Objective(nn.Module):
    """The loss of a GPT as a module, so that DDP, FSDP and compile can wrap it.

    Weights are saved from `.model`, so that their names are those of the GPT.
    """

    def __init__(self, model: nn.Module, head_loss: HeadLoss) -> None:
        super().__init__()
        self.model = model
        self.head_loss = head_loss

    def forward(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the loss of a batch.

        Args:
            tokens: (B, T) int64.
            labels: (B,) int64, the null label where it was dropped.

        Returns:
            the loss, token + lambda * cluster (scalar, float32), and LOSSES as a detached (3,).
        """
        features = self.model.features(tokens[:, :-1], labels)      # (B, T, D)
        head = self.model.output.weight                             # (V, D)
        return self.head_loss(features.flatten(0, 1), head, tokens.flatten())


@dataclass(eq=False)
class GPTTrainer:
    """Trains a GPT: a runtime.trainable.Trainable.

    Attributes:
        wrapped: an Objective, or what DDP or FSDP made of it.
        optimizer: of the Objective's model.
        session: Session.
        precision: one of PRECISIONS, of the forward pass.
        accumulation: micro-batches of a step.
        val_batches: of the validation images, or None.
        save_samples: saves pictures at a path, sampled with given weights; None saves none.
        compiler: of the model's blocks, which reports after the first step; None if they are not
            compiled.
    """

    wrapped: nn.Module
    optimizer: ModelOptimizer
    session: Session
    precision: str
    accumulation: int = 1
    val_batches: ValBatches | None = None
    save_samples: Callable[[Path, dict[str, Tensor]], None] | None = None
    compiler: BlockCompiler | None = None

    def __post_init__(self) -> None:
        self.meter = Meter((*LOSSES, "grad_norm"), self.session.device)

    def step(self, step: int, batch: tuple[Tensor, Tensor], lr: float) -> None:
        """Applies a step from this process's part of the batch.

        Args:
            step: its number, from 0.
            batch: tokens (B, T) and labels (B,) int64, on the CPU.
            lr: learning rate.
        """
        tokens, labels = (tensor.to(self.session.device, non_blocking=True) for tensor in batch)
        micro_batches = zip(tokens.chunk(self.accumulation), labels.chunk(self.accumulation),
                            strict=True)
        losses = torch.zeros(len(LOSSES), device=self.session.device)
        for number, micro_batch in enumerate(micro_batches, start=1):
            is_last = number == self.accumulation
            with sync_gradients(self.wrapped, is_last):
                with autocast(self.session.device, self.precision):
                    loss, micro_losses = self.wrapped(*micro_batch)
                self.optimizer.backward(loss / self.accumulation)
            losses += micro_losses / self.accumulation
        norm, is_bad = self.optimizer.step(step, lr, losses[0])
        self.meter.add(step, torch.cat([losses, norm[None]]), is_bad)
        if self.compiler:
            self.compiler.report(forwards=self.accumulation)
            self.compiler = None

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Returns LOSSES as means over the whole batches of validation images, without dropout.

        What does not fill a batch is left out, the same images every time. All processes call
        this. Without such images nothing is returned.
        """
        batches = self.val_batches
        if batches is None:
            return {}
        session = self.session
        part = session.part_of(batches.batch_size)
        sums = torch.zeros(len(LOSSES), device=session.device)
        self.wrapped.eval()
        for index in range(batches.per_epoch):
            tokens, labels = (tensor.to(session.device) for tensor in batches[index, part])
            with autocast(session.device, self.precision):
                _, losses = self.wrapped(tokens, labels)
                sums += losses * (len(tokens) / batches.batch_size)
        self.wrapped.train()
        means = session.sum(sums) / batches.per_epoch
        return dict(zip(LOSSES, means.tolist(), strict=True))

    def save_pictures(self, path: Path) -> None:
        """Saves pictures sampled with the present weights, averaged ones if there are any."""
        if self.save_samples is None:
            return
        weights = self.optimizer.best_weights(keep=self.session.is_main)
        if self.session.is_main:
            self.save_samples(path, weights)

    def state(self) -> dict[str, Any]:
        """Returns all that training continues from, on rank 0; all processes call this."""
        return self.optimizer.state()

    def load(self, state: dict[str, Any]) -> None:
        """Loads what `state` returned, read on every process."""
        self.optimizer.load(state)
