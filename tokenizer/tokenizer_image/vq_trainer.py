"""One step of a tokenizer: first the VQ model, then, once it has begun, the discriminator.

Letters: B batch, P pixels, V codes.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.runtime.checkpoint import load_strictly
from autoregressive.runtime.compute import autocast
from autoregressive.runtime.distributed import Session, keyed_random
from autoregressive.runtime.log import LOGGER
from autoregressive.runtime.meter import Meter
from autoregressive.runtime.optim import ModelOptimizer, OptimSettings
from autoregressive.runtime.parallel import sync_gradients, wrap_for_training
from tokenizer.tokenizer_image.crops import Failures, TrainingCrops
from tokenizer.tokenizer_image.images import to_float
from tokenizer.tokenizer_image.lpips import LPIPS
from tokenizer.tokenizer_image.vq_loss import GAN_LOSSES, adaptive_weight
from tokenizer.tokenizer_image.vq_model import VQModel
from tokenizer.validation.metrics import codebook_usage
from tokenizer.validation.reconstruction import Validation

STATISTICS = ("reconstruction", "perceptual", "codebook", "commitment", "entropy", "generator", "discriminator",
              "grad_norm", "discriminator_grad_norm")
RECONSTRUCTION_LOSSES = {"l2": F.mse_loss, "l1": F.l1_loss}
FAILURES_EVERY = 100            # steps between two looks at the pictures that were found to be broken


@dataclass(frozen=True)
class TokenizerSettings:
    """What a step of training does: flags of vq_train.py, under their names.

    Attributes:
        reconstruction_loss: "l2" or "l1".
        reconstruction_weight, perceptual_weight, disc_weight: weights; the codebook terms have their own.
        entropy_ratio: weight of the entropy term.
        disc_loss: one of GAN_LOSSES.
        disc_start: steps before the discriminator begins.
        disc_adaptive_weight: whether the weight of G follows the gradients at the decoder's last layer.
        revive_every: steps after which codes that nothing used move to present latents; 0: never.
        global_seed: of the run; it decides which latents unused codes move to.
        mixed_precision: one of PRECISIONS, of the forward pass.
        gradient_accumulation_steps: micro-batches of a step.
    """

    reconstruction_loss: str
    reconstruction_weight: float
    perceptual_weight: float
    disc_weight: float
    entropy_ratio: float
    disc_loss: str
    disc_start: int
    disc_adaptive_weight: bool
    revive_every: int
    global_seed: int
    mixed_precision: str
    gradient_accumulation_steps: int


class TokenizerMeter(Meter):
    """The means of a tokenizer's steps, and how much of the codebook they used."""

    def __init__(self, num_codes: int, device: torch.device):
        super().__init__(STATISTICS, device)
        self.counts = torch.zeros(num_codes, device=device)                         # of the codes, since last read

    def read(self, session: Session) -> dict[str, float]:
        """Returns what Meter.read does, with usage and perplexity of the codebook."""
        usage = codebook_usage(session.sum(self.counts))
        del usage["codes_used"]
        self.counts = torch.zeros_like(self.counts)
        return super().read(session) | usage


