"""Whether a store of codes is what a training needs: made for its flags and mapping, undamaged."""

from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from autoregressive.data.checksums import CHECKSUM_ROWS, checksum_of_labels, checksum_of_rows
from autoregressive.data.codes import DAMAGED, CodeStore
from autoregressive.data.mapping import Mapping
from autoregressive.data.older_codes import OlderCodes
from autoregressive.data.opening import has_manifest, open_codes
from autoregressive.runtime.identity import check_codebook, check_recorded
from autoregressive.runtime.log import LOGGER


@dataclass(frozen=True)
class ExpectedCodes:
    """The flags of a training that its codes must agree with, under their names.

    Attributes:
        vocab_size, codebook_size: number of codes, V.
        num_classes: number of class labels.
        image_size: pixels of a picture's side.
        grid: side in tokens, of --image-size and --downsample-size.
        cluster_size: codes per cluster.
    """

    vocab_size: int
    codebook_size: int
    num_classes: int
    image_size: int
    grid: int
    cluster_size: int


def check_store(store: CodeStore, mapping: Mapping, expected: ExpectedCodes) -> None:
    """Raises ValueError if a store, its mapping and the flags of a training do not agree."""
    manifest = store.manifest
    num_classes = None if manifest["class_names"] is None else len(manifest["class_names"])
    codebook_size = manifest["codebook_size"]
    check_recorded("--vocab-size", expected.vocab_size, codebook_size, store.path)
    check_recorded("--codebook-size", expected.codebook_size, codebook_size, store.path)
    check_recorded("--num-classes", expected.num_classes, num_classes, store.path)
    check_recorded("--image-size", expected.image_size, manifest["image_size"], store.path)
    check_recorded("--image-size / --downsample-size (the grid)", expected.grid, store.grid,
                   store.path)
    if manifest.get("claimed"):
        LOGGER.warning("%s: imported codes, whose codebook is claimed, not verified; compare them "
                       "with their images with scripts/autoregressive/check_codes.sh", store.path)
    check_recorded("--cluster-size", expected.cluster_size, mapping.hashes.get("cluster_size"),
                   mapping.path)
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
