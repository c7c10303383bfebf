"""The interface of the networks that turn pictures into features.

Letters: N pictures, P pixels, F pool features, G spatial features, C classes.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from evaluations.c2i.npz_reader import NpzImages

SPATIAL_CHANNELS = 7            # of the spatial features, the first ones
# Names of the mean and the covariance in the npz of a reference.
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


class Features(NamedTuple):
    """What a network computes from N pictures, all float32.

    Attributes:
        pool: (N, F), for FID, precision and recall.
        spatial: (N, G), for sFID.
        probabilities: (N, C) of the classes, for the Inception score.
    """

    pool: np.ndarray
    spatial: np.ndarray
    probabilities: np.ndarray


class FeatureNetwork(Protocol):
    """What the metrics and the evaluator need of a network.

    Attributes:
        name: what every result calls it, so that numbers of different networks are never compared
            by mistake.
        sha256: hash of its weights.
        image_size: side in pixels of the pictures that it takes, or None if any.
        class_names: names of its classes, or None where they are not those of the labels.
        accuracy: fraction of the validation pictures whose label it gives, or None if unknown.
    """

    name: str
    sha256: str
    image_size: int | None
    class_names: list[str] | None
    accuracy: float | None

    def features(self, images: np.ndarray) -> Features:
        """Returns the features of a batch (N, P, P, 3) uint8."""


def to_numpy(*tensors: Tensor) -> tuple[np.ndarray, ...]:
    """Returns tensors (N, any) as float32 arrays of the CPU.

    They are copied together, so that the host waits for the device once.
    """
    widths = [tensor.shape[1] for tensor in tensors]
    joined = torch.cat([tensor.float() for tensor in tensors], dim=1).cpu()     # (N, all widths)
    return tuple(part.contiguous().numpy() for part in joined.split(widths, dim=1))


def extract_features(network: FeatureNetwork, images: NpzImages, batch_size: int,
                     advance: Callable[[int], None]) -> Features:
    """Computes the features of all pictures of a file, of which no more than a batch is in memory.

    Args:
        network: what computes them.
        images: the pictures.
        batch_size: pictures at once.
        advance: called with the number of pictures done, for a progress bar.

    Raises:
        ValueError: a feature is not finite, or the file is damaged.
    """
    parts = []
    for batch in images.batches(batch_size):
        part = network.features(batch)
        if not all(np.isfinite(array).all() for array in part):
            raise ValueError(f"{images.path}: expected finite features, found NaN or infinity from "
                             f"{network.name}; its weights are damaged or its precision is too low")
        parts.append(part)
        advance(len(batch))
    return Features(np.concatenate([part.pool for part in parts]),
                    np.concatenate([part.spatial for part in parts]),
                    np.concatenate([part.probabilities for part in parts]))
