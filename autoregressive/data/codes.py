"""Codes of data sets on disk: what a store is, how it is read and checked; the mapping that turns codes into tokens.

A store is one folder, written by code_writer.py:

    manifest.json   what the codes are: dataset, classes, crops in their order, V, hashes, failed images, checksums
    codes.npy       (N, crops, T) uint16 (int32 above V = 65,536), the codes of every crop of every image
    labels.npy      (N,) int64
    status.npy      (N,) uint8, failures/: only while the store is being written

Letters: N images, T tokens, V codes, K clusters, S codes per cluster.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autoregressive.data.older_codes import find_older_codes, read_older_codes
from autoregressive.runtime.checkpoint import read_checkpoint
from autoregressive.runtime.files import mapping_sha256, read_json

CHECKSUM_ROWS = 65536                               # rows of the codes that one checksum covers
SAME_IN_COMBINED = ("num_images", "num_tokens", "dataset", "class_names", "images_sha256", "image_size", "grid",
                    "codebook_size", "codebook_sha256", "tokenizer_sha256")


def code_dtype(codebook_size):
    """Returns the dtype that codes 0 .. codebook_size - 1 are stored in."""
    return np.dtype(np.uint16 if codebook_size <= 65536 else np.int32)


def add_code_args(parser, several=False):
    """Declares where the codes lie: shared by extraction, its check, and training, which combines `several` stores."""
    if several:
        parser.add_argument("--code-path", required=True, nargs="+", action="extend",
                            help="folder of the codes; several, of the same images, add their crops to each other")
    else:
        parser.add_argument("--code-path", required=True, help="folder of the codes")


def compare_manifests(expected, found):
    """Returns the first difference as text, `key value, found one with value`; None if there is none.

    Args:
        expected: dict.
        found: dict; keys that `expected` lacks do not count.
    """
    for key, value in expected.items():
        if found.get(key) != value:
            return f"{key} {_shorten(value)}, found one with {_shorten(found.get(key))}"
    return None


def _shorten(value):
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def checksum_of_rows(array, first, bar=None):
    """Returns the SHA-256 of the bytes of CHECKSUM_ROWS rows of an array from row `first` on."""
    digest, end = hashlib.sha256(), min(first + CHECKSUM_ROWS, len(array))
    for start in range(first, end, 1024):                           # in pieces, so that a bar can follow
        rows = array[start:min(start + 1024, end)]
        digest.update(np.ascontiguousarray(rows))
        if bar is not None:
            bar.update(len(rows))
    return digest.hexdigest()


@dataclass(frozen=True)
class CodeStore:
    """One or several finished stores, memory-mapped.

    Attributes:
        path: the folder; those of several joined by " + ".
        manifest: dict, see the module; what an older layout does not tell is None.
        codes: (N, crops, T) integers on disk; codes[rows, crops] reads them.
        labels: (N,) int64.
        rows: indices of the images that did not fail, ascending.
    """

    path: str
    manifest: dict
    codes: np.ndarray
    labels: np.ndarray
    rows: np.ndarray

    @property
    def grid(self):
        return self.manifest["grid"]


def open_codes(*paths):
    """Opens finished stores, or folders of the older layout, for reading.

    Args:
        paths: their folders; several must hold the same images, whose crops are put together.

    Returns:
        CodeStore

    Raises:
        ValueError: there is none, one is unfinished, empty or damaged, or they do not fit each other.
    """
    stores = [_open_one(Path(path)) for path in paths]
    first = stores[0]
    for other in stores[1:]:
        expected = {key: first.manifest[key] for key in SAME_IN_COMBINED}
        if difference := compare_manifests(expected, other.manifest):
            raise ValueError(f"{other.path}: expected a store with {difference}; --code-path combines crops of the "
                             f"same images only, as in {first.path}")
        if not np.array_equal(first.labels, other.labels):
            raise ValueError(f"{other.path}: expected the labels of {first.path}, found others; --code-path combines "
                             "crops of the same images only")
    if len(stores) == 1:
        return first
    manifest = first.manifest | {"num_crops": sum(store.codes.shape[1] for store in stores),
                                 "crops": [store.manifest["crops"] for store in stores]}
    rows = first.rows
    for store in stores[1:]:
        rows = np.intersect1d(rows, store.rows, assume_unique=True)
    codes = CombinedCodes([store.codes for store in stores])
    return CodeStore(" + ".join(store.path for store in stores), manifest, codes, first.labels, rows)


class CombinedCodes:
    """Codes of several stores of the same images, one after the other along the crops."""

    def __init__(self, parts):
        self._parts = parts
        self._ends = np.cumsum([part.shape[1] for part in parts])
        self.shape = (parts[0].shape[0], int(self._ends[-1]), parts[0].shape[2])

    def __getitem__(self, key):
        """Returns the codes (n, T) int32 of pairs (rows (n,), crops (n,))."""
        rows, crops = key
        codes = np.empty((len(rows), self.shape[2]), np.int32)
        owners = np.searchsorted(self._ends, crops, side="right")
        for number, (part, end) in enumerate(zip(self._parts, self._ends, strict=True)):
            mine = owners == number
            codes[mine] = part[rows[mine], crops[mine] - (end - part.shape[1])]
        return codes


def _open_one(path):
    if not (path / "manifest.json").is_file():
        if older := find_older_codes(path):
            codes, labels = read_older_codes(*older)
            manifest = dict.fromkeys(SAME_IN_COMBINED) | {
                "num_images": len(labels), "num_crops": codes.shape[1], "num_tokens": codes.shape[2],
                "grid": round(codes.shape[2] ** 0.5), "crops": None, "failed": []}
            return CodeStore(str(path), manifest, codes, labels, np.arange(len(labels)))
        raise ValueError(f"{path}: expected a code store with a manifest.json, found "
                         f"{'none in this folder' if path.is_dir() else 'no such folder'}; "
                         "make one with autoregressive/train/extract_codes_c2i.py")
    manifest = read_json(path / "manifest.json")
    if not manifest.get("complete"):
        raise ValueError(f"{path}: expected a finished code store, found an unfinished one; "
                         "run the same extraction command again, it continues")
    codes, labels = _map(path / "codes.npy"), _map(path / "labels.npy")
    shape = (manifest["num_images"], manifest["num_crops"], manifest["num_tokens"])
    if codes.shape != shape or labels.shape != shape[:1]:
        raise ValueError(f"{path}: expected codes {shape} and as many labels, found {codes.shape} and {labels.shape}; "
                         "the store is damaged, extract it again with --overwrite")
    good = np.ones(len(labels), dtype=bool)
    good[[failure["row"] for failure in manifest["failed"]]] = False
    if not good.any():
        raise ValueError(f"{path}: expected at least one image, found none that could be read")
    return CodeStore(str(path), manifest, codes, labels, np.flatnonzero(good))


def _map(path):
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: expected an array, {error}; the store is damaged, extract it again with "
                         "--overwrite") from error


def verify_checksums(store, bar=None):
    """Reads a whole store and compares it with the checksums of its manifest.

    Args:
        store: CodeStore of one folder.
        bar: progress bar of the rows.

    Raises:
        ValueError: rows are not what was written; the message names them.
    """
    for index, expected in enumerate(store.manifest["codes_sha256"]):
        first = index * CHECKSUM_ROWS
        if checksum_of_rows(store.codes, first, bar) != expected:
            raise ValueError(f"{store.path}/codes.npy: expected rows {first} to "
                             f"{min(first + CHECKSUM_ROWS, len(store.codes)) - 1} as they were written, found others; "
                             "the store is damaged, extract it again with --overwrite")
    if checksum_of_rows(store.labels, 0) != store.manifest["labels_sha256"]:
        raise ValueError(f"{store.path}/labels.npy: expected the labels as they were written, found others; the store "
                         "is damaged, extract it again with --overwrite")


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
