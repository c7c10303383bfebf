"""What is compared before the first update, so that a week of training does not begin with the wrong files."""

import math

from autoregressive.runtime.log import LOGGER


def check_store(args, store, mapping):
    """Compares a code store and a mapping with each other and with the flags of the training.

    Args:
        args: vocab_size, codebook_size, codebook_embed_dim, num_classes, image_size, downsample_size, cluster_size.
        store: CodeStore.
        mapping: Mapping.

    Raises:
        ValueError: something differs; the message names the flag or the file to change.
    """
    manifest, grid = store.manifest, args.image_size // args.downsample_size
    num_classes = manifest["class_names"] and len(manifest["class_names"])
    for flag, given, found in (("--vocab-size", args.vocab_size, manifest["codebook_size"]),
                               ("--codebook-size", args.codebook_size, manifest["codebook_size"]),
                               ("--num-classes", args.num_classes, num_classes),
                               ("--image-size", args.image_size, manifest["image_size"]),
                               ("--image-size / --downsample-size (the grid)", grid, manifest["grid"])):
        if found is not None and given != found:                # None: an older layout does not tell
            raise ValueError(f"{flag}: expected {found} as in {store.path}, got {given}")
    recorded = mapping.hashes
    if recorded.get("cluster_size", args.cluster_size) != args.cluster_size:
        raise ValueError(f"--cluster-size: expected {recorded['cluster_size']} as in {mapping.path}, "
                         f"got {args.cluster_size}")
    original = recorded.get("original_codebook_sha256")
    if original is None or manifest["codebook_sha256"] is None:
        unknown = mapping.path if original is None else store.path
        LOGGER.warning("%s: carries no hashes, so it cannot be checked that %s and %s belong together", unknown,
                       mapping.path, store.path)
    elif original != manifest["codebook_sha256"]:
        raise ValueError(f"{mapping.path}: expected the mapping of codebook {manifest['codebook_sha256'][:12]}, which "
                         f"{store.path} was extracted with, got that of {original[:12]}; run balance_k_means.py on the "
                         "checkpoint of the extraction")


def announce(args, store, num_parameters, num_updates):
    """Logs what is about to be trained, and the loss a healthy run begins and ends with."""
    LOGGER.info("%s, %.1fM parameters; %s: %d images, %d crops of %d tokens, %d classes", args.gpt_model,
                num_parameters / 1e6, store.path, len(store.rows), store.codes.shape[1], store.codes.shape[2],
                args.num_classes)
    if failed := len(store.labels) - len(store.rows):
        LOGGER.warning("%d images of %s could not be read and are left out", failed, store.path)
    LOGGER.info("%d updates of %d images, lambda %g; token loss begins at ln V = %.2f, cluster loss at ln K = %.2f",
                num_updates, args.global_batch_size, args.lambda_cce, math.log(args.vocab_size),
                math.log(args.vocab_size // args.cluster_size))
    if args.vocab_size == 16384:
        LOGGER.info("ImageNet models end with a token loss of 7 to 8: that is healthy, not broken")
