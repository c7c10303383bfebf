"""How close a reconstruction comes to its original."""

import torch


def psnr(pictures, reconstructions):
    """Returns the peak signal-to-noise ratio of every picture.

    Args:
        pictures: (N, P, P, 3) uint8 tensor.
        reconstructions: the same shape and dtype.

    Returns:
        (N,) float64 in dB; infinite where the two are equal.
    """
    error = (pictures.double() - reconstructions.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error)
