"""Batches for training, each a pure function of the seed and the number of its step.

Which images are in it follows from the seed and the epoch, which of their crops is taken and which
labels are dropped from (seed, epoch, row).

Letters: N images, B batch, T tokens.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from autoregressive.data.codes import CodeStore
from autoregressive.runtime.distributed import keyed_random
from autoregressive.runtime.loader import BatchOrder

# Streams of random numbers of one epoch, beside the order of its rows.
CROP = 1
LABEL_DROPOUT = 2
VAL = 3
BETA = 4


def split_store(store: CodeStore, fraction: float, seed: int) -> tuple[CodeStore, CodeStore]:
    """Divides the images of a store at random, always in the same way.

    Args:
        store: CodeStore.
        fraction: of the images to validate with, 0 to below 1; above 0, at least one.
        seed: the run's seed.

    Returns:
        the store without these images, and the store of them alone.
    """
    count = max(1, round(fraction * len(store.rows))) if fraction else 0
    order = keyed_random(seed, 0, VAL).permutation(store.rows)
    training = dataclasses.replace(store, rows=np.sort(order[count:]))
    val = dataclasses.replace(store, rows=np.sort(order[:count]))
    return training, val


@dataclasses.dataclass(eq=False)
class TokenBatches(Dataset):
    """Turns a code store and a mapping into batches of tokens and labels.

    An epoch visits every image once, in an order of its own, and draws one of its stored crops: of
    several stores combined first the store, then the crop. The last incomplete batch is dropped.
    Labels become the null label with probability `label_dropout`. For guidance-free training every
    image has a number beta of its own in each epoch, uniform in [0, 1).

    Attributes:
        store: CodeStore.
        mapping: (V,) int64, code -> token.
        batch_size: images of a step, over all processes.
        seed: the run's seed.
        num_classes: the null label.
        label_dropout: probability of dropping a label; 0 in validation.
        draws_betas: whether batches hold betas.
        order: BatchOrder of the images that did not fail.
        per_epoch: batches of an epoch.
    """

    store: CodeStore
    mapping: np.ndarray
    batch_size: int
    seed: int
    num_classes: int
    label_dropout: float
    draws_betas: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError if the store has fewer images than a batch, or labels out of range."""
        store = self.store
        if len(store.rows) < self.batch_size:
            raise ValueError(f"{store.path}: expected at least one batch of {self.batch_size} "
                             f"images, found {len(store.rows)}; lower --global-batch-size")
        if store.labels.max() >= self.num_classes or store.labels.min() < 0:
            raise ValueError(f"{store.path}: expected labels 0 .. {self.num_classes - 1}, found "
                             f"{store.labels.min()} .. {store.labels.max()}; give --num-classes")
        self.order = BatchOrder(len(store.rows), self.batch_size, self.seed)
        self.per_epoch = self.order.per_epoch
        self._epoch = -1                # of the crops and drops that are drawn

    def rows(self, step: int) -> np.ndarray:
        """Returns the rows (batch_size,) of the store in the batch of a step, from 0."""
        _, chosen = self.order.rows(step)
        return self.store.rows[chosen]

    def __getitem__(self, key: tuple[int, range]) -> tuple[Tensor, ...]:
        """Returns a part of the batch of a step.

        Args:
            key: number of the step, from 0, and range of places in the batch, of
                0 .. batch_size - 1.

        Returns:
            tokens (B, T) int64 and labels (B,) int64 tensors on the CPU; betas (B,) float32, too,
            if they are drawn.

        Raises:
            ValueError: a code is out of range.
        """
        step, part = key
        epoch, chosen = self.order.rows(step, part)
        if epoch != self._epoch:
            self._draw_epoch(epoch)
        rows = self.store.rows[chosen]
        codes = self.store.codes[rows, self._crops[chosen]]                         # (B, T)
        if codes.max() >= len(self.mapping) or codes.min() < 0:
            raise ValueError(f"{self.store.path}: expected codes 0 .. {len(self.mapping) - 1}, "
                             f"found {codes.min()} .. {codes.max()} in rows {rows.tolist()}; look "
                             "at it with scripts/autoregressive/check_codes.sh")
        labels = np.where(self._drops[chosen], self.num_classes, self.store.labels[rows])
        batch = torch.from_numpy(self.mapping[codes]), torch.from_numpy(labels)
        return (*batch, torch.from_numpy(self._betas[chosen])) if self.draws_betas else batch

    def _draw_epoch(self, epoch: int) -> None:
        """Draws a crop of every image of an epoch, whether its label is dropped, and its beta."""
        count = len(self.store.rows)
        crops = self.store.crops_to_draw
        places = keyed_random(self.seed, epoch, CROP).integers(len(crops), size=count)
        self._crops = crops[places]
        uniforms = keyed_random(self.seed, epoch, LABEL_DROPOUT).random(count)
        self._drops = uniforms < self.label_dropout
        self._betas = keyed_random(self.seed, epoch, BETA).random(count, dtype=np.float32)
        self._epoch = epoch
