"""The one interface behind which the networks lie that turn pictures into features."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from evaluations.c2i.npz_reader import NpzImages

SPATIAL_CHANNELS = 7            # of the spatial features, the first ones
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}      # mean and covariance in a reference's npz


class FeatureNetwork(Protocol):
    """What the metrics need of a network.

    Attributes:
        name: what every result calls it, so that numbers of different networks are never compared by mistake.
        sha256: hash of its weights.
        image_size: side in pixels of the pictures that it takes, or None if any.
        settings: class_names, None where its classes are not those of labels; accuracy of a classifier.
    """

    name: str
    sha256: str
    image_size: int | None
    settings: dict[str, Any]

    def features(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Computes the features of a batch.

        Args:
            images: (N, P, P, 3) uint8 numpy array.

        Returns:
            pool (N, F), spatial (N, G) and class probabilities (N, C): float32 numpy arrays.
        """


def to_numpy(*tensors: Tensor) -> tuple[np.ndarray, ...]:
    """Returns tensors (N, any) as float32 arrays of the CPU; several are one copy, so one wait for the device."""
    widths = [tensor.shape[1] for tensor in tensors]
    joined = torch.cat([tensor.float() for tensor in tensors], dim=1).cpu()         # (N, all widths)
    return tuple(part.contiguous().numpy() for part in joined.split(widths, dim=1))


@dataclass(frozen=True)
class Features:
    """Features of N pictures: pool (N, F), spatial (N, G), probabilities (N, C), float32."""

    pool: np.ndarray
    spatial: np.ndarray
    probabilities: np.ndarray


def extract_features(network: FeatureNetwork, images: NpzImages, batch_size: int,
                     advance: Callable[[int], None]) -> Features:
    """Computes the features of all pictures of a file, of which no more than a batch is in memory.

    Args:
        network: FeatureNetwork.
        images: NpzImages.
        batch_size: pictures at once.
        advance: called with the number of pictures done, for a progress bar.

    Raises:
        ValueError: a feature is not finite, or the file is damaged.
    """
    parts = []
    for batch in images.batches(batch_size):
        arrays = network.features(batch)
        if not all(np.isfinite(array).all() for array in arrays):
            raise ValueError(f"{images.path}: expected finite features, found NaN or infinity from {network.name}; "
                             "its weights are damaged or its precision is too low")
        parts.append(arrays)
        advance(len(batch))
    return Features(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
