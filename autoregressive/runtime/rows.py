"""Arrays of many rows that any number of processes fill at once: codes of images, sampled pictures.

A folder holds one .npy file for each array, whose space is reserved at the start, and status.npy, a
byte for each row. Rows are written at their own place with os.pwrite, first the arrays, then the
status that makes them count. So a kill loses at most the batches being written, codes take up
their space once, since they stay where they are written, and there are no millions of small files.
A record beside the arrays holds the identity of the run; it is written first and removed last, and
rows without it belong to no run.

A process that writes to a memory map of a file on a full disk is killed by SIGBUS; os.pwrite raises
OSError. O_DSYNC puts rows on the disk before their status, and keeps a network file system from
widening a write to whole pages, over what another machine wrote beside it.
"""

import contextlib
import errno
import math
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from autoregressive.runtime.files import read_json, write_json
from autoregressive.runtime.identity import find_difference
from autoregressive.runtime.log import LOGGER

# Values of the status of a row.
TO_DO = 0
WRITTEN = 1
FAILED = 2
POLL_SECONDS = 1                                    # between two looks at the others' progress
# What a file that is too large raises; EINVAL: too large for any disk.
TOO_LARGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EINVAL)
LARGEST_FILE = 2**62                                # bytes; numpy would overflow beyond
RowKind = tuple[DTypeLike, tuple[int, ...]]         # dtype and shape of a row


class RowWriter:
    """The arrays of one run while they are filled; every process opens its own.

    Attributes:
        path: the folder.
        identity: plain dict of everything that the rows depend on.
        num_rows: rows of every array.
        arrays: name -> dtype and shape of a row.
    """

    def __init__(self, path: str | Path, identity: dict[str, Any], num_rows: int,
                 arrays: dict[str, RowKind], record: str = "identity.json") -> None:
        """
        Args:
            path: the folder.
            identity: plain dict of everything that the rows depend on.
            num_rows: rows of every array.
            arrays: name -> dtype and shape of a row; the files are called {name}.npy.
            record: name of the file that holds the identity.
        """
        self.path = Path(path)
        self.identity = identity
        self.num_rows = num_rows
        self.arrays = arrays
        self._files: dict[str, RowKind] = arrays | {"status": (np.dtype(np.uint8), ())}
        self._record = self.path / record

    def create(self) -> None:
        """Lays out the arrays, or finds what an earlier start of the same run has left.

        One process calls this.

        Raises:
            ValueError: rows of another run or a file lie there, or the disk is too small.
        """
        if self.path.is_file():
            raise ValueError(f"{self.path}: expected a folder of rows, found a file; remove it, or "
                             "name another place")
        if self._record.is_file():
            difference = find_difference(self.identity, read_json(self._record), self.identity)
            if difference:
                raise ValueError(f"{self.path}: expected rows with {difference}; name another "
                                 "folder, or remove it")
        else:
            self.remove()                           # rows of no run
            write_json(self._record, self.identity | {"complete": False})
        try:
            for name, (dtype, shape) in self._files.items():
                _preallocate(self._file(name), (self.num_rows, *shape), np.dtype(dtype))
        except ValueError:                          # the disk is too small
            if not self._file("status").exists():   # nothing was written by an earlier start
                self.remove()
            raise

    def clear(self) -> None:
        """Removes the arrays, the status first: if interrupted, it leaves no row that counts."""
        for name in reversed(self._files):
            self._file(name).unlink(missing_ok=True)
        for unfinished in self.path.glob(".*.tmp"):
            unfinished.unlink()

    def remove(self) -> None:
        """Removes the arrays, and the record last."""
        self.clear()
        self._record.unlink(missing_ok=True)
        with contextlib.suppress(OSError):          # it is not there, or holds something else
            self.path.rmdir()

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.npy"

    def array(self, name: str) -> np.ndarray:
        """Returns an array (num_rows, ...), mapped for reading; "status" is one of them."""
        return np.load(self._file(name), mmap_mode="r", allow_pickle=False)

    def read(self, name: str, rows_at_once: int) -> Iterator[np.ndarray]:
        """Yields the rows of an array in order, in chunks (rows_at_once or fewer, ...).

        Unlike a memory map it holds no more than one chunk in memory.
        """
        dtype, shape = self.arrays[name]
        row_size = math.prod(shape)
        with open(self._file(name), "rb") as file:
            file.seek(self.array(name).offset)
            for first in range(0, self.num_rows, rows_at_once):
                count = min(rows_at_once, self.num_rows - first)
                yield np.fromfile(file, dtype, count * row_size).reshape(count, *shape)

    @property
    def num_done(self) -> int:
        """Rows that were written, or recorded as failed, by all processes together."""
        return int(np.count_nonzero(self.array("status")))

    def is_missing(self) -> np.ndarray:
        """Returns which rows are not written yet, (num_rows,) bool."""
        return self.array("status") == TO_DO

    def missing(self, rows_per_batch: int) -> list[range]:
        """Returns the batches that are not written yet.

        Batches are ranges of rows, cut at multiples of `rows_per_batch`.
        """
        is_missing = self.is_missing()
        batches = []
        for first in range(0, self.num_rows, rows_per_batch):
            rows = range(first, min(first + rows_per_batch, self.num_rows))
            if is_missing[rows.start:rows.stop].any():
                batches.append(rows)
        return batches

    def write(self, rows: range | np.ndarray, **arrays: np.ndarray) -> None:
        """Writes rows: every array, then the status that makes them count.

        Args:
            rows: consecutive ones as a range, or an array (n,) of ascending ones, which one process
                alone may write.
            arrays: by name, (len(rows), ...); "status", if it is not given, is WRITTEN.
        """
        status = arrays.pop("status", np.full(len(rows), WRITTEN))
        for name, array in (arrays | {"status": status}).items():
            dtype, _ = self._files[name]
            _write_rows(self._file(name), rows, array.astype(dtype))

    def wait_for_others(self) -> None:
        """Waits until every row is written, by any process.

        It looks at the file again and again, where a collective could time out.
        """
        while self.num_done < self.num_rows:
            time.sleep(POLL_SECONDS)