class TokenizerTrainer:
    """Trains a VQ model and its discriminator: a runtime.trainable.Trainable."""

    def __init__(self, model: VQModel, discriminator: nn.Module | None, perceptual: LPIPS | None,
                 settings: TokenizerSettings, optim: OptimSettings, session: Session, *, num_steps: int,
                 validation: Validation | None = None, crops: TrainingCrops | None = None):
        """
        Args:
            model: VQ model in float32.
            discriminator: PatchDiscriminator, or None for no adversarial loss.
            perceptual: LPIPS or None.
            settings: TokenizerSettings.
            optim: OptimSettings of both networks; a moving average is kept of the VQ model alone.
            session: Session.
            num_steps: length of the run, at whose end no codes move.
            validation: Validation of the model, or None.
            crops: what the batches are made of, to name the pictures in it that are broken; or None.
        """
        device = session.device
        self.session, self.settings, self.num_steps, self.validation = session, settings, num_steps, validation
        self.crops = crops
        self.failures = Failures(len(crops.dataset), crops.max_failures) if crops else None
        self.model = model.to(device)
        self.wrapped = wrap_for_training(self.model, session)
        self.optimizer = ModelOptimizer(self.model, optim, device)
        self.discriminator = discriminator
        if discriminator is not None:
            discriminator.to(device)
            self.wrapped_discriminator = wrap_for_training(discriminator, session)
            self.discriminator_optimizer = ModelOptimizer(discriminator, replace(optim, ema=False), device)
        self.perceptual = perceptual.to(device) if perceptual else None
        num_codes = model.quantize.embedding.num_embeddings
        self.meter = TokenizerMeter(num_codes, device)
        self.used = torch.zeros(num_codes, device=device)                           # since the last revival

    def step(self, step: int, batch: Tensor, lr: float) -> None:
        """Applies a step from this process's part of the batch, (B, P, P, 3) uint8."""
        settings = self.settings
        has_gan = self.discriminator is not None and step >= settings.disc_start
        images = to_float(batch.to(self.session.device, non_blocking=True))
        micro_batches = images.chunk(settings.gradient_accumulation_steps)
        losses, reconstructions = 0, []
        for number, micro_batch in enumerate(micro_batches, 1):
            terms, reconstruction = self._generator(micro_batch, has_gan, number == len(micro_batches))
            losses = losses + terms
            reconstructions.append(reconstruction)
        norm, is_bad = self.optimizer.step(step, lr, losses[0])
        discriminator_loss = discriminator_norm = losses.new_zeros(())
        if has_gan:
            for number, pair in enumerate(zip(micro_batches, reconstructions, strict=True), 1):
                discriminator_loss = discriminator_loss + self._discriminator(*pair, number == len(micro_batches))
            discriminator_norm, is_also_bad = self.discriminator_optimizer.step(step, lr, discriminator_loss)
            is_bad = is_bad | is_also_bad
        self.meter.add(step, torch.stack([*losses, discriminator_loss, norm, discriminator_norm]), is_bad)
        steps = step + 1
        if settings.revive_every and steps % settings.revive_every == 0 and steps < self.num_steps:
            LOGGER.info("step %d: %d unused codes moved", steps, self.revive(steps, images))
        if self.crops and (steps % FAILURES_EVERY == 0 or steps == self.num_steps):
            self.note_failures()
            self.failures.gather(self.session)
            self.failures.check(consequence="others take their place")

    def note_failures(self) -> None:
        """Names the pictures that this process has found to be broken since the last call."""
        self.failures.add(self.crops.failures(known=self.failures.found))

    def _generator(self, images: Tensor, has_gan: bool, is_last: bool) -> tuple[Tensor, Tensor]:
        """Adds the gradient of one micro-batch to the VQ model; returns its share of the terms (6,), reconstruction."""
        settings = self.settings
        with sync_gradients(self.wrapped, is_last), autocast(self.session.device, settings.mixed_precision):
            reconstruction, quantizer, codes = self.wrapped(images, settings.entropy_ratio)
            reconstruction, quantizer = reconstruction.float(), torch.stack(quantizer)
            error = RECONSTRUCTION_LOSSES[settings.reconstruction_loss](reconstruction, images)
            perceptual = generator = error.new_zeros(())
            if self.perceptual:
                perceptual = self.perceptual(images, reconstruction).mean().float()
            loss = settings.reconstruction_weight * error + settings.perceptual_weight * perceptual
            if has_gan:
                self.discriminator.requires_grad_(False)            # the tokenizer's step moves the tokenizer alone
                generator = GAN_LOSSES[settings.disc_loss][1](self.discriminator(reconstruction).float())
                adaptive = self._adaptive(loss, generator) if settings.disc_adaptive_weight else 1.0
                loss = loss + settings.disc_weight * adaptive * generator
                self.discriminator.requires_grad_(True)
            self.optimizer.backward((loss + quantizer.sum()) / settings.gradient_accumulation_steps)
        self.model.quantize.record_usage(codes)
        ones = torch.ones(codes.numel(), device=codes.device)
        counts = torch.zeros_like(self.used).scatter_add_(0, codes.flatten(), ones)     # bincount waits for a GPU
        self.used += counts
        self.meter.counts += counts
        terms = torch.stack([error, perceptual, *quantizer, generator]) / settings.gradient_accumulation_steps
        return terms.detach(), reconstruction.detach()

    def _adaptive(self, loss: Tensor, generator: Tensor) -> Tensor:
        last = self.model.decoder.conv_out.weight
        means = []                                  # over the whole batch; sums would outweigh the epsilon in the ratio
        for term in (loss, generator):
            gradient, = torch.autograd.grad(term, last, retain_graph=True)
            means.append(self.session.sum(gradient) / self.session.world_size)
        return adaptive_weight(*means)

    def _discriminator(self, images: Tensor, reconstruction: Tensor, is_last: bool) -> Tensor:
        """Adds the gradient of one micro-batch to the discriminator; returns its share of D."""
        settings = self.settings
        with (sync_gradients(self.wrapped_discriminator, is_last),
              autocast(self.session.device, settings.mixed_precision)):
            real, fake = self.wrapped_discriminator(torch.cat([images, reconstruction])).float().chunk(2)
            loss = GAN_LOSSES[settings.disc_loss][0](real, fake) / settings.gradient_accumulation_steps
            self.discriminator_optimizer.backward(loss)
        return loss.detach()

    @torch.no_grad()
    def revive(self, steps: int, images: Tensor) -> int:
        """Moves codes that nothing used since the last call to latents of present images; returns how many.

        Args:
            steps: that were applied; which latents are taken follows from it and the seed.
            images: (B, 3, P, P) in [-1, 1], this process's part of the batch.
        """
        is_dead = self.session.sum(self.used) == 0
        self.used = torch.zeros_like(self.used)
        latents = self.model.encode(images).float().permute(0, 2, 3, 1).flatten(0, 2)       # (B*h*w, E)
        latents = np.concatenate(self.session.gather(latents.cpu().numpy()))        # of the whole batch
        chosen = keyed_random(self.settings.global_seed, steps, 0).integers(len(latents), size=int(is_dead.sum()))
        vectors = F.normalize(torch.from_numpy(latents[chosen]), dim=1)
        self.model.quantize.embedding.weight[is_dead] = vectors.to(self.session.device)
        return len(vectors)

    def best_model(self) -> VQModel:
        """Returns the model to judge and to save: with the averaged weights if there are any."""
        with torch.device("meta"):
            model = VQModel(self.model.config)
        load_strictly(model, self.optimizer.best_weights(), "the weights in training")
        return model.to(self.session.device).eval().requires_grad_(False)

    def validate(self) -> dict[str, float]:
        return self.validation.measure(self.best_model(), self.session) if self.validation else {}

    def draw(self, path: Path) -> None:
        model = self.best_model()
        if self.validation and self.session.is_main:
            self.validation.save_pictures(path, model, self.session.device)

    def state(self) -> dict:
        state = self.optimizer.state() | {"used": self.session.sum(self.used.clone()).cpu(),
                                          "counts": self.session.sum(self.meter.counts.clone()).cpu()}
        if self.discriminator is not None:
            state["discriminator"] = self.discriminator_optimizer.state()
        return state

    def load(self, state: dict) -> None:
        self.optimizer.load(state)
        # Their sums over all processes are what counts.
        self.used = state["used"].to(self.session.device) / self.session.world_size
        self.meter.counts = state["counts"].to(self.session.device) / self.session.world_size
        if self.discriminator is not None:
            self.discriminator_optimizer.load(state["discriminator"])
