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


def open_older_codes(path: Path) -> tuple["OlderCodes", np.ndarray] | None:
    """Reads the labels, and prepares to read the codes, of the older layout in folder `path`.

    Returns:
        OlderCodes, and labels (N,) int64; None if no folder of codes lies there.

    Raises:
        ValueError: there are several, or codes without labels; files are missing, numbered with gaps, or of another
            shape.
    """
    found = sorted(path.glob("*_codes"))
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(f"{path}: expected one folder *_codes, found {' and '.join(item.name for item in found)}; "
                         "move them into folders of their own")
    codes_folder = found[0]
    labels_folder = codes_folder.with_name(codes_folder.name.removesuffix("_codes") + "_labels")
    if not labels_folder.is_dir():
        raise ValueError(f"{labels_folder}: expected the labels of {codes_folder.name}, found no such folder")
    count, num_labels = _count_files(codes_folder), _count_files(labels_folder)
    if num_labels != count:
        raise ValueError(f"{labels_folder}: expected {count} files as in {codes_folder}, found {num_labels}")
    labels = np.array([_read(labels_folder, row).item() for row in range(count)], np.int64)
    images = _count_images(codes_folder, labels)
    return OlderCodes(codes_folder, images), labels[:images]


def _read(folder, row):
    return np.load(folder / f"{row}.npy", allow_pickle=False)


def _count_files(folder):
    numbers = sorted(int(name[:-4]) for name in os.listdir(folder) if name.endswith(".npy") and name[:-4].isdigit())
    if not numbers or numbers != list(range(len(numbers))):
        raise ValueError(f"{folder}: expected files 0.npy, 1.npy, ... without gaps, found {len(numbers)} files"
                         + (f" up to {numbers[-1]}.npy" if numbers else ""))
    return len(numbers)


def _count_images(codes_folder, labels):
    """Returns how many files there are before those that repeat the first ones."""
    count = len(labels)
    for first in range(max(1, count - LONGEST_PADDING), count):
        if labels[first] == labels[0] and all(
                np.array_equal(_read(codes_folder, first + place), _read(codes_folder, place))
                for place in range(count - first)):
            return first
    return count


class OlderCodes:
    """Codes (N, crops, T) in one file per image."""

    def __init__(self, folder: Path, count: int):
        self._folder = folder
        first = _read(folder, 0)
        if first.ndim != 3 or len(first) != 1:
            raise ValueError(f"{folder / '0.npy'}: expected codes (1, crops, T), found {first.shape}")
        self.shape = (count, *first.shape[1:])

    def __getitem__(self, key: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Returns the codes (n, T) int64 of pairs (rows (n,), crops (n,) or one for all)."""
        return np.stack([_read(self._folder, row)[0, crop] for row, crop in np.broadcast(*key)])
