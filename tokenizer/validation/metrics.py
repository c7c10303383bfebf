"""How close reconstructions come to their originals, and how much of a codebook they use.

Letters: N pictures, P pixels, V codes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_WINDOW = 11        # pixels
SSIM_SIGMA = 1.5        # pixels


def psnr(pictures: Tensor, reconstructions: Tensor) -> Tensor:
    """Returns the peak signal-to-noise ratio of every picture.

    Args:
        pictures: (N, P, P, 3) uint8 tensor.
        reconstructions: the same shape and dtype.

    Returns:
        (N,) float64 in dB; infinite where the two are equal.
    """
    error = (pictures.double() - reconstructions.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error)


def ssim(pictures: Tensor, reconstructions: Tensor) -> Tensor:
    """Returns the structural similarity of every picture, by a Gaussian window (Wang et al. 2004).

    Args:
        pictures: (N, P, P, 3) uint8 tensor, P at least 11; the data range is 255.
        reconstructions: the same shape and dtype.

    Returns:
        (N,) float64, mean over channels and all places of the whole window; 1 where the two are
        equal.
    """
    x = _channels(pictures)                                                     # (3 N, 1, P, P)
    y = _channels(reconstructions)
    places = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=x.device) - SSIM_WINDOW // 2
    weights = torch.exp(-places.square() / (2 * SSIM_SIGMA**2))
    weights = weights / weights.sum()                                           # (11,)

    def blur(images: Tensor) -> Tensor:
        """Returns the weighted means of images (3 N, 1, P, P) where the whole window fits."""
        in_rows = F.conv2d(images, weights.view(1, 1, 1, -1))
        return F.conv2d(in_rows, weights.view(1, 1, -1, 1))

    mean_x = blur(x)
    mean_y = blur(y)
    variance_x = blur(x * x) - mean_x**2
    variance_y = blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1 = (0.01 * 255) ** 2
    c2 = (0.03 * 255) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)
                  / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)))
    return similarity.mean((1, 2, 3)).view(len(pictures), 3).mean(1)


def _channels(pictures: Tensor) -> Tensor:
    """Returns the channels of pictures (N, P, P, 3) as images of one, (3 N, 1, P, P) float64."""
    return pictures.double().permute(0, 3, 1, 2).flatten(0, 1)[:, None]


def codebook_usage(counts: Tensor) -> dict[str, float]:
    """Says how much of a codebook is used.

    Args:
        counts: (V,) how often each code occurs, at least once in total.

    Returns:
        dict: codes_used, usage (the fraction of codes that are used, 0 .. 1), perplexity (exp of
        the entropy: as many codes used evenly).
    """
    used = int((counts > 0).sum())
    entropy = torch.special.entr(counts.double() / counts.sum()).sum()
    return {"codes_used": used, "usage": used / len(counts), "perplexity": entropy.exp().item()}
