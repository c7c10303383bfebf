"""What the codes of a store are to their readers, and those of several stores as one.

Letters: N images, T tokens.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Codes(Protocol):
    """The codes of every crop of every image: an array on disk, or what reads like one.

    Attributes:
        shape: (N, crops, T).
    """

    shape: tuple[int, ...]

    def __getitem__(self, key: tuple[np.ndarray, np.ndarray | int]) -> np.ndarray:
        """Returns the codes (n, T), integers, of pairs (rows (n,), crops (n,) or one for all)."""


class CombinedCodes:
    """Codes of several stores of the same images, one after the other along the crops.

    Attributes:
        num_crops: crops of every store.
        shape: (N, sum of num_crops, T).
    """

    def __init__(self, parts: Sequence[Codes]) -> None:
        """Combines codes (N, crops, T), of as many images and tokens each."""
        num_images, _, num_tokens = parts[0].shape
        self.num_crops = [part.shape[1] for part in parts]
        self.shape = (num_images, sum(self.num_crops), num_tokens)
        self._parts = parts
        self._first_crops = np.cumsum([0, *self.num_crops])     # of every part, and the end

    def __getitem__(self, key: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Returns the codes (n, T) int32 of pairs (rows (n,), crops (n,))."""
        rows, crops = key
        codes = np.empty((len(rows), self.shape[2]), np.int32)
        for crop in np.unique(crops):
            number = np.searchsorted(self._first_crops, crop, side="right") - 1
            is_here = crops == crop
            crop_of_part = crop - self._first_crops[number]
            codes[is_here] = self._parts[number][rows[is_here], crop_of_part]
        return codes
