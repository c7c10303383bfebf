"""Batches for training: which image, which crop and which labels are dropped follows from (seed, epoch, row) alone.

Letters: N images, B batch, T tokens.
"""

import numpy as np
import torch

from autoregressive.runtime.distributed import keyed_random

ORDER, CROP, LABEL_DROPOUT = range(3)               # streams of random numbers of one epoch


class TokenBatches:
    """Turns a code store and a mapping into batches of tokens and labels.

    An epoch visits every image once, in an order of its own, and draws one of its stored crops uniformly; the last
    incomplete batch is dropped. Labels become the null label with probability `label_dropout`.
    """

    def __init__(self, store, mapping, batch_size, seed, num_classes, label_dropout):
        """
        Args:
            store: CodeStore.
            mapping: (V,) int64, code -> token.
            batch_size: images of an update, over all processes.
            seed: the run's seed.
            num_classes: the null label.
            label_dropout: probability of dropping a label; 0 in evaluation.

        Raises:
            ValueError: the store has fewer images than a batch, or codes or labels out of range.
        """
        if len(store.rows) < batch_size:
            raise ValueError(f"{store.path}: expected at least one batch of {batch_size} images, found "
                             f"{len(store.rows)}; lower --global-batch-size")
        if store.labels.max() >= num_classes or store.labels.min() < 0:
            raise ValueError(f"{store.path}: expected labels 0 .. {num_classes - 1}, found "
                             f"{store.labels.min()} .. {store.labels.max()}; give --num-classes")
        self.store, self.mapping, self.batch_size = store, mapping, batch_size
        self.seed, self.num_classes, self.label_dropout = seed, num_classes, label_dropout
        self.per_epoch = len(store.rows) // batch_size
        self._epoch = None

    def _plan(self, epoch):
        if self._epoch != epoch:
            count = len(self.store.rows)
            self._order = keyed_random(self.seed, epoch, ORDER).permutation(count)
            self._crops = keyed_random(self.seed, epoch, CROP).integers(self.store.codes.shape[1], size=count)
            self._drops = keyed_random(self.seed, epoch, LABEL_DROPOUT).random(count) < self.label_dropout
            self._epoch = epoch

    def batch(self, update, part):
        """Returns a part of the batch of an update.

        Args:
            update: number of the update, from 0; epochs follow one another.
            part: range of places in the batch, of 0 .. batch_size - 1.

        Returns:
            tokens (B, T) int64 and labels (B,) int64 tensors on the CPU.
        """
        epoch, index = divmod(update, self.per_epoch)
        self._plan(epoch)
        chosen = self._order[index * self.batch_size:][part.start:part.stop]
        rows = self.store.rows[chosen]
        codes = self.store.codes[rows, self._crops[chosen]]                         # (B, T)
        labels = np.where(self._drops[chosen], self.num_classes, self.store.labels[rows])
        return torch.from_numpy(self.mapping[codes]), torch.from_numpy(labels)
