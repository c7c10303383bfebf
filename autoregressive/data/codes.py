"""Codes of a data set on disk, and the mapping that turns them into tokens.

A store is one folder:

    manifest.json   what the codes are: dataset, classes, crops, grid, V, hashes, failed images, and whether it is whole
    codes.npy       (N, crops, T) uint16 (int32 above V = 65,536), the codes of every crop of every image
    labels.npy      (N,) int64
    status.npy      (N,) uint8 while the store is being written: 0 to do, 1 written, 2 failed

Rows are written with os.pwrite at their own place, first the codes, then the status: a kill loses at most the rows that
had no status yet, and any number of processes writes one store without a merge.

Letters: N images, T tokens, V codes, K clusters, S codes per cluster.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autoregressive.runtime.checkpoint import read_checkpoint
from autoregressive.runtime.files import atomic_write, mapping_sha256, read_json, write_json

TO_DO, WRITTEN, FAILED = 0, 1, 2


def code_dtype(codebook_size):
    """Returns the dtype that codes 0 .. codebook_size - 1 are stored in."""
    return np.dtype(np.uint16 if codebook_size <= 65536 else np.int32)


def add_code_args(parser):
    """Declares where the codes lie: shared by extraction and training."""
    parser.add_argument("--code-path", required=True, help="folder of the codes")


def _preallocate(path, shape, dtype):
    """Makes a .npy file of zeros whose space on the disk is reserved; an existing one is kept."""
    if path.exists():
        return
    temporary = path.with_name(f".{path.name}.tmp")
    np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):                              # not on every system
        with open(temporary, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
    os.replace(temporary, path)


def _write_rows(path, first_row, rows):
    """Writes rows of a .npy file at their place; on a full disk this raises OSError, a map would kill the process."""
    offset = np.load(path, mmap_mode="r").offset + first_row * rows[0].nbytes
    data = memoryview(np.ascontiguousarray(rows)).cast("B")
    with open(path, "r+b") as file:
        while len(data):
            written = os.pwrite(file.fileno(), data, offset)
            data, offset = data[written:], offset + written


class CodeWriter:
    """Writes rows of one store; every process of an extraction opens its own."""

    def __init__(self, path, manifest):
        """
        Args:
            path: folder that `create` laid out.
            manifest: what was given to `create`.
        """
        self.path, self.manifest = Path(path), manifest

    @staticmethod
    def create(path, manifest, labels):
        """Lays out an unfinished store, or finds the one that the same extraction began (one process calls this).

        Args:
            path: folder of the store.
            manifest: dict with at least num_images, num_crops, num_tokens, codebook_size.
            labels: (N,) int64.

        Raises:
            ValueError: another store, or something else, lies there.
        """
        path = Path(path)
        if (path / "manifest.json").is_file():
            found = read_json(path / "manifest.json")
            for key in manifest:
                if found.get(key) != manifest[key]:
                    raise ValueError(f"{path}: expected a store with {key} {manifest[key]!r}, found one with "
                                     f"{found.get(key)!r}; choose another --code-path or remove the folder")
            if found["complete"]:
                return
        elif path.is_dir() and any(path.iterdir()):
            raise ValueError(f"{path}: expected a new or empty folder, or a store; found other files")
        else:
            write_json(path / "manifest.json", manifest | {"complete": False})
        shape = (manifest["num_images"], manifest["num_crops"], manifest["num_tokens"])
        _preallocate(path / "codes.npy", shape, code_dtype(manifest["codebook_size"]))
        with atomic_write(path / "labels.npy") as file:
            np.save(file, labels.astype(np.int64))
        _preallocate(path / "status.npy", shape[:1], np.dtype(np.uint8))

    @property
    def is_complete(self):
        return read_json(self.path / "manifest.json")["complete"]

    def is_written(self, rows):
        """Says whether every row of a range was written, or recorded as failed, before."""
        return bool((np.load(self.path / "status.npy", mmap_mode="r")[rows.start:rows.stop] != TO_DO).all())

    def write(self, rows, codes, failures):
        """Writes consecutive rows: codes first, then failures, then the status that makes them count.

        Args:
            rows: range of rows.
            codes: (len(rows), crops, T) integers; None if all failed.
            failures: dict of row -> (path, reason); the codes of these rows are never read.
        """
        if codes is not None:
            _write_rows(self.path / "codes.npy", rows.start, codes.astype(code_dtype(self.manifest["codebook_size"])))
        if failures:
            lines = [json.dumps({"row": row, "path": str(path), "reason": reason}) + "\n"
                     for row, (path, reason) in failures.items()]
            with open(self.path / "failures.jsonl", "a") as file:
                file.writelines(lines)
        status = [FAILED if row in failures else WRITTEN for row in rows]
        _write_rows(self.path / "status.npy", rows.start, np.array(status, dtype=np.uint8))

    def finish(self):
        """Marks the store as whole, with its failures in the manifest (one process calls this, after all have written).

        Raises:
            RuntimeError: rows are missing.
        """
        status = np.load(self.path / "status.npy")
        if missing := int((status == TO_DO).sum()):
            raise RuntimeError(f"{self.path}: {missing} rows were not written; run the same command again")
        log = self.path / "failures.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        failed = {line["row"]: line for line in lines}              # a row that was tried twice is listed once
        manifest = self.manifest | {"complete": True, "failed": [failed[row] for row in sorted(failed)]}
        write_json(self.path / "manifest.json", manifest)
        (self.path / "status.npy").unlink()
        log.unlink(missing_ok=True)


@dataclass(frozen=True)
class CodeStore:
    """A finished store, memory-mapped.

    Attributes:
        path: its folder.
        manifest: dict, see the module.
        codes: (N, crops, T) integers, mapped from disk.
        labels: (N,) int64.
        rows: indices of the images that did not fail, ascending.
    """

    path: Path
    manifest: dict
    codes: np.ndarray
    labels: np.ndarray
    rows: np.ndarray

    @property
    def grid(self):
        return self.manifest["grid"]


def open_codes(path):
    """Opens a finished store for reading.

    Args:
        path: its folder.

    Returns:
        CodeStore

    Raises:
        ValueError: there is none, it is unfinished, empty, or its files do not fit its manifest.
    """
    path = Path(path)
    if not (path / "manifest.json").is_file():
        raise ValueError(f"{path}: expected a code store with a manifest.json, found "
                         f"{'none in this folder' if path.is_dir() else 'no such folder'}; "
                         "make one with autoregressive/train/extract_codes_c2i.py")
    manifest = read_json(path / "manifest.json")
    if not manifest.get("complete"):
        raise ValueError(f"{path}: expected a finished code store, found an unfinished one; "
                         "run the same extraction command again, it continues")
    codes = np.load(path / "codes.npy", mmap_mode="r", allow_pickle=False)
    labels = np.load(path / "labels.npy", allow_pickle=False)
    shape = (manifest["num_images"], manifest["num_crops"], manifest["num_tokens"])
    if codes.shape != shape or labels.shape != shape[:1]:
        raise ValueError(f"{path}: expected codes {shape} and as many labels, found {codes.shape} and {labels.shape}; "
                         "the store is damaged, extract it again")
    good = np.ones(len(labels), dtype=bool)
    good[[failure["row"] for failure in manifest["failed"]]] = False
    if not good.any():
        raise ValueError(f"{path}: expected at least one image, found none that could be read")
    return CodeStore(path, manifest, codes, labels, np.flatnonzero(good))


@dataclass(frozen=True)
class Mapping:
    """Old code -> token, with the hashes that travel with it.

    Attributes:
        path: its file.
        tokens: (V,) int64, a permutation.
        hashes: dict with mapping_sha256, and, where its side file lies beside it, codebook_sha256 (of the reordered
            codebook), original_codebook_sha256, cluster_size.
    """

    path: Path
    tokens: np.ndarray
    hashes: dict


def default_mapping_path(cluster_size):
    """Returns where balance_k_means.py puts the mapping of the published codebook."""
    return f"pretrained_models/mapping-kmeans+nearest-cluster_size={cluster_size}.pt"


def read_mapping(path, codebook_size):
    """Reads a mapping and checks that it is a permutation of the codebook.

    Args:
        path: file of an int64 tensor (V,); `{path}.json` beside it holds its hashes.
        codebook_size: V.

    Returns:
        Mapping

    Raises:
        ValueError: missing, of another size, no permutation, or not what its side file says.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected the mapping of the codebook, found no file; "
                         "make it with balance_k_means.py or name it with --mapping-path")
    tokens = read_checkpoint(path)
    found = tuple(getattr(tokens, "shape", ()))
    if found != (codebook_size,):
        raise ValueError(f"{path}: expected a mapping of {codebook_size} codes, got shape {found}; "
                         "run balance_k_means.py on the checkpoint that the codes were extracted with")
    if not np.array_equal(np.sort(tokens.numpy()), np.arange(codebook_size)):
        raise ValueError(f"{path}: expected a permutation of 0 .. {codebook_size - 1}, got repeated or other numbers; "
                         "run balance_k_means.py again")
    hashes = {"mapping_sha256": mapping_sha256(tokens)}
    side_file = path.with_name(path.name + ".json")
    if side_file.is_file():
        recorded = read_json(side_file)
        if recorded["mapping_sha256"] != hashes["mapping_sha256"]:
            raise ValueError(f"{path}: expected the mapping that {side_file.name} describes, got another; "
                             "run balance_k_means.py again")
        hashes = recorded
    return Mapping(path, tokens.numpy().astype(np.int64), hashes)
