"""How close reconstructions come to their originals, and how much of a codebook they use."""

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


def codebook_usage(counts):
    """Says how much of a codebook is used.

    Args:
        counts: (V,) how often each code occurs, at least once in total.

    Returns:
        dict: codes_used, usage (their share, 0 .. 1), perplexity (exp of the entropy: as many codes used evenly).
    """
    used = int((counts > 0).sum())
    entropy = torch.special.entr(counts.double() / counts.sum()).sum()
    return {"codes_used": used, "usage": used / len(counts), "perplexity": entropy.exp().item()}
