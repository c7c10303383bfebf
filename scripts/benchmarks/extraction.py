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

import tempfile
import time

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from autoregressive.data.code_writer import CodeWriter
from autoregressive.runtime.entry import Parser, run
from tokenizer.tokenizer_image.crops import load_rows
from tokenizer.tokenizer_image.encoding import ENCODE_PRECISIONS, CropEncoder, agreement, default_batch_size
from tokenizer.tokenizer_image.images import center_crop, crop_names, cut_crops, enlarged_side, open_images, to_float
from tokenizer.tokenizer_image.vq_model import VQModel

CROPS = crop_names(ten_crop=True, mirrored=True)
CROP_RANGE = 1.1
GFLOP_PER_PIXEL = 138 / 256**2                      # of the encoder, for one crop
STORE_IMAGES, STORE_BATCH = 3000, 32                # of the loader and store alone
AGREEMENT_CROPS = 2


def build_parser():
    """Returns the parser of this script's command line."""
    parser = Parser("Compare ways to turn images into codes: images per second.", draws=False)
    parser.add_argument("--num-images", type=int, default=8, help="images to encode, ten crops of each")
    parser.add_argument("--image-size", type=int, default=256, help="side of a crop in pixels")
    parser.add_argument("--precision", default="fp32", choices=tuple(ENCODE_PRECISIONS), help="of our encoder")
    parser.add_argument("--rounds", type=int, default=1, help="how often both ways take turns; medians are printed")
    parser.add_argument("--num-workers", type=int, default=2, help="of the loader and store alone")
    parser.add_argument("--data-path", help="folder of class folders to read; default: 256 px JPEGs made here")
    parser.add_argument("--skip-encoding", action="store_true", help="measure loader and store only")
    return parser


def random_windows(count, size):
    """Returns windows (count, size, size, 3) uint8 of two photographs."""
    random, photos = np.random.default_rng(0), load_sample_images().images
    windows = []
    for number in range(count):
        photo = photos[number % 2]
        top, left = (random.integers(length - size, endpoint=True) for length in photo.shape[:2])
        windows.append(photo[top:top + size, left:left + size])
    return np.stack(windows)


class PublishedLoop:
    """One image at a time in float32: its ten crops are one batch, its codes one file."""

    def __init__(self, vq, device, compiled):
        self.vq, self.device = vq.to(device), device
        self.encode = torch.compile(vq.encode) if compiled else vq.encode

    @torch.inference_mode()
    def extract(self, wholes, size, folder):
        for number, whole in enumerate(wholes):
            images = to_float(cut_crops(whole[None], size, CROPS)[0]).to(self.device)
            codes = self.vq.quantize.codes(self.encode(images))
            np.save(folder / f"{number}.npy", codes[None].cpu().numpy())


def compare_encoding(args, device, folder):
    wholes = np.stack([center_crop(window, enlarged_side(args.image_size, CROP_RANGE))
                       for window in random_windows(args.num_images, 256)])
    compiled = device.type == "cuda"
    torch.manual_seed(0)
    vq = VQModel("VQ-16").eval().requires_grad_(False)
    batch_size = default_batch_size("VQ-16", args.image_size, ENCODE_PRECISIONS[args.precision], device)
    ours = CropEncoder(vq, device, args.precision, batch_size, compiled)
    published = PublishedLoop(vq, device, compiled)
    ways = {"published": lambda: published.extract(wholes, args.image_size, folder),
            "ours": lambda: np.save(folder / "all.npy", ours.codes(wholes, args.image_size, CROPS).cpu().numpy())}
    if compiled:
        for extract in ways.values():
            extract()
    seconds = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, extract in ways.items():
            started = time.perf_counter()
            extract()
            seconds[name].append(time.perf_counter() - started)
    rates = {name: args.num_images / np.median(times) for name, times in seconds.items()}
    for name, rate in rates.items():
        tflops = rate * len(CROPS) * GFLOP_PER_PIXEL * args.image_size**2 / 1000
        print(f"{name}: {rate:.3f} images/s, {tflops:.3f} TFLOP/s of the encoder", flush=True)
    print(f"ours / published: {rates['ours'] / rates['published']:.2f} ({args.precision}, {batch_size} crops together; "
          f"published: fp32, {len(CROPS)}); matrix products reach {matrix_tflops(args.precision, device):.3f} TFLOP/s")
    for precision in ("bf16", "fp16") if compiled else ("bf16",):
        half = CropEncoder(vq, device, precision, AGREEMENT_CROPS)
        rate = agreement(vq, half, wholes[:1], args.image_size, CROPS[:AGREEMENT_CROPS], device)
        print(f"{precision} and fp32 agree on {100 * rate:.2f} % of the codes (random weights)", flush=True)


def matrix_tflops(precision, device):
    """Returns the TFLOP/s of a large square matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    matrix = torch.randn(side, side, device=device, dtype=ENCODE_PRECISIONS[precision])
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / np.median(seconds) / 1e12


def measure_store(args, folder):
    """Prints the images per second of reading, cutting and storing, without an encoder."""
    if not args.data_path:
        (folder / "images" / "photo").mkdir(parents=True)
        for number, window in enumerate(random_windows(STORE_IMAGES, 256)):
            Image.fromarray(window).save(folder / "images" / "photo" / f"{number}.jpg", quality=95)
    images = open_images("imagenet", args.data_path or folder / "images")
    tokens = (args.image_size // 16) ** 2
    writer = CodeWriter(folder / "codes", {"num_images": len(images), "num_crops": len(CROPS), "num_tokens": tokens,
                                           "codebook_size": 16384})
    writer.create(images.labels)
    loader = load_rows(images, enlarged_side(args.image_size, CROP_RANGE), writer.missing(STORE_BATCH),
                       args.num_workers)
    started = time.perf_counter()
    for batch in loader:
        writer.write(batch.rows, np.zeros((len(batch.rows), len(CROPS), tokens), np.int64), batch.failures)
    rate = len(images) / (time.perf_counter() - started)
    print(f"loader and store alone: {rate:.0f} images/s with {args.num_workers} workers, {len(images)} images")


def main(args, session):
    with tempfile.TemporaryDirectory() as folder:
        measure_store(args, Path(folder))
        if not args.skip_encoding:
            compare_encoding(args, session.device, Path(folder))


if __name__ == "__main__":
    run(main, build_parser())
