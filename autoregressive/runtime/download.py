"""Downloads of files that are known by their hash: whole and right, or not there."""

import hashlib
import urllib.request
from pathlib import Path

from autoregressive.runtime.files import atomic_write

BLOCK = 2**20
TIMEOUT_SECONDS = 30


def download(url, path, sha256, num_bytes, show):
    """Downloads a file.

    Args:
        url: where it lies.
        path: where to put it; nothing is there before it is whole and its hash is right.
        sha256: its SHA-256, hexadecimal.
        num_bytes: its size.
        show: called with num_bytes, returns a progress bar as a context manager with update(bytes).

    Raises:
        ValueError: it cannot be had, or is another file; the message says where to put it by hand.
    """
    name, by_hand = Path(path).name, f"get it from {url} and put it at {path} (SHA-256 {sha256})"
    digest, found = hashlib.sha256(), 0
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as source, atomic_write(path) as file, \
                show(num_bytes) as bar:
            while block := source.read(BLOCK):
                file.write(block)
                digest.update(block)
                found += len(block)
                bar.update(len(block))
            if digest.hexdigest() != sha256:
                raise ValueError(f"{name}: expected {num_bytes} bytes of SHA-256 {sha256[:12]}, downloaded {found} of "
                                 f"{digest.hexdigest()[:12]}; {by_hand}")
    except OSError as error:
        raise ValueError(f"{name}: could not be downloaded ({error}); {by_hand}") from error
