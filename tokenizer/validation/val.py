"""Judges a tokenizer: reconstructs a set of images, with PSNR, SSIM, LPIPS and codebook usage.

    python tokenizer/validation/val.py --data-path imagenet/val \
        --vq-ckpt pretrained_models/vq_ds16_c2i.pt

On a CPU, after scripts/quickstart.sh:

    python tokenizer/validation/val.py --dataset digits --data-path val --image-size 16 \
        --vq-model VQ-4-small --codebook-size 512 --vq-ckpt results/quickstart/vq.pt

The reconstructions lie in one npz, ready for rFID: make the reference of the same originals by
evaluations/c2i/make_reference.py --kind rfid.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # the repository root, not this folder

import numpy as np

from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import Flags, Parser, at_least, check_one_process, checks, run
from autoregressive.runtime.failures import add_failure_args
from autoregressive.runtime.files import check_output, open_npz, open_spool, write_json
from autoregressive.runtime.log import LOGGER, open_logger
from tokenizer.tokenizer_image.images import add_image_args, dataset_sha256, open_dataset, to_float
from tokenizer.tokenizer_image.loading import open_vq
from tokenizer.tokenizer_image.lpips import LPIPS, add_lpips_args, load_lpips
from tokenizer.tokenizer_image.vq_model import add_vq_args, check_image_size
from tokenizer.validation.metrics import SSIM_WINDOW, psnr, ssim
from tokenizer.validation.reconstruction import Measure, ReconstructionMeter, Validation


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Reconstruct images and say how well; LPIPS is left out without VGG's weights.",
                    has_seed=False)
    add_image_args(parser)
    add_vq_args(parser, ckpt_required=True)
    add_lpips_args(parser)
    parser.add_argument("--batch-size", type=at_least(1), default=32, help="images taken together")
    parser.add_argument("--num-workers", type=at_least(0), default=24,
                        help="processes that read images, at most as many as there are cores")
    add_failure_args(parser)
    parser.add_argument("--output", default="reconstructions.npz",
                        help="the npz; the numbers go beside it with .json")
    return parser


def choose_measures(image_size: int, lpips: LPIPS | None) -> dict[str, Measure]:
    """Returns what is measured, by name: SSIM where its window fits, LPIPS where it is there."""
    measures = {"psnr": psnr}
    if image_size >= SSIM_WINDOW:
        measures["ssim"] = ssim
    if lpips is not None:
        measures["lpips"] = lambda pictures, others: lpips(to_float(pictures), to_float(others))
    return measures


def main(args: Flags, session: Session) -> None:
    """Reconstructs the pictures, measures them, and writes both down."""
    open_logger(session)

    # Open the pictures, the tokenizer and LPIPS, and hold the outputs.
    with checks(session):
        check_one_process(session)
        dataset = open_dataset(args.dataset, args.data_path)
        vq, hashes = open_vq(args, args.vq_ckpt)
        check_image_size(args.image_size, args.vq_model)
        lpips = None
        if Path(args.vgg_path).is_file():
            lpips = load_lpips(args.vgg_path, args.lpips_path)
        output = Path(args.output)
        if output.suffix != ".npz":
            raise ValueError(f"--output: expected a name ending in .npz, got {output}")
        record = output.with_suffix(".json")
        check_output(output)
        check_output(record)
        session.hold(output, record)
    if lpips is None:
        LOGGER.info("LPIPS is left out: %s is not there", args.vgg_path)
    else:
        lpips.to(session.device)
    meter = ReconstructionMeter(choose_measures(args.image_size, lpips), args.codebook_size,
                                session.device)
    validation = Validation(dataset, args.image_size, args.batch_size, args.num_workers,
                            args.max_failures)

    # Reconstructions are spooled first: an npz begins with how many pictures are whole.
    shape = (args.image_size, args.image_size, 3)
    with open_spool(output.parent, shape) as spool:
        vq.to(session.device)
        for pictures in validation.reconstruct(vq, meter, session, "reconstruct"):
            spool.add(pictures)
        validation.failures.check()
        rows = np.setdiff1d(np.arange(len(dataset)), list(validation.failures.found))

        # Then they are written, with labels and what they depend on.
        settings = {"kind": "reconstructions", "vq_model": args.vq_model,
                    "image_size": args.image_size, "dataset": args.dataset,
                    "class_names": dataset.class_names,
                    "images_sha256": dataset_sha256(dataset, rows), **hashes}
        with open_npz(output, settings) as npz:
            npz.add_rows("arr_0", np.uint8, (len(rows), *shape), spool)
            npz.add("labels", dataset.labels[rows])
    numbers = meter.read(session) | {"num_images": len(rows)}
    write_json(record, numbers | {"settings": settings})
    listed = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
    LOGGER.info("%s; %s", listed, output)


if __name__ == "__main__":
    run(main, build_parser())