class HostCopy:
    """Tensors that are being copied into page-locked memory of the host; the device goes on."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._copies = {name: tensor.to("cpu", non_blocking=True)
                        for name, tensor in tensors.items()}
        self._arrived = None
        if any(tensor.is_cuda for tensor in tensors.values()):
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def arrays(self) -> dict[str, np.ndarray]:
        """Waits for the copies, and returns them."""
        if self._arrived:
            self._arrived.synchronize()
        return {name: copy.numpy() for name, copy in self._copies.items()}


class BackgroundWriter:
    """Writes rows in a thread, so that a GPU samples the next batch meanwhile.

    One batch at most is being written while the next one is sampled. At the end of the context
    everything is written. What goes wrong in the thread is raised by the next `write`, or at the
    end; it is logged if the context ends with another error.
    """

    def __init__(self, rows: RowWriter) -> None:
        self._rows = rows
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self._thread.shutdown()
        if kind is None:
            self._wait()
        elif self._pending and (failure := self._pending.exception()):
            LOGGER.error("writing rows: %s", failure)

    def write(self, rows: range, **tensors: Tensor) -> None:
        """Begins to write consecutive rows, as RowWriter.write; the tensors must not change."""
        copy = HostCopy(tensors)
        self._wait()
        self._pending = self._thread.submit(lambda: self._rows.write(rows, **copy.arrays()))

    def _wait(self) -> None:
        if self._pending:
            self._pending.result()


def _preallocate(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Makes a .npy file of zeros whose space on the disk is reserved; an existing one is kept."""
    if path.exists():
        return
    temporary = path.with_name(f".{path.name}.tmp")
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        if num_bytes > LARGEST_FILE:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):          # not on every system
            with open(temporary, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno not in TOO_LARGE:
            raise
        free_mib = shutil.disk_usage(path.parent).free / 2**20
        raise ValueError(f"{path}: expected room for {num_bytes / 2**20:.1f} MiB, {error.strerror} "
                         f"({free_mib:.1f} MiB are free); choose a folder on another "
                         "disk") from error
    os.replace(temporary, path)


def _write_rows(path: Path, places: range | np.ndarray, rows: np.ndarray) -> None:
    """Writes rows into a .npy file, at their ascending places in it, and waits for the disk."""
    start = np.load(path, mmap_mode="r").offset
    places = np.asarray(places)
    jumps = np.flatnonzero(np.diff(places) != 1) + 1
    runs = np.split(np.arange(len(places)), jumps)              # of consecutive rows
    # Thousands of short runs wait for the disk once, at the end.
    is_one = len(runs) == 1
    handle = os.open(path, os.O_WRONLY | (getattr(os, "O_DSYNC", 0) if is_one else 0))
    try:
        for run in runs:
            data = memoryview(np.ascontiguousarray(rows[run[0]:run[-1] + 1])).cast("B")
            _write_all(handle, data, start + int(places[run[0]]) * rows[0].nbytes)
        if not is_one:
            os.fsync(handle)
    finally:
        os.close(handle)


def _write_all(handle: int, data: memoryview, offset: int) -> None:
    """Writes all of `data` at an offset of an open file."""
    while len(data):
        written = os.pwrite(handle, data, offset)
        data = data[written:]
        offset += written
