"""Main 0: turns images into codes.

    torchrun --nnodes=1 --nproc_per_node=8 autoregressive/train/extract_codes_c2i.py \
        --vq-ckpt pretrained_models/vq_ds16_c2i.pt --data-path imagenet/train --code-path codes \
        --ten-crop --crop-range 1.1 --image-size 384

On a CPU, after the tokenizer of scripts/quickstart.sh was trained:

    python autoregressive/train/extract_codes_c2i.py --dataset digits --data-path train --code-path codes --no-flip \
        --vq-model VQ-4-small --codebook-size 512 --image-size 16 --vq-ckpt results/quickstart/vq.pt
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])      # the repository root instead of this folder

from autoregressive.data.code_writer import CodeWriter
from autoregressive.data.codes import add_code_args, open_codes, verify_checksums
from autoregressive.runtime.compute import PRECISIONS, add_compile_errors_arg, set_up_compiler
from autoregressive.runtime.distributed import Session, seed_everything
from autoregressive.runtime.entry import Flags, Parser, at_least, between, checks, free, run
from autoregressive.runtime.files import check_writable_folder
from autoregressive.runtime.log import LOGGER, open_logger, progress
from tokenizer.tokenizer_image.crops import Failures, add_failure_args, load_crops
from tokenizer.tokenizer_image.encoding import CropEncoder, agreement, default_batch_size
from tokenizer.tokenizer_image.images import (
    ImageSet,
    add_image_args,
    crop_names,
    dataset_sha256,
    enlarged_side,
    open_dataset,
)
from tokenizer.tokenizer_image.loading import load_vq
from tokenizer.tokenizer_image.vq_model import VQConfig, add_vq_args, check_image_size, downsampling

LARGEST_CROP_RANGE = 4


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Turn images into codes.")
    add_image_args(parser)
    add_code_args(parser)
    add_vq_args(parser, ckpt_required=True)
    parser.add_argument("--ten-crop", action="store_true", help="ten crops of the enlarged picture instead of two")
    parser.add_argument("--crop-range", type=at_least(1.0), default=1.1,
                        help="how much --ten-crop enlarges the picture")
    parser.add_argument("--no-flip", action="store_true", help="leave out the mirrored crops (digits, text)")
    parser.add_argument("--precision", default="none", choices=tuple(PRECISIONS),
                        help="of the encoder; the nearest code is always searched in float32")
    free(parser.add_argument("--batch-size", type=between(0, 2**16), default=0,
                             help="crops encoded together; 0: found from the memory"))
    free(parser.add_argument("--num-workers", type=at_least(0), default=24,
                             help="processes that decode and crop images, at most as many as there are cores"))
    free(parser.add_argument("--no-compile", action="store_true", help="do not compile (a GPU compiles by default)"))
    add_compile_errors_arg(parser)
    add_failure_args(parser)
    free(parser.add_argument("--overwrite", action="store_true",
                             help="replace a finished store, or one of another extraction, at --code-path"))
    return parser


def describe_store(args: Flags, dataset: ImageSet, hashes: dict[str, str]) -> dict:
    """Returns the manifest of the store that this command makes: its identity."""
    check_image_size(args.image_size, args.vq_model)
    if args.ten_crop and args.crop_range > LARGEST_CROP_RANGE:
        raise ValueError(f"--crop-range: expected 1 to {LARGEST_CROP_RANGE}, got {args.crop_range}")
    grid, crops = args.image_size // downsampling(args.vq_model), crop_names(args.ten_crop, not args.no_flip)
    return {"dataset": args.dataset, "num_images": len(dataset), "class_names": dataset.class_names,
            "images_sha256": dataset_sha256(dataset),
            "num_crops": len(crops), "crops": crops, "crop_range": args.crop_range if args.ten_crop else 1.0,
            "image_size": args.image_size, "grid": grid, "num_tokens": grid * grid,
            "precision": "fp32" if args.precision == "none" else args.precision,             # the word of all stores
            **args.pick(VQConfig), "codebook_sha256": hashes["codebook_sha256"],
            "tokenizer_sha256": hashes["weights_sha256"]}


def main(args: Flags, session: Session) -> None:
    open_logger(session)
    seed_everything(args.global_seed)
    with checks(session):
        dataset = open_dataset(args.dataset, args.data_path)
        vq, hashes = load_vq(args.vq_ckpt, VQConfig(**args.pick(VQConfig)))
        manifest = describe_store(args, dataset, hashes)
        writer = CodeWriter(args.code_path, manifest)
        if session.is_main:
            check_writable_folder(args.code_path)
            session.hold(writer.target)
            writer.create(dataset.labels, args.overwrite)
    if writer.is_complete:
        with checks(session), progress(session, len(dataset), "verify", "image") as bar:
            if session.is_main:
                verify_checksums(open_codes(args.code_path), bar)
        LOGGER.info("%s is finished: %d images, checksums verified", args.code_path, len(dataset))
        return

    size, names = args.image_size, manifest["crops"]
    batch_size = args.batch_size or default_batch_size(args.vq_model, size, PRECISIONS[args.precision], session.device)
    compiles = session.device.type == "cuda" and not args.no_compile
    encoder = CropEncoder(vq, session.device, args.precision, batch_size,
                          compiled=compiles and set_up_compiler(session.device, args.compile_errors))
    batches = writer.rows.missing(max(1, batch_size // len(names)))     # cut by absolute row, for any number of ranks
    num_done = writer.rows.num_done                         # before another process may remove the rows
    session.barrier()                                           # all have seen the same rows missing
    mine = [batches[number] for number in session.share_of(len(batches))]
    loader = load_crops(dataset, enlarged_side(size, manifest["crop_range"]), mine, args.num_workers)
    with progress(session, len(dataset), "extract", "image", initial=num_done) as bar:
        for number, batch in enumerate(loader):
            if number == 0 and args.precision != "none" and session.is_main:
                rate = agreement(vq, encoder, batch.pictures, size, names, session.device)
                LOGGER.info("%s and float32 agree on %.2f %% of the first batch's codes", args.precision, 100 * rate)
            writer.write(batch.rows, encoder.codes(batch.pictures, size, names).cpu().numpy(), batch.failures)
            if session.is_main:
                bar.update(writer.rows.num_done - bar.n)          # of all processes
    if session.is_main:
        finish(writer, args.max_failures, session)


def finish(writer: CodeWriter, max_failures: float, session: Session) -> None:
    """Waits for all rows, completes the store, and ends with exit code 1 if too many images are broken."""
    count = writer.manifest["num_images"]
    writer.rows.wait_for_others()
    with progress(session, count, "checksums", "image") as bar:
        failed = writer.finish(max_failures * count, bar)
    failures = Failures(count, max_failures)
    failures.add({failure["row"]: (failure["path"], failure["reason"]) for failure in failed})
    failures.check(f"; {writer.path / 'manifest.json'} lists them, and the same command tries only these again",
                   consequence="training leaves them out")
    LOGGER.info("%d images, %d crops of %d tokens each; codes in %s", count, writer.manifest["num_crops"],
                writer.manifest["num_tokens"], writer.path)


if __name__ == "__main__":
    run(main, build_parser())
