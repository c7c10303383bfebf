"""Pictures of a data set, read and cut by workers: random crops for training a tokenizer, centre crops for the rest.

Which row comes when, and how it is cut, follows from the seed alone. Letters: B pictures, P pixels of a crop.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch.utils.data import DataLoader, Dataset

from autoregressive.runtime.distributed import keyed_random
from autoregressive.runtime.loader import BatchOrder, read_ahead
from tokenizer.tokenizer_image.images import ImageSet, center_crop, random_crop


@dataclass(frozen=True)
class TrainingCrops(Dataset):
    """Random crops of a set of pictures; the crop of a row is a function of (seed, epoch, row).

    Attributes:
        dataset: the pictures.
        order: BatchOrder of them, whose seed is the run's.
        image_size: side of a crop in pixels.
        smallest_share: least share of the shorter side that a crop shows; 1 shows all of it.
        flip: whether half of the crops are mirrored.
        per_epoch: batches of an epoch.
    """

    dataset: ImageSet
    order: BatchOrder
    image_size: int
    smallest_share: float
    flip: bool

    @property
    def per_epoch(self) -> int:
        return self.order.per_epoch

    def rows(self, step: int) -> np.ndarray:
        """Returns the rows (batch_size,) in the batch of a step, from 0."""
        return self.order.rows(step)[1]

    def __getitem__(self, key: tuple[int, range]) -> np.ndarray:
        """Returns a part of the batch of a step, (B, P, P, 3) uint8.

        Args:
            key: number of the step, from 0, and range of places in the batch.

        Raises:
            ValueError: a file is broken.
        """
        epoch, rows = self.order.rows(*key)
        return np.stack([self.crop(epoch, row) for row in rows.tolist()])

    def crop(self, epoch: int, row: int) -> np.ndarray:
        """Returns the crop (P, P, 3) uint8 of a row in an epoch."""
        random = keyed_random(self.order.seed, epoch, 1 + row)
        crop = random_crop(self.dataset.read(row), self.image_size, random, self.smallest_share)
        return crop[:, ::-1] if self.flip and random.random() < 0.5 else crop


@dataclass(frozen=True)
class CropBatch:
    """Centre crops of consecutive rows of a data set.

    Attributes:
        rows: range of the rows.
        pictures: (len(rows), P, P, 3) uint8 numpy; zeros where a file is broken.
        failures: dict of row -> (path, reason) of the broken ones.
    """

    rows: range
    pictures: np.ndarray
    failures: dict[int, tuple[str, str]]

    def whole(self) -> np.ndarray:
        """Returns the pictures. Raises ValueError if a file was broken."""
        for _, reason in self.failures.values():
            raise ValueError(reason)
        return self.pictures


@dataclass(frozen=True)
class CenterCrops(Dataset):
    """ADM's centre crops, of `image_size` pixels, of ranges of rows; a broken file costs its own row only."""

    dataset: ImageSet
    image_size: int

    def __getitem__(self, rows: range) -> CropBatch:
        pictures = np.zeros((len(rows), self.image_size, self.image_size, 3), np.uint8)
        failures = {}
        for place, row in enumerate(rows):
            try:
                pictures[place] = center_crop(self.dataset.read(row), self.image_size)
            except (OSError, ValueError) as error:
                failures[row] = (self.dataset.name_of(row), str(error) or type(error).__name__)
        return CropBatch(rows, pictures, failures)


def load_crops(dataset: ImageSet, image_size: int, row_ranges: Iterable[range], num_workers: int) -> DataLoader:
    """Returns a loader of one CropBatch for every range, in order; see runtime.loader.read_ahead.

    Args:
        dataset: the pictures.
        image_size: side of the centre crops in pixels.
        row_ranges: ranges of rows.
        num_workers: processes that read and cut, as given by the user.
    """
    return read_ahead(CenterCrops(dataset, image_size), row_ranges, num_workers)
