"""The Inception network of the ADM evaluator: where its file comes from, and what runs it."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path

import torch

from autoregressive.runtime.files import file_sha256
from evaluations.c2i.features import FeatureNetwork

# The frozen graph of the ADM evaluator, of 2015-12-05.
INCEPTION_URL = ("https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/"
                 "classify_image_graph_def.pb")
INCEPTION_SHA256 = "009d6814d1bc560d4e7b236e170e9b2d5ca6f4b57bd8037f6db05776204415c6"
DEFAULT_INCEPTION = "pretrained_models/classify_image_graph_def.pb"
# A backend, and the package by which it reads the graph.
BACKENDS = {"tensorflow": "tensorflow", "torch": "tensorboard"}
# Nodes of the graph that are fed and read.
INPUT = "ExpandDims"
POOL = "pool_3"
SPATIAL = "mixed_6/conv"
LOGITS = "softmax/logits/MatMul"    # its second input is the weight (2048, 1008)


class Inception:
    """What both backends of the FeatureNetwork share."""

    image_size: int | None = None                   # any: the graph resizes to 299 pixels
    class_names: list[str] | None = None            # its classes are not those of the labels
    accuracy: float | None = None

    def __init__(self, path: str | Path, backend: str, nodes: Iterable[str]) -> None:
        """Checks that a file is the graph of this network.

        Args:
            path: the graph.
            backend: one of BACKENDS.
            nodes: the names of its nodes.

        Raises:
            ValueError: it is not the graph of this network.
        """
        self.name = f"Inception 2015-12-05 ({backend})"
        self.sha256 = file_sha256(path)
        if missing := {INPUT, POOL, SPATIAL, LOGITS}.difference(nodes):
            raise ValueError(f"{path}: expected nodes {INPUT}, {POOL}, {SPATIAL} and {LOGITS}, "
                             f"found no {', '.join(sorted(missing))}; this is not the graph of the "
                             "ADM evaluator")


def open_inception(path: str | Path, backend: str, device: torch.device) -> FeatureNetwork:
    """Opens the Inception network of the ADM evaluator.

    Args:
        path: the frozen graph; if it is the default and missing, it is downloaded there once.
        backend: "tensorflow" or "torch".
        device: for the torch backend.

    Raises:
        ValueError: the file is missing or not the graph, it cannot be downloaded, or a package is
            missing.
    """
    if importlib.util.find_spec(BACKENDS[backend]) is None:
        raise ValueError(f"--backend {backend}: expected the package {BACKENDS[backend]}, found "
                         "none; install it, or choose another --backend")
    if not Path(path).is_file():
        if str(path) != DEFAULT_INCEPTION:
            raise ValueError(f"{path}: expected the frozen Inception graph, found no file; leave "
                             "--inception-path out to download it")
        download_inception(path)
    # Imported here: only a graph needs these, and TensorFlow takes seconds.
    from google.protobuf.message import DecodeError

    try:
        if backend == "torch":
            from evaluations.c2i.inception_torch import TorchInception

            return TorchInception(path, device)
        from evaluations.c2i.inception_tensorflow import TensorFlowInception

        return TensorFlowInception(path)
    except DecodeError as error:
        raise ValueError(f"{path}: expected a frozen TensorFlow graph, found other or damaged "
                         f"content ({error}); download it again") from error


def download_inception(path: str | Path) -> None:
    """Downloads the frozen graph to `path`, which appears when its hash is right.

    Raises:
        ValueError: it cannot be downloaded, or is another file; the message says where to put it by
            hand.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=INCEPTION_SHA256)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path}: could not be downloaded ({error}); get it from {INCEPTION_URL} "
                         f"and put it there (SHA-256 {INCEPTION_SHA256})") from error
