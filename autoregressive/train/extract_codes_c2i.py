"""Main 0: turns images into codes.

    torchrun --nnodes=1 --nproc_per_node=8 autoregressive/train/extract_codes_c2i.py \
        --vq-ckpt pretrained_models/vq_ds16_c2i.pt --data-path imagenet/train --code-path codes \
        --ten-crop --crop-range 1.1 --image-size 384

On a CPU, after the tokenizer of scripts/quickstart.sh was trained:

    python autoregressive/train/extract_codes_c2i.py --dataset digits --data-path train \
        --code-path codes --no-flip --vq-model VQ-4-small --codebook-size 512 --image-size 16 \
        --vq-ckpt results/quickstart/vq.pt
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The repository root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from autoregressive.data.code_writer import CodeWriter, add_writer_args
from autoregressive.data.codes import add_code_args
from autoregressive.data.finishing import finish_store, verify_finished
from autoregressive.runtime.compute import PRECISIONS, add_compile_errors_arg, set_up_compiler
from autoregressive.runtime.distributed import Session, seed_everything
from autoregressive.runtime.entry import Flags, Parser, at_least, between, checks, may_vary, run
from autoregressive.runtime.failures import add_failure_args
from autoregressive.runtime.files import check_writable_folder
from autoregressive.runtime.log import LOGGER, open_logger, progress
from tokenizer.tokenizer_image.crops import add_crop_range_arg, check_crop_range, load_crops
from tokenizer.tokenizer_image.encoding import CropEncoder, agreement, default_batch_size
from tokenizer.tokenizer_image.images import (
    ImageSet,
    add_image_args,
    crop_names,
    dataset_sha256,
    enlarged_side,
    open_dataset,
)
from tokenizer.tokenizer_image.loading import open_vq
from tokenizer.tokenizer_image.vq_model import (
    VQConfig,
    VQModel,
    add_vq_args,
    check_image_size,
    downsampling,
)


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Turn images into codes.")
    add_image_args(parser)
    add_code_args(parser)
    add_vq_args(parser, ckpt_required=True)
    parser.add_argument("--ten-crop", action="store_true",
                        help="ten crops of the enlarged picture instead of two")
    add_crop_range_arg(parser)
    parser.add_argument("--no-flip", action="store_true",
                        help="leave out the mirrored crops (digits, text)")
    parser.add_argument("--precision", default="none", choices=tuple(PRECISIONS),
                        help="of the encoder; the nearest code is always searched in float32")
    may_vary(parser.add_argument("--batch-size", type=between(0, 2**16), default=0,
                                 help="crops encoded together; 0: found from the memory"))
    may_vary(parser.add_argument("--num-workers", type=at_least(0), default=24,
                                 help="processes that decode and crop images, at most as many as "
                                      "there are cores"))
    may_vary(parser.add_argument("--no-compile", action="store_true",
                                 help="do not compile (a GPU compiles by default)"))
    add_compile_errors_arg(parser)
    add_failure_args(parser)
    add_writer_args(parser)
    return parser


def describe_store(args: Flags, dataset: ImageSet, hashes: dict[str, str]) -> dict[str, object]:
    """Returns the manifest of the store that this command makes: its identity.

    Args:
        args: parsed flags.
        dataset: the images.
        hashes: of the tokenizer.

    Raises:
        ValueError: the flags contradict each other.
    """
    check_image_size(args.image_size, args.vq_model)
    if args.ten_crop:
        check_crop_range(args.crop_range)
    elif args.is_given("crop_range"):
        raise ValueError("--crop-range: expected --ten-crop, whose crops it spreads, got two "
                         "crops; give both, or neither")
    grid = args.image_size // downsampling(args.vq_model)
    crops = crop_names(args.ten_crop, not args.no_flip)
    precision = "fp32" if args.precision == "none" else args.precision      # as all stores say
    return {"dataset": args.dataset, "num_images": len(dataset),
            "class_names": dataset.class_names, "images_sha256": dataset_sha256(dataset),
            "num_crops": len(crops), "crops": crops,
            "crop_range": args.crop_range if args.ten_crop else 1.0,
            "image_size": args.image_size, "grid": grid, "num_tokens": grid * grid,
            "precision": precision, **args.pick(VQConfig),
            "codebook_sha256": hashes["codebook_sha256"],
            "tokenizer_sha256": hashes["weights_sha256"]}


def main(args: Flags, session: Session) -> None:
    """Extracts the codes that are missing, and completes the store."""
    open_logger(session)
    seed_everything(args.global_seed)

    # Open images and tokenizer, and lay out the store, or find the one that was begun.
    with checks(session):
        dataset = open_dataset(args.dataset, args.data_path)
        vq, hashes = open_vq(args, args.vq_ckpt)
        writer = CodeWriter(args.code_path, describe_store(args, dataset, hashes))
        if session.is_main:
            check_writable_folder(args.code_path)
            session.hold(writer.target)
            writer.create(dataset.labels, args.overwrite)

    # A finished store is read once more, instead of being made again.
    if writer.is_complete:
        verify_finished(writer, session)
        return

    extract(args, dataset, vq, writer, session)
    if session.is_main:
        finish_store(writer, args.max_failures, session)


def extract(args: Flags, dataset: ImageSet, vq: VQModel, writer: CodeWriter,
            session: Session) -> None:
    """Encodes this process's part of the images whose codes are not written yet."""
    size = args.image_size
    names = writer.manifest["crops"]

    # The encoder, in batches of as many crops as the memory holds.
    batch_size = args.batch_size or default_batch_size(
        args.vq_model, size, PRECISIONS[args.precision], session.device)
    wants_compiled = session.device.type == "cuda" and not args.no_compile
    encoder = CropEncoder(
        vq, session.device, args.precision, batch_size,
        compiled=wants_compiled and set_up_compiler(session.device, args.compile_errors))

    # Batches are cut by absolute row, so any process may encode any of them.
    batches = writer.rows.missing(max(1, batch_size // len(names)))
    num_done = writer.rows.num_done     # before another process may remove the rows
    session.barrier()                   # all have seen the same rows missing
    mine = [batches[number] for number in session.part_of(len(batches))]

    # Read and crop ahead, encode, write.
    side = enlarged_side(size, writer.manifest["crop_range"])
    loader = load_crops(dataset, side, mine, args.num_workers)
    with progress(session, len(dataset), "extract", "image", initial=num_done) as bar:
        for number, batch in enumerate(loader):
            if number == 0 and args.precision != "none" and session.is_main:
                rate = agreement(vq, encoder, batch.pictures, size, names, session.device)
                LOGGER.info("%s and float32 agree on %.2f %% of the first batch's codes",
                            args.precision, 100 * rate)
            codes = encoder.codes(batch.pictures, size, names).cpu().numpy()
            writer.write(batch.rows, codes, batch.failures)
            if session.is_main:
                bar.update(writer.rows.num_done - bar.n)        # of all processes


if __name__ == "__main__":
    run(main, build_parser())
