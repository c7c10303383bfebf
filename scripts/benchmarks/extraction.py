"""Images per second of extraction: the published loop over single images and ours, on the same images in one run.

    python scripts/benchmarks/extraction.py                                     # CPU: several minutes
    python scripts/benchmarks/extraction.py --num-images 256 --precision bf16   # GPU

VQ-16 with random weights, ten crops; pictures are cut from the two photographs inside scikit-learn. Also: how far the
precisions agree, and what reading, cutting and storing sustain when the encoder costs nothing.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])      # the repository root instead of this folder

import statistics
import tempfile

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from autoregressive.data.code_writer import CodeWriter
from autoregressive.runtime.compute import PRECISIONS
from autoregressive.runtime.entry import run
from scripts.benchmarks.turns import benchmark_parser, compare, timed
from tokenizer.tokenizer_image.crops import load_crops
from tokenizer.tokenizer_image.encoding import CropEncoder, agreement, default_batch_size
from tokenizer.tokenizer_image.images import center_crop, crop_names, cut_crops, enlarged_side, open_dataset, to_float
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel

CROPS = crop_names(ten_crop=True, mirrored=True)
SIZE, CROP_RANGE = 256, 1.1                         # pixels of a crop, and of the whole around it
GFLOP = 138                                         # of the encoder, for one crop
STORE_IMAGES, STORE_BATCH = 3000, 32                # of the loader and store alone
AGREEMENT_CROPS = 2


def build_parser():
    """Returns the parser of this script's command line."""
    parser = benchmark_parser("Compare ways to turn images into codes: images per second.", rounds=1)
    parser.add_argument("--num-images", type=int, default=8, help="images to encode, ten crops of each")
    parser.add_argument("--precision", default="none", choices=tuple(PRECISIONS), help="of our encoder")
    parser.add_argument("--num-workers", type=int, default=2, help="of the loader and store alone")
    parser.add_argument("--data-path", help="folder of class folders to read; default: 256 px JPEGs made here")
    return parser


def random_windows(count):
    """Returns windows (count, SIZE, SIZE, 3) uint8 of two photographs."""
    random, photos = np.random.default_rng(0), load_sample_images().images
    windows = []
    for number in range(count):
        photo = photos[number % 2]
        top, left = (random.integers(length - SIZE, endpoint=True) for length in photo.shape[:2])
        windows.append(photo[top:top + SIZE, left:left + SIZE])
    return np.stack(windows)


@torch.inference_mode()
def extract_as_published(vq, encode, wholes, folder, device):
    """Takes one image at a time in float32: its ten crops are one batch, its codes one file."""
    for number, whole in enumerate(wholes):
        images = to_float(cut_crops(whole[None], SIZE, CROPS)[0]).to(device)
        codes = vq.quantize.codes(encode(images))
        np.save(folder / f"{number}.npy", codes[None].cpu().numpy())


def compare_encoding(args, device, folder):
    side = enlarged_side(SIZE, CROP_RANGE)
    wholes = np.stack([center_crop(window, side) for window in random_windows(args.num_images)])
    compiled = device.type == "cuda"
    torch.manual_seed(0)
    vq = VQModel(VQConfig("VQ-16")).eval().requires_grad_(False).to(device)
    batch_size = default_batch_size("VQ-16", SIZE, PRECISIONS[args.precision], device)
    ours = CropEncoder(vq, device, args.precision, batch_size, compiled)
    encode = torch.compile(vq.encode) if compiled else vq.encode

    def measure(extract):
        rate = len(wholes) / timed(extract, device)[1]
        return {"images/s": rate, "TFLOP/s of the encoder": rate * len(CROPS) * GFLOP / 1000}

    compare(f"{args.precision}, {batch_size} crops together (published: none, {len(CROPS)})", measure, {
        "published": lambda: extract_as_published(vq, encode, wholes, folder, device),
        "ours": lambda: np.save(folder / "all.npy", ours.codes(wholes, SIZE, CROPS).cpu().numpy())},
        args.rounds, warm_up=int(compiled))
    print(f"matrix products reach {matrix_tflops(args.precision, device):.3f} TFLOP/s")
    for precision in ("bf16", "fp16") if compiled else ("bf16",):
        half = CropEncoder(vq, device, precision, AGREEMENT_CROPS)
        rate = agreement(vq, half, wholes[:1], SIZE, CROPS[:AGREEMENT_CROPS], device)
        print(f"{precision} and float32 agree on {100 * rate:.2f} % of the codes (random weights)", flush=True)


def matrix_tflops(precision, device):
    """Returns the TFLOP/s of a large square matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    matrix = torch.randn(side, side, device=device, dtype=PRECISIONS[precision])
    return 2 * side**3 / statistics.median(timed(lambda: matrix @ matrix, device)[1] for _ in range(5)) / 1e12


def measure_store(args, folder):
    """Prints the images per second of reading, cutting and storing, without an encoder."""
    if not args.data_path:
        (folder / "images" / "photo").mkdir(parents=True)
        for number, window in enumerate(random_windows(STORE_IMAGES)):
            Image.fromarray(window).save(folder / "images" / "photo" / f"{number}.jpg", quality=95)
    dataset = open_dataset("imagenet", args.data_path or folder / "images")
    tokens = (SIZE // 16) ** 2
    writer = CodeWriter(folder / "codes", {"num_images": len(dataset), "num_crops": len(CROPS), "num_tokens": tokens,
                                           "codebook_size": 16384})
    writer.create(dataset.labels)

    def extract():
        for batch in load_crops(dataset, enlarged_side(SIZE, CROP_RANGE), writer.rows.missing(STORE_BATCH),
                                args.num_workers):
            writer.write(batch.rows, np.zeros((len(batch.rows), len(CROPS), tokens), np.int64), batch.failures)

    rate = len(dataset) / timed(extract, torch.device("cpu"))[1]
    print(f"loader and store alone: {rate:.0f} images/s with {args.num_workers} workers, {len(dataset)} images")


def main(args, session):
    with tempfile.TemporaryDirectory() as folder:
        measure_store(args, Path(folder))
        compare_encoding(args, session.device, Path(folder))


if __name__ == "__main__":
    run(main, build_parser())
