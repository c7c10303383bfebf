"""The five numbers of the ADM evaluator, as pure functions on features.

Letters: N images, D feature dimensions, C classes. Nothing here knows where features come from.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.linalg
import torch
from scipy.special import xlogy
from torch import Tensor

from evaluations.c2i.covariance import check_covariance, covariance_factor

SPLIT_SIZE = 5000       # images in a split of the Inception score
NEIGHBOURS = 3          # the radius of a manifold ball is the distance to this neighbour
STATISTICS_ROWS = 4096  # features taken at once: enough for the matrix product to be fast
DISTANCE_ROWS = 2048    # side of a block of distances: 16 MiB of float32
LEAST_DISTANCE = -1e-3          # of two Gaussians; rounding stays above it


class Gaussian(NamedTuple):
    """What frechet_distance compares, all float64.

    Attributes:
        mean: (D,).
        covariance: (D, D).
        factor: (r, D) with factor^T factor = covariance where it is known (features fewer than D).
    """

    mean: np.ndarray
    covariance: np.ndarray
    factor: np.ndarray | None = None


class StreamingStatistics:
    """Mean and covariance of features that arrive in batches, in float64.

    Batches are merged by their means and scatter matrices (Chan, Golub and LeVeque), so that a
    large mean does not cost the covariance precision.

    Attributes:
        count: number of features.
        mean: (D,), 0 before the first batch.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._scatter = 0.0

    def add(self, features: np.ndarray) -> None:
        """Takes a batch of features (n, D) of any float type.

        Raises:
            ValueError: a value is not finite.
        """
        features = np.asarray(features, dtype=np.float64)
        check_finite(features)
        if not len(features):
            return
        weight = len(features) / (self.count + len(features))
        batch_mean = features.mean(axis=0)                                          # (D,)
        centred = features - batch_mean                                             # (n, D)
        step = batch_mean - self.mean                                               # (D,)
        between = np.outer(step, step) * (self.count * weight)                      # (D, D)
        self._scatter = self._scatter + centred.T @ centred + between
        self.mean = self.mean + step * weight
        self.count += len(features)

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance (D, D) float64.

        Raises:
            ValueError: fewer than two features were added.
        """
        if self.count < 2:
            raise ValueError(f"expected at least 2 images for a covariance, got {self.count}")
        return self._scatter / (self.count - 1)


def feature_statistics(features: np.ndarray) -> Gaussian:
    """Returns the Gaussian of features (N, D) of any float type, N >= 2.

    It knows its factor, (N - 1, D), when N <= D.

    Raises:
        ValueError: fewer than two rows, or a value that is not finite.
    """
    statistics = StreamingStatistics()
    for rows in _blocks(features, STATISTICS_ROWS):
        statistics.add(features[rows])
    covariance = statistics.covariance
    is_singular = len(features) <= features.shape[1]
    factor = _helmert_factor(features) if is_singular else None
    return Gaussian(statistics.mean, covariance, factor)


def _helmert_factor(features: np.ndarray) -> np.ndarray:
    """Returns F (N - 1, D) with F^T F = covariance, by Helmert's contrasts of features (N, D).

    They centre without the zero direction that subtracting a mean leaves behind.
    """
    features = np.asarray(features, dtype=np.float64)
    features = features - features.mean(axis=0)                # changes nothing but the rounding
    counts = np.arange(1, len(features))[:, None]                                   # (N - 1, 1)
    contrasts = features.cumsum(axis=0)[:-1] - counts * features[1:]                # (N - 1, D)
    contrasts = contrasts / np.sqrt(counts * (counts + 1))
    return contrasts / np.sqrt(len(features) - 1)


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray,
                     factor1: np.ndarray | None = None,
                     factor2: np.ndarray | None = None) -> float:
    """Computes the FID, |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), by symmetric real matrices.

    With S1 = F1^T F1, the trace of the root is the sum of the roots of the eigenvalues of
    F1 S2 F1^T, and, with S2 = F2^T F2, the sum of the singular values of F1 F2^T. A known factor
    leaves out the null space, whose rounding errors would be added up.

    Args:
        mu1: mean (D,) of the first Gaussian.
        sigma1: its covariance (D, D).
        mu2: mean (D,) of the second.
        sigma2: its covariance (D, D).
        factor1: as Gaussian.factor of the first, or None.
        factor2: as Gaussian.factor of the second, or None.

    Returns:
        float; for equal arguments 0 up to rounding, of either sign.

    Raises:
        ValueError: sizes differ, a value is not finite, a covariance is none, the result is
            negative.
    """
    mu1 = np.asarray(mu1, dtype=np.float64)
    sigma1 = np.asarray(sigma1, dtype=np.float64)
    mu2 = np.asarray(mu2, dtype=np.float64)
    sigma2 = np.asarray(sigma2, dtype=np.float64)
    for array in (mu1, sigma1, mu2, sigma2):
        check_finite(array)
    size = len(mu1)
    if mu2.shape != (size,) or sigma1.shape != (size, size) or sigma2.shape != (size, size):
        raise ValueError("expected two means (D,) and two covariances (D, D), got "
                         f"{mu1.shape}, {sigma1.shape} and {mu2.shape}, {sigma2.shape}")
    if factor1 is not None and factor2 is not None:
        roots = scipy.linalg.svdvals(factor1 @ factor2.T)
    else:
        if factor1 is None and factor2 is not None:             # the distance is symmetric
            factor1, sigma2 = factor2, sigma1
            sigma1 = factor1.T @ factor1
        check_covariance(sigma2)
        factor = covariance_factor(sigma1) if factor1 is None else factor1
        roots = np.sqrt(scipy.linalg.eigvalsh(factor @ sigma2 @ factor.T).clip(min=0))
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * roots.sum()
    if distance < LEAST_DISTANCE:
        raise ValueError(f"expected a distance of at least 0 up to rounding, got {distance:g}; the "
                         "means and covariances are not those of one network's features, or too "
                         "large")
    return float(distance)


def inception_score(probabilities: np.ndarray, split_size: int = SPLIT_SIZE) -> float:
    """Computes exp(mean KL(p(class | image) || p(class))), averaged over splits of the images.

    Args:
        probabilities: (N, C), rows sum to 1.
        split_size: consecutive images in a split; a shorter last split counts as much as the
            others, as in the ADM evaluator.

    Raises:
        ValueError: a value is not finite.
    """
    scores = []
    for rows in _blocks(probabilities, split_size):
        split = np.asarray(probabilities[rows], dtype=np.float64)
        check_finite(split)
        marginal = split.mean(axis=0)                                            # (C,)
        divergence = (xlogy(split, split) - xlogy(split, marginal)).sum(axis=1)  # (n,)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


def manifold_radii(features: Tensor, neighbours: int = NEIGHBOURS,
                   advance: Callable[[int], None] = lambda count: None) -> Tensor:
    """Returns the squared distances (N,) float32 of features to their k-th nearest other ones.

    Args:
        features: (N, D) float32 tensor, on any device.
        neighbours: k of the improved precision and recall (Kynkäänniemi et al. 2019).
        advance: called with the number of block rows done, for a progress bar.

    Raises:
        ValueError: there are not more than `neighbours` features.
    """
    if len(features) <= neighbours:
        raise ValueError(f"expected more than {neighbours} images for precision and recall, "
                         f"got {len(features)}")
    nearest = features.new_full((len(features), neighbours), torch.inf)
    norms = features.square().sum(dim=1)
    blocks = _blocks(features, DISTANCE_ROWS)

    def take(rows: slice, distances: Tensor) -> None:
        """Merges distances (n, m) of rows to m others into their nearest."""
        joined = torch.cat([nearest[rows], distances], dim=1)
        nearest[rows] = joined.topk(neighbours, dim=1, largest=False).values    # ascending

    for number, rows in enumerate(blocks):
        for others in blocks[number:]:              # the other half by symmetry
            distances = _squared_distances(features[rows], norms[rows],
                                           features[others], norms[others])
            if others is rows:
                distances.fill_diagonal_(torch.inf)
            else:
                take(others, distances.T)
            take(rows, distances)
        advance(len(features[rows]))
    return nearest[:, -1]


def precision_recall(reference: Tensor, samples: Tensor, neighbours: int = NEIGHBOURS,
                     advance: Callable[[int], None] = lambda count: None) -> tuple[float, float]:
    """Computes which fraction of the samples lies in the reference's manifold, and the reverse.

    Args:
        reference: (N1, D) float32 tensor.
        samples: (N2, D) float32 tensor on the same device.
        neighbours: see manifold_radii.
        advance: called with rows done, 2 N1 + N2 in all, for a progress bar.

    Returns:
        precision, recall: floats in [0, 1].

    Raises:
        ValueError: too few features, or a value that is not finite.
    """
    for features in (reference, samples):
        check_finite(features.numpy(force=True))
    reference_radii = manifold_radii(reference, neighbours, advance)
    sample_radii = manifold_radii(samples, neighbours, advance)
    norms = reference.square().sum(dim=1)
    sample_norms = samples.square().sum(dim=1)
    is_covered = reference.new_zeros(len(reference), dtype=torch.bool)
    is_real = samples.new_zeros(len(samples), dtype=torch.bool)
    for rows in _blocks(reference, DISTANCE_ROWS):
        for others in _blocks(samples, DISTANCE_ROWS):
            distances = _squared_distances(reference[rows], norms[rows],
                                           samples[others], sample_norms[others])
            is_real[others] |= (distances <= reference_radii[rows, None]).any(dim=0)
            is_covered[rows] |= (distances <= sample_radii[None, others]).any(dim=1)
        advance(len(reference[rows]))
    return is_real.double().mean().item(), is_covered.double().mean().item()


def _blocks(array: np.ndarray | Tensor, size: int) -> list[slice]:
    """Returns slices of `size` consecutive rows; the last may reach beyond the end."""
    return [slice(start, start + size) for start in range(0, len(array), size)]


def _squared_distances(rows: Tensor, row_norms: Tensor, columns: Tensor,
                       column_norms: Tensor) -> Tensor:
    """Returns the squared distances (n, m) of rows (n, D) to columns (m, D).

    The norms, (n,) and (m,), are the squared ones.
    """
    products = torch.addmm(column_norms[None, :], rows, columns.T, alpha=-2)
    return products.add_(row_norms[:, None]).clamp_(min=0)      # rounding may go below zero


def check_finite(array: np.ndarray) -> None:
    """Raises ValueError when an array holds NaN or infinity."""
    if not np.isfinite(array).all():
        count = int((~np.isfinite(array)).sum())
        raise ValueError(f"expected finite numbers, found {count} NaN or infinite ones")
