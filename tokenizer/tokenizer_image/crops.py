"""Pictures of a data set, read and cut by workers: random crops for training a tokenizer, centre crops for the rest.

Which row comes when, and how it is cut, follows from the seed alone.
"""

from dataclasses import dataclass

import numpy as np
from torch.utils.data import DataLoader, Dataset

from autoregressive.runtime.distributed import cores_per_process, keyed_random
from tokenizer.tokenizer_image.images import center_crop, random_crop


class TrainingCrops(Dataset):
    """Random crops of a set of pictures; the crop of a key (epoch, row) is a function of (seed, epoch, row).

    Args:
        images: what open_images returned.
        image_size: side of a crop in pixels.
        seed: the run's seed.
        smallest_share: least share of the shorter side that a crop shows; 1 shows all of it.
        flip: whether half of the crops are mirrored.
    """

    def __init__(self, images, image_size, seed, smallest_share, flip):
        self.images, self.image_size, self.seed = images, image_size, seed
        self.smallest_share, self.flip = smallest_share, flip

    def __getitem__(self, key):
        """Returns (image_size, image_size, 3) uint8. Raises ValueError if the file is broken."""
        epoch, row = key
        random = keyed_random(self.seed, epoch, 1 + row)
        crop = random_crop(self.images.read(row), self.image_size, random, self.smallest_share)
        return crop[:, ::-1].copy() if self.flip and random.random() < 0.5 else crop


class CenterCrops(Dataset):
    """ADM's centre crops of a set of pictures, (image_size, image_size, 3) uint8."""

    def __init__(self, images, image_size):
        self.images, self.image_size = images, image_size

    def __getitem__(self, row):
        return center_crop(self.images.read(row), self.image_size)


def plan_updates(num_images, batch_size, seed, updates, part):
    """Yields the keys (epoch, row) of one process's part of the batch of each update.

    An epoch visits every image once, in an order of its own; the last incomplete batch is dropped.

    Args:
        num_images: images of the set, at least a batch.
        batch_size: images of an update, over all processes.
        seed: the run's seed.
        updates: range of update numbers; epochs follow one another.
        part: range of places in the batch, of 0 .. batch_size - 1.
    """
    per_epoch, shuffled = num_images // batch_size, None
    for update in updates:
        epoch, index = divmod(update, per_epoch)
        if epoch != shuffled:
            order, shuffled = keyed_random(seed, epoch, 0).permutation(num_images), epoch
        yield [(epoch, int(row)) for row in order[index * batch_size:][part.start:part.stop]]


class UpdatePlan:
    """Which rows are in the batch of which update, for a log that names them."""

    def __init__(self, num_images, batch_size, seed):
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.per_epoch = num_images // batch_size

    def rows(self, update):
        """Returns the rows (batch_size,) int64 of an update."""
        keys, = plan_updates(self.num_images, self.batch_size, self.seed, range(update, update + 1),
                             range(self.batch_size))
        return np.array([row for _, row in keys])


def load_crops(crops, batches, num_workers):
    """Returns a loader of (B, P, P, 3) uint8 tensors: the crops of each list of keys in `batches`.

    `num_workers` processes read and cut, as given by the user; no more are started than there are cores.
    """
    return DataLoader(crops, batch_sampler=batches, num_workers=min(num_workers, cores_per_process()))


@dataclass(frozen=True)
class RowBatch:
    """Centre crops of consecutive rows of a data set.

    Attributes:
        rows: range of the rows.
        pictures: (len(rows), P, P, 3) uint8 numpy; zeros where a file is broken.
        failures: dict of row -> (path, reason) of the broken ones.
    """

    rows: range
    pictures: np.ndarray
    failures: dict


class RowBatches(Dataset):
    """ADM's centre crops of ranges of rows; a broken file costs its own row only."""

    def __init__(self, images, image_size, row_ranges):
        self.images, self.image_size, self.row_ranges = images, image_size, row_ranges

    def __len__(self):
        return len(self.row_ranges)

    def __getitem__(self, index):
        rows = self.row_ranges[index]
        pictures = np.zeros((len(rows), self.image_size, self.image_size, 3), np.uint8)
        failures = {}
        for place, row in enumerate(rows):
            try:
                pictures[place] = center_crop(self.images.read(row), self.image_size)
            except (OSError, ValueError) as error:
                failures[row] = (self.images.name_of(row), str(error) or type(error).__name__)
        return RowBatch(rows, pictures, failures)


def load_rows(images, image_size, row_ranges, num_workers):
    """Returns a loader of one RowBatch for every range, in order.

    Args:
        images: what open_images returned.
        image_size: side of the centre crops in pixels.
        row_ranges: list of ranges of rows.
        num_workers: processes that read and cut, as given by the user; no more are started than there are cores.
    """
    # batch_size None: a worker makes a whole RowBatch, which travels through a pipe and needs no /dev/shm.
    return DataLoader(RowBatches(images, image_size, row_ranges), batch_size=None,
                      num_workers=min(num_workers, len(row_ranges), cores_per_process()))
