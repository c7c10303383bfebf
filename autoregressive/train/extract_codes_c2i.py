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

from autoregressive.assemble import load_vq
from autoregressive.data.code_writer import CodeWriter
from autoregressive.data.codes import add_code_args, open_codes, verify_checksums
from autoregressive.runtime.compiling import can_compile
from autoregressive.runtime.distributed import seed_everything
from autoregressive.runtime.entry import Parser, checks, run
from autoregressive.runtime.log import open_logger, progress
from tokenizer.tokenizer_image.crops import load_rows
from tokenizer.tokenizer_image.encoding import ENCODE_PRECISIONS, CropEncoder, agreement, default_batch_size
from tokenizer.tokenizer_image.images import add_image_args, crop_names, enlarged_side, images_sha256, open_images
from tokenizer.tokenizer_image.vq_model import add_vq_args, check_image_size

LARGEST_CROP_RANGE = 4


def build_parser():
    """Returns the parser of this script's command line."""
    parser = Parser("Turn images into codes.")
    add_image_args(parser)
    add_code_args(parser)
    add_vq_args(parser, ckpt_required=True)
    parser.add_argument("--ten-crop", action="store_true", help="ten crops of the enlarged picture instead of two")
    parser.add_argument("--crop-range", type=float, default=1.1, help="how much --ten-crop enlarges the picture")
    parser.add_argument("--no-flip", action="store_true", help="leave out the mirrored crops (digits, text)")
    parser.add_argument("--precision", default="fp32", choices=tuple(ENCODE_PRECISIONS),
                        help="of the encoder; the nearest code is always searched in float32")
    parser.add_argument("--batch-size", type=int, default=0, help="crops encoded together; 0: found from the memory")
    parser.add_argument("--num-workers", type=int, default=24,
                        help="processes that decode and crop images, at most as many as there are cores")
    parser.add_argument("--no-compile", action="store_true", help="do not compile (a GPU compiles by default)")
    parser.add_argument("--max-failures", type=float, default=0.001,
                        help="share of images that may be broken; more end with exit code 1 and a list")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace a finished store, or one of another extraction, at --code-path")
    return parser


def check_flags(args):
    """Raises ValueError for flags out of range."""
    check_image_size(args.image_size, args.vq_model)
    if args.ten_crop and not 1 <= args.crop_range <= LARGEST_CROP_RANGE:
        raise ValueError(f"--crop-range: expected 1 to {LARGEST_CROP_RANGE}, got {args.crop_range}")
    if args.batch_size < 0 or args.num_workers < 0:
        raise ValueError(f"expected --batch-size and --num-workers of at least 0, got {args.batch_size} and "
                         f"{args.num_workers}")
    if not 0 <= args.max_failures <= 1:
        raise ValueError(f"--max-failures: expected a share, 0 to 1, got {args.max_failures}")


def describe_store(args, images, vq, hashes):
    """Returns the manifest of the store that this command makes."""
    grid, crops = args.image_size // vq.downsampling, crop_names(args.ten_crop, not args.no_flip)
    return {"dataset": args.dataset, "num_images": len(images), "class_names": images.class_names,
            "images_sha256": images_sha256(images),
            "num_crops": len(crops), "crops": crops, "crop_range": args.crop_range if args.ten_crop else 1.0,
            "image_size": args.image_size, "grid": grid, "num_tokens": grid * grid, "precision": args.precision,
            "vq_model": args.vq_model, "codebook_size": args.codebook_size,
            "codebook_embed_dim": args.codebook_embed_dim, "codebook_sha256": hashes["codebook_sha256"],
            "tokenizer_sha256": hashes["weights_sha256"]}


def verify(path, manifest, session, logger):
    """Compares a finished store with its checksums, on rank 0."""
    with checks(session):
        if session.is_main:
            with progress(session, manifest["num_images"], "verify", "image") as bar:
                verify_checksums(open_codes(path), bar)
    logger.info("%s is finished: %d images, checksums verified", path, manifest["num_images"])


def main(args, session):
    logger = open_logger(session)
    seed_everything(args.global_seed)
    with checks(session):
        images = open_images(args.dataset, args.data_path)
        vq, hashes = load_vq(args.vq_ckpt, args.vq_model, args.codebook_size, args.codebook_embed_dim)
        check_flags(args)
        manifest = describe_store(args, images, vq, hashes)
        writer = CodeWriter(args.code_path, manifest)
        if session.is_main:
            writer.create(images.labels, args.overwrite)
    if writer.is_complete:
        verify(args.code_path, manifest, session, logger)
        return
    size, names = args.image_size, manifest["crops"]
    batch_size = args.batch_size or default_batch_size(args.vq_model, size, ENCODE_PRECISIONS[args.precision],
                                                       session.device)
    encoder = CropEncoder(vq, session.device, args.precision, batch_size,
                          compiled=can_compile(session.device, not args.no_compile))
    batches = writer.missing(max(1, batch_size // len(names)))  # cut by absolute row, whatever the number of processes
    session.barrier()                                           # all have seen the same rows missing
    share = session.share_of(len(batches))
    loader = load_rows(images, enlarged_side(size, manifest["crop_range"]), batches[share.start:share.stop],
                       args.num_workers)
    with progress(session, len(images), "extract", "image", initial=writer.num_done) as bar:
        for number, batch in enumerate(loader):
            if number == 0 and args.precision != "fp32" and session.is_main:
                rate = agreement(vq, encoder, batch.pictures, size, names, session.device)
                logger.info("%s and fp32 agree on %.2f %% of the first batch's codes", args.precision, 100 * rate)
            writer.write(batch.rows, encoder.codes(batch.pictures, size, names).cpu().numpy(), batch.failures)
            bar.update(writer.num_done - bar.n)                 # of all processes
    if session.is_main:
        finish(writer, args, session, logger)


def finish(writer, args, session, logger):
    """Waits for all rows, completes the store, and ends with exit code 1 if too many images are broken."""
    count = writer.manifest["num_images"]
    writer.wait_for_others()
    with progress(session, count, "checksums", "image") as bar:
        failed = writer.finish(args.max_failures * count, bar)
    for failure in failed[:10]:
        logger.warning("broken: %s", failure["reason"])
    listed = f"{len(failed)} of {count} images are broken; {writer.path / 'manifest.json'} lists them"
    if len(failed) > args.max_failures * count:
        logger.error("%s. More than --max-failures %g: repair or remove them and run the same command again, which "
                     "tries only these, or raise --max-failures", listed, args.max_failures)
        raise SystemExit(1)
    if failed:
        logger.warning("%s, and training leaves them out", listed)
    logger.info("%d images, %d crops of %d tokens each; codes in %s", count, writer.manifest["num_crops"],
                writer.manifest["num_tokens"], writer.path)


if __name__ == "__main__":
    run(main, build_parser())
