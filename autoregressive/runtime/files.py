"""Files that are whole or absent, and the hashes that travel with them."""

import contextlib
import hashlib
import json
import os
import socket
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a temporary binary file beside `path` that takes its name once it is completely on disk.

    An exception inside the block removes the temporary file and leaves an older `path` as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class NpzWriter:
    """Adds arrays to an npz that is being written; made by open_npz."""

    def __init__(self, archive: zipfile.ZipFile):
        self._archive = archive

    def add(self, name: str, array: np.ndarray) -> None:
        """Adds a small array."""
        self.add_rows(name, array.dtype, array.shape, [array])

    def add_rows(self, name: str, dtype: np.dtype, shape: tuple[int, ...], chunks: Iterable[np.ndarray]) -> None:
        """Adds an array of `shape` whose rows come from consecutive arrays, of which no more than one is in memory."""
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        member = zipfile.ZipInfo(f"{name}.npy")                     # of a fixed date: equal contents, equal bytes
        with self._archive.open(member, "w", force_zip64=True) as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for chunk in chunks:
                stream.write(np.ascontiguousarray(chunk, dtype=dtype).tobytes())


@contextlib.contextmanager
def open_npz(path: str | Path, settings: dict[str, Any]) -> Iterator[NpzWriter]:
    """Opens an npz that is filled array by array, and appears when it is whole; `settings` travel in it as JSON."""
    with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        writer = NpzWriter(archive)
        yield writer
        writer.add("settings", np.array(json.dumps(settings)))


def read_npz_settings(path: str | Path) -> dict[str, Any]:
    """Returns the settings that open_npz stored in an npz; none if it is of others.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return json.loads(str(arrays["settings"])) if "settings" in arrays else {}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected an npz, found a damaged file ({error}); remove it") from error


def write_json(path, content):
    """Writes plain data as indented JSON, atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


def read_json(path: str | Path, kinds: dict[str, type | tuple[type, ...]] | None = None) -> dict[str, Any]:
    """Reads a JSON file that holds one object.

    Args:
        path: the file.
        kinds: keys that must be there, with the types that their values may have.

    Raises:
        ValueError: the file is not JSON, no object, or lacks a key or holds another type under it, which is named.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:                     # of JSON and of UTF-8
        raise ValueError(f"{path}: expected JSON, {error}; the file is damaged, make it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(content).__name__}; make the file again")
    for key, kind in (kinds or {}).items():
        if not isinstance(content.get(key), kind):
            found = f"a {type(content[key]).__name__}" if key in content else "none"
            raise ValueError(f"{path}: expected {key} of another kind, found {found}; make the file again")
    return content


def check_file(path, hint=""):
    """Raises ValueError unless `path` is an existing file; `hint` says what to do."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: expected a file, found {'a folder' if Path(path).is_dir() else 'none'}"
                         + (f"; {hint}" if hint else ""))


def check_output(path: str | Path) -> None:
    """Raises ValueError unless a file can be written at `path`; its folder is created if it is missing."""
    if Path(path).is_dir():
        raise ValueError(f"{path}: expected the name of a file to write, found a folder; add a name")
    check_writable_folder(Path(path).parent)


def check_writable_folder(path):
    """Raises ValueError unless files can be made in folder `path`, which is created if it is missing."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"{path}: expected a writable folder, {error.strerror}; name another place") from error


def file_sha256(path: str | Path) -> str:
    """Returns the SHA-256 of a file's bytes as hexadecimal text."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tensor_bytes(tensor):
    """Returns the little-endian bytes of a tensor of any dtype, row-major."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy()         # little-endian wherever torch runs


def codebook_sha256(codebook):
    """Returns the SHA-256 of the float32 little-endian bytes of a codebook (V, E)."""
    return hashlib.sha256(tensor_bytes(codebook.float())).hexdigest()


def mapping_sha256(mapping):
    """Returns the SHA-256 of the int64 little-endian bytes of a mapping (V,)."""
    return hashlib.sha256(tensor_bytes(mapping.long())).hexdigest()


def weights_sha256(state):
    """Returns the SHA-256 over (name, dtype, shape, bytes) of all tensors of a state dict, in name order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
