"""One update of a tokenizer: first the VQ model, then, once it has begun, the discriminator.

Letters: B batch, P pixels, V codes.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from autoregressive.runtime.distributed import gather_state, keyed_random, scatter_state, sync_gradients
from tokenizer.tokenizer_image.images import to_float
from tokenizer.tokenizer_image.vq_loss import GAN_LOSSES, adaptive_weight
from tokenizer.validation.metrics import codebook_usage

PRECISIONS = {"none": None, "bf16": torch.bfloat16}
STATISTICS = ("reconstruction", "perceptual", "codebook", "commitment", "entropy", "generator", "discriminator",
              "grad_norm", "discriminator_grad_norm")
RECONSTRUCTION_LOSSES = {"l2": F.mse_loss, "l1": F.l1_loss}


@dataclass(frozen=True)
class LossSettings:
    """Weights and kinds of the losses.

    Attributes:
        reconstruction: "l2" or "l1".
        reconstruction_weight, perceptual_weight, gan_weight: weights; the codebook terms have their own.
        entropy_ratio: weight of the entropy term.
        gan: one of GAN_LOSSES.
        gan_start: updates before the discriminator begins.
        adaptive: whether the weight of G follows the gradients at the decoder's last layer.
    """

    reconstruction: str = "l2"
    reconstruction_weight: float = 1.0
    perceptual_weight: float = 1.0
    gan_weight: float = 0.5
    entropy_ratio: float = 0.0
    gan: str = "hinge"
    gan_start: int = 20000
    adaptive: bool = False


class Reconstruction(nn.Module):
    """A VQ model as DDP wraps it: images -> reconstruction, quantiser losses (3,), codes (B, T)."""

    def __init__(self, model, entropy_ratio):
        super().__init__()
        self.model, self.entropy_ratio = model, entropy_ratio

    def forward(self, images):
        reconstruction, losses, codes = self.model(images, self.entropy_ratio)
        return reconstruction.float(), torch.stack(tuple(losses)), codes


class TokenizerTrainer:
    """Applies updates to a VQ model and its discriminator, and keeps on the device what the log needs.

    Args:
        module: Reconstruction; wrapped: it, or what DDP made of it.
        optimizer: of the VQ model, a fused one.
        discriminator: PatchDiscriminator or None; wrapped_discriminator, discriminator_optimizer: likewise.
        perceptual: LPIPS or None.
        settings: LossSettings.
        session: Session.
        precision: one of PRECISIONS, of the forward pass.
        max_grad_norm: bound of the norm of either gradient; 0 is none.
        accumulation: micro-batches of an update.
        ema: moving average of the VQ model's weights, or None.
    """

    def __init__(self, module, wrapped, optimizer, discriminator, wrapped_discriminator, discriminator_optimizer,
                 perceptual, settings, session, precision, max_grad_norm, accumulation, ema):
        self.module, self.wrapped, self.optimizer = module, wrapped, optimizer
        self.discriminator, self.wrapped_discriminator = discriminator, wrapped_discriminator
        self.discriminator_optimizer = discriminator_optimizer
        self.perceptual, self.settings, self.session, self.ema = perceptual, settings, session, ema
        self.device, self.max_grad_norm, self.accumulation = session.device, max_grad_norm, accumulation
        self.dtype = PRECISIONS[precision]
        self.sums, self.count = torch.zeros(len(STATISTICS), device=self.device), 0
        num_codes = module.model.quantize.embedding.num_embeddings
        self.used = torch.zeros(num_codes, device=self.device)                      # since the last revival
        self.counts = torch.zeros(num_codes, device=self.device)                    # since the last line of the log
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=self.device)

    @property
    def model(self):
        return self.module.model

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def update(self, number, pictures, lr):
        """Applies update `number` from this process's part of the batch, (B, P, P, 3) uint8."""
        for optimizer in filter(None, (self.optimizer, self.discriminator_optimizer)):
            for group in optimizer.param_groups:
                group["lr"] = lr
        has_gan = self.discriminator is not None and number >= self.settings.gan_start
        parts = to_float(pictures.to(self.device, non_blocking=True)).chunk(self.accumulation)
        losses, pairs = 0, []
        for place, images in enumerate(parts):
            terms, reconstruction = self._generator(images, has_gan, place + 1 == len(parts))
            losses = losses + terms / self.accumulation
            pairs.append((images, reconstruction))
        norm, bad = self._step(self.optimizer, self.module.parameters())
        if self.ema:
            self.ema.update(self.model, number + 1, bad.float())
        discriminator_loss = discriminator_norm = losses.new_zeros(())
        if has_gan:
            for place, pair in enumerate(pairs):
                discriminator_loss = discriminator_loss + self._discriminator(*pair, place + 1 == len(pairs))
            discriminator_norm, also_bad = self._step(self.discriminator_optimizer, self.discriminator.parameters())
            bad = bad | also_bad
        self.sums += torch.cat([losses, torch.stack([discriminator_loss, norm, discriminator_norm])])
        self.count += 1
        self.first_bad = torch.where(bad & (self.first_bad < 0), number, self.first_bad)

    def _generator(self, images, has_gan, is_last):
        """Adds the gradient of one micro-batch to the VQ model; returns its terms (6,) and the reconstruction."""
        settings = self.settings
        with sync_gradients(self.wrapped, is_last), self.autocast():
            reconstruction, quantizer, codes = self.wrapped(images)
            error = RECONSTRUCTION_LOSSES[settings.reconstruction](reconstruction, images)
            zero = error.new_zeros(())
            perceptual = self.perceptual(images, reconstruction).mean().float() if self.perceptual else zero
            loss = settings.reconstruction_weight * error + settings.perceptual_weight * perceptual
            generator = zero
            if has_gan:
                self.discriminator.requires_grad_(False)            # the tokenizer's step moves the tokenizer alone
                generator = GAN_LOSSES[settings.gan][1](self.discriminator(reconstruction).float())
                weight = settings.gan_weight * (self._adaptive(loss, generator) if settings.adaptive else 1.0)
                loss = loss + weight * generator
                self.discriminator.requires_grad_(True)
            ((loss + quantizer.sum()) / self.accumulation).backward()
        self.model.quantize.record_usage(codes)
        counts = torch.bincount(codes.flatten(), minlength=len(self.used))
        self.used += counts
        self.counts += counts
        return torch.stack([error, perceptual, *quantizer, generator]).detach(), reconstruction.detach()

    def _adaptive(self, loss, generator):
        last = self.model.decoder.conv_out.weight
        gradients = [torch.autograd.grad(term, last, retain_graph=True)[0] for term in (loss, generator)]
        return adaptive_weight(*(self.session.sum(gradient) for gradient in gradients))    # of the whole batch

    def _discriminator(self, images, reconstruction, is_last):
        """Adds the gradient of one micro-batch to the discriminator; returns its share of D."""
        with sync_gradients(self.wrapped_discriminator, is_last), self.autocast():
            real, fake = self.wrapped_discriminator(torch.cat([images, reconstruction])).float().chunk(2)
            loss = GAN_LOSSES[self.settings.gan][0](real, fake) / self.accumulation
            loss.backward()
        return loss.detach()

    def _step(self, optimizer, parameters):
        """Applies a step unless its gradient is not finite; returns the gradient's norm and whether it was bad."""
        norm = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm or float("inf"))
        bad = ~norm.isfinite()
        optimizer.found_inf, optimizer.grad_scale = bad.float(), None               # of fused optimizers: step or not
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm.detach(), bad

    @torch.no_grad()
    def revive(self, number, pictures, seed):
        """Moves codes that nothing used since the last call to latents of present pictures; returns how many.

        Args:
            number: of the update.
            pictures: (B, P, P, 3) uint8, this process's part of the batch.
            seed: the run's seed; which latents are taken follows from it and `number`.
        """
        dead = self.session.sum(self.used) == 0
        self.used = torch.zeros_like(self.used)
        latents = self.model.encode(to_float(pictures.to(self.device))).float().permute(0, 2, 3, 1).flatten(0, 2)
        latents = np.concatenate(self.session.gather(latents.cpu().numpy()))        # of the whole batch
        chosen = keyed_random(seed, number, 0).integers(len(latents), size=int(dead.sum()))
        vectors = F.normalize(torch.from_numpy(latents[chosen]), dim=1)
        self.model.quantize.embedding.weight[dead] = vectors.to(self.device)
        return len(vectors)

    def bad_update(self, session):
        """Returns the first update that was not finite on any process; -1 if all were. Waits for the device."""
        return min((number for number in session.gather(int(self.first_bad)) if number >= 0), default=-1)

    def drain(self, session):
        """Returns the means since the last call over all processes, as a dict of floats, and starts anew."""
        means = session.sum(self.sums / self.count) / session.world_size
        self.sums, self.count = torch.zeros_like(self.sums), 0
        use = codebook_usage(session.sum(self.counts))
        self.counts = torch.zeros_like(self.counts)
        values = dict(zip(STATISTICS, means.tolist(), strict=True))
        return values | {"usage": use["usage"], "perplexity": use["perplexity"]}

    def whole_state(self):
        """Returns everything that training continues from, as plain containers (all processes call this)."""
        model, optimizer = gather_state(self.model, self.optimizer)
        state = {"model": model, "optimizer": optimizer, "used": self.session.sum(self.used.clone()).cpu(),
                 "counts": self.session.sum(self.counts.clone()).cpu()}
        if self.discriminator is not None:
            names = ("discriminator", "discriminator_optimizer")
            state |= zip(names, gather_state(self.discriminator, self.discriminator_optimizer), strict=True)
        return state | ({"ema": {name: weight.cpu() for name, weight in self.ema.weights.items()}} if self.ema else {})

    def load_whole_state(self, state):
        """Loads what whole_state returned."""
        scatter_state(self.model, state["model"], self.optimizer, state["optimizer"])
        for name in ("used", "counts"):             # their sums over all processes are what counts
            setattr(self, name, state[name].to(self.device) / self.session.world_size)
        if self.discriminator is not None:
            scatter_state(self.discriminator, state["discriminator"], self.discriminator_optimizer,
                          state["discriminator_optimizer"])
        if self.ema:
            for name, weight in self.ema.weights.items():
                weight.copy_(state["ema"][name])
