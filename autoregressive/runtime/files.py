"""Files that are whole or absent, and the hashes that travel with them."""

import contextlib
import hashlib
import json
import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch


@contextlib.contextmanager
def atomic_write(path):
    """Opens a temporary binary file beside `path` that takes its name once it is completely on disk.

    An exception inside the block removes the temporary file and leaves an older `path` as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())      # mkstemp's 0600 would hide results from colleagues
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def npz_writer(path):
    """Opens an npz that is filled array by array without holding one in memory, and appears when it is whole.

    Yields:
        add(name, dtype, shape, chunks): writes an array of `shape` whose rows come from consecutive arrays.
    """
    with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def add(name, dtype, shape, chunks):
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
            member = zipfile.ZipInfo(f"{name}.npy")                 # of a fixed date: equal contents, equal bytes
            with archive.open(member, "w", force_zip64=True) as stream:
                np.lib.format.write_array_header_1_0(stream, header)
                for chunk in chunks:
                    stream.write(np.ascontiguousarray(chunk, dtype=dtype).tobytes())

        yield add


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path, content):
    """Writes plain data as indented JSON, atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


def read_json(path):
    """Reads a JSON file.

    Raises:
        ValueError: the file is not JSON.
    """
    try:
        return json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, {error}; the file is damaged, make it again") from error


def require_file(path, hint=""):
    """Raises ValueError unless `path` is an existing file; `hint` says what to do."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: expected a file, found {'a folder' if Path(path).is_dir() else 'none'}"
                         + (f"; {hint}" if hint else ""))


def require_writable_folder(path):
    """Raises ValueError unless files can be made in folder `path`, which is created if it is missing."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"{path}: expected a writable folder, {error.strerror}; name another place") from error


def file_sha256(path):
    """Returns the SHA-256 of a file's bytes as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file):
    digest = hashlib.sha256()                       # Python 3.10 has no hashlib.file_digest
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
