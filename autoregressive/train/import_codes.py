"""Main 0, for codes that others have made: turns them into a store.

    python autoregressive/train/import_codes.py --from imagenet-llamagen-adm-256_codes.tar \
        --code-path codes --vq-ckpt pretrained_models/vq_ds16_c2i.pt --class-names classes.txt

Reads RandAR's tar (also compressed, or unpacked), LPD's folders of npz files, and the older layout
of LlamaGen and IAR; see data/ready_folders.py. Such files do not say which tokenizer they belong
to, nor how large the pictures were: that is what the flags say, and what the manifest lists as
claimed. check_codes.py compares the codes with their images.

On a CPU, a tar of codes that were made by the tokenizer of scripts/quickstart.sh:

    python autoregressive/train/import_codes.py --from digits.tar --code-path codes \
        --vq-ckpt results/quickstart/vq.pt --vq-model VQ-4-small --codebook-size 512 --image-size 16
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The repository root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from autoregressive.data.code_writer import CodeWriter, add_writer_args
from autoregressive.data.codes import add_code_args
from autoregressive.data.finishing import finish_store, verify_finished
from autoregressive.data.importing import (
    check_some,
    check_written,
    choose_class_names,
    copy_codes,
    read_class_names,
)
from autoregressive.data.ready_codes import CodeSource
from autoregressive.data.ready_folders import open_source
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import Flags, Parser, check_one_process, checks, pixels, run
from autoregressive.runtime.failures import add_failure_args
from autoregressive.runtime.files import check_file, check_writable_folder
from autoregressive.runtime.log import LOGGER, open_logger
from tokenizer.tokenizer_image.crops import add_crop_range_arg, check_crop_range
from tokenizer.tokenizer_image.images import crop_names, dataset_sha256
from tokenizer.tokenizer_image.loading import open_vq
from tokenizer.tokenizer_image.vq_model import (
    VQConfig,
    add_vq_args,
    check_image_size,
    downsampling,
)

# What the manifest has from flags alone.
CLAIMED = ["image_size", "crop_range", "vq_model", "codebook_embed_dim", "codebook_sha256",
           "tokenizer_sha256"]
# Crops by their number, in the published order.
CROPS = {len(names): names for names in (crop_names(ten_crop, mirrored)
                                         for ten_crop in (False, True)
                                         for mirrored in (False, True))}


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Make a store of codes that others have made.", has_seed=False)
    parser.add_argument("--from", required=True, dest="source",
                        help="the codes: RandAR's tar, or a folder of RandAR, LPD, or LlamaGen")
    add_code_args(parser)
    add_vq_args(parser, ckpt_required=True)
    parser.add_argument("--image-size", type=pixels, default=256,
                        help="side in pixels of the pictures that the codes were made of")
    add_crop_range_arg(parser)
    parser.add_argument("--class-names",
                        help="file with the names of all classes, one a line; default: the names "
                             "of LPD's class folders, else the numbers")
    add_failure_args(parser)
    add_writer_args(parser)
    return parser


def describe_store(args: Flags, source: CodeSource, class_names: list[str],
                   hashes: dict[str, str]) -> dict[str, object]:
    """Returns the manifest of the store that this command makes: its identity.

    Args:
        args: parsed flags.
        source: the codes.
        class_names: of all classes.
        hashes: of the tokenizer.

    Raises:
        ValueError: the images have a number of crops that no extraction makes.
    """
    if source.num_crops not in CROPS:
        raise ValueError(f"{source.path}: expected {', '.join(map(str, CROPS))} crops of an image, "
                         f"found {source.num_crops}; nothing says what they are")
    crops = CROPS[source.num_crops]
    has_ten = len(crops) > 2
    if has_ten:
        check_crop_range(args.crop_range)
    grid = args.image_size // downsampling(args.vq_model)
    return {"dataset": f"{source.layout}'s codes", "num_images": len(source),
            "class_names": class_names, "images_sha256": dataset_sha256(source),
            "num_crops": len(crops), "crops": crops,
            "crop_range": args.crop_range if has_ten else 1.0,
            "image_size": args.image_size, "grid": grid, "num_tokens": grid * grid,
            **args.pick(VQConfig), "codebook_sha256": hashes["codebook_sha256"],
            "tokenizer_sha256": hashes["weights_sha256"], "claimed": CLAIMED}


def main(args: Flags, session: Session) -> None:
    """Copies the codes that are missing, and completes the store."""
    open_logger(session)

    # Open the codes and the tokenizer, and lay out the store, or find the one that was begun.
    with checks(session):
        check_one_process(session)
        _, hashes = open_vq(args, args.vq_ckpt)
        check_image_size(args.image_size, args.vq_model)
        given_names = None
        if args.class_names is not None:
            check_file(args.class_names, "name one with --class-names")
            given_names = read_class_names(args.class_names)
        source = open_source(args.source, session)
        class_names = choose_class_names(source, given_names)
        manifest = describe_store(args, source, class_names, hashes)
        check_some(source, manifest)
        writer = CodeWriter(args.code_path, manifest)
        check_writable_folder(args.code_path)
        session.hold(writer.target)
        writer.create(source.labels, args.overwrite)
        if not writer.is_complete:
            check_written(source, writer)
    LOGGER.info("%s: %s's layout, %d images of %d classes", args.source, source.layout,
                len(source), len(class_names))

    # A finished store is read once more, instead of being made again.
    if writer.is_complete:
        verify_finished(writer, session)
        return

    copy_codes(source, writer, session)
    finish_store(writer, args.max_failures, session)
    LOGGER.warning("that these are codes of %s is claimed, not verified; compare them with their "
                   "images with scripts/autoregressive/check_codes.sh", args.vq_ckpt)


if __name__ == "__main__":
    run(main, build_parser())
