"""Whether a store of codes is what a training needs: made for its flags and mapping, undamaged."""

from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from autoregressive.data.checksums import CHECKSUM_ROWS, checksum_of_labels, checksum_of_rows
from autoregressive.data.codes import DAMAGED, CodeStore
from autoregressive.data.mapping import Mapping
from autoregressive.data.older_codes import OlderCodes
from autoregressive.data.opening import has_manifest, open_codes
from autoregressive.runtime.files import Kinds, check_kinds
from autoregressive.runtime.identity import check_codebook, check_recorded
from autoregressive.runtime.log import LOGGER

TOKENIZER_KINDS: Kinds = {"vq_model": str, "codebook_embed_dim": int}   # in newer manifests


def recorded_flags(store: CodeStore) -> dict[str, Any]:
    """Returns the flags of a training that its codes tell; None is unknown.

    Raises:
        ValueError: they are none that a training could have.
    """
    manifest = store.manifest
    names = manifest["class_names"]
    size = manifest["image_size"]
    codebook_size = manifest["codebook_size"]
    flags = {"vocab_size": codebook_size, "codebook_size": codebook_size,
             "num_classes": None if names is None else len(names), "image_size": size,
             "downsample_size": None if size is None else size // store.grid}
    for name, value in flags.items():
        if value is not None and value < 1:
            raise ValueError(f"{store.path}: expected {name} of at least 1, found {value}; "
                             f"{DAMAGED}")
    of_tokenizer = {name: manifest[name] for name in TOKENIZER_KINDS if name in manifest}
    check_kinds(of_tokenizer, {name: TOKENIZER_KINDS[name] for name in of_tokenizer}, store.path)
    return flags | of_tokenizer


def check_store(store: CodeStore, mapping: Mapping, grid: int) -> None:
    """Raises ValueError if a store, its mapping and the grid of the flags do not agree."""
    manifest = store.manifest
    check_recorded("--image-size / --downsample-size (the grid)", grid, store.grid, store.path)
    if manifest.get("claimed"):
        LOGGER.warning("%s: imported codes, whose codebook is claimed, not verified; compare them "
                       "with their images with scripts/autoregressive/check_codes.sh", store.path)
    check_codebook(manifest["codebook_sha256"], mapping.hashes.get("original_codebook_sha256"),
                   store.path, mapping.path)


def verify_codes(paths: Sequence[str]) -> None:
    """Compares stores of codes with their checksums; the older layout has none.

    Raises:
        ValueError: something differs.
    """
    for path in paths:
        if has_manifest(path):                          # the older layout takes minutes to open
            verify_checksums(open_codes(path))


def verify_checksums(store: CodeStore, bar: tqdm | None = None) -> None:
    """Reads a whole store and compares it with the checksums of its manifest.

    Args:
        store: of one folder; in the older layout, which has no checksums, nothing is read.
        bar: progress bar of the rows.

    Raises:
        ValueError: rows are not what was written; the message names them.
    """
    if isinstance(store.codes, OlderCodes):
        return
    for index, checksum in enumerate(store.manifest["codes_sha256"]):
        first = index * CHECKSUM_ROWS
        if checksum_of_rows(store.codes, first, bar) != checksum:
            last = min(first + CHECKSUM_ROWS, store.codes.shape[0]) - 1
            raise ValueError(f"{store.path}/codes.npy: expected rows {first} to {last} as they "
                             f"were written, found others; {DAMAGED}")
    # Older stores carry the checksum of the first block of labels alone: the same, up to 65,536
    # images.
    accepted = (checksum_of_labels(store.labels), checksum_of_rows(store.labels, 0))
    if store.manifest["labels_sha256"] not in accepted:
        raise ValueError(f"{store.path}/labels.npy: expected the labels as they were written, "
                         f"found others; {DAMAGED}")
