"""The numbers that an evaluation asks for, from the features of two files.

Letters: F features of a space, pool or spatial.
"""

from dataclasses import dataclass

import numpy as np
import torch

from autoregressive.runtime.distributed import Session
from autoregressive.runtime.log import progress
from evaluations.c2i.covariance import check_covariance
from evaluations.c2i.features import STATISTICS, FeatureNetwork, Features, extract_features
from evaluations.c2i.metrics import (
    Gaussian,
    check_finite,
    feature_statistics,
    frechet_distance,
    inception_score,
    precision_recall,
)
from evaluations.c2i.npz_reader import NpzImages

TITLES = {"is": "Inception Score", "fid": "FID", "sfid": "sFID", "precision": "Precision",
          "recall": "Recall"}
SPACES = {"fid": "pool", "sfid": "spatial"}     # the features whose Gaussians are compared
MANIFOLDS = {"precision", "recall"}


@dataclass(frozen=True)
class Scores:
    """What an evaluation found.

    Attributes:
        numbers: by title, in the order of ADM.
        warnings: one for every covariance of fewer pictures than dimensions.
    """

    numbers: dict[str, float]
    warnings: list[str]


def read_statistics(reference: NpzImages, network: FeatureNetwork,
                    metrics: set[str]) -> dict[str, Gaussian]:
    """Returns the ready statistics of a reference that `metrics` need, by metric.

    Raises:
        ValueError: they are of another network, or no mean and covariance.
    """
    pool, spatial, _ = network.features(np.zeros((1, *reference.shape[1:]), np.uint8))
    sizes = {"fid": pool.shape[1], "sfid": spatial.shape[1]}
    statistics = {}
    for metric, size in sizes.items():
        if metric not in metrics:
            continue
        gaussian = _read_gaussian(reference, network, STATISTICS[SPACES[metric]], size)
        if gaussian is not None:
            statistics[metric] = gaussian
    return statistics


def _read_gaussian(reference: NpzImages, network: FeatureNetwork, names: tuple[str, str],
                   size: int) -> Gaussian | None:
    """Returns the mean (F,) and covariance (F, F) under two names; None if there is neither.

    Args:
        reference: the file.
        network: whose features they must be of.
        names: of the two arrays.
        size: F.

    Raises:
        ValueError: they are no such statistics.
    """
    arrays = [reference.array(name) for name in names]
    if all(array is None for array in arrays):
        return None
    both = " and ".join(names)
    if any(array is not None and array.dtype.kind not in "fiu" for array in arrays):
        raise ValueError(f"{reference.path}: expected numbers under {both}, found another type; "
                         "make the reference again")
    shapes = [getattr(array, "shape", None) for array in arrays]
    owner = reference.settings.get("feature_network_sha256", network.sha256)
    if shapes != [(size,), (size, size)] or owner != network.sha256:
        raise ValueError(f"{reference.path}: expected {both} of {network.name} with {size} "
                         f"features, found shapes {shapes[0]} and {shapes[1]}, or another "
                         "network's statistics; make the reference again with this network")
    mean, covariance = arrays
    try:
        check_finite(mean)
        check_finite(covariance)
        check_covariance(covariance)
    except ValueError as error:
        raise ValueError(f"{reference.path}: {both}: {error}; make the reference again") from error
    return Gaussian(mean, covariance)


def needs_reference_features(metrics: set[str], stored: dict[str, Gaussian]) -> bool:
    """Returns whether `metrics` need more of the reference than its `stored` statistics."""
    compares_manifolds = bool(metrics & MANIFOLDS)
    lacks_statistics = any(metric in metrics and metric not in stored for metric in SPACES)
    return compares_manifolds or lacks_statistics


def extract_file_features(network: FeatureNetwork, images: NpzImages, batch_size: int,
                          session: Session) -> Features:
    """Returns the Features of a file, with a progress bar."""
    with progress(session, len(images), images.path.name, "image") as bar:
        return extract_features(network, images, batch_size, bar.update)


def compute_scores(metrics: set[str], samples: Features, reference: Features | None,
                   stored: dict[str, Gaussian], session: Session) -> Scores:
    """Computes the numbers of `metrics`.

    Args:
        metrics: keys of TITLES.
        samples: features of the samples.
        reference: those of the reference; None where needs_reference_features says no.
        stored: what read_statistics returned.
        session: whose device computes distances.

    Raises:
        ValueError: statistics do not belong together, or features are too few.
    """
    numbers = {}
    warnings = []
    if "is" in metrics:
        numbers["is"] = inception_score(samples.probabilities)
    for metric in sorted(metrics & SPACES.keys()):
        space = SPACES[metric]
        sample_gaussian = _gaussian_of(getattr(samples, space), "sample", metric, warnings)
        if metric in stored:
            gaussian = stored[metric]
        else:
            gaussian = _gaussian_of(getattr(reference, space), "reference", metric, warnings)
        try:
            numbers[metric] = frechet_distance(
                mu1=gaussian.mean, sigma1=gaussian.covariance, factor1=gaussian.factor,
                mu2=sample_gaussian.mean, sigma2=sample_gaussian.covariance,
                factor2=sample_gaussian.factor)
        except ValueError as error:
            raise ValueError(f"{TITLES[metric]}: {error}") from error
    if MANIFOLDS & metrics:
        reference_pool = torch.from_numpy(reference.pool).to(session.device)
        sample_pool = torch.from_numpy(samples.pool).to(session.device)
        num_rows = 2 * len(reference_pool) + len(sample_pool)
        with progress(session, num_rows, "precision and recall", "row") as bar:
            numbers["precision"], numbers["recall"] = precision_recall(
                reference_pool, sample_pool, advance=bar.update)
    by_title = {title: numbers[name] for name, title in TITLES.items() if name in metrics}
    return Scores(by_title, warnings)


def _gaussian_of(features: np.ndarray, kind: str, metric: str, warnings: list[str]) -> Gaussian:
    """Returns the Gaussian of features (N, F); adds a warning if N is less than F."""
    count, size = features.shape
    if count < size:
        warnings.append(f"{TITLES[metric]} is biased upwards: {count} {kind} pictures for {size} "
                        "features; compare it with results of equal numbers only")
    return feature_statistics(features)
