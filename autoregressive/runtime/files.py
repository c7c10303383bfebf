"""Files that are whole or absent, and the hashes that travel with them."""

import contextlib
import hashlib
import json
import lzma
import math
import os
import socket
import struct
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

# What zipfile raises on damage; RuntimeError is encryption, or an unknown method of compression.
DAMAGED_ARCHIVE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, struct.error,
                   RuntimeError, OSError, OverflowError)
# What numpy raises on content that is no plain array.
NO_ARRAY = (ValueError, TypeError, OverflowError, MemoryError, SyntaxError, tokenize.TokenError)
# Key -> the type or types of its value, or the same of the keys of a dict that is its value.
Kinds = dict[str, "type | tuple[type, ...] | Kinds"]


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a temporary binary file beside `path`, which takes its name once it is on the disk.

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
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)              # a full disk does not say of what
        raise


class NpzWriter:
    """Adds arrays to an npz that is being written; made by open_npz."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive

    def add(self, name: str, array: np.ndarray) -> None:
        """Adds a small array."""
        self.add_rows(name, array.dtype, array.shape, [array])

    def add_rows(self, name: str, dtype: np.dtype, shape: tuple[int, ...],
                 chunks: Iterable[np.ndarray]) -> None:
        """Adds an array whose rows come in chunks, of which no more than one is in memory.

        Args:
            name: of the array in the npz.
            dtype: of the array; chunks are converted to it.
            shape: of the whole array.
            chunks: consecutive rows (n, *shape[1:]).
        """
        description = np.lib.format.dtype_to_descr(np.dtype(dtype))
        header = {"descr": description, "fortran_order": False, "shape": shape}
        member = zipfile.ZipInfo(f"{name}.npy")     # of a fixed date: equal contents, equal bytes
        with self._archive.open(member, "w", force_zip64=True) as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for chunk in chunks:
                stream.write(np.ascontiguousarray(chunk, dtype=dtype).tobytes())


@contextlib.contextmanager
def open_npz(path: str | Path, settings: dict[str, Any]) -> Iterator[NpzWriter]:
    """Opens an npz that is filled array by array and appears when it is whole.

    The plain dict `settings` is stored in it as JSON, see read_npz_settings.
    """
    with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        writer = NpzWriter(archive)
        yield writer
        writer.add("settings", np.array(json.dumps(settings)))


@contextlib.contextmanager
def read_npz(path: str | Path) -> Iterator[zipfile.ZipFile]:
    """Opens an npz as a zip archive.

    Raises:
        ValueError: there is no such file, or it is damaged, which may show when a member is read
            inside the block.
    """
    check_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except DAMAGED_ARCHIVE as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise                                   # of the operating system, which names the file
        raise ValueError(f"{path}: expected a whole npz, {error or 'its end is missing'}; "
                         "copy or make the file again") from error


def npz_members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Returns what lies in an npz: name of the array -> its member."""
    return {member.filename.removesuffix(".npy"): member for member in archive.infolist()}


def read_npz_array(path: str | Path, name: str) -> np.ndarray | None:
    """Returns a small array of an npz, or None if it has none of that name.

    Raises:
        ValueError: the file is damaged, or the array holds Python objects.
    """
    with read_npz(path) as archive:
        member = npz_members(archive).get(name)
        if member is None:
            return None
        with archive.open(member) as stream:
            try:
                return np.lib.format.read_array(stream, allow_pickle=False)
            except NO_ARRAY as error:
                raise ValueError(f"{path}: expected a plain array under {name}, found other "
                                 f"content ({error}); make the file again") from error


def read_npz_settings(path: str | Path) -> dict[str, Any]:
    """Returns the settings that open_npz stored in an npz; none if it is of others.

    Raises:
        ValueError: the file is damaged, or the settings are no JSON object.
    """
    stored = read_npz_array(path, "settings")
    if stored is None:
        return {}
    with contextlib.suppress(ValueError, TypeError, RecursionError):    # not one text, not JSON
        if isinstance(settings := json.loads(stored.item()), dict):
            return settings
    raise ValueError(f"{path}: expected settings as one JSON object, found {stored.dtype} "
                     f"{stored.shape} with other content; make the file again")


