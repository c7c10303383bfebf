"""Codes of data sets on disk: what a store is.

A store is one folder, written by code_writer.py and opened by opening.py:

    manifest.json   what the codes are: dataset, classes, crops in their order, V, hashes, failed
                    images, checksums; of imported codes also the keys that are claimed: they
                    were given by flags, since the source does not tell them
    codes.npy       (N, crops, T) uint16 (int32 above V = 65,536), every crop of every image
    labels.npy      (N,) int64
    status.npy      (N,) uint8, failures/: only while the store is being written

Letters: N images, T tokens, V codes.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from autoregressive.data.combined_codes import Codes, CombinedCodes
from autoregressive.runtime.entry import Parser

DAMAGED = "the store is damaged, extract it again with --overwrite"


def code_dtype(codebook_size: int) -> type[np.integer]:
    """Returns the dtype that codes 0 .. codebook_size - 1 are stored in."""
    return np.uint16 if codebook_size <= 65536 else np.int32


def numbered_classes(count: int) -> list[str]:
    """Returns what the classes of imported codes are called if nothing tells their names."""
    return [str(label) for label in range(count)]


def add_code_args(parser: Parser, several: bool = False) -> None:
    """Declares where the codes lie; training alone combines `several` stores."""
    if several:
        parser.add_argument("--code-path", required=True, nargs="+", action="extend",
                            help="folder of the codes; several, of the same images, add their "
                                 "crops to each other")
    else:
        parser.add_argument("--code-path", required=True, help="folder of the codes")


@dataclass(frozen=True)
class CodeStore:
    """One or several finished stores, memory-mapped.

    Attributes:
        path: the folder; those of several joined by " + ".
        manifest: dict, see the module; what an older layout does not tell is None.
        codes: (N, crops, T) integers on disk; codes[rows, crops] reads them.
        labels: (N,) int64.
        rows: indices of the images that did not fail, ascending.
    """

    path: str
    manifest: dict[str, Any]
    codes: Codes
    labels: np.ndarray
    rows: np.ndarray

    @property
    def grid(self) -> int:
        """Side of the picture in tokens."""
        return self.manifest["grid"]

    @property
    def crops_to_draw(self) -> np.ndarray:
        """Indices of crops (n,), from which training draws uniformly.

        They are repeated such that each of several stores is as likely as the others, whatever its
        number of crops.
        """
        counts = [self.codes.shape[1]]
        if isinstance(self.codes, CombinedCodes):
            counts = self.codes.num_crops
        per_store = math.lcm(*counts)
        repeats = np.repeat([per_store // count for count in counts], counts)
        return np.repeat(np.arange(sum(counts)), repeats)
