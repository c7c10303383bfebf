"""Codes of data sets on disk: what a store is, how it is read and checked; the mapping that turns codes into tokens.

A store is one folder, written by code_writer.py:

    manifest.json   what the codes are: dataset, classes, crops in their order, V, hashes, failed images, checksums
    codes.npy       (N, crops, T) uint16 (int32 above V = 65,536), the codes of every crop of every image
    labels.npy      (N,) int64
    status.npy      (N,) uint8, failures/: only while the store is being written

Letters: N images, T tokens, V codes, K clusters, S codes per cluster.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoregressive.data.arrays import read_integers
from autoregressive.data.older_codes import OlderCodes, open_older_codes
from autoregressive.runtime.checkpoint import read_checkpoint
from autoregressive.runtime.entry import Parser
from autoregressive.runtime.files import mapping_sha256, read_json
from autoregressive.runtime.identity import find_difference

CHECKSUM_ROWS = 65536                               # rows of the codes that one checksum covers
SAME_IN_COMBINED = ("num_images", "num_tokens", "dataset", "class_names", "images_sha256", "image_size", "grid",
                    "codebook_size", "codebook_sha256", "tokenizer_sha256")
KINDS = {"num_images": int, "num_crops": int, "num_tokens": int, "grid": int, "image_size": int, "codebook_size": int,
         "dataset": str, "crops": list, "class_names": list, "failed": list, "images_sha256": str,
         "codebook_sha256": str, "tokenizer_sha256": str, "codes_sha256": list, "labels_sha256": str}
DAMAGED = "the store is damaged, extract it again with --overwrite"
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def code_dtype(codebook_size: int) -> type:
    """Returns the dtype that codes 0 .. codebook_size - 1 are stored in."""
    return np.uint16 if codebook_size <= 65536 else np.int32


def add_code_args(parser: Parser, several: bool = False) -> None:
    """Declares where the codes lie: shared by extraction, its check, and training, which combines `several` stores."""
    how_many = {"nargs": "+", "action": "extend"} if several else {}
    parser.add_argument("--code-path", required=True, **how_many, help="folder of the codes" + (
        "; several, of the same images, add their crops to each other" if several else ""))


def checksum_of_rows(array: np.ndarray, first: int, bar: Any = None) -> str:
    """Returns the SHA-256 of the bytes of CHECKSUM_ROWS rows of an array from row `first` on."""
    digest, covered = hashlib.sha256(), array[first:first + CHECKSUM_ROWS]
    for start in range(0, len(covered), 1024):                      # in pieces, so that a bar can follow
        rows = covered[start:start + 1024]
        digest.update(np.ascontiguousarray(rows))
        if bar is not None:
            bar.update(len(rows))
    return digest.hexdigest()


def checksum_of_labels(labels: np.ndarray) -> str:
    """Returns the SHA-256 of the bytes of all labels (N,)."""
    return hashlib.sha256(np.ascontiguousarray(labels)).hexdigest()


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
    def grid(self) -> int:
        return self.manifest["grid"]

    @property
    def crops_to_draw(self) -> np.ndarray:
        """Crops (n,) that are equally likely in training: each of several stores comes as often as the others."""
        is_combined = isinstance(self.codes, CombinedCodes)
        counts = self.codes.num_crops if is_combined else [self.codes.shape[1]]
        per_store = math.lcm(*counts)
        repeats = np.repeat([per_store // count for count in counts], counts)
        return np.repeat(np.arange(sum(counts)), repeats)


def open_codes(*paths: str | Path) -> CodeStore:
    """Opens finished stores, or folders of the older layout, for reading.

    Args:
        paths: their folders; several must hold the same images, whose crops are put together.

    Returns:
        CodeStore

    Raises:
        ValueError: there is none, one is unfinished, empty or damaged, or they do not fit each other.
    """
    stores = [_open_one(Path(path)) for path in paths]
    first, *others = stores
    rows = first.rows
    for other in others:
        if difference := find_difference(first.manifest, other.manifest, SAME_IN_COMBINED):
            raise ValueError(f"{other.path}: expected a store with {difference}; --code-path combines crops of the "
                             f"same images only, as in {first.path}")
        if not np.array_equal(first.labels, other.labels):
            raise ValueError(f"{other.path}: expected the labels of {first.path}, found others; --code-path combines "
                             "crops of the same images only")
        rows = np.intersect1d(rows, other.rows, assume_unique=True)
    if not others:
        return first
    manifest = first.manifest | {"num_crops": sum(store.codes.shape[1] for store in stores),
                                 "crops": [store.manifest["crops"] for store in stores],
                                 "codes_sha256": [store.manifest.get("codes_sha256") for store in stores]}
    codes = CombinedCodes([store.codes for store in stores])
    return CodeStore(" + ".join(store.path for store in stores), manifest, codes, first.labels, rows)


class CombinedCodes:
    """Codes of several stores of the same images, one after the other along the crops.

    Attributes:
        num_crops: crops of every store.
    """

    def __init__(self, parts: list[Any]):
        self.num_crops = [part.shape[1] for part in parts]
        self._crops = [(part, crop) for part in parts for crop in range(part.shape[1])]
        self.shape = (parts[0].shape[0], len(self._crops), parts[0].shape[2])

    def __getitem__(self, key: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Returns the codes (n, T) int32 of pairs (rows (n,), crops (n,))."""
        rows, crops = key
        codes = np.empty((len(rows), self.shape[2]), np.int32)
        for number in np.unique(crops):
            part, crop = self._crops[number]
            codes[crops == number] = part[rows[crops == number], crop]
        return codes


