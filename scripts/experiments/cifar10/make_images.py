"""CIFAR-10 as class folders, which the entry scripts read.

    python scripts/experiments/cifar10/make_images.py DATA OUT

OUT/train gets 50,000 images, OUT/val 10,000. DATA is a folder for torchvision's CIFAR10, which
downloads what is missing (170 MB) and compares it with its checksum; or a folder of lossless
mosaics of 100 x 100 pictures: train_0.webp to train_4.webp, test.webp, and labels.npz.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[3])      # the root, not this folder

import hashlib
from collections.abc import Iterator

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10

from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import Flags, Parser, checks, run
from autoregressive.runtime.files import check_writable_folder, write_json
from autoregressive.runtime.log import open_logger, progress

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32                                           # of a picture, in pixels
MOSAIC_SIDE = 100                                   # of a mosaic, in pictures
MOSAICS = {"train": [f"train_{number}.webp" for number in range(5)], "val": ["test.webp"]}
NUM_IMAGES = {"train": 50_000, "val": 10_000}


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Write CIFAR-10 as folders of class folders.", has_seed=False)
    parser.add_argument("data", help="folder of torchvision's CIFAR10, or of mosaics")
    parser.add_argument("out", help="folder to write")
    return parser


def read_mosaics(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pictures (N, 32, 32, 3) uint8 of mosaics and their labels (N,)."""
    rows = []
    for name in MOSAICS[split]:
        mosaic = np.asarray(Image.open(folder / name).convert("RGB"))
        tiles = mosaic.reshape(MOSAIC_SIDE, SIDE, MOSAIC_SIDE, SIDE, 3).swapaxes(1, 2)
        rows.append(tiles.reshape(-1, SIDE, SIDE, 3))
    with np.load(folder / "labels.npz") as labels:
        return np.concatenate(rows), labels["y_train" if split == "train" else "y_test"]


def read_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pictures (N, 32, 32, 3) uint8 and labels (N,) of a split.

    Raises:
        ValueError: they are not whole.
    """
    if (folder / "labels.npz").is_file():
        pictures, labels = read_mosaics(folder, split)
    else:
        dataset = CIFAR10(folder, train=split == "train", download=True)
        pictures = dataset.data
        labels = np.array(dataset.targets)
    shape = (NUM_IMAGES[split], SIDE, SIDE, 3)
    if pictures.shape != shape or labels.shape != shape[:1]:
        raise ValueError(f"{folder}: expected pictures {shape} and as many labels, found "
                         f"{pictures.shape} and {labels.shape}")
    return pictures, labels


def write_split(folder: Path, pictures: np.ndarray, labels: np.ndarray) -> Iterator[None]:
    """Writes every picture as {class}/{row}.png; yields after each."""
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for row, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        Image.fromarray(picture).save(folder / CLASSES[label] / f"{row:05d}.png")
        yield


def main(args: Flags, session: Session) -> None:
    """Reads both splits, writes their pictures, and a manifest with their hashes."""
    open_logger(session)
    out = Path(args.out)
    with checks(session):
        check_writable_folder(out)
        splits = {split: read_split(Path(args.data), split) for split in NUM_IMAGES}
    hashes = {}
    for split, (pictures, labels) in splits.items():
        with progress(session, len(pictures), split, "image") as bar:
            for _ in write_split(out / split, pictures, labels):
                bar.update()
        content = pictures.tobytes() + labels.astype(np.int64).tobytes()
        hashes[split] = hashlib.sha256(content).hexdigest()
    write_json(out / "manifest.json", {"dataset": "CIFAR-10", "sha256": hashes})


if __name__ == "__main__":
    run(main, build_parser())
