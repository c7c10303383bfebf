"""One step of a tokenizer: first the VQ model, then, once it has begun, the discriminator.

Letters: B batch, b micro-batch, P pixels, V codes, E code dimension, h and w sides of a feature
map.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive.runtime.checkpoint import load_strictly
from autoregressive.runtime.compute import autocast
from autoregressive.runtime.distributed import Session, keyed_random
from autoregressive.runtime.failures import Failures
from autoregressive.runtime.log import LOGGER
from autoregressive.runtime.meter import Meter
from autoregressive.runtime.optim import ModelOptimizer, OptimSettings
from autoregressive.runtime.parallel import sync_gradients, wrap_for_training
from tokenizer.tokenizer_image.images import to_float
from tokenizer.tokenizer_image.vq_loss import GAN_LOSSES, adaptive_weight
from tokenizer.tokenizer_image.vq_model import VQModel
from tokenizer.tokenizer_image.vq_settings import Networks, TokenizerData, TokenizerSettings
from tokenizer.validation.metrics import codebook_usage

STATISTICS = ("reconstruction", "perceptual", "codebook", "commitment", "entropy", "generator",
              "discriminator", "grad_norm", "discriminator_grad_norm")
RECONSTRUCTION_LOSSES = {"l2": F.mse_loss, "l1": F.l1_loss}
FAILURES_EVERY = 100            # steps between two reports of the pictures found to be broken


class TokenizerMeter(Meter):
    """The means of a tokenizer's steps, and how much of the codebook they used."""

    def __init__(self, num_codes: int, device: torch.device) -> None:
        super().__init__(STATISTICS, device)
        self.counts = torch.zeros(num_codes, device=device)     # (V,) uses of the codes since read

    def read(self, session: Session) -> dict[str, float]:
        """Returns what Meter.read does, with usage and perplexity of the codebook."""
        usage = codebook_usage(session.sum(self.counts))
        del usage["codes_used"]
        self.counts = torch.zeros_like(self.counts)
        return super().read(session) | usage


