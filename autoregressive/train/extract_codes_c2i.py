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

import numpy as np
import torch

from autoregressive.assemble import load_vq
from autoregressive.data.codes import CodeWriter, add_code_args
from autoregressive.runtime.distributed import seed_everything
from autoregressive.runtime.entry import Parser, checks, run
from autoregressive.runtime.log import open_logger, progress
from tokenizer.tokenizer_image.images import add_image_args, flip_pair, open_images, ten_crop, to_float
from tokenizer.tokenizer_image.vq_model import add_vq_args

BATCH_IMAGES = 32                                   # rows of the store that are encoded and written together


def build_parser():
    """Returns the parser of this script's command line."""
    parser = Parser("Turn images into codes.")
    add_image_args(parser)
    add_code_args(parser)
    add_vq_args(parser, ckpt_required=True)
    parser.add_argument("--ten-crop", action="store_true", help="ten crops of the enlarged picture instead of two")
    parser.add_argument("--crop-range", type=float, default=1.1, help="how much --ten-crop enlarges the picture")
    parser.add_argument("--no-flip", action="store_true", help="leave out the mirrored crops (digits, text)")
    parser.add_argument("--num-workers", type=int, default=24, help="workers that decode and crop images")
    parser.refuse_for_now("--num-workers")
    return parser


def crop(image, args):
    """Returns the crops (crops, P, P, 3) uint8 of an image (H, W, 3) uint8."""
    size = args.image_size
    crops = ten_crop(image, size, args.crop_range) if args.ten_crop else flip_pair(image, size)
    return crops[:len(crops) // 2] if args.no_flip else crops    # the mirrored ones come second


def describe_store(args, images, vq, hashes):
    """Returns the manifest of the store that this command makes."""
    grid = args.image_size // vq.downsampling
    kind = f"ten-crop {args.crop_range:g}" if args.ten_crop else "centre"
    return {"dataset": args.dataset, "num_images": len(images), "class_names": images.class_names, "crops": kind,
            "mirrored": not args.no_flip, "num_crops": (5 if args.ten_crop else 1) * (1 if args.no_flip else 2),
            "image_size": args.image_size, "grid": grid, "num_tokens": grid * grid, "vq_model": args.vq_model,
            "codebook_size": args.codebook_size, "codebook_embed_dim": args.codebook_embed_dim,
            "codebook_sha256": hashes["codebook_sha256"], "tokenizer_sha256": hashes["weights_sha256"]}


@torch.inference_mode()
def encode_rows(rows, images, vq, args, device):
    """Encodes images of consecutive rows, all their crops together.

    Returns:
        codes (n, crops, T) int64 numpy array, and the failures as a dict of row -> (path, reason).
    """
    failures, crops = {}, []
    for row in rows:
        try:
            crops.append(crop(images.read(row), args))
        except (OSError, ValueError) as error:      # a broken file costs its own row only
            failures[row] = (images.path_of(row), str(error) or type(error).__name__)
            crops.append(None)
    if len(failures) == len(rows):
        return None, failures
    blank = np.zeros_like(next(picture for picture in crops if picture is not None))
    pixels = np.stack([blank if picture is None else picture for picture in crops])         # (n, crops, P, P, 3)
    pictures = to_float(pixels.reshape(-1, *pixels.shape[2:])).to(device)                   # (n * crops, 3, P, P)
    codes = vq.quantize.codes(vq.encode(pictures))                                          # (n * crops, T)
    return codes.reshape(*pixels.shape[:2], -1).cpu().numpy(), failures


def main(args, session):
    logger = open_logger(session)
    seed_everything(args.global_seed)
    with checks(session):
        images = open_images(args.dataset, args.data_path)
        vq, hashes = load_vq(args.vq_ckpt, args.vq_model, args.codebook_size, args.codebook_embed_dim)
        if args.image_size < vq.downsampling or args.image_size % vq.downsampling:
            raise ValueError(f"--image-size: expected a multiple of {vq.downsampling} for {args.vq_model}, "
                             f"got {args.image_size}")
        if args.ten_crop and not 1 <= args.crop_range <= 4:
            raise ValueError(f"--crop-range: expected 1 to 4, got {args.crop_range}")
        manifest = describe_store(args, images, vq, hashes)
        if session.is_main:
            CodeWriter.create(args.code_path, manifest, images.labels)
    writer = CodeWriter(args.code_path, manifest)
    if writer.is_complete:
        logger.info("%s is finished: %d images", args.code_path, len(images))
        return
    vq.to(session.device)
    starts = range(0, len(images), BATCH_IMAGES)    # batches are cut by absolute row: the same for any number of ranks
    share = session.share_of(len(starts))
    with progress(session, len(images), "extract", "image") as bar:
        for first in starts[share.start:share.stop]:
            rows = range(first, min(first + BATCH_IMAGES, len(images)))
            if not writer.is_written(rows):
                writer.write(rows, *encode_rows(rows, images, vq, args, session.device))
            bar.update(len(rows) * session.world_size)
    session.barrier()
    if session.is_main:
        writer.finish()
    logger.info("%d images, %d crops of %d tokens each; codes in %s", manifest["num_images"], manifest["num_crops"],
                manifest["num_tokens"], args.code_path)


if __name__ == "__main__":
    run(main, build_parser())
