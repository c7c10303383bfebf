"""Images per second of extraction: the published loop over single images and ours, in one run.

    python scripts/benchmarks/extraction.py                             # CPU: several minutes
    python scripts/benchmarks/extraction.py --num-images 256 --precision bf16 --rounds 3    # GPU

VQ-16 with random weights, ten crops; pictures are cut from the two photographs inside scikit-learn.
Also: how far the precisions agree, and what reading, cutting and storing sustain when the encoder
costs nothing.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The repository root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import functools
import statistics
import tempfile

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from autoregressive.data.code_writer import CodeWriter
from autoregressive.runtime.compute import PRECISIONS, set_up_compiler
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import Flags, Parser, at_least, run
from scripts.benchmarks.turns import (
    Report,
    Values,
    add_report_args,
    benchmark_parser,
    compare,
    timed,
)
from tokenizer.tokenizer_image.crops import load_crops
from tokenizer.tokenizer_image.encoding import CropEncoder, agreement, default_batch_size
from tokenizer.tokenizer_image.images import (
    center_crop,
    crop_names,
    cut_crops,
    enlarged_side,
    open_dataset,
    to_float,
)
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel

CROPS = crop_names(ten_crop=True, mirrored=True)
CROP_RANGE = 1.1                                    # side of the whole around a crop
GFLOP = 138                                         # of the encoder, for one crop of 256 pixels
STORE_BATCH = 32                                    # of the loader and store alone
AGREEMENT_CROPS = 2


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    description = "Compare ways to turn images into codes: images per second."
    parser = benchmark_parser(description, rounds=1)
    add_report_args(parser)
    parser.add_argument("--num-images", type=at_least(1), default=8,
                        help="images to encode, ten crops of each")
    parser.add_argument("--image-size", type=at_least(16), default=256,
                        help="pixels of a crop's side")
    parser.add_argument("--store-images", type=at_least(0), default=3000,
                        help="images of the loader and store alone; 0 leaves that out")
    parser.add_argument("--precision", default="none", choices=tuple(PRECISIONS),
                        help="of our encoder")
    parser.add_argument("--num-workers", type=at_least(0), default=2,
                        help="of the loader and store alone")
    parser.add_argument("--data-path",
                        help="folder of class folders to read; default: 256 px JPEGs made here")
    return parser


def random_windows(count: int, size: int) -> np.ndarray:
    """Returns windows (count, size, size, 3) uint8 of two photographs."""
    random, photos = np.random.default_rng(0), load_sample_images().images
    windows = []
    for number in range(count):
        photo = photos[number % 2]
        top, left = (random.integers(length - size, endpoint=True) for length in photo.shape[:2])
        windows.append(photo[top:top + size, left:left + size])
    return np.stack(windows)


@torch.inference_mode()
def extract_as_published(vq, encode, wholes, size, folder, device):
    """Takes one image at a time in float32: its ten crops are one batch, its codes one file."""
    for number, whole in enumerate(wholes):
        images = to_float(cut_crops(whole[None], size, CROPS)[0]).to(device)
        codes = vq.quantize.codes(encode(images))
        np.save(folder / f"{number}.npy", codes[None].cpu().numpy())


def compare_encoding(args: Flags, device: torch.device, folder: Path) -> Values:
    """Measures both ways of encoding and prints how far the precisions agree."""
    size = args.image_size
    side = enlarged_side(size, CROP_RANGE)
    windows = random_windows(args.num_images, size)
    wholes = np.stack([center_crop(window, side) for window in windows])
    compiled = device.type == "cuda"
    torch.manual_seed(0)
    vq = VQModel(VQConfig("VQ-16")).eval().requires_grad_(False).to(device)
    batch_size = min(default_batch_size("VQ-16", size, PRECISIONS[args.precision], device),
                     args.num_images * len(CROPS))
    ours = CropEncoder(vq, device, args.precision, batch_size, compiled)
    encode = torch.compile(vq.encode) if compiled else vq.encode

    gflop_per_image = len(CROPS) * GFLOP * (size / 256)**2

    def measure(extract):
        rate = len(wholes) / timed(extract, device)[1]
        return {"images/s": rate, "TFLOP/s of the encoder": rate * gflop_per_image / 1000}

    ways = {
        "published": lambda: extract_as_published(vq, encode, wholes, size, folder, device),
        "ours": lambda: np.save(folder / "all.npy", ours.codes(wholes, size, CROPS).cpu().numpy()),
    }
    title = f"{args.precision}, {batch_size} crops together (published: none, {len(CROPS)})"
    medians = compare(title, measure, ways, args.rounds, warm_up=int(compiled))
    fastest = matrix_tflops(args.precision, device)
    print(f"matrix products reach {fastest:.3f} TFLOP/s")
    for precision in ("bf16", "fp16") if compiled else ("bf16",):
        half = CropEncoder(vq, device, precision, AGREEMENT_CROPS)
        rate = agreement(vq, half, wholes[:1], size, CROPS[:AGREEMENT_CROPS], device)
        print(f"{precision} and float32 agree on {100 * rate:.2f} % of the codes (random weights)",
              flush=True)
    return medians | {"matrix products": {"TFLOP/s of the encoder": fastest}}


def matrix_tflops(precision: str, device: torch.device) -> float:
    """Returns the TFLOP/s of a large square matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    matrix = torch.randn(side, side, device=device, dtype=PRECISIONS[precision])
    seconds = [timed(lambda: matrix @ matrix, device)[1] for _ in range(5)]
    return 2 * side**3 / statistics.median(seconds) / 1e12


def measure_store(args: Flags, folder: Path) -> Values:
    """Measures the images per second of reading, cutting and storing, without an encoder."""
    size = args.image_size
    if not args.data_path:
        (folder / "images" / "photo").mkdir(parents=True)
        for number, window in enumerate(random_windows(args.store_images, size)):
            Image.fromarray(window).save(folder / "images" / "photo" / f"{number}.jpg", quality=95)
    dataset = open_dataset("imagenet", args.data_path or folder / "images")
    tokens = (size // 16) ** 2
    header = {"num_images": len(dataset), "num_crops": len(CROPS), "num_tokens": tokens,
              "codebook_size": 16384}
    writer = CodeWriter(folder / "codes", header)
    writer.create(dataset.labels)

    def extract():
        side = enlarged_side(size, CROP_RANGE)
        missing = writer.rows.missing(STORE_BATCH)
        for batch in load_crops(dataset, side, missing, args.num_workers):
            codes = np.zeros((len(batch.rows), len(CROPS), tokens), np.int64)
            writer.write(batch.rows, codes, batch.failures)

    rate = len(dataset) / timed(extract, torch.device("cpu"))[1]
    print(f"loader and store alone: {rate:.0f} images/s with {args.num_workers} workers, "
          f"{len(dataset)} images")
    return {"ours": {"images/s": rate}}


def main(args: Flags, session: Session) -> None:
    if session.device.type == "cuda":
        set_up_compiler(session.device, "raise")
    report = Report("extraction", args.report, args.minutes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report.measure(f"VQ-16, ten crops of {args.image_size} px, {args.precision}",
                       functools.partial(compare_encoding, args, session.device, folder))
        if args.store_images:
            report.measure(f"loader and store alone, {args.num_workers} workers",
                           functools.partial(measure_store, args, folder))
    report.finish()


if __name__ == "__main__":
    run(main, build_parser())
