"""Codes that others have made, in folders, and which layout a source has.

    RandAR      {class index}/{image index}.npy, integers (2, T): the image and its mirror image; a
                tar, compressed or not (ready_codes.py), or a folder
    LPD         {class folder}/{image}.npz, integers (T,) under indices and indices_flip; a folder
    LlamaGen    the older layout (older_codes.py); a folder

Which of them a source is follows from its files, never from the name of a folder.

Letters: N images, T tokens.
"""

import functools
import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from autoregressive.data.arrays import check_integers, read_integers
from autoregressive.data.older_codes import OlderFolders, find_older_codes, open_older_codes
from autoregressive.data.ready_codes import (
    HINT,
    LAYOUTS,
    CodeSource,
    NumberedCodes,
    Reader,
    TarCodes,
    is_hidden,
    numbers_in,
    warn_of_hidden,
)
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.files import read_npz_array
from autoregressive.runtime.log import progress


def open_source(path: str | Path, session: Session) -> CodeSource:
    """Finds out which layout ready codes have, and lists them, with a progress bar.

    Args:
        path: a tar or a folder.
        session: for the progress bar.

    Raises:
        ValueError: they are of none of the layouts, or some are missing, twice there or misnamed.
    """
    path = Path(path)
    if path.is_file():
        with progress(session, None, "list", "file") as bar:
            return TarCodes(path, bar.update)
    if not path.is_dir():
        found = "a pipe or device" if path.exists() else "none"
        raise ValueError(f"{path}: expected codes, {LAYOUTS}, found {found}; name them with --from")
    if any(path.glob("*_labels")):
        folders = find_older_codes(path)
        if folders is not None:
            with progress(session, folders.num_files, folders.labels.name, "image") as bar:
                return OlderSource(folders, bar.update)
    with progress(session, None, "list", "file") as bar:
        return open_class_folders(path, bar.update)


def open_class_folders(root: Path, advance: Callable[[int], None]) -> CodeSource:
    """Lists the files in a folder of class folders, all .npy or all .npz.

    Raises:
        ValueError: there are no class folders, empty ones, or other files.
    """
    names_of_classes = {}
    suffix = None
    num_hidden = 0
    for folder in sorted_entries(root):
        if is_hidden(folder.name):
            num_hidden += 1
            continue
        if not folder.is_dir():
            raise ValueError(f"{folder.path!r}: expected codes, {LAYOUTS}, found another file; "
                             "remove it, or name the codes with --from")
        names = names_of_classes[folder.name] = []
        for entry in sorted_entries(folder.path):
            if is_hidden(entry.name):
                num_hidden += 1
                continue
            suffix = suffix or Path(entry.name).suffix
            if suffix not in (".npy", ".npz") or not entry.name.endswith(suffix) \
                    or not entry.is_file():
                expected = suffix if suffix in (".npy", ".npz") else ".npy or .npz"
                raise ValueError(f"{entry.path!r}: expected a file {expected} in a class folder, "
                                 "found something else; remove it, or name the codes, "
                                 f"{LAYOUTS}, with --from")
            names.append(entry.name)
        if not names:
            raise ValueError(f"{folder.path!r}: expected codes of a class, found none; remove the "
                             "folder or fill it")
        advance(len(names))
    if suffix is None:
        raise ValueError(f"{root}: expected codes, {LAYOUTS}, found an empty folder; name them "
                         "with --from")
    warn_of_hidden(root, num_hidden)
    kind = NumberedFolders if suffix == ".npy" else NamedFolders
    return kind(root, names_of_classes)


def sorted_entries(folder: str | Path) -> list[os.DirEntry]:
    """Returns what lies in a folder, by name."""
    return sorted(os.scandir(folder), key=lambda entry: entry.name)


class NumberedFolders(NumberedCodes):
    """RandAR's layout as a folder."""

    def __init__(self, root: Path, names_of_classes: dict[str, list[str]]) -> None:
        """Takes the names of the files of each class folder; raises ValueError for other names."""
        self.path = root
        labels = array("q")
        images = array("q")
        for folder, names in names_of_classes.items():
            for name in names:
                numbers = numbers_in(f"{folder}/{name}", root)
                labels.append(numbers.label)
                images.append(numbers.image)
        self._sort(labels, images)

    def readers(self, is_wanted: np.ndarray) -> Iterator[tuple[int, Reader]]:
        """Yields the wanted rows in order; see CodeSource."""
        for row in np.flatnonzero(is_wanted).tolist():
            yield row, functools.partial(read_integers, self.path / self.name_of(row), HINT)


class NamedFolders(CodeSource):
    """LPD's layout: class folders are labelled in the order of their names, as in extraction."""

    layout = "LPD"
    num_crops = 2

    def __init__(self, root: Path, names_of_classes: dict[str, list[str]]) -> None:
        """Takes the names of the files of each class folder, both sorted."""
        self.path = root
        self.class_names = list(names_of_classes)
        counts = [len(names) for names in names_of_classes.values()]
        self.labels = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        self._names = [name for names in names_of_classes.values() for name in names]

    def name_of(self, row: int) -> str:
        """Returns {class folder}/{image}.npz."""
        return f"{self.class_names[self.labels[row]]}/{self._names[row]}"

    def readers(self, is_wanted: np.ndarray) -> Iterator[tuple[int, Reader]]:
        """Yields the wanted rows in order; see CodeSource."""
        for row in np.flatnonzero(is_wanted).tolist():
            yield row, functools.partial(read_flipped_pair, self.path / self.name_of(row))


def read_flipped_pair(path: Path) -> np.ndarray:
    """Reads the codes (2, T) of a file of LPD's layout: of an image and its mirror image.

    Raises:
        ValueError: one of them is missing, or they are no integers (T,).
    """
    pair = []
    for name in ("indices", "indices_flip"):
        codes = read_npz_array(path, name)
        if codes is None:
            raise ValueError(f"{path}: expected codes under indices and indices_flip, found none "
                             f"under {name}; {HINT}")
        pair.append(check_integers(codes, path, HINT))
    if pair[0].shape != pair[1].shape:
        raise ValueError(f"{path}: expected as many indices as indices_flip, found "
                         f"{pair[0].shape} and {pair[1].shape}; {HINT}")
    return np.stack(pair)


class OlderSource(CodeSource):
    """The older layout, without the images that filled its last round."""

    layout = "LlamaGen"

    def __init__(self, folders: OlderFolders, advance: Callable[[int], None]) -> None:
        """Reads the labels; raises ValueError as open_older_codes does."""
        self.path = folders.codes
        self._codes, self.labels = open_older_codes(folders, advance)
        self.num_crops = self._codes.shape[1]

    def name_of(self, row: int) -> str:
        """Returns {i}.npy."""
        return f"{row}.npy"

    def readers(self, is_wanted: np.ndarray) -> Iterator[tuple[int, Reader]]:
        """Yields the wanted rows in order; see CodeSource."""
        for row in np.flatnonzero(is_wanted).tolist():
            yield row, functools.partial(self._codes.read, row)
