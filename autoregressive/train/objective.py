"""What is optimised when a GPT is trained, and one step of it.

Letters: B batch, T tokens, D width, V codes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoregressive.runtime.compute import BlockCompiler, autocast
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.meter import Meter
from autoregressive.runtime.optim import ModelOptimizer
from autoregressive.runtime.parallel import sync_gradients

LOSSES = ("token_loss", "cluster_loss", "cluster_accuracy")


class Objective(nn.Module):
    """The loss of a GPT as a module, so that DDP, FSDP and compile can wrap it; weights are saved from `.model`.

    `head_loss` maps features (N, D), head (V, D) and targets (N,) to the loss and its statistics (3,).
    """

    def __init__(self, model: nn.Module, head_loss: Callable[..., tuple[Tensor, Tensor]]):
        super().__init__()
        self.model, self.head_loss = model, head_loss

    def forward(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the loss of a batch.

        Args:
            tokens: (B, T) int64.
            labels: (B,) int64, the null label where it was dropped.

        Returns:
            the loss, token + lambda * cluster (scalar, float32), and (token loss, cluster loss, cluster accuracy) as a
            detached (3,).
        """
        features = self.model.features(tokens[:, :-1], labels)                      # (B, T, D)
        return self.head_loss(features.flatten(0, 1), self.model.output.weight, tokens.flatten())


@dataclass(eq=False)
class GPTTrainer:
    """Trains a GPT: a runtime.trainable.Trainable.

    Attributes:
        wrapped: an Objective, or what DDP or FSDP made of it.
        optimizer: of the Objective's model.
        session: Session.
        precision: one of PRECISIONS, of the forward pass.
        accumulation: micro-batches of a step.
        val_batches: TokenBatches of the validation images, or None.
        draw_samples: saves a picture at a path, drawn with given weights; None draws nothing.
        compiler: of the model's blocks, which reports after the first step; None if they are not compiled.
    """

    wrapped: nn.Module
    optimizer: ModelOptimizer
    session: Session
    precision: str
    accumulation: int = 1
    val_batches: Any = None
    draw_samples: Callable[[Path, dict[str, Tensor]], None] | None = None
    compiler: BlockCompiler | None = None

    def __post_init__(self):
        self.meter = Meter((*LOSSES, "grad_norm"), self.session.device)

    def step(self, step: int, batch: tuple[Tensor, Tensor], lr: float) -> None:
        """Applies a step from this process's part of the batch: tokens (B, T) and labels (B,) int64, on the CPU."""
        tokens, labels = (tensor.to(self.session.device, non_blocking=True) for tensor in batch)
        micro_batches = list(zip(tokens.chunk(self.accumulation), labels.chunk(self.accumulation), strict=True))
        losses = torch.zeros(len(LOSSES), device=self.session.device)
        for number, micro_batch in enumerate(micro_batches, 1):
            with sync_gradients(self.wrapped, number == self.accumulation):
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
        """Returns the mean losses over the validation images, without dropout; none if there are no such images."""
        if self.val_batches is None:
            return {}
        batches, session = self.val_batches, self.session
        part = session.share_of(batches.batch_size)
        sums = torch.zeros(len(LOSSES), device=session.device)
        self.wrapped.eval()
        for index in range(batches.per_epoch):
            tokens, labels = (tensor.to(session.device) for tensor in batches[index, part])
            with autocast(session.device, self.precision):
                sums += self.wrapped(tokens, labels)[1] * (len(tokens) / batches.batch_size)
        self.wrapped.train()
        means = session.sum(sums) / batches.per_epoch
        return dict(zip(LOSSES, means.tolist(), strict=True))

    def draw(self, path: Path) -> None:
        """Saves pictures drawn with the present weights, averaged ones if there are any."""
        if self.draw_samples is None:
            return
        weights = self.optimizer.best_weights(keep=self.session.is_main)
        if self.session.is_main:
            self.draw_samples(path, weights)

    def state(self) -> dict[str, Any]:
        return self.optimizer.state()

    def load(self, state: dict[str, Any]) -> None:
        self.optimizer.load(state)
