"""Batches for training: which image, which crop and which labels are dropped follows from (seed, epoch, row) alone.

Letters: N images, B batch, T tokens.
"""

import collections
import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from autoregressive.runtime.distributed import keyed_random

ORDER, CROP, LABEL_DROPOUT, HELD_OUT = range(4)     # streams of random numbers of one epoch


def split_store(store, share, seed):
    """Divides the images of a store at random, always in the same way.

    Args:
        store: CodeStore.
        share: share of the images that is held out, 0 to below 1; above 0, at least one.
        seed: the run's seed.

    Returns:
        (store without the held-out images, store of them alone).
    """
    count = max(1, round(share * len(store.rows))) if share else 0
    order = keyed_random(seed, 0, HELD_OUT).permutation(store.rows)
    return (dataclasses.replace(store, rows=np.sort(order[count:])),
            dataclasses.replace(store, rows=np.sort(order[:count])))


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
        self._plan = functools.lru_cache(maxsize=2)(self._draw)     # two epochs: threads read ahead into the next

    def _draw(self, epoch):
        count = len(self.store.rows)
        return (keyed_random(self.seed, epoch, ORDER).permutation(count),
                keyed_random(self.seed, epoch, CROP).integers(self.store.codes.shape[1], size=count),
                keyed_random(self.seed, epoch, LABEL_DROPOUT).random(count) < self.label_dropout)

    def rows(self, update):
        """Returns the rows (batch_size,) of the store in the batch of an update."""
        epoch, index = divmod(update, self.per_epoch)
        return self.store.rows[self._plan(epoch)[0][index * self.batch_size:][:self.batch_size]]

    def batch(self, update, part):
        """Returns a part of the batch of an update.

        Args:
            update: number of the update, from 0; epochs follow one another.
            part: range of places in the batch, of 0 .. batch_size - 1.

        Returns:
            tokens (B, T) int64 and labels (B,) int64 tensors on the CPU.
        """
        epoch, index = divmod(update, self.per_epoch)
        order, crops, drops = self._plan(epoch)
        chosen = order[index * self.batch_size:][part.start:part.stop]
        rows = self.store.rows[chosen]
        codes = self.store.codes[rows, crops[chosen]]                               # (B, T)
        if codes.max() >= len(self.mapping) or codes.min() < 0:
            raise ValueError(f"{self.store.path}: expected codes 0 .. {len(self.mapping) - 1}, found {codes.min()} .. "
                             f"{codes.max()} in rows {rows.tolist()}; look at it with scripts/autoregressive/"
                             "check_codes.sh")
        labels = np.where(drops[chosen], self.num_classes, self.store.labels[rows])
        return torch.from_numpy(self.mapping[codes]), torch.from_numpy(labels)

    def ahead(self, updates, part, num_workers):
        """Yields the parts of the batches of a range of updates, read ahead by threads.

        Args:
            updates: range of updates.
            part: as in `batch`.
            num_workers: batches that are prepared ahead, each by a thread; 0 prepares none.
        """
        if not num_workers:
            yield from (self.batch(update, part) for update in updates)
            return
        with ThreadPoolExecutor(num_workers) as pool:
            waiting = collections.deque(pool.submit(self.batch, update, part) for update in updates[:num_workers])
            for update in range(updates.start, updates.stop):
                ready = waiting.popleft()
                if update + num_workers < updates.stop:
                    waiting.append(pool.submit(self.batch, update + num_workers, part))
                yield ready.result()
