"""Opens stores of codes, several as one, and refuses what is unfinished or damaged."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autoregressive.data.arrays import read_integers
from autoregressive.data.checksums import CHECKSUM_ROWS, checksum_of_labels
from autoregressive.data.codes import DAMAGED, CodeStore
from autoregressive.data.combined_codes import CombinedCodes
from autoregressive.data.older_codes import OlderFolders, find_older_codes, open_older_codes
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.files import read_json
from autoregressive.runtime.identity import find_difference
from autoregressive.runtime.log import progress

SAME_IN_COMBINED = ("num_images", "num_tokens", "dataset", "class_names", "images_sha256",
                    "image_size", "grid", "codebook_size", "codebook_sha256", "tokenizer_sha256")
KINDS = {"num_images": int, "num_crops": int, "num_tokens": int, "grid": int, "image_size": int,
         "codebook_size": int, "dataset": str, "crops": list, "class_names": list, "failed": list,
         "images_sha256": str, "codebook_sha256": str, "tokenizer_sha256": str,
         "codes_sha256": list, "labels_sha256": str}            # of the values of a manifest


def open_older_stores(paths: Sequence[str], session: Session) -> dict[str, CodeStore]:
    """Opens those of some folders that are of the older layout, with a progress bar.

    Such a store is small, since it reads its codes when they are asked for: one process opens it,
    and sends it to the others.

    Args:
        paths: folders of codes, of any layout.
        session: for the progress bar.

    Returns:
        path -> store, without the folders that open_codes has to open.

    Raises:
        ValueError: one is damaged, or holds no codes at all.
    """
    stores = {}
    for path in paths:
        if not has_manifest(path):
            folders = _find_older(Path(path))
            with progress(session, folders.num_files, folders.labels.name, "image") as bar:
                stores[path] = _open_older(folders, bar.update)
    return stores


def open_codes(*paths: str | Path, opened: dict[str, CodeStore] | None = None) -> CodeStore:
    """Opens finished stores, or folders of the older layout, for reading.

    Args:
        paths: their folders; several must hold the same images, whose crops are put together.
        opened: what open_older_stores returned, which is not opened again.

    Raises:
        ValueError: there is none, one is unfinished, empty or damaged, or they do not fit each
            other.
    """
    opened = opened or {}
    stores = [opened[path] if path in opened else _open_one(Path(path)) for path in paths]
    return stores[0] if len(stores) == 1 else _combine(stores)


def _combine(stores: Sequence[CodeStore]) -> CodeStore:
    first = stores[0]
    rows = first.rows
    for other in stores[1:]:
        difference = find_difference(first.manifest, other.manifest, SAME_IN_COMBINED)
        if difference:
            raise ValueError(f"{other.path}: expected a store with {difference}; --code-path "
                             f"combines crops of the same images only, as in {first.path}")
        if not np.array_equal(first.labels, other.labels):
            raise ValueError(f"{other.path}: expected the labels of {first.path}, found others; "
                             "--code-path combines crops of the same images only")
        rows = np.intersect1d(rows, other.rows, assume_unique=True)
    codes = CombinedCodes([store.codes for store in stores])
    manifest = first.manifest | {
        "num_crops": codes.shape[1], "crops": [store.manifest["crops"] for store in stores],
        "codes_sha256": [store.manifest.get("codes_sha256") for store in stores]}
    path = " + ".join(store.path for store in stores)
    return CodeStore(path, manifest, codes, first.labels, rows)


def has_manifest(path: str | Path) -> bool:
    """Says whether a folder holds a store of ours, finished or not, unlike the older layout."""
    return (Path(path) / "manifest.json").is_file()


def _open_one(path: Path) -> CodeStore:
    return _open_finished(path) if has_manifest(path) else _open_older(_find_older(path))


def _find_older(path: Path) -> OlderFolders:
    folders = find_older_codes(path)
    if folders is None:
        found = "none in this folder" if path.is_dir() else "no such folder"
        raise ValueError(f"{path}: expected a code store with a manifest.json, found {found}; "
                         "make one with autoregressive/train/extract_codes_c2i.py")
    return folders


def _open_older(folders: OlderFolders,
                advance: Callable[[int], None] = lambda count: None) -> CodeStore:
    """Returns a store of the older layout, with a manifest of what its files tell.

    See open_older_codes.
    """
    codes, labels = open_older_codes(folders, advance)
    path = folders.codes.parent
    _, num_crops, num_tokens = codes.shape
    manifest = dict.fromkeys(SAME_IN_COMBINED) | {
        "num_images": len(labels), "num_crops": num_crops, "num_tokens": num_tokens,
        "grid": math.isqrt(num_tokens), "crops": None, "failed": [],
        "codes_sha256": codes.sample_sha256,        # a text: no list of checksums of all rows
        "labels_sha256": checksum_of_labels(labels)}
    _check_grid(manifest, path)
    return CodeStore(str(path), manifest, codes, labels, np.arange(len(labels)))


def _open_finished(path: Path) -> CodeStore:
    record = path / "manifest.json"
    if not read_json(record, {"complete": bool})["complete"]:
        raise ValueError(f"{path}: expected a finished code store, found an unfinished one; "
                         "run the same extraction command again, it continues")
    manifest = read_json(record, KINDS)
    _check_grid(manifest, path)
    codes = read_integers(path / "codes.npy", DAMAGED, mapped=True)
    labels = read_integers(path / "labels.npy", DAMAGED, mapped=True)
    shape = (manifest["num_images"], manifest["num_crops"], manifest["num_tokens"])
    if codes.shape != shape or labels.shape != shape[:1]:
        raise ValueError(f"{path}: expected codes {shape} and as many labels, found {codes.shape} "
                         f"and {labels.shape}; {DAMAGED}")
    failed = [failure.get("row") if isinstance(failure, dict) else None
              for failure in manifest["failed"]]
    if not all(isinstance(row, int) and 0 <= row < len(labels) for row in failed):
        raise ValueError(f"{record}: expected a row of every image in failed, found others; "
                         f"{DAMAGED}")
    num_checksums = -(-len(codes) // CHECKSUM_ROWS)
    if len(manifest["codes_sha256"]) != num_checksums:
        raise ValueError(f"{record}: expected {num_checksums} checksums in codes_sha256, found "
                         f"{len(manifest['codes_sha256'])}; {DAMAGED}")
    rows = np.setdiff1d(np.arange(len(labels)), failed)
    if not len(rows):
        raise ValueError(f"{path}: expected at least one image, found none that could be read")
    return CodeStore(str(path), manifest, codes, labels, rows)


def _check_grid(manifest: dict[str, Any], path: Path) -> None:
    grid = manifest["grid"]
    if grid < 1 or manifest["num_tokens"] != grid * grid:
        raise ValueError(f"{path}: expected the tokens of a square grid, found "
                         f"{manifest['num_tokens']} tokens for a grid of {grid} x {grid}; extract "
                         "the codes again")
