"""Pictures in an npz, read batch by batch: it may be larger than memory, compressed or not, zip64.

Letters: N pictures, H and W their sides, P the side of square ones.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from autoregressive.runtime.files import (
    NO_ARRAY,
    check_file,
    npz_members,
    read_npz,
    read_npz_array,
    read_npz_settings,
)

IMAGES = "arr_0"


class NpzImages:
    """The pictures and small arrays of one npz.

    Attributes:
        path: the file.
        shape: (N, H, W, 3) of the pictures.
        settings: the record of how the pictures were made, a plain dict; empty if there is none.

    Raises:
        ValueError: the file is missing, damaged, or holds no uint8 RGB pictures under `arr_0`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        check_file(path, "name an npz of pictures")
        with read_npz(path) as archive:
            self._members = npz_members(archive)
            if IMAGES not in self._members:
                found = ", ".join(sorted(self._members)) or "nothing"
                raise ValueError(f"{path}: expected pictures under {IMAGES}, found {found}; "
                                 f"save them with numpy.savez(path, {IMAGES}=pictures)")
            with archive.open(self._members[IMAGES]) as member:
                self.shape, is_fortran, dtype = self._read_header(member)
                size = self._members[IMAGES].file_size - member.tell()
        are_pictures = dtype == np.uint8 and len(self.shape) == 4 and self.shape[3] == 3
        if not are_pictures or is_fortran:
            raise ValueError(f"{path}: expected {IMAGES} as uint8 (N, P, P, 3) in C order, found "
                             f"{dtype} {self.shape} in {'Fortran' if is_fortran else 'C'} order")
        if min(self.shape) < 1:
            raise ValueError(f"{path}: expected pictures, found {IMAGES} of shape {self.shape}")
        if size < math.prod(self.shape):
            raise ValueError(f"{path}: expected {math.prod(self.shape)} bytes of pictures, found "
                             f"{size}; the file is damaged, make it again")
        self.settings = read_npz_settings(path)

    def __len__(self) -> int:
        """Returns N."""
        return self.shape[0]

    def check_side(self, side: int | None, owner: str) -> None:
        """Raises ValueError unless the pictures have `side` pixels a side; None accepts any.

        Args:
            side: in pixels.
            owner: whose side it is, for the message.
        """
        if side is not None and self.shape[1:3] != (side, side):
            raise ValueError(f"{self.path}: expected pictures of {side} x {side} pixels for "
                             f"{owner}, found {self.shape[1]} x {self.shape[2]}")

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """Yields consecutive pictures (n, H, W, 3) uint8, n <= batch_size.

        Raises:
            ValueError: the file is damaged.
        """
        picture_bytes = math.prod(self.shape[1:])
        with read_npz(self.path) as archive, archive.open(self._members[IMAGES]) as member:
            self._read_header(member)
            for start in range(0, len(self), batch_size):
                count = min(batch_size, len(self) - start)
                content = member.read(count * picture_bytes)
                if len(content) < count * picture_bytes:
                    num_found = start + len(content) // picture_bytes
                    raise ValueError(f"{self.path}: expected {len(self)} pictures, found an end "
                                     f"after {num_found}; the file is damaged, make it again")
                yield np.frombuffer(content, np.uint8).reshape(count, *self.shape[1:])

    def array(self, name: str) -> np.ndarray | None:
        """Returns a small array of the file, or None if it has none of that name.

        Raises:
            ValueError: the file is damaged, or the array holds Python objects.
        """
        return read_npz_array(self.path, name)

    def labels(self) -> np.ndarray | None:
        """Returns the class index of each picture, (N,) int64, or None.

        Raises:
            ValueError: there are labels of another kind or number.
        """
        labels = self.array("labels")
        if labels is None:
            return None
        if labels.shape != (len(self),) or labels.dtype.kind not in "iu":
            raise ValueError(f"{self.path}: expected labels as {len(self)} integers, "
                             f"found {labels.dtype} {labels.shape}")
        return labels.astype(np.int64)

    def _read_header(self, member: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
        """Returns shape, whether in Fortran's order, and type of an array; reads up to its data.

        Raises:
            ValueError: it is no array of numpy.
        """
        readers = {(1, 0): np.lib.format.read_array_header_1_0,
                   (2, 0): np.lib.format.read_array_header_2_0}
        try:
            version = np.lib.format.read_magic(member)
            return readers[version](member)
        except (*NO_ARRAY, KeyError) as error:
            raise ValueError(f"{self.path}: expected {IMAGES} as a numpy array, found other "
                             f"content ({error})") from error