def _open_one(path):
    if not (path / "manifest.json").is_file():
        if older := open_older_codes(path):
            codes, labels = older
            num_tokens = codes.shape[2]
            manifest = dict.fromkeys(SAME_IN_COMBINED) | {
                "num_images": len(labels), "num_crops": codes.shape[1], "num_tokens": num_tokens,
                "grid": math.isqrt(num_tokens), "crops": None, "failed": [],
                "codes_sha256": codes.sample_sha256,            # a text: no list of checksums of all rows
                "labels_sha256": checksum_of_labels(labels)}
            _check_grid(manifest, path)
            return CodeStore(str(path), manifest, codes, labels, np.arange(len(labels)))
        raise ValueError(f"{path}: expected a code store with a manifest.json, found "
                         f"{'none in this folder' if path.is_dir() else 'no such folder'}; "
                         "make one with autoregressive/train/extract_codes_c2i.py")
    if not read_json(path / "manifest.json", {"complete": bool})["complete"]:
        raise ValueError(f"{path}: expected a finished code store, found an unfinished one; "
                         "run the same extraction command again, it continues")
    manifest = read_json(path / "manifest.json", KINDS)
    _check_grid(manifest, path)
    codes = read_integers(path / "codes.npy", DAMAGED, mapped=True)
    labels = read_integers(path / "labels.npy", DAMAGED, mapped=True)
    shape = (manifest["num_images"], manifest["num_crops"], manifest["num_tokens"])
    if codes.shape != shape or labels.shape != shape[:1]:
        raise ValueError(f"{path}: expected codes {shape} and as many labels, found {codes.shape} and {labels.shape}; "
                         f"{DAMAGED}")
    failed = [failure.get("row") if isinstance(failure, dict) else None for failure in manifest["failed"]]
    if not all(isinstance(row, int) and 0 <= row < len(labels) for row in failed):
        raise ValueError(f"{path / 'manifest.json'}: expected a row of every image in failed, found others; {DAMAGED}")
    num_checksums = -(-len(codes) // CHECKSUM_ROWS)
    if len(manifest["codes_sha256"]) != num_checksums:
        raise ValueError(f"{path / 'manifest.json'}: expected {num_checksums} checksums in codes_sha256, found "
                         f"{len(manifest['codes_sha256'])}; {DAMAGED}")
    rows = np.setdiff1d(np.arange(len(labels)), failed)
    if not len(rows):
        raise ValueError(f"{path}: expected at least one image, found none that could be read")
    return CodeStore(str(path), manifest, codes, labels, rows)


def _check_grid(manifest: dict[str, Any], path: Path) -> None:
    grid = manifest["grid"]
    if grid < 1 or manifest["num_tokens"] != grid * grid:
        raise ValueError(f"{path}: expected the tokens of a square grid, found {manifest['num_tokens']} tokens for a "
                         f"grid of {grid} x {grid}; extract the codes again")


def verify_checksums(store: CodeStore, bar: Any = None) -> None:
    """Reads a whole store and compares it with the checksums of its manifest; the older layout has none.

    Args:
        store: CodeStore of one folder.
        bar: progress bar of the rows.

    Raises:
        ValueError: rows are not what was written; the message names them.
    """
    if isinstance(store.codes, OlderCodes):
        return
    for index, checksum in enumerate(store.manifest["codes_sha256"]):
        first = index * CHECKSUM_ROWS
        if checksum_of_rows(store.codes, first, bar) != checksum:
            raise ValueError(f"{store.path}/codes.npy: expected rows {first} to "
                             f"{min(first + CHECKSUM_ROWS, len(store.codes)) - 1} as they were written, found others; "
                             f"{DAMAGED}")
    # Older stores carry the checksum of the first block of labels alone: the same, up to 65,536 images.
    accepted = (checksum_of_labels(store.labels), checksum_of_rows(store.labels, 0))
    if store.manifest["labels_sha256"] not in accepted:
        raise ValueError(f"{store.path}/labels.npy: expected the labels as they were written, found others; {DAMAGED}")


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


def default_mapping_path(cluster_size: int) -> str:
    """Returns where balance_k_means.py puts the mapping of the published codebook."""
    return f"pretrained_models/mapping-kmeans+nearest-cluster_size={cluster_size}.pt"


def read_mapping(path: str | Path, codebook_size: int) -> Mapping:
    """Reads a mapping and checks that it is a permutation of the codebook.

    Args:
        path: file of an int64 tensor (V,); `{path}.json` beside it holds its hashes.
        codebook_size: V.

    Returns:
        Mapping

    Raises:
        ValueError: missing, of another kind or size, no permutation, or not what its side file says.
    """
    tokens = read_checkpoint(path, "make the mapping with balance_k_means.py or name it with --mapping-path")
    found = tuple(getattr(tokens, "shape", ()))
    if found != (codebook_size,):
        raise ValueError(f"{path}: expected a mapping of {codebook_size} codes, got shape {found}; "
                         "run balance_k_means.py on the checkpoint that the codes were extracted with")
    if tokens.dtype not in INTEGERS or tokens.layout != torch.strided or tokens.is_meta:
        kind = "dense" if tokens.layout == torch.strided else "sparse"
        raise ValueError(f"{path}: expected a dense tensor of integers, got a {kind} one of {tokens.dtype}; "
                         "run balance_k_means.py again")
    tokens = tokens.long()
    if not np.array_equal(np.sort(tokens.numpy()), np.arange(codebook_size)):
        raise ValueError(f"{path}: expected a permutation of 0 .. {codebook_size - 1}, got repeated or other numbers; "
                         "run balance_k_means.py again")
    own = {"mapping_sha256": mapping_sha256(tokens)}
    side_file = Path(f"{path}.json")
    hashes = read_json(side_file, {"mapping_sha256": str}) if side_file.is_file() else own
    if hashes["mapping_sha256"] != own["mapping_sha256"]:
        raise ValueError(f"{path}: expected the mapping that {side_file.name} describes, got another; "
                         "run balance_k_means.py again")
    return Mapping(Path(path), tokens.numpy(), hashes)
