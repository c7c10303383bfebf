"""Reads .npy files, with errors of one line that name the file and what to do."""

from pathlib import Path

import numpy as np

from autoregressive.runtime.files import NO_ARRAY


def read_integers(path: Path, hint: str, mapped: bool = False) -> np.ndarray:
    """Reads an array of integers.

    Args:
        path: a .npy file.
        hint: ends the message: what to do.
        mapped: whether to map it instead of reading it.

    Raises:
        ValueError: the file is missing, damaged, or holds something else.
    """
    try:
        array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (OSError, EOFError, *NO_ARRAY) as error:
        reason = error or type(error).__name__
        raise ValueError(f"{path}: expected an array, {reason}; {hint}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        found = array.dtype if isinstance(array, np.ndarray) else "an archive"
        raise ValueError(f"{path}: expected an array of integers, found {found}; {hint}")
    return array
