"""A small classifier as a feature network, for data sets on which Inception says nothing.

Letters: N images, P pixels, C classes, F features.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from autoregressive.runtime.checkpoint import (
    load_strictly,
    model_state,
    read_checkpoint,
    save_checkpoint,
)
from autoregressive.runtime.compute import to_device
from autoregressive.runtime.files import check_kinds, weights_sha256
from evaluations.c2i.features import SPATIAL_CHANNELS, Features, to_numpy

SMALLEST_IMAGE = 8      # pixels
DEFAULT_WIDTH = 32      # channels of the first convolution
SETTINGS = {"class_names": list, "image_size": int, "accuracy": (float, int), "num_val": int,
            "dataset": str, "seed": int}


class Maps(NamedTuple):
    """What a SmallClassifier computes: pool (N, F), middle (N, F, P/4, P/4) and logits (N, C)."""

    pool: Tensor
    middle: Tensor
    logits: Tensor


class SmallClassifier(nn.Module):
    """Five convolutions, a global average pool and a linear layer; F = 2 width."""

    def __init__(self, num_classes: int, width: int = DEFAULT_WIDTH) -> None:
        super().__init__()
        self.lower = nn.Sequential(
            _unit(3, width), _unit(width, width, stride=2),
            _unit(width, 2 * width), _unit(2 * width, 2 * width, stride=2))
        self.upper = _unit(2 * width, 2 * width)
        self.output = nn.Linear(2 * width, num_classes)

    def maps(self, pictures: Tensor) -> Maps:
        """Returns features and logits of pictures (N, P, P, 3) uint8."""
        images = (pictures.permute(0, 3, 1, 2).float() - 128) / 128             # (N, 3, P, P)
        middle = self.lower(images)                                             # (N, F, P/4, P/4)
        pool = self.upper(middle).mean(dim=(2, 3))                              # (N, F)
        return Maps(pool, middle, self.output(pool))

    def forward(self, pictures: Tensor) -> Tensor:
        """Returns logits (N, C) of pictures (N, P, P, 3) uint8."""
        return self.maps(pictures).logits


def _unit(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """Returns a 3x3 convolution, its batch norm and a ReLU."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
                         nn.BatchNorm2d(out_channels), nn.ReLU())


class ClassifierFeatures:
    """A file of save_classifier as a features.FeatureNetwork.

    Attributes:
        settings: class_names, image_size, accuracy and num_val (in validation), dataset, seed.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        """Reads a classifier.

        Args:
            path: the file.
            device: where to compute.

        Raises:
            ValueError: the file is missing, damaged or something else.
        """
        payload = read_checkpoint(path)
        settings = payload.get("settings") if isinstance(payload, dict) else None
        missing = [name for name in SETTINGS
                   if not isinstance(settings, dict) or name not in settings]
        if missing:
            raise ValueError(f"{path}: expected a classifier made by train_classifier.py, found a "
                             f"file that lacks {', '.join(missing)}; name another one, or train "
                             "it")
        check_kinds({"width": DEFAULT_WIDTH} | settings, SETTINGS | {"width": int}, path)
        if not settings["class_names"] or settings["image_size"] < SMALLEST_IMAGE:
            raise ValueError(f"{path}: expected class_names and image_size of at least "
                             f"{SMALLEST_IMAGE}, found {len(settings['class_names'])} classes and "
                             f"{settings['image_size']}; make the file again")
        model = SmallClassifier(len(settings["class_names"]), settings.get("width", DEFAULT_WIDTH))
        load_strictly(model, model_state(payload, path), path)
        self.name = f"small classifier {Path(path).name} (not Inception)"
        self.sha256 = weights_sha256(model.state_dict())
        self.settings = settings
        self.image_size = settings["image_size"]
        self.class_names = settings["class_names"]
        self.accuracy = settings["accuracy"]
        self._model = model.to(device).eval()
        self._device = torch.device(device)

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> Features:
        """Returns the features of pictures (N, P, P, 3) uint8; spatial is (N, P/4 * P/4 * 7)."""
        maps = self._model.maps(to_device(images, self._device))
        spatial = maps.middle[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Features(*to_numpy(maps.pool, spatial, maps.logits.softmax(dim=1)))


def save_classifier(path: str | Path, model: SmallClassifier, settings: dict[str, Any]) -> None:
    """Saves a classifier with its SETTINGS. Raises ValueError if its training diverged."""
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: expected finite weights, found NaN or infinity in {name}: "
                             "the training diverged; choose a smaller --lr")
    save_checkpoint(path, {"model": model.state_dict(), "settings": settings})
