"""Crops for training and judging a tokenizer: which row comes when, and how it is cut, follows from the seed alone."""

from torch.utils.data import DataLoader, Dataset

from autoregressive.runtime.distributed import keyed_random
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


def load_crops(crops, batches, num_workers):
    """Returns a loader of (B, P, P, 3) uint8 tensors: the crops of each list of keys in `batches`."""
    return DataLoader(crops, batch_sampler=batches, num_workers=num_workers)
