"""Reads .npy files, with errors of one line that name the file and what to do."""

import io
from pathlib import Path

import numpy as np

from autoregressive.runtime.files import NO_ARRAY


def read_integers(path: Path, hint: str, mapped: bool = False,
                  content: bytes | None = None) -> np.ndarray:
    """Reads an array of integers.

    Args:
        path: a .npy file.
        hint: ends the message: what to do.
        mapped: whether to map it instead of reading it.
        content: of a file that lies in an archive; `path` is its name then.

    Raises:
        ValueError: the file is missing, damaged, or holds something else.
    """
    file = path if content is None else io.BytesIO(content)
    try:
        array = np.load(file, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (OSError, EOFError, *NO_ARRAY) as error:
        reason = error or type(error).__name__
        raise ValueError(f"{path}: expected an array, {reason}; {hint}") from error
    return check_integers(array, path, hint)


def check_integers(array: object, path: Path, hint: str) -> np.ndarray:
    """Returns `array`, read from `path`, which must be one of integers; else raises ValueError."""
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        found = array.dtype if isinstance(array, np.ndarray) else "an archive"
        raise ValueError(f"{path}: expected an array of integers, found {found}; {hint}")
    return array
