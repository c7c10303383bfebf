"""The five numbers of the ADM evaluator, as pure functions on features.

Letters: N images, D feature dimensions, C classes. Nothing here knows where features come from.
"""

from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from scipy.special import xlogy
from torch import Tensor

SPLIT_SIZE = 5000       # images in a split of the Inception score
NEIGHBOURS = 3          # the radius of a manifold ball is the distance to this neighbour
STATISTICS_ROWS = 4096  # features taken at once: enough for the matrix product to be worth its while
DISTANCE_ROWS = 2048    # side of a block of distances: 16 MiB of float32
LEAST_EIGENVALUE = -1e-6        # of a covariance, as a share of its largest one
LEAST_DISTANCE = -1e-3          # of two Gaussians; rounding stays above both


class StreamingStatistics:
    """Mean and covariance of features that arrive in batches, in float64.

    Batches are merged by their means and scatter matrices (Chan, Golub and LeVeque), so that a large mean costs no
    digits of the covariance.
    """

    def __init__(self):
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
        share = len(features) / (self.count + len(features))
        batch_mean = features.mean(axis=0)
        centered = features - batch_mean
        step = batch_mean - self.mean
        self._scatter = self._scatter + centered.T @ centered + np.outer(step, step) * (self.count * share)
        self.mean = self.mean + step * share
        self.count += len(features)

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance (D, D).

        Raises:
            ValueError: fewer than two features were added.
        """
        if self.count < 2:
            raise ValueError(f"expected at least 2 images for a covariance, got {self.count}")
        return self._scatter / (self.count - 1)


def feature_statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Returns what frechet_distance wants to know of features.

    Args:
        features: (N, D) of any float type, N >= 2.

    Returns:
        mean (D,), covariance (D, D), and their factor (N - 1, D) when N <= D, else None; all float64.

    Raises:
        ValueError: fewer than two rows, or a value that is not finite.
    """
    statistics = StreamingStatistics()
    for rows in _blocks(features, STATISTICS_ROWS):
        statistics.add(features[rows])
    covariance = statistics.covariance
    return statistics.mean, covariance, _helmert_factor(features) if len(features) <= features.shape[1] else None


def _helmert_factor(features):
    """Returns F (N - 1, D) with F^T F = covariance: centring without the zero direction that a mean leaves behind."""
    features = np.asarray(features, dtype=np.float64)
    features = features - features.mean(axis=0)                # changes nothing but the rounding
    counts = np.arange(1, len(features))[:, None]
    contrasts = (features.cumsum(axis=0)[:-1] - counts * features[1:]) / np.sqrt(counts * (counts + 1))
    return contrasts / np.sqrt(len(features) - 1)


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray,
                     factor1: np.ndarray | None = None, factor2: np.ndarray | None = None) -> float:
    """Computes |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), the FID, without leaving the symmetric real matrices.

    With S1 = F1^T F1, the trace of the root is the sum of the roots of the eigenvalues of F1 S2 F1^T, and, with
    S2 = F2^T F2, the sum of the singular values of F1 F2^T.

    Args:
        mu1, mu2: means (D,).
        sigma1, sigma2: covariances (D, D).
        factor1, factor2: (r, D) with factor^T factor = sigma where it is known (features fewer than D); it spares the
            null space, whose rounding errors would be added up.

    Returns:
        float; for equal arguments 0 up to rounding, of either sign.

    Raises:
        ValueError: sizes differ, a value is not finite, a covariance is none, the result is
            negative.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(array, dtype=np.float64) for array in (mu1, sigma1, mu2, sigma2))
    for array in (mu1, sigma1, mu2, sigma2):
        check_finite(array)
    size = len(mu1)
    if mu2.shape != (size,) or sigma1.shape != (size, size) or sigma2.shape != (size, size):
        raise ValueError("expected two means (D,) and two covariances (D, D), got "
                         f"{mu1.shape}, {sigma1.shape} and {mu2.shape}, {sigma2.shape}")
    if factor1 is not None and factor2 is not None:
        roots = scipy.linalg.svdvals(factor1 @ factor2.T)
    else:
        if factor1 is None and factor2 is not None:
            factor1, sigma2 = factor2, sigma1
            sigma1 = factor1.T @ factor1
        check_covariance(sigma2)
        factor = covariance_factor(sigma1) if factor1 is None else factor1
        roots = np.sqrt(scipy.linalg.eigvalsh(factor @ sigma2 @ factor.T).clip(min=0))
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * roots.sum()
    if distance < LEAST_DISTANCE:
        raise ValueError(f"expected a distance of at least 0 up to rounding, got {distance:g}; the "
                         "means and covariances are not those of one network's features, or too large")
    return float(distance)


def check_covariance(sigma: np.ndarray) -> None:
    """Raises ValueError unless (D, D) is symmetric and positive semidefinite up to rounding."""
    sigma = np.asarray(sigma, dtype=np.float64)
    asymmetry = np.abs(sigma - sigma.T).max(initial=0)
    if asymmetry > -LEAST_EIGENVALUE * np.abs(sigma).max(initial=0):
        raise ValueError(f"expected a covariance, found an asymmetric matrix ({asymmetry:g} apart)")
    try:
        scipy.linalg.cholesky(sigma)
    except scipy.linalg.LinAlgError:                           # singular, or worse
        _check_eigenvalues(scipy.linalg.eigvalsh(sigma))


def _check_eigenvalues(values: np.ndarray) -> None:
    """Raises ValueError unless the ascending eigenvalues (D,) are a covariance's."""
    if values[0] < LEAST_EIGENVALUE * max(values[-1], 0):
        raise ValueError(f"expected a covariance, found a matrix with eigenvalues {values[0]:g} to "
                         f"{values[-1]:g}")


