"""Judges a tokenizer: reconstructs a set of images into one npz, with PSNR, SSIM, LPIPS and codebook usage.

    python tokenizer/validation/val.py --data-path imagenet/val --vq-ckpt pretrained_models/vq_ds16_c2i.pt

On a CPU, after scripts/quickstart.sh:

    python tokenizer/validation/val.py --dataset digits --data-path heldout --image-size 16 --vq-model VQ-4-small \
        --codebook-size 512 --vq-ckpt results/quickstart/vq.pt

The npz is ready for rFID: make the reference of the same originals by evaluations/c2i/make_reference.py --kind rfid.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])      # the repository root instead of this folder

import json

import numpy as np
import torch

from autoregressive.assemble import load_vq
from autoregressive.runtime.entry import Parser, checks, require_one_process, run
from autoregressive.runtime.files import npz_writer, require_writable_folder, write_json
from autoregressive.runtime.log import open_logger, progress
from tokenizer.tokenizer_image.crops import CenterCrops, load_crops
from tokenizer.tokenizer_image.images import add_image_args, open_images, to_float, to_uint8
from tokenizer.tokenizer_image.lpips import DEFAULT_LINEAR, DEFAULT_VGG, load_lpips
from tokenizer.tokenizer_image.vq_model import add_vq_args, check_image_size
from tokenizer.validation.metrics import SSIM_WINDOW, codebook_usage, psnr, ssim


def build_parser():
    """Returns the parser of this script's command line."""
    parser = Parser("Reconstruct images and say how well.", draws=False)
    add_image_args(parser)
    add_vq_args(parser, ckpt_required=True)
    parser.add_argument("--batch-size", type=int, default=32, help="images taken together")
    parser.add_argument("--num-workers", type=int, default=24,
                        help="processes that read images, at most as many as there are cores")
    parser.add_argument("--vgg-path", default=DEFAULT_VGG, help="torchvision's VGG16; LPIPS is left out without it")
    parser.add_argument("--lpips-path", default=DEFAULT_LINEAR, help="the linear layers of LPIPS")
    parser.add_argument("--output", default="reconstructions.npz", help="the npz; the numbers go beside it with .json")
    return parser


class Judge:
    """Reconstructs batches and keeps the sums of what is said of them."""

    def __init__(self, vq, lpips, device):
        self.vq, self.lpips, self.device = vq.to(device), lpips and lpips.to(device), device
        self.counts = torch.zeros(vq.quantize.embedding.num_embeddings, dtype=torch.float64, device=device)
        self.sums, self.num_images = {}, 0

    @torch.inference_mode()
    def reconstruct(self, pictures):
        """Returns the reconstructions (B, P, P, 3) uint8 numpy of pictures (B, P, P, 3) uint8."""
        pictures = pictures.to(self.device)
        images = to_float(pictures)
        reconstructed, _, codes = self.vq(images)
        others = to_uint8(reconstructed)
        values = {"psnr": psnr(pictures, others)}
        if pictures.shape[1] >= SSIM_WINDOW:
            values["ssim"] = ssim(pictures, others)
        if self.lpips:
            values["lpips"] = self.lpips(images, to_float(others)).double()
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.sum().item()
        self.counts += torch.bincount(codes.flatten(), minlength=len(self.counts))
        self.num_images += len(pictures)
        return others.cpu().numpy()

    def numbers(self):
        """Returns the means over all images, and the use of the codebook, as a dict of plain numbers."""
        means = {name: value / self.num_images for name, value in self.sums.items()}
        return means | codebook_usage(self.counts) | {"num_images": self.num_images}


def main(args, session):
    logger = open_logger(session)
    with checks(session):
        require_one_process(session)
        if args.batch_size < 1 or args.num_workers < 0:
            raise ValueError(f"expected --batch-size of at least 1 and --num-workers of at least 0, got "
                             f"{args.batch_size} and {args.num_workers}")
        images = open_images(args.dataset, args.data_path)
        vq, hashes = load_vq(args.vq_ckpt, args.vq_model, args.codebook_size, args.codebook_embed_dim)
        check_image_size(args.image_size, args.vq_model)
        lpips = load_lpips(args.vgg_path, args.lpips_path) if Path(args.vgg_path).is_file() else None
        output = Path(args.output)
        if output.suffix != ".npz":
            raise ValueError(f"--output: expected a name ending in .npz, got {output}")
        require_writable_folder(output.parent)
    if lpips is None:
        logger.info("LPIPS is left out: %s is not there", args.vgg_path)
    judge, rows = Judge(vq, lpips, session.device), range(len(images))
    batches = [rows[first:first + args.batch_size] for first in range(0, len(images), args.batch_size)]
    settings = {"kind": "reconstructions", "vq_model": args.vq_model, "image_size": args.image_size,
                "dataset": args.dataset, "class_names": images.class_names, **hashes}
    record = np.array(json.dumps(settings))
    with progress(session, len(images), "reconstruct", "image") as bar, npz_writer(output) as add:

        def reconstructions():
            for pictures in load_crops(CenterCrops(images, args.image_size), batches, args.num_workers):
                yield judge.reconstruct(pictures)
                bar.update(len(pictures))

        add("arr_0", np.uint8, (len(images), args.image_size, args.image_size, 3), reconstructions())
        add("labels", np.int64, images.labels.shape, [images.labels])
        add("settings", record.dtype, (), [record])
    numbers = judge.numbers()
    write_json(output.with_suffix(".json"), numbers | {"settings": settings})
    logger.info("%s; %s", ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()), output)


if __name__ == "__main__":
    run(main, build_parser())
