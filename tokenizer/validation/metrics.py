"""How close reconstructions come to their originals, and how much of a codebook they use."""

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5                   # pixels


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
    """Returns the structural similarity of every picture (Wang et al. 2004): Gaussian window of 11 pixels, sigma 1.5.

    Args:
        pictures: (N, P, P, 3) uint8 tensor, P at least 11; the data range is 255.
        reconstructions: the same shape and dtype.

    Returns:
        (N,) float64, mean over channels and all places of the whole window; 1 where the two are equal.
    """
    x, y = (tensor.double().permute(0, 3, 1, 2).flatten(0, 1)[:, None] for tensor in (pictures, reconstructions))
    places = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=x.device) - SSIM_WINDOW // 2
    weights = torch.exp(-places.square() / (2 * SSIM_SIGMA**2))
    weights = weights / weights.sum()

    def blur(images):                                                               # (3 N, 1, P, P)
        return F.conv2d(F.conv2d(images, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))

    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)
                  / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)))
    return similarity.mean((1, 2, 3)).view(len(pictures), 3).mean(1)


def codebook_usage(counts: Tensor) -> dict[str, float]:
    """Says how much of a codebook is used.

    Args:
        counts: (V,) how often each code occurs, at least once in total.

    Returns:
        dict: codes_used, usage (their share, 0 .. 1), perplexity (exp of the entropy: as many codes used evenly).
    """
    used = int((counts > 0).sum())
    entropy = torch.special.entr(counts.double() / counts.sum()).sum()
    return {"codes_used": used, "usage": used / len(counts), "perplexity": entropy.exp().item()}
