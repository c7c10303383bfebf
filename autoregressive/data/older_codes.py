"""Reads codes in the layout of the older public code: two folders with a small .npy file per image.

    imagenet{size}_codes/{i}.npy        int64 (1, crops, T)
    imagenet{size}_labels/{i}.npy       int64 (1,)

A writer with several processes filled its last round with the first images again; such files at the
end are left out, with a warning. Nothing is concluded from the size in a folder's name.

Letters: N images, T tokens.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from autoregressive.data.arrays import read_integers
from autoregressive.runtime.log import LOGGER

LONGEST_PADDING = 1024          # images; as many processes as anybody wrote this layout with
HINT = ("write the older layout again, or extract the codes with "
        "autoregressive/train/extract_codes_c2i.py")


class OlderFolders(NamedTuple):
    """The two folders of a store of the older layout, and how many files lie in each of them."""

    codes: Path
    labels: Path
    num_files: int


def find_older_codes(path: Path) -> OlderFolders | None:
    """Returns the two folders of the older layout in folder `path`; None without one of codes.

    Raises:
        ValueError: there are several, or codes without labels; files are missing, or numbered with
            gaps.
    """
    folders = sorted(path.glob("*_codes"))
    if not folders:
        return None
    if len(folders) > 1:
        names = " and ".join(folder.name for folder in folders)
        raise ValueError(f"{path}: expected one folder *_codes, found {names}; move them into "
                         "folders of their own")
    codes_folder = folders[0]
    labels_folder = codes_folder.with_name(codes_folder.name.removesuffix("_codes") + "_labels")
    if not labels_folder.is_dir():
        raise ValueError(f"{labels_folder}: expected the labels of {codes_folder.name}, found no "
                         "such folder")
    count = _count_files(codes_folder)
    num_labels = _count_files(labels_folder)
    if num_labels != count:
        raise ValueError(f"{labels_folder}: expected {count} files as in {codes_folder}, found "
                         f"{num_labels}")
    return OlderFolders(codes_folder, labels_folder, count)


def open_older_codes(folders: OlderFolders,
                     advance: Callable[[int], None]) -> tuple[OlderCodes, np.ndarray]:
    """Reads the labels, and prepares to read the codes, of the older layout.

    A million images are a million small files of labels, which takes minutes.

    Args:
        folders: those of find_older_codes.
        advance: called with the number of labels read, for a progress bar.

    Returns:
        the codes, and labels (N,) int64.

    Raises:
        ValueError: files are damaged, of another shape, or no integers.
    """
    count = folders.num_files
    labels = _read_labels(folders.labels, count, advance)
    codes = OlderCodes(folders.codes, count)
    codes.check_sizes()

    # The rows that may be padding, and those that it would repeat, are a sample of the codes, too.
    longest = min(LONGEST_PADDING, count - 1)
    first = range(longest)
    last = range(count - longest, count)
    sample = {row: _fingerprint(codes, labels, row) for row in sorted({0, *first, *last})}
    codes.sample_sha256 = _checksum_of_sample(codes.shape, sample)
    num_padding = _find_padding([sample[row] for row in first], [sample[row] for row in last],
                                count, folders.codes)
    num_images = count - num_padding
    codes.shape = (num_images, *codes.shape[1:])
    return codes, labels[:num_images]


def _read_labels(folder: Path, count: int, advance: Callable[[int], None]) -> np.ndarray:
    """Returns the labels (count,) int64 of a folder with a file for each."""
    labels = np.empty(count, np.int64)
    for row in range(count):
        path = folder / f"{row}.npy"
        label = read_integers(path, HINT)
        if label.size != 1:
            raise ValueError(f"{path}: expected one label, found shape {label.shape}; {HINT}")
        labels[row] = label.item()
        advance(1)
    return labels


def _count_files(folder: Path) -> int:
    numbers = sorted(int(name.removesuffix(".npy")) for name in os.listdir(folder)
                     if re.fullmatch(r"[0-9]+\.npy", name))
    if not numbers or numbers != list(range(len(numbers))):
        up_to = f" up to {numbers[-1]}.npy" if numbers else ""
        raise ValueError(f"{folder}: expected files 0.npy, 1.npy, ... without gaps, found "
                         f"{len(numbers)} files{up_to}")
    return len(numbers)


class Fingerprint(NamedTuple):
    """What tells an image of the older layout from others: its label, and a hash of its codes."""

    label: int
    digest: bytes


def _fingerprint(codes: OlderCodes, labels: np.ndarray, row: int) -> Fingerprint:
    """Returns the fingerprint of a row, the same whatever the dtype of its codes."""
    content = np.ascontiguousarray(codes.read(row), np.int64)
    return Fingerprint(int(labels[row]), hashlib.sha256(content).digest())


def _find_padding(first: Sequence[Fingerprint], last: Sequence[Fingerprint], count: int,
                  folder: Path) -> int:
    """Returns how many files at the end repeat the first ones, put there to fill a last round.

    Data that repeat themselves end in their beginning in several ways, and nothing says which of
    them is padding, if any: then it is none. A warning says what is concluded.

    Args:
        first, last: of as many of the first and of the last rows as may be padding, in order.
        count: number of the files.
        folder: of the codes.
    """
    possible = [length for length in range(1, len(first) + 1) if last[-length:] == first[:length]]
    if not possible:
        return 0
    if len(possible) > 1:
        LOGGER.warning("%s: the last files repeat the first ones, %s of them: nothing tells what "
                       "is padding, so all %d are used; remove what is", folder,
                       " or ".join(map(str, possible[:4])), count)
        return 0
    LOGGER.warning("%s: left out the last %d of %d files, which repeat the first ones as a writer "
                   "with several processes does to fill its last round", folder, possible[0], count)
    return possible[0]


def _checksum_of_sample(shape: tuple[int, ...], sample: dict[int, Fingerprint]) -> str:
    """Returns the SHA-256 of the shape of all codes and of the codes of the rows of a sample."""
    digest = hashlib.sha256(repr(shape).encode())
    for row in sorted(sample):
        digest.update(sample[row].digest)
    return digest.hexdigest()


class OlderCodes:
    """Codes (N, crops, T) in one file per image.

    Attributes:
        folder: of the files.
        shape: (N, crops, T).
        sample_sha256: of the shape and of at most 2 LONGEST_PADDING rows: other codes have another
            one, most likely.
    """

    sample_sha256: str

    def __init__(self, folder: Path, count: int) -> None:
        """Opens `count` files of a folder.

        Raises:
            ValueError: the first is damaged or of another shape.
        """
        self.folder = folder
        first = read_integers(folder / "0.npy", HINT)
        if first.ndim != 3 or len(first) != 1 or not first.size:
            raise ValueError(f"{folder / '0.npy'}: expected codes (1, crops, T), found "
                             f"{first.shape}")
        self.shape = (count, *first.shape[1:])

    def check_sizes(self) -> None:
        """Raises ValueError unless all files are as large as the first.

        Then their shapes are equal, and none of them had to be opened for it.
        """
        expected = (self.folder / "0.npy").stat().st_size
        for row in range(self.shape[0]):
            path = self.folder / f"{row}.npy"
            found = path.stat().st_size
            if found != expected:
                raise ValueError(f"{path}: expected {expected} bytes as in 0.npy, found {found}; "
                                 f"{HINT}")

    def read(self, row: int) -> np.ndarray:
        """Returns the codes (crops, T) of a row.

        Raises:
            ValueError: its file holds anything else.
        """
        path = self.folder / f"{row}.npy"
        codes = read_integers(path, HINT)
        expected = (1, *self.shape[1:])
        if codes.shape != expected:
            raise ValueError(f"{path}: expected shape {expected} as in 0.npy, found {codes.shape}; "
                             f"{HINT}")
        return codes[0]

    def __getitem__(self, key: tuple[np.ndarray, np.ndarray | int]) -> np.ndarray:
        """Returns the codes (n, T) int64 of pairs (rows (n,), crops (n,) or one for all)."""
        return np.stack([self.read(row)[crop] for row, crop in np.broadcast(*key)])