class TokenizerTrainer:
    """Trains a VQ model and its discriminator: a runtime.trainable.Trainable.

    Attributes:
        model: the VQ model, on the session's device.
        meter: means of what the steps report.
        validation: the pictures to validate with, or None.
        failures: the training pictures that are broken, as far as known; None without data.
    """

    def __init__(self, networks: Networks, settings: TokenizerSettings, optim: OptimSettings,
                 session: Session, *, num_steps: int, data: TokenizerData | None = None) -> None:
        """Moves the networks to the session's device and builds their optimizers.

        Args:
            networks: what is trained, and what it is judged by.
            settings: what a step does.
            optim: of both networks; a moving average is kept of the VQ model alone.
            session: Session.
            num_steps: length of the run, at whose end no codes move.
            data: to validate with, and to name its pictures that are broken; None for neither.
        """
        device = session.device
        self.session = session
        self.settings = settings
        self.num_steps = num_steps
        self.validation = data.validation if data else None
        self.crops = data.crops if data else None
        self.failures = None
        if self.crops:
            self.failures = Failures(len(self.crops.dataset), self.crops.max_failures)

        self.model = networks.model.to(device)
        self.wrapped = wrap_for_training(self.model, session)
        self.optimizer = ModelOptimizer(self.model, optim, device)
        self.discriminator = networks.discriminator
        if self.discriminator is not None:
            self.discriminator.to(device)
            self.wrapped_discriminator = wrap_for_training(self.discriminator, session)
            self.discriminator_optimizer = ModelOptimizer(self.discriminator,
                                                          replace(optim, ema=False), device)
        self.perceptual = networks.perceptual.to(device) if networks.perceptual else None

        num_codes = self.model.quantize.embedding.num_embeddings
        self.meter = TokenizerMeter(num_codes, device)
        self.used = torch.zeros(num_codes, device=device)   # (V,) uses since the last revival

    def step(self, step: int, batch: Tensor, lr: float) -> None:
        """Applies a step from this process's part of the batch, (B, P, P, 3) uint8."""
        settings = self.settings
        has_gan = self.discriminator is not None and step >= settings.disc_start
        images = to_float(batch.to(self.session.device, non_blocking=True))         # (B, 3, P, P)
        micro_batches = images.chunk(settings.gradient_accumulation_steps)

        # The VQ model: the gradient of every micro-batch, then one step.
        losses = 0
        reconstructions = []
        for number, micro_batch in enumerate(micro_batches, 1):
            is_last = number == len(micro_batches)
            terms, reconstruction = self._backward_model(micro_batch, has_gan, is_last)
            losses = losses + terms                                                 # (6,)
            reconstructions.append(reconstruction)
        norm, is_bad = self.optimizer.step(step, lr, losses[0])

        # The discriminator, on the same images and what the model made of them.
        discriminator_loss = losses.new_zeros(())
        discriminator_norm = losses.new_zeros(())
        if has_gan:
            pairs = zip(micro_batches, reconstructions, strict=True)
            for number, (micro_batch, reconstruction) in enumerate(pairs, 1):
                is_last = number == len(micro_batches)
                loss = self._backward_discriminator(micro_batch, reconstruction, is_last)
                discriminator_loss = discriminator_loss + loss
            discriminator_norm, is_also_bad = self.discriminator_optimizer.step(
                step, lr, discriminator_loss)
            is_bad = is_bad | is_also_bad
        values = torch.stack([*losses, discriminator_loss, norm, discriminator_norm])
        self.meter.add(step, values, is_bad)

        # Every so many steps: move codes that nothing used, report pictures that are broken.
        steps = step + 1
        if settings.revive_every and steps % settings.revive_every == 0 and steps < self.num_steps:
            LOGGER.info("step %d: %d unused codes moved", steps, self.revive(steps, images))
        is_report_due = steps % FAILURES_EVERY == 0 or steps == self.num_steps
        if self.crops and is_report_due:
            self.note_failures()
            self.failures.gather(self.session)
            self.failures.check(consequence="others take their place")

    def note_failures(self) -> None:
        """Names the pictures that this process has found to be broken since the last call."""
        self.failures.add(self.crops.failures(known=self.failures.found))

    def _backward_model(self, images: Tensor, has_gan: bool,
                        is_last: bool) -> tuple[Tensor, Tensor]:
        """Adds the gradient of one micro-batch to the VQ model.

        Args:
            images: (b, 3, P, P) in [-1, 1], one micro-batch.
            has_gan: whether the discriminator has begun.
            is_last: whether this is the last micro-batch of the step.

        Returns:
            its part of the first six STATISTICS, (6,), and its reconstruction (b, 3, P, P).
        """
        settings = self.settings
        with (sync_gradients(self.wrapped, is_last),
              autocast(self.session.device, settings.mixed_precision)):
            reconstruction, quantizer_losses, codes = self.wrapped(images, settings.entropy_ratio)
            reconstruction = reconstruction.float()                                 # (b, 3, P, P)
            quantizer = torch.stack(quantizer_losses)                               # (3,)
            error = RECONSTRUCTION_LOSSES[settings.reconstruction_loss](reconstruction, images)
            perceptual = error.new_zeros(())
            generator = error.new_zeros(())
            if self.perceptual:
                perceptual = self.perceptual(images, reconstruction).mean().float()
            loss = settings.reconstruction_weight * error + settings.perceptual_weight * perceptual
            if has_gan:
                self.discriminator.requires_grad_(False)    # this step moves the tokenizer alone
                logits = self.discriminator(reconstruction).float()
                generator = GAN_LOSSES[settings.disc_loss].generator(logits)
                adaptive = 1.0
                if settings.disc_adaptive_weight:
                    adaptive = self._adaptive_weight(loss, generator)
                loss = loss + settings.disc_weight * adaptive * generator
                self.discriminator.requires_grad_(True)
            self.optimizer.backward((loss + quantizer.sum()) / settings.gradient_accumulation_steps)
        self.model.quantize.remember_usage(codes)
        self._count(codes)
        terms = torch.stack([error, perceptual, *quantizer, generator])             # (6,)
        terms = terms / settings.gradient_accumulation_steps
        return terms.detach(), reconstruction.detach()

    def _count(self, codes: Tensor) -> None:
        """Counts the uses of codes (b, T) int64."""
        # Not by bincount, which waits for a GPU.
        ones = torch.ones(codes.numel(), device=codes.device)
        counts = torch.zeros_like(self.used)                                        # (V,)
        counts.scatter_add_(0, codes.flatten(), ones)
        self.used += counts
        self.meter.counts += counts

    def _adaptive_weight(self, loss: Tensor, generator: Tensor) -> Tensor:
        """Returns the adaptive weight of G, from the gradients at the decoder's last layer."""
        last = self.model.decoder.conv_out.weight
        means = []          # over the whole batch: sums would outweigh the epsilon in the ratio
        for term in (loss, generator):
            (gradient,) = torch.autograd.grad(term, last, retain_graph=True)
            means.append(self.session.sum(gradient) / self.session.world_size)
        return adaptive_weight(*means)

    def _backward_discriminator(self, images: Tensor, reconstruction: Tensor,
                                is_last: bool) -> Tensor:
        """Adds the gradient of one micro-batch to the discriminator; returns its part of D."""
        settings = self.settings
        with (sync_gradients(self.wrapped_discriminator, is_last),
              autocast(self.session.device, settings.mixed_precision)):
            logits = self.wrapped_discriminator(torch.cat([images, reconstruction])).float()
            real, fake = logits.chunk(2)                                            # (b, 1, h, w)
            loss = GAN_LOSSES[settings.disc_loss].discriminator(real, fake)
            loss = loss / settings.gradient_accumulation_steps
            self.discriminator_optimizer.backward(loss)
        return loss.detach()

    @torch.no_grad()
    def revive(self, steps: int, images: Tensor) -> int:
        """Moves codes that nothing used since the last call onto latents of present images.

        Args:
            steps: number of steps applied; it and the seed decide which latents are taken.
            images: (B, 3, P, P) in [-1, 1], this process's part of the batch.

        Returns:
            how many were moved.
        """
        is_dead = self.session.sum(self.used) == 0
        self.used = torch.zeros_like(self.used)
        latents = self.model.encode(images).float()                                 # (B, E, h, w)
        rows = latents.permute(0, 2, 3, 1).flatten(0, 2)                            # (B*h*w, E)
        rows = np.concatenate(self.session.gather(rows.cpu().numpy()))      # of the whole batch
        random = keyed_random(self.settings.global_seed, steps, 0)
        chosen = random.integers(len(rows), size=int(is_dead.sum()))
        vectors = F.normalize(torch.from_numpy(rows[chosen]), dim=1)
        self.model.quantize.embedding.weight[is_dead] = vectors.to(self.session.device)
        return len(vectors)

    def best_model(self) -> VQModel:
        """Returns the model to judge and to save: with the averaged weights if there are any."""
        with torch.device("meta"):
            model = VQModel(self.model.config)
        load_strictly(model, self.optimizer.best_weights(), "the weights in training")
        return model.to(self.session.device).eval().requires_grad_(False)

    def validate(self) -> dict[str, float]:
        """Returns Validation.measure of the best model; nothing without validation pictures."""
        if not self.validation:
            return {}
        return self.validation.measure(self.best_model(), self.session)

    def save_pictures(self, path: Path) -> None:
        """Saves validation pictures above their reconstructions (all processes call this)."""
        model = self.best_model()
        if self.validation and self.session.is_main:
            self.validation.save_pictures(path, model, self.session.device)

    def state(self) -> dict[str, Any]:
        """Returns all that training continues from, as Trainable.state."""
        state = self.optimizer.state()
        state["used"] = self.session.sum(self.used.clone()).cpu()
        state["counts"] = self.session.sum(self.meter.counts.clone()).cpu()
        if self.discriminator is not None:
            state["discriminator"] = self.discriminator_optimizer.state()
        return state

    def load(self, state: dict[str, Any]) -> None:
        """Loads what `state` returned, on every process."""
        self.optimizer.load(state)
        # The sums over all processes are what counts, so each of them takes an equal part.
        self.used = state["used"].to(self.session.device) / self.session.world_size
        self.meter.counts = state["counts"].to(self.session.device) / self.session.world_size
        if self.discriminator is not None:
            self.discriminator_optimizer.load(state["discriminator"])
