"""The losses of tokenizer training beside those of the quantiser: adversarial ones, and their adaptive weight.

A discriminator gives logits: positive says real. D is its own loss, G that of the tokenizer, which would pass for real.
"""

import torch.nn.functional as F

ADAPTIVE_EPSILON, LARGEST_ADAPTIVE = 1e-4, 1e4


def hinge_discriminator(real, fake):
    """D = (E relu(1 - real) + E relu(1 + fake)) / 2, of logits of any shape."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def hinge_generator(fake):
    """G = -E fake, of logits of any shape."""
    return -fake.mean()


def non_saturating_discriminator(real, fake):
    """D = (E softplus(-real) + E softplus(fake)) / 2: binary cross-entropy of logits against real = 1, fake = 0."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def non_saturating_generator(fake):
    """G = E softplus(-fake): binary cross-entropy of the fake logits against real = 1."""
    return F.softplus(-fake).mean()


GAN_LOSSES = {"hinge": (hinge_discriminator, hinge_generator),
              "non-saturating": (non_saturating_discriminator, non_saturating_generator)}


def adaptive_weight(reconstruction_gradient, gan_gradient):
    """Returns |gradient of the reconstruction| / (|gradient of G| + 1e-4), clamped to 0 .. 1e4 (Esser et al. 2021).

    Args:
        reconstruction_gradient, gan_gradient: gradients of the two losses at the last layer, of any equal shape.
    """
    weight = reconstruction_gradient.norm() / (gan_gradient.norm() + ADAPTIVE_EPSILON)
    return weight.clamp(0, LARGEST_ADAPTIVE).detach()
