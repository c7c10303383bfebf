"""What is optimised when a GPT is trained, and one step of it.

Letters: B batch, T tokens, D width, V codes, M tokens of a patch (1 but in stages of patches),
n = T / M rows of an image, N = B * n rows.
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
from autoregressive.runtime.trainable import ValBatches

LOSSES = ("token_loss", "cluster_loss", "cluster_accuracy")
CURVES = (*LOSSES, "grad_norm")
# Of features (N, D), head (V, D), targets (N, M), perhaps lambda_cce, and fixed features (N, D) in
# guidance-free training: the loss, and LOSSES (3,).
HeadLoss = Callable[..., tuple[Tensor, Tensor]]


class Objective(nn.Module):
    """The loss of a GPT as a module, so that DDP, FSDP and compile can wrap it.

    Weights are saved from `.model`, so that their names are those of the GPT.
    """

    def __init__(self, model: nn.Module, head_loss: HeadLoss,
                 lambda_at: Callable[[int], float] | None = None,
                 patch_at: Callable[[int], int] = lambda step: 1) -> None:
        """
        Args:
            model: a GPT.
            head_loss: HeadLoss.
            lambda_at: gives lambda of a step if it changes; else it is None, and in `head_loss`.
            patch_at: gives the side of the patches of a step, in tokens.
        """
        super().__init__()
        self.model = model
        self.head_loss = head_loss
        self.lambda_at = lambda_at
        self.patch_at = patch_at
        self.patch = patch_at(0)
        # A tensor: for a float that changes the loss would be compiled again.
        lambda_cce = torch.tensor(lambda_at(0)) if lambda_at else None
        self.register_buffer("lambda_cce", lambda_cce, persistent=False)

    def set_step(self, step: int) -> None:
        """Sets lambda and patches to those of a step, from 0; does not wait for the device."""
        self.patch = self.patch_at(step)
        if self.lambda_at:
            self.lambda_cce.fill_(self.lambda_at(step))

    def forward(self, tokens: Tensor, labels: Tensor,
                betas: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Computes the loss of a batch; in validation always that of single tokens.

        Args:
            tokens: (B, T) int64.
            labels: (B,) int64, the null label where it was dropped.
            betas: (B,) float32 in guidance-free training, else None.

        Returns:
            the loss, token + lambda * cluster (scalar, float32), and LOSSES as a detached (3,).
        """
        patch = self.patch if self.training else 1
        inputs = tokens[:, :-1] if patch == 1 else tokens
        options = {} if self.lambda_cce is None else {"lambda_cce": self.lambda_cce}
        if betas is None:
            features = self.model.features(inputs, labels, patch=patch)     # (B, n, D)
        else:
            features, fixed = self._mix(inputs, labels, betas, patch)
            options["fixed"] = fixed.flatten(0, 1)                  # (N, D)
        head = self.model.output.weight                             # (V, D)
        targets = self.model.targets(tokens, patch).flatten(0, 1)   # (N, M)
        return self.head_loss(features.flatten(0, 1), head, targets, **options)

    def _mix(self, inputs: Tensor, labels: Tensor, betas: Tensor,
             patch: int) -> tuple[Tensor, Tensor]:
        """Returns beta * cond and (1 - beta) * uncond features (B, n, D), as in guidance_free.py.

        The second pass, of the null label, has neither dropout nor gradient. An image whose label
        was dropped is fed with beta 1, and mixed by its own.
        """
        null = torch.full_like(labels, self.model.config.num_classes)
        with torch.no_grad():
            self.model.eval()
            uncond = self.model.features(inputs, null, patch=patch)
            self.model.train()
        fed = torch.where(labels == null, 1.0, betas)
        cond = self.model.features(inputs, labels, fed, patch)
        share = betas[:, None, None]
        return share * cond, (1 - share) * uncond


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
        parts = self.wrapped.modules()
        self.objective = next(part for part in parts if isinstance(part, Objective))
        self.is_staged = self.objective.patch > 1           # before the first step is set
        names = list(CURVES)
        if self.objective.lambda_at:
            names.append("lambda_cce")
        if self.is_staged:
            names.append("patch")
        self.meter = Meter(tuple(names), self.session.device)

    def step(self, step: int, batch: tuple[Tensor, ...], lr: float) -> None:
        """Applies a step from this process's part of the batch.

        Args:
            step: its number, from 0.
            batch: tokens (B, T) and labels (B,) int64, perhaps betas (B,) float32, on the CPU.
            lr: learning rate.
        """
        on_device = [tensor.to(self.session.device, non_blocking=True) for tensor in batch]
        micro_batches = zip(*(tensor.chunk(self.accumulation) for tensor in on_device), strict=True)
        losses = torch.zeros(len(LOSSES), device=self.session.device)
        self.objective.set_step(step)
        for number, micro_batch in enumerate(micro_batches, start=1):
            is_last = number == self.accumulation
            with sync_gradients(self.wrapped, is_last):
                with autocast(self.session.device, self.precision):
                    loss, micro_losses = self.wrapped(*micro_batch)
                self.optimizer.backward(loss / self.accumulation)
            losses += micro_losses / self.accumulation
        norm, is_bad = self.optimizer.step(step, lr, losses[0])
        values = [*losses, norm]
        if self.objective.lambda_at:
            values.append(self.objective.lambda_cce)
        if self.is_staged:
            values.append(norm.new_full((), self.objective.patch))
        self.meter.add(step, torch.stack(values), is_bad)
        if self.compiler:
            passes = 2 if len(batch) == 3 else 1        # guidance-free: that of the null label, too
            self.compiler.report(forwards=self.accumulation * passes)
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
        state = self.optimizer.state()
        return state | {"patch": self.objective.patch} if self.is_staged else state

    def load(self, state: dict[str, Any]) -> None:
        """Loads what `state` returned, read on every process."""
        self.optimizer.load(state)
