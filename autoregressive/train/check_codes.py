"""A look at a code store before a week of training: is it whole, and do its codes belong to these images?

    python autoregressive/train/check_codes.py --code-path codes --data-path imagenet/train \
        --vq-ckpt pretrained_models/vq_ds16_c2i.pt

On a CPU, after scripts/quickstart.sh:

    python autoregressive/train/check_codes.py --code-path results/quickstart/codes --dataset digits --data-path train \
        --vq-ckpt results/quickstart/vq.pt

Prints one line a check, draws random rows beside what their codes decode to, and ends with exit code 1 if a check
fails.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])      # the repository root instead of this folder

import numpy as np
import torch

from autoregressive.assemble import load_vq
from autoregressive.data.codes import add_code_args, open_codes, verify_checksums
from autoregressive.runtime.distributed import keyed_random
from autoregressive.runtime.entry import Parser, checks, require_one_process, run
from autoregressive.runtime.log import open_logger, progress
from autoregressive.runtime.pictures import save_grid
from tokenizer.tokenizer_image.encoding import CropEncoder
from tokenizer.tokenizer_image.images import (
    add_source_args,
    center_crop,
    cut_crops,
    enlarged_side,
    images_sha256,
    open_images,
    to_uint8,
)
from tokenizer.validation.metrics import psnr

LEAST_REPRODUCED = 0.5          # share of a row's codes: half precision loses a few, another picture nearly all
ROWS_AT_ONCE = 4096             # of the codes, while their range is looked at


def build_parser():
    """Returns the parser of this script's command line."""
    parser = Parser("Check a code store against its images and its tokenizer.")
    add_code_args(parser)
    add_source_args(parser)
    parser.add_argument("--vq-ckpt", required=True, help="checkpoint of the tokenizer of the extraction")
    parser.add_argument("--num-rows", type=int, default=32, help="random rows to decode beside their images")
    parser.add_argument("--output", help="the picture; default: check.png in the folder of the codes")
    return parser


class Report:
    """One line for each check, and whether all were passed."""

    def __init__(self, logger):
        self._logger, self.num_failed = logger, 0

    def check(self, passed, what, detail=""):
        self.num_failed += not passed
        self._logger.log(20 if passed else 40, "%-6s %s%s", "ok" if passed else "WRONG", what, detail and f": {detail}")


