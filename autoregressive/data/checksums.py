"""Checksums of the codes and labels of a store, by which a damaged one is found.

Letters: N images.
"""

import hashlib

import numpy as np
from tqdm import tqdm

CHECKSUM_ROWS = 65536           # rows of the codes that one checksum covers
ROWS_AT_ONCE = 1024             # that are read between two steps of a progress bar


def checksum_of_rows(array: np.ndarray, first: int, bar: tqdm | None = None) -> str:
    """Returns the SHA-256 of the bytes of CHECKSUM_ROWS rows of an array from row `first` on.

    Args:
        array: (N, ...).
        first: the first row.
        bar: progress bar of the rows.
    """
    digest = hashlib.sha256()
    covered = array[first:first + CHECKSUM_ROWS]
    for start in range(0, len(covered), ROWS_AT_ONCE):
        rows = covered[start:start + ROWS_AT_ONCE]
        digest.update(np.ascontiguousarray(rows))
        if bar is not None:
            bar.update(len(rows))
    return digest.hexdigest()


def checksum_of_labels(labels: np.ndarray) -> str:
    """Returns the SHA-256 of the bytes of all labels (N,)."""
    return hashlib.sha256(np.ascontiguousarray(labels)).hexdigest()