class Spool:
    """Arrays of bytes, all of one shape, kept on the disk; made by open_spool.

    An npz begins with the number of its rows; so rows whose number is not known yet wait here.
    """

    def __init__(self, file: BinaryIO, shape: tuple[int, ...]) -> None:
        self._file = file
        self._shape = shape

    def add(self, arrays: np.ndarray) -> None:
        """Adds arrays (n, *shape) uint8; n may be 0."""
        self._file.write(arrays.tobytes())

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields every array, of `shape` and uint8, in the order in which they were added."""
        self._file.seek(0)
        while content := self._file.read(math.prod(self._shape)):
            yield np.frombuffer(content, np.uint8).reshape(self._shape)


@contextlib.contextmanager
def open_spool(folder: str | Path, shape: tuple[int, ...]) -> Iterator[Spool]:
    """Opens a Spool of arrays of `shape`: a nameless file in `folder`, gone after the block."""
    with tempfile.TemporaryFile(dir=folder) as file:
        yield Spool(file, shape)


def write_json(path: str | Path, content: object) -> None:
    """Writes plain data as indented JSON, atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


def read_json(path: str | Path, kinds: Kinds | None = None) -> dict[str, Any]:
    """Reads a JSON file that holds one object.

    Args:
        path: the file.
        kinds: keys that must be there, with the types that their values may have.

    Raises:
        ValueError: the file is not JSON, no object, or lacks a key or holds another type under it;
            the message names the key.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:                     # of JSON and of UTF-8
        raise ValueError(f"{path}: expected JSON, {error}; the file is damaged, make it "
                         "again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(content).__name__}; make "
                         "the file again")
    check_kinds(content, kinds or {}, path)
    return content


def check_kinds(content: dict[str, Any], kinds: Kinds, path: str | Path) -> None:
    """Raises ValueError unless `content`, read from `path`, has each key with a value of its types.

    The message names a key inside another as optimizer.state. True and False count as whole numbers
    for Python; here they do not.
    """
    for key, kind in kinds.items():
        value = content.get(key)
        if isinstance(kind, dict):
            check_kinds(content, {key: dict}, path)
            inner = {f"{key}.{name}": part for name, part in value.items()}
            check_kinds(inner, {f"{key}.{name}": each for name, each in kind.items()}, path)
            continue
        allowed = kind if isinstance(kind, tuple) else (kind,)
        is_unwanted_bool = isinstance(value, bool) and bool not in allowed
        if not isinstance(value, allowed) or is_unwanted_bool:
            expected = " or ".join(each.__name__ for each in allowed)
            found = type(value).__name__ if key in content else "none"
            raise ValueError(f"{path}: expected {key} as {expected}, found {found}; the file is "
                             "damaged, make it again")


def check_file(path: str | Path, hint: str = "") -> None:
    """Raises ValueError unless `path` is an existing file; `hint` says what to do."""
    if not Path(path).is_file():
        found = "a folder" if Path(path).is_dir() else "none"
        advice = f"; {hint}" if hint else ""
        raise ValueError(f"{path}: expected a file, found {found}{advice}")


def check_output(path: str | Path) -> None:
    """Raises ValueError unless a file can be written at `path`; creates its folder if missing."""
    if Path(path).is_dir():
        raise ValueError(f"{path}: expected the name of a file to write, found a folder; add a "
                         "name")
    check_writable_folder(Path(path).parent)


def check_writable_folder(path: str | Path) -> None:
    """Raises ValueError unless files can be made in folder `path`; creates it if missing."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"{path}: expected a writable folder, {error.strerror}; name another "
                         "place") from error


def file_sha256(path: str | Path) -> str:
    """Returns the SHA-256 of a file's bytes as hexadecimal text."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> np.ndarray:
    """Returns the little-endian bytes of a tensor of any dtype, row-major, as (n,) uint8."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy()         # little-endian wherever torch runs


def codebook_sha256(codebook: Tensor) -> str:
    """Returns the SHA-256 of the float32 little-endian bytes of a codebook (V, E)."""
    return hashlib.sha256(tensor_bytes(codebook.float())).hexdigest()


def mapping_sha256(mapping: Tensor) -> str:
    """Returns the SHA-256 of the int64 little-endian bytes of a mapping (V,)."""
    return hashlib.sha256(tensor_bytes(mapping.long())).hexdigest()


def weights_sha256(state: dict[str, Tensor]) -> str:
    """Returns the SHA-256 over name, dtype, shape and bytes of a state dict's tensors, by name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
