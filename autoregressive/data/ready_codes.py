"""Codes that others have made, as sources of a store; those of RandAR, in a tar.

A tar is read as a stream, once for the names of its members and once for their codes. Nothing of it
is unpacked, and no path in it is opened. The rows are in the order of class and image index,
whatever the order of the members.

Letters: N images, T tokens.
"""

import functools
import os
import re
import tarfile
import zlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from autoregressive.data.arrays import read_integers
from autoregressive.runtime.log import LOGGER

LAYOUTS = ("a tar or folder of {class index}/{image index}.npy, a folder of "
           "{class folder}/{image}.npz, or folders *_codes and *_labels")
HINT = "replace the file, or remove it"
# A class and an image by their indices, below one folder or none.
NUMBERED = re.compile(r"(.*/)?(0|[1-9][0-9]{0,8})/(0|[1-9][0-9]{0,8})\.npy", re.DOTALL)
LARGEST_MEMBER = 2**24          # bytes; codes of the largest pictures are a tenth of it
# What tarfile raises on damage; TypeError is the header of a gzip file that is cut off.
DAMAGED_TAR = (tarfile.TarError, EOFError, zlib.error, TypeError)
Reader = Callable[[], np.ndarray]


class CodeSource(ABC):
    """Ready codes of labelled images.

    Attributes:
        layout: a word for what it is.
        path: where its files lie.
        num_crops: codes of an image.
        labels: (N,) int64.
        class_names: names of the classes, in the order of the labels; None if it does not tell.
    """

    layout: str
    path: Path
    num_crops: int
    labels: np.ndarray
    class_names: list[str] | None = None

    def __len__(self) -> int:
        """Returns N, the number of images."""
        return len(self.labels)

    @abstractmethod
    def name_of(self, row: int) -> str:
        """Returns the path of a row below that of the source."""

    @abstractmethod
    def readers(self, is_wanted: np.ndarray) -> Iterator[tuple[int, Reader]]:
        """Yields wanted rows, in any order, each with a function that reads its codes.

        That returns integers, (crops, T) if they are what they should be, and raises ValueError or
        OSError, which name the file, if they cannot be read.

        Args:
            is_wanted: (N,) bool.
        """


class Numbers(NamedTuple):
    """What the name of a file of RandAR's layout says."""

    prefix: str
    label: int
    image: int


def numbers_in(name: str, source: str | Path) -> Numbers:
    """Returns the numbers in the name of a file of a source.

    Raises:
        ValueError: it is another name.
    """
    match = NUMBERED.fullmatch(name)
    if match is None:
        raise ValueError(f"{source}: expected {{class index}}/{{image index}}.npy alone, found "
                         f"{name!r}; remove it, or name the codes with --from")
    return Numbers(match[1] or "", int(match[2]), int(match[3]))


def is_hidden(name: str) -> bool:
    """Says whether a path is that of a hidden file, as macOS adds them to folders and tars."""
    return os.path.basename(name).startswith(".")


def warn_of_hidden(source: Path, count: int) -> None:
    """Says how many hidden files of a source are left out, if there are any."""
    if count:
        LOGGER.warning("%s: left out %d hidden files", source, count)


class NumberedCodes(CodeSource):
    """RandAR's layout: classes and images by their indices."""

    layout = "RandAR"
    num_crops = 2

    def _sort(self, labels: array, images: array) -> np.ndarray:
        """Sets the rows from the numbers of all files, in any order.

        Returns:
            (N,) int64: the place of each row in that order.

        Raises:
            ValueError: a file is there twice, or there is none.
        """
        if not labels:
            raise ValueError(f"{self.path}: expected {{class index}}/{{image index}}.npy, found no "
                             "file; name the codes with --from")
        order = np.lexsort((images, labels))
        self.labels = np.array(labels, np.int64)[order]
        self._images = np.array(images, np.int64)[order]
        is_twice = (np.diff(self.labels) == 0) & (np.diff(self._images) == 0)
        if is_twice.any():
            raise ValueError(f"{self.path}: expected every file once, found "
                             f"{self.name_of(is_twice.argmax())} twice; make it again")
        return order

    def name_of(self, row: int) -> str:
        """Returns {class index}/{image index}.npy."""
        return f"{self.labels[row]}/{self._images[row]}.npy"


class TarCodes(NumberedCodes):
    """RandAR's layout in a tar, which is read as a stream."""

    def __init__(self, path: Path, advance: Callable[[int], None]) -> None:
        """Lists the members.

        Raises:
            ValueError: it is no tar, damaged or cut off, or holds other members.
        """
        self.path = path
        labels = array("q")
        images = array("q")
        prefix = None
        num_hidden = 0
        try:
            for _, member in self._members():
                if is_hidden(member.name):
                    num_hidden += 1
                    continue
                numbers = numbers_in(member.name, path)
                if not member.isreg() or not 0 < member.size <= LARGEST_MEMBER:
                    raise ValueError(f"{path}: expected files of 1 to {LARGEST_MEMBER} bytes, "
                                     f"found {member.name!r}, a link, a device or of "
                                     f"{member.size} bytes; make the tar without it")
                prefix = numbers.prefix if prefix is None else prefix
                if numbers.prefix != prefix:
                    raise ValueError(f"{path}: expected one folder of class folders, found "
                                     f"{prefix!r} and {numbers.prefix!r}; make a tar of each")
                labels.append(numbers.label)
                images.append(numbers.image)
                advance(1)
        except DAMAGED_TAR as error:
            whole = f"after {len(labels)} files" if labels else "at its start"
            raise ValueError(f"{path}: expected codes, {LAYOUTS}, found no whole tar, {whole}: "
                             f"{error or type(error).__name__}; copy it again") from error
        warn_of_hidden(path, num_hidden)
        order = self._sort(labels, images)
        self._row_of_place = np.empty_like(order)
        self._row_of_place[order] = np.arange(len(order))

    def _members(self) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
        """Yields all members but folders, in their order.

        Raises:
            tarfile.ReadError, or others of DAMAGED_TAR: it is damaged, or does not end there.
        """
        with tarfile.open(self.path, "r|*", tarinfo=CheckedMember) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()                 # it would keep a kilobyte of each
                if not member.isdir():
                    yield tar, member
            while rest := tar.fileobj.read(2**20):
                if rest.strip(b"\0"):
                    raise tarfile.ReadError("more content after its end")

    def readers(self, is_wanted: np.ndarray) -> Iterator[tuple[int, Reader]]:
        """Yields the wanted rows in the order of the tar; see CodeSource."""
        members = (item for item in self._members() if not is_hidden(item[1].name))
        for (tar, member), row in zip(members, self._row_of_place, strict=True):
            name = self.name_of(row)
            if not member.name.endswith(name):
                raise RuntimeError(f"{self.path}: expected {name} as a moment ago, found "
                                   f"{member.name!r}; run the same command again")
            if is_wanted[row]:
                content = tar.extractfile(member).read()
                yield int(row), functools.partial(read_integers, self.path / name, HINT,
                                                  content=content)


class CheckedMember(tarfile.TarInfo):
    """A member of a tar whose damaged header is an error.

    For tarfile it is the end of the tar, and so is a tar that is cut off between two members.
    """

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        """Returns the next member of a tar."""
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:              # zeros: the end of a whole tar
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"unexpected end, or a damaged header ({error})") from error