def check_contents(store, report, session):
    """Checks every byte of the store: checksums, range of the codes, labels, class counts."""
    manifest, count = store.manifest, len(store.labels)
    try:
        with progress(session, count, "checksums", "image") as bar:
            verify_checksums(store, bar)
        report.check(True, "checksums of codes and labels")
    except ValueError as error:
        report.check(False, "checksums of codes and labels", str(error))
    codebook_size = manifest["codebook_size"]
    used = np.zeros(codebook_size + 1, dtype=bool)                  # the last place is for what is out of range
    with progress(session, len(store.rows), "codes", "image") as bar:
        for rows in np.array_split(store.rows, -(-len(store.rows) // ROWS_AT_ONCE)):
            used[np.minimum(store.codes[rows], codebook_size)] = True
            bar.update(len(rows))
    report.check(not used[codebook_size], f"codes are below {codebook_size}",
                 f"{np.count_nonzero(used[:codebook_size])} different ones")
    counts = np.bincount(store.labels[store.rows], minlength=len(manifest["class_names"]))
    report.check(counts.min() > 0 and len(counts) == len(manifest["class_names"]),
                 f"{len(counts)} classes with images", f"{counts.min()} to {counts.max()} each, "
                 f"{len(store.rows)} images, {count - len(store.rows)} broken")


def check_origin(store, images, hashes, report):
    """Checks that images and tokenizer are those of the extraction."""
    manifest = store.manifest
    report.check(manifest["tokenizer_sha256"] == hashes["weights_sha256"], "tokenizer is the one of the extraction")
    report.check(manifest["class_names"] == images.class_names, "class names, in order")
    report.check(manifest["images_sha256"] == images_sha256(images), "names of the images, in order")
    report.check(np.array_equal(store.labels, images.labels), "labels of the images")


@torch.inference_mode()
def check_rows(store, images, vq, rows, crops, report, session):
    """Encodes and decodes crops of some rows; returns pictures (n, P, 2 P, 3) uint8 with captions."""
    manifest, encoder = store.manifest, CropEncoder(vq, session.device, "fp32", 1)
    size, side = manifest["image_size"], enlarged_side(manifest["image_size"], manifest["crop_range"])
    pairs, captions, reproduced = [], [], []
    for row, crop in zip(rows.tolist(), crops.tolist(), strict=True):
        whole, name = read_whole(images, row, side), manifest["crops"][crop]
        original, = cut_crops(whole, size, [name])[0]
        stored = torch.from_numpy(store.codes[row, crop].astype(np.int64)).to(session.device)
        reproduced.append((encoder.codes(whole, size, [name])[0, 0] == stored).float().mean().item())
        decoded = to_uint8(vq.decode_codes(stored.clamp(max=manifest["codebook_size"] - 1)[None], store.grid))[0].cpu()
        quality = psnr(original[None], decoded[None])[0]
        pairs.append(torch.cat([original, decoded], dim=1).numpy())                         # (P, 2 P, 3)
        captions.append(f"{manifest['class_names'][store.labels[row]]}  {quality:.1f} dB")
    wrong = [row for row, share in zip(rows.tolist(), reproduced, strict=True) if share < LEAST_REPRODUCED]
    detail = f"encoding them again gives {100 * np.mean(reproduced):.2f} % of the stored codes"
    report.check(not wrong, f"codes of {len(rows)} random rows are those of their images",
                 detail + (f", below {100 * LEAST_REPRODUCED:g} % in rows {wrong}" if wrong else ""))
    return np.stack(pairs), captions


def read_whole(images, row, side):
    """Returns the centre crop (1, side, side, 3) uint8 of a row; black where there is no picture any more."""
    try:
        return center_crop(images.read(row), side)[None]
    except ValueError:
        return np.zeros((1, side, side, 3), np.uint8)


def main(args, session):
    logger, report = open_logger(session), None
    with checks(session):
        require_one_process(session)
        if args.num_rows < 1:
            raise ValueError(f"--num-rows: expected at least 1, got {args.num_rows}")
        store = open_codes(args.code_path)
        manifest = store.manifest
        if manifest["crops"] is None:
            raise ValueError(f"{args.code_path}: expected a store with a manifest.json; the older layout does not say "
                             "what its codes are")
        images = open_images(args.dataset, args.data_path)
        if len(images) != len(store.labels):
            raise ValueError(f"--data-path: expected the {len(store.labels)} images of {args.code_path}, "
                             f"found {len(images)}")
        vq, hashes = load_vq(args.vq_ckpt, manifest["vq_model"], manifest["codebook_size"],
                             manifest["codebook_embed_dim"])
    report = Report(logger)
    check_origin(store, images, hashes, report)
    check_contents(store, report, session)
    random = keyed_random(args.global_seed, 0, 0)
    rows = np.sort(random.choice(store.rows, min(args.num_rows, len(store.rows)), replace=False))
    crops = random.integers(store.codes.shape[1], size=len(rows))
    pictures, captions = check_rows(store, images, vq.to(session.device), rows, crops, report, session)
    output = Path(args.output or Path(args.code_path) / "check.png")
    save_grid(output, pictures, columns=4, captions=captions)
    if report.num_failed:
        logger.error("%d checks failed; images and what their codes decode to: %s", report.num_failed, output)
        raise SystemExit(1)
    logger.info("all checks passed; images and what their codes decode to: %s", output)


if __name__ == "__main__":
    run(main, build_parser())