def covariance_factor(sigma: np.ndarray) -> np.ndarray:
    """Returns F (r, D) with F^T F = sigma (D, D) float64, r <= D, leaving out its null space.

    Raises:
        ValueError: an eigenvalue is negative by more than rounding.
    """
    threshold = len(sigma) * np.finfo(np.float64).eps
    try:
        factor = scipy.linalg.cholesky(sigma)
        if np.square(np.diagonal(factor)).min() > threshold * np.diagonal(sigma).max():
            return factor
    except scipy.linalg.LinAlgError:
        pass                                                   # singular: fewer images than dimensions, dead features
    values, vectors = scipy.linalg.eigh(sigma)
    _check_eigenvalues(values)
    kept = values > threshold * values[-1]
    return (vectors[:, kept] * np.sqrt(values[kept])).T


def inception_score(probabilities: np.ndarray, split_size: int = SPLIT_SIZE) -> float:
    """Computes exp(mean KL(p(class | image) || p(class))) within splits of consecutive images, averaged over splits.

    Args:
        probabilities: (N, C), rows sum to 1.
        split_size: images in a split; a shorter last split counts as much as the others, as in the ADM evaluator.

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
    """Returns the squared distance of each feature to its `neighbours`-th nearest other one, (N,) float32.

    Args:
        features: (N, D) float32 tensor, on any device.
        neighbours: k of the improved precision and recall (Kynkäänniemi et al. 2019).
        advance: called with the number of block rows done, for a progress bar.

    Raises:
        ValueError: there are not more than `neighbours` features.
    """
    if len(features) <= neighbours:
        raise ValueError(f"expected more than {neighbours} images for precision and recall, got {len(features)}")
    nearest = features.new_full((len(features), neighbours), torch.inf)
    norms = features.square().sum(dim=1)
    blocks = _blocks(features, DISTANCE_ROWS)

    def take(rows, distances):
        joined = torch.cat([nearest[rows], distances], dim=1)
        nearest[rows] = joined.topk(neighbours, dim=1, largest=False).values     # ascending

    for number, rows in enumerate(blocks):
        for others in blocks[number:]:                                           # the other half by symmetry
            distances = _squared_distances(features[rows], norms[rows], features[others], norms[others])
            if others is rows:
                distances.fill_diagonal_(torch.inf)
            else:
                take(others, distances.T)
            take(rows, distances)
        advance(len(features[rows]))
    return nearest[:, -1]


def precision_recall(reference: Tensor, samples: Tensor, neighbours: int = NEIGHBOURS,
                     advance: Callable[[int], None] = lambda count: None) -> tuple[float, float]:
    """Computes the share of samples inside the reference's manifold, and of references inside the samples'.

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
    norms, sample_norms = reference.square().sum(dim=1), samples.square().sum(dim=1)
    is_covered = reference.new_zeros(len(reference), dtype=torch.bool)
    is_real = samples.new_zeros(len(samples), dtype=torch.bool)
    for rows in _blocks(reference, DISTANCE_ROWS):
        for others in _blocks(samples, DISTANCE_ROWS):
            distances = _squared_distances(reference[rows], norms[rows], samples[others], sample_norms[others])
            is_real[others] |= (distances <= reference_radii[rows, None]).any(dim=0)
            is_covered[rows] |= (distances <= sample_radii[None, others]).any(dim=1)
        advance(len(reference[rows]))
    return is_real.double().mean().item(), is_covered.double().mean().item()


def _blocks(array, size):
    return [slice(start, start + size) for start in range(0, len(array), size)]


def _squared_distances(rows, row_norms, columns, column_norms):
    products = torch.addmm(column_norms[None, :], rows, columns.T, alpha=-2)
    return products.add_(row_norms[:, None]).clamp_(min=0)                       # rounding may go below zero


def check_finite(array: np.ndarray) -> None:
    """Raises ValueError when an array holds NaN or infinity."""
    if not np.isfinite(array).all():
        raise ValueError(f"expected finite numbers, found {int((~np.isfinite(array)).sum())} NaN or infinite ones")
