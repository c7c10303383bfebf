"""The one interface behind which the networks lie that turn pictures into features; Inception's file and its nodes."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from autoregressive.runtime.download import download
from autoregressive.runtime.files import file_sha256

# The frozen graph of the ADM evaluator, of 2015-12-05.
INCEPTION_URL = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/classify_image_graph_def.pb"
INCEPTION_SHA256 = "009d6814d1bc560d4e7b236e170e9b2d5ca6f4b57bd8037f6db05776204415c6"
INCEPTION_BYTES = 95673916
DEFAULT_INCEPTION = "pretrained_models/classify_image_graph_def.pb"
# Its nodes that are fed and read; the second input of LOGITS is the weight (2048, 1008) behind the probabilities.
INPUT, POOL, SPATIAL, LOGITS = "ExpandDims", "pool_3", "mixed_6/conv", "softmax/logits/MatMul"
SPATIAL_CHANNELS = 7            # of the spatial features, the first ones
BACKENDS = ("tensorflow", "torch")


def open_inception(path, backend, device, show):
    """Opens the Inception network of the ADM evaluator.

    Args:
        path: the frozen graph; if it is the default and missing, it is downloaded there once.
        backend: "tensorflow" or "torch".
        device: torch device, for the torch backend.
        show: makes a progress bar of a number of bytes for the download.

    Returns:
        FeatureNetwork

    Raises:
        ValueError: the file is missing or not the graph, it cannot be downloaded, or TensorFlow is not installed.
    """
    if backend == "tensorflow" and importlib.util.find_spec("tensorflow") is None:
        raise ValueError("--backend tensorflow: expected the package tensorflow, found none; install it, or use "
                         "--backend torch, which needs none")
    if not Path(path).is_file():
        if str(path) != DEFAULT_INCEPTION:
            raise ValueError(f"{path}: expected the frozen Inception graph, found no file; leave --inception-path "
                             "out to download it")
        download(INCEPTION_URL, path, INCEPTION_SHA256, INCEPTION_BYTES, show)
    sha256 = file_sha256(path)
    if backend == "torch":
        from evaluations.c2i.inception_torch import TorchInception

        return TorchInception(path, sha256, device)
    from evaluations.c2i.inception_tensorflow import TensorFlowInception  # here: it takes seconds to import

    return TensorFlowInception(path, sha256)


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
