"""Pictures of a data set, read and cut by workers: random crops for training, else centre crops.

Which row comes when, and how it is cut, follows from the seed alone. Letters: N pictures of a set,
B pictures, P pixels of a crop.
"""

from collections.abc import Container, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from autoregressive.runtime.distributed import keyed_random
from autoregressive.runtime.entry import Parser, at_least
from autoregressive.runtime.loader import BatchOrder, read_ahead
from tokenizer.tokenizer_image.images import ImageSet, center_crop, random_crop

LARGEST_CROP_RANGE = 4


def add_crop_range_arg(parser: Parser) -> None:
    """Declares how much larger than a crop is what ten crops are cut from."""
    parser.add_argument("--crop-range", type=at_least(1.0), default=1.1,
                        help="how much ten crops enlarge the picture that they are cut from")


def check_crop_range(crop_range: float) -> None:
    """Raises ValueError if ten crops would be cut from a far larger picture."""
    if crop_range > LARGEST_CROP_RANGE:
        raise ValueError(f"--crop-range: expected 1 to {LARGEST_CROP_RANGE}, got {crop_range}")


@dataclass(frozen=True)
class TrainingCrops(Dataset):
    """Random crops of a set of pictures; the crop of a row is a function of (seed, epoch, row).

    In place of a broken picture comes the next one that is whole.

    Attributes:
        dataset: the pictures.
        order: BatchOrder of them, whose seed is the run's.
        image_size: side of a crop in pixels.
        smallest_fraction: least fraction of the shorter side that a crop shows; 1 shows all of it.
        flip: whether half of the crops are mirrored.
        max_failures: fraction of the pictures that may be broken.
        is_broken: (N,) bool, shared by all workers: what was found to be broken.
    """

    dataset: ImageSet
    order: BatchOrder
    image_size: int
    smallest_fraction: float
    flip: bool
    max_failures: float = 0.0
    is_broken: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Makes the memory that all workers share."""
        is_broken = torch.zeros(len(self.dataset), dtype=torch.bool).share_memory_()
        object.__setattr__(self, "is_broken", is_broken)        # frozen

    @property
    def per_epoch(self) -> int:
        """Batches of an epoch."""
        return self.order.per_epoch

    def rows(self, step: int) -> np.ndarray:
        """Returns the rows (batch_size,) in the batch of a step, from 0."""
        _, rows = self.order.rows(step)
        return rows

    def __getitem__(self, key: tuple[int, range]) -> np.ndarray:
        """Returns a part of the batch of a step, (B, P, P, 3) uint8.

        Args:
            key: number of the step, from 0, and range of places in the batch.

        Raises:
            ValueError: more files are broken than may be.
        """
        step, part = key
        epoch, rows = self.order.rows(step, part)
        return np.stack([self.crop(epoch, row) for row in rows.tolist()])

    def crop(self, epoch: int, row: int) -> np.ndarray:
        """Returns the crop (P, P, 3) uint8 of a row in an epoch.

        Raises:
            ValueError: more files are broken than may be.
        """
        count = len(self.dataset)
        for place in range(row, row + count):       # from the row itself on, until one is whole
            source = place % count
            random = keyed_random(self.order.seed, epoch, 1 + row)
            try:
                picture = self.dataset.read(source)
                crop = random_crop(picture, self.image_size, random, self.smallest_fraction)
            except (OSError, ValueError) as error:
                self.is_broken[source] = True
                if self.is_broken.sum() > self.max_failures * count:
                    raise ValueError(_reason(self.dataset, source, error)) from error
                continue
            is_mirrored = self.flip and random.random() < 0.5
            return crop[:, ::-1] if is_mirrored else crop
        raise ValueError("expected images that can be read, found none")

    def failures(self, known: Container[int]) -> dict[int, tuple[str, str]]:
        """Returns what was found to be broken beyond the rows `known`: row -> (path, reason)."""
        found = {}
        for row in self.is_broken.nonzero().flatten().tolist():
            if row in known:
                continue
            again = CenterCrops(self.dataset, self.image_size)[range(row, row + 1)].failures
            name = self.dataset.name_of(row)
            found[row] = again.get(row, (name, f"{name}: could not be read once"))
        return found


def _reason(dataset: ImageSet, row: int, error: Exception) -> str:
    """Returns why a picture cannot be used, with its name, which the error itself may lack."""
    reason = str(error) or type(error).__name__
    name = dataset.name_of(row)
    return reason if name in reason else f"{name}: {reason}"


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
        """Returns the pictures (n, P, P, 3) uint8 that are not broken."""
        return self.pictures[[row not in self.failures for row in self.rows]]


@dataclass(frozen=True)
class CenterCrops(Dataset):
    """ADM's centre crops of ranges of rows; a broken file affects its own row only.

    Attributes:
        dataset: the pictures.
        image_size: side of a crop in pixels.
    """

    dataset: ImageSet
    image_size: int

    def __getitem__(self, rows: range) -> CropBatch:
        """Returns the crops of a range of rows."""
        pictures = np.zeros((len(rows), self.image_size, self.image_size, 3), np.uint8)
        failures = {}
        for place, row in enumerate(rows):
            try:
                pictures[place] = center_crop(self.dataset.read(row), self.image_size)
            except (OSError, ValueError) as error:
                failures[row] = (self.dataset.name_of(row), _reason(self.dataset, row, error))
        return CropBatch(rows, pictures, failures)


def load_crops(dataset: ImageSet, image_size: int, row_ranges: Iterable[range],
               num_workers: int) -> DataLoader:
    """Returns a loader of one CropBatch for every range, in order; see runtime.loader.read_ahead.

    Args:
        dataset: the pictures.
        image_size: side of the centre crops in pixels.
        row_ranges: ranges of rows.
        num_workers: processes that read and cut, as given by the user.
    """
    return read_ahead(CenterCrops(dataset, image_size), row_ranges, num_workers)
