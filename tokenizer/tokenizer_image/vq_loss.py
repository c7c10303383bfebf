"""The adversarial losses of tokenizer training, and their adaptive weight.

A discriminator gives logits: positive says real. D is its own loss; G is that of the tokenizer,
whose reconstructions are to pass for real. Both are scalars.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

ADAPTIVE_EPSILON = 1e-4
LARGEST_ADAPTIVE = 1e4


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """D = (E relu(1 - real) + E relu(1 + fake)) / 2, of logits of any shape."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """G = -E fake, of logits of any shape."""
    return -fake.mean()


def non_saturating_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """D = (E softplus(-real) + E softplus(fake)) / 2, of logits of any shape.

    It is the binary cross-entropy of the logits against real = 1, fake = 0.
    """
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def non_saturating_generator(fake: Tensor) -> Tensor:
    """G = E softplus(-fake): binary cross-entropy of the fake logits against real = 1."""
    return F.softplus(-fake).mean()


class GANLoss(NamedTuple):
    """D, of real and fake logits, and the G that belongs to it, of fake logits."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


GAN_LOSSES = {
    "hinge": GANLoss(hinge_discriminator, hinge_generator),
    "non-saturating": GANLoss(non_saturating_discriminator, non_saturating_generator),
}


def adaptive_weight(reconstruction_gradient: Tensor, gan_gradient: Tensor) -> Tensor:
    """Returns |gradient of the reconstruction| / (|gradient of G| + 1e-4), clamped to 0 .. 1e4.

    It balances the two losses (Esser et al. 2021).

    Args:
        reconstruction_gradient: gradient of the loss without G at the last layer.
        gan_gradient: gradient of G there, of the same shape.
    """
    weight = reconstruction_gradient.norm() / (gan_gradient.norm() + ADAPTIVE_EPSILON)
    return weight.clamp(0, LARGEST_ADAPTIVE).detach()
