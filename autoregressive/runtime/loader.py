"""In which order the rows of a data set come, and how their batches are read ahead of the work."""

import atexit
import multiprocessing
import signal
import sys
from collections.abc import Iterable

import numpy as np
from torch import Generator
from torch.utils.data import DataLoader, Dataset

from autoregressive.runtime.distributed import cores_per_process, keyed_random

ORDER = 0               # stream of random numbers of an epoch: the order of its rows


class BatchOrder:
    """Which rows are in the batch of which step: an epoch visits every row once, in its own order.

    The order follows from (seed, epoch) alone; the last incomplete batch of an epoch is dropped.

    Attributes:
        num_rows: of the data set.
        batch_size: rows of a step, over all processes.
        seed: of the run.
        per_epoch: batches of an epoch.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int) -> None:
        """`num_rows` is at least `batch_size`, the images of a step over all processes."""
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self.per_epoch = num_rows // batch_size
        self._epoch = -1                            # that self._order is of

    def rows(self, step: int, part: range | None = None) -> tuple[int, np.ndarray]:
        """Returns the epoch of a step and the rows (B,) int64 of its batch.

        Args:
            step: number of the step, from 0; epochs follow one another.
            part: range of places in the batch; None takes all of it.
        """
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._order = keyed_random(self.seed, epoch, ORDER).permutation(self.num_rows)
            self._epoch = epoch
        batch = self._order[index * self.batch_size:][:self.batch_size]
        return epoch, batch if part is None else batch[part.start:part.stop]


def read_ahead(dataset: Dataset, keys: Iterable[object], num_workers: int,
               pinned: bool = False) -> DataLoader:
    """Returns an iterable of dataset[key] for every key, in order; arrays become tensors.

    The global random numbers are left alone: the loader draws the seeds of its workers from a
    generator of its own.

    Args:
        dataset: maps a key to a whole batch.
        keys: of the batches.
        num_workers: processes that read, as given by the user; no more are started than there are
            cores.
        pinned: whether to put tensors into pinned memory, for copies to a GPU that do not wait.
    """
    num_workers = min(num_workers, cores_per_process())
    # Workers are forked where that is possible: others would be sent whole memory maps.
    is_forking_safe = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
    start_method = "fork" if num_workers > 0 and is_forking_safe else None
    return DataLoader(dataset, batch_size=None, sampler=keys, num_workers=num_workers,
                      generator=Generator(), pin_memory=pinned, worker_init_fn=_ignore_signals,
                      multiprocessing_context=start_method)


def _ignore_signals(_worker: int) -> None:
    """Has a worker ignore the signals that a cluster or a terminal sends to all processes at once.

    They would end the worker, and with it the run, before it has saved; the run ends its workers
    itself.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Ends workers that are still there at the end of the process.

    Python would also send them SIGTERM, which they ignore.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)   # torch's handler would call this an error
    for worker in multiprocessing.active_children():
        worker.kill()
