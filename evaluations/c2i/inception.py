"""The one interface behind which the networks lie that turn pictures into features."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np


class FeatureNetwork(Protocol):
    """What the metrics need of a network.

    Attributes:
        name: what every result calls it, so that numbers of different networks are never compared by mistake.
        sha256: hash of its weights.
        image_size: side in pixels of the pictures that it takes, or None if any.
    """

    name: str
    sha256: str
    image_size: int | None

    def features(self, images):
        """Computes the features of a batch.

        Args:
            images: (N, P, P, 3) uint8 numpy array.

        Returns:
            pool (N, F), spatial (N, G) and class probabilities (N, C): float32 numpy arrays.
        """


@dataclass(frozen=True)
class Features:
    """Features of N pictures: pool (N, F), spatial (N, G), probabilities (N, C), float32."""

    pool: np.ndarray
    spatial: np.ndarray
    probabilities: np.ndarray


def extract_features(network, images, batch_size, advance):
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


def require_image_size(network, images):
    """Raises ValueError unless the pictures of a file have the size that the network takes."""
    size = network.image_size
    if size is not None and images.shape[1:3] != (size, size):
        raise ValueError(f"{images.path}: expected pictures of {size} x {size} pixels for {network.name}, "
                         f"found {images.shape[1]} x {images.shape[2]}")
