"""Reads codes in the layout of the older public code: two folders with one small .npy file per image each.

    imagenet{size}_codes/{i}.npy        int64 (1, crops, T)
    imagenet{size}_labels/{i}.npy       int64 (1,)

A writer with several processes filled its last round with the first images again; such files at the end are left out.
Nothing is concluded from the size in a folder's name.
"""

import os
from pathlib import Path

import numpy as np

LONGEST_PADDING = 1024                              # images; as many processes as anybody wrote this layout with


def find_older_codes(path):
    """Returns the folders (codes, labels) of the older layout in folder `path`; None if there are none.

    Raises:
        ValueError: there are several, or codes without labels.
    """
    path = Path(path)
    found = sorted(path.glob("*_codes")) if path.is_dir() else []
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(f"{path}: expected one folder *_codes, found {' and '.join(item.name for item in found)}; "
                         "move them into folders of their own")
    labels = found[0].with_name(found[0].name.removesuffix("_codes") + "_labels")
    if not labels.is_dir():
        raise ValueError(f"{labels}: expected the labels of {found[0].name}, found no such folder")
    return found[0], labels


def read_older_codes(codes_folder, labels_folder):
    """Reads the labels, and prepares to read the codes, of the older layout.

    Args:
        codes_folder, labels_folder: what find_older_codes returned.

    Returns:
        OlderCodes, and labels (N,) int64.

    Raises:
        ValueError: files are missing, or numbered with gaps, or of another shape.
    """
    count = _count_files(codes_folder)
    if _count_files(labels_folder) != count:
        raise ValueError(f"{labels_folder}: expected {count} files as in {codes_folder}, found "
                         f"{_count_files(labels_folder)}")
    codes = OlderCodes(codes_folder, count)
    labels = np.concatenate([np.load(labels_folder / f"{row}.npy", allow_pickle=False).reshape(1)
                             for row in range(count)])
    images = count - _count_padding(codes, labels)
    return OlderCodes(codes_folder, images), labels[:images].astype(np.int64)


def _count_files(folder):
    numbers = sorted(int(name[:-4]) for name in os.listdir(folder) if name.endswith(".npy") and name[:-4].isdigit())
    if not numbers or numbers != list(range(len(numbers))):
        raise ValueError(f"{folder}: expected files 0.npy, 1.npy, ... without gaps, found {len(numbers)} files"
                         + (f" up to {numbers[-1]}.npy" if numbers else ""))
    return len(numbers)


def _count_padding(codes, labels):
    count = len(labels)
    for first in range(max(1, count - LONGEST_PADDING), count):
        if labels[first] == labels[0] and all(np.array_equal(codes.row(first + place), codes.row(place))
                                              for place in range(count - first)):
            return count - first
    return 0


class OlderCodes:
    """Codes (N, crops, T) in one file per image."""

    def __init__(self, folder, count):
        self._folder = Path(folder)
        first = np.load(self._folder / "0.npy", allow_pickle=False)
        if first.ndim != 3 or len(first) != 1:
            raise ValueError(f"{self._folder / '0.npy'}: expected codes (1, crops, T), found {first.shape}")
        self.shape = (count, *first.shape[1:])

    def row(self, row):
        """Returns the codes (crops, T) int64 of an image."""
        return np.load(self._folder / f"{row}.npy", allow_pickle=False)[0]

    def __getitem__(self, key):
        """Returns the codes (n, T) int64 of pairs (rows (n,), crops (n,))."""
        rows, crops = key
        return np.stack([self.row(row)[crop] for row, crop in zip(rows.tolist(), crops.tolist(), strict=True)])
