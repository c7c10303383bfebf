"""Whether a store of codes is what a training needs: made for its flags and its mapping, and as it was written."""

from pathlib import Path

from autoregressive.data.codes import CodeStore, Mapping, open_codes, verify_checksums
from autoregressive.runtime.identity import check_codebook, check_recorded


def check_store(store: CodeStore, mapping: Mapping, *, vocab_size: int, codebook_size: int, num_classes: int,
                image_size: int, grid: int, cluster_size: int) -> None:
    """Compares a store, a mapping and the flags of a training, so that no week of it begins with others.

    Args:
        store: CodeStore.
        mapping: Mapping.
        vocab_size, codebook_size, num_classes, cluster_size: flags under these names.
        image_size: pixels of a picture's side.
        grid: side in tokens, of --image-size and --downsample-size.

    Raises:
        ValueError: they differ.
    """
    manifest = store.manifest
    recorded_classes = manifest["class_names"] and len(manifest["class_names"])
    check_recorded("--vocab-size", vocab_size, manifest["codebook_size"], store.path)
    check_recorded("--codebook-size", codebook_size, manifest["codebook_size"], store.path)
    check_recorded("--num-classes", num_classes, recorded_classes, store.path)
    check_recorded("--image-size", image_size, manifest["image_size"], store.path)
    check_recorded("--image-size / --downsample-size (the grid)", grid, store.grid, store.path)
    check_recorded("--cluster-size", cluster_size, mapping.hashes.get("cluster_size"), mapping.path)
    check_codebook(manifest["codebook_sha256"], mapping.hashes.get("original_codebook_sha256"), store.path,
                   mapping.path)


def verify_codes(paths: list[str]) -> None:
    """Compares stores of codes with their checksums; the older layout has none. Raises ValueError where they differ."""
    for path in paths:
        if (Path(path) / "manifest.json").is_file():            # the older one takes minutes to open
            verify_checksums(open_codes(path))
