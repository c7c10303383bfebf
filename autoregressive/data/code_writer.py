"""Writes a store of codes (autoregressive/data/codes.py has its layout), from any number of processes at once.

Rows are written with os.pwrite at their own place, first the codes, then the status that makes them count: a kill loses
at most the batch at hand, and there is nothing to merge. A map would be killed by SIGBUS on a full disk; a write raises
OSError. O_DSYNC puts codes on the disk before their status, and keeps a network file system from widening a write to
whole pages, over what another machine wrote beside it.
"""

import errno
import os
import shutil
import time
from pathlib import Path

import numpy as np

from autoregressive.data.codes import CHECKSUM_ROWS, checksum_of_rows, code_dtype, compare_manifests
from autoregressive.runtime.files import atomic_write, read_json, write_json

TO_DO, WRITTEN, FAILED = 0, 1, 2
POLL_SECONDS = 1                                    # between two looks at what the other processes have written
STORE_FILES = ("manifest.json", "status.npy", "codes.npy", "labels.npy")       # in the order that --overwrite removes


class CodeWriter:
    """One store that is being written; every process of an extraction opens its own.

    Attributes:
        path: its folder.
        manifest: dict of what the codes are; never of when, or by how many processes, they were made.
    """

    def __init__(self, path, manifest):
        """
        Args:
            path: folder of the store.
            manifest: dict with at least num_images, num_crops, num_tokens, codebook_size.
        """
        self.path, self.manifest = Path(path), manifest

    def create(self, labels, overwrite=False):
        """Lays out an unfinished store, or finds the one that the same extraction began (one process calls this).

        Rows that failed before are to be tried again. A finished store of the same manifest is left as it is.

        Args:
            labels: (N,) int64.
            overwrite: whether to replace a finished store, or that of another extraction.

        Raises:
            ValueError: another store, or something else, lies there, or the disk is too small.
        """
        if (self.path / "manifest.json").is_file():
            found = read_json(self.path / "manifest.json")
            difference = compare_manifests(self.manifest, found)
            if overwrite and (difference or found["complete"]):
                self._remove()
            elif difference:
                raise ValueError(f"{self.path}: expected a store with {difference}; choose another --code-path, or "
                                 "replace it with --overwrite")
            elif found["complete"]:
                return
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise ValueError(f"{self.path}: expected a new or empty folder, or a store; found other files")
        write_json(self.path / "manifest.json", self.manifest | {"complete": False})
        shape = (self.manifest["num_images"], self.manifest["num_crops"], self.manifest["num_tokens"])
        _preallocate(self.path / "codes.npy", shape, code_dtype(self.manifest["codebook_size"]))
        with atomic_write(self.path / "labels.npy") as file:
            np.save(file, labels.astype(np.int64))
        _preallocate(self.path / "status.npy", shape[:1], np.dtype(np.uint8))
        failed = np.flatnonzero(self._status() == FAILED)
        for row in failed.tolist():
            _write_rows(self.path / "status.npy", row, np.array([TO_DO], np.uint8))
        shutil.rmtree(self.path / "failures", ignore_errors=True)

    def _remove(self):
        for name in STORE_FILES:
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / "failures", ignore_errors=True)

    def _status(self):
        return np.load(self.path / "status.npy", mmap_mode="r")

    @property
    def is_complete(self):
        return read_json(self.path / "manifest.json")["complete"]

    @property
    def num_done(self):
        """Rows that were written, or recorded as failed, by all processes together."""
        return int(np.count_nonzero(self._status()))

    def missing(self, rows_per_batch):
        """Returns the batches, as ranges of rows cut at multiples of rows_per_batch, that are not written yet."""
        status, count = self._status(), self.manifest["num_images"]
        batches = (range(first, min(first + rows_per_batch, count)) for first in range(0, count, rows_per_batch))
        return [rows for rows in batches if (status[rows.start:rows.stop] == TO_DO).any()]

    def write(self, rows, codes, failures):
        """Writes consecutive rows: codes first, then failures, then the status that makes them count.

        Args:
            rows: range of rows.
            codes: (len(rows), crops, T) integers.
            failures: dict of row -> (path, reason); the codes of these rows are never read.
        """
        dtype = code_dtype(self.manifest["codebook_size"])
        codes = codes.astype(dtype)
        codes[[row - rows.start for row in failures]] = 0
        _write_rows(self.path / "codes.npy", rows.start, codes)
        for row, (path, reason) in failures.items():
            write_json(self.path / "failures" / f"{row:09d}.json", {"row": row, "path": path, "reason": reason})
        status = [FAILED if row in failures else WRITTEN for row in rows]
        _write_rows(self.path / "status.npy", rows.start, np.array(status, dtype=np.uint8))

    def wait_for_others(self):
        """Waits until every row is written by someone: by a look at the file, so that no collective can time out."""
        while self.num_done < self.manifest["num_images"]:
            time.sleep(POLL_SECONDS)

    def finish(self, most_failures, bar=None):
        """Completes the manifest: failures, checksums, and, unless too many failed, that the store is whole.

        One process calls this, after wait_for_others.

        Args:
            most_failures: rows that may have failed in a store that is whole.
            bar: progress bar of the rows that are summed up.

        Returns:
            the list of failures, dicts of row, path and reason, by row.

        Raises:
            RuntimeError: rows are missing.
        """
        if missing := self.manifest["num_images"] - self.num_done:
            raise RuntimeError(f"{self.path}: {missing} rows were not written; run the same command again")
        failed = [read_json(path) for path in sorted((self.path / "failures").glob("*.json"))]
        complete = len(failed) <= most_failures
        codes = np.load(self.path / "codes.npy", mmap_mode="r")
        manifest = self.manifest | {"failed": failed, "complete": complete}
        if complete:
            manifest |= {"checksum_rows": CHECKSUM_ROWS,
                         "codes_sha256": [checksum_of_rows(codes, first, bar)
                                          for first in range(0, len(codes), CHECKSUM_ROWS)],
                         "labels_sha256": checksum_of_rows(np.load(self.path / "labels.npy"), 0)}
        write_json(self.path / "manifest.json", manifest)
        if complete:
            (self.path / "status.npy").unlink()
            shutil.rmtree(self.path / "failures", ignore_errors=True)
        return failed


def _preallocate(path, shape, dtype):
    """Makes a .npy file of zeros whose space on the disk is reserved; an existing one is kept."""
    if path.exists():
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):                          # not on every system
            with open(temporary, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        needed, free = np.prod(shape) * dtype.itemsize / 2**20, shutil.disk_usage(path.parent).free / 2**20
        raise ValueError(f"{path}: expected room for {needed:.1f} MiB, {error.strerror} ({free:.1f} MiB are free); "
                         "choose a --code-path on another disk") from error
    os.replace(temporary, path)


def _write_rows(path, first_row, rows):
    offset = np.load(path, mmap_mode="r").offset + first_row * rows[0].nbytes
    data = memoryview(np.ascontiguousarray(rows)).cast("B")
    handle = os.open(path, os.O_WRONLY | getattr(os, "O_DSYNC", 0))
    try:
        while len(data):
            written = os.pwrite(handle, data, offset)
            data, offset = data[written:], offset + written
    finally:
        os.close(handle)
