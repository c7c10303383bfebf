"""Image files and the only conversions between uint8 pictures and float images.

Pictures are (H, W, 3) uint8 RGB numpy arrays; images are (N, 3, P, P) float32 tensors in [-1, 1].
The geometry is that of ADM (OpenAI's guided-diffusion), which the published codes and references
were made with. Letters: B pictures, N images or pictures, H and W sides, P pixels of a crop's side.
"""

import argparse
import hashlib
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from autoregressive.runtime.entry import Parser, pixels
from tokenizer.tokenizer_image.listing import list_images

MOST_PIXELS = 2**27             # of an enlarged picture; Pillow refuses files above 2^27.4
# Of crops: the fraction of the space that is above them, and left of them.
POSITIONS = {"top-left": (0, 0), "top-right": (0, 1), "bottom-left": (1, 0), "bottom-right": (1, 1),
             "centre": (0.5, 0.5)}
MIRRORED = ", mirrored"         # what the name of such a crop ends with
DIGITS_SPLITS = ("train", "val")
DIGITS_VAL = 6                  # one in so many digits of each class belongs to the split val
DIGITS_SEED = 0                 # of the split that tokenizer, GPT and classifier share
# What Pillow raises on truncated, damaged, misnamed or gigantic files.
BROKEN_IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error,
                       Image.DecompressionBombError)


def add_source_args(parser: Parser) -> argparse._ArgumentGroup:
    """Declares --dataset and --data-path, which say where images come from; returns their group."""
    group = parser.add_argument_group("images")
    group.add_argument("--dataset", default="imagenet", choices=tuple(DATASETS),
                       help="imagenet is any folder of class folders, "
                            "digits the one inside scikit-learn")
    group.add_argument("--data-path", required=True,
                       help=f"the folder; for digits the split, {' or '.join(DIGITS_SPLITS)}")
    return group


def add_image_args(parser: Parser) -> None:
    """Declares the flags of add_source_args, and --image-size beside them."""
    group = add_source_args(parser)
    group.add_argument("--image-size", type=pixels, default=256, help="side in pixels")


class ImageSet:
    """A set of labelled pictures.

    Attributes:
        class_names: names of the classes, in the order of the labels.
        labels: (N,) int64.
    """

    class_names: list[str]
    labels: np.ndarray

    def __len__(self) -> int:
        """Returns N, the number of pictures."""
        return len(self.labels)

    def name_of(self, row: int) -> str:
        """Returns the path of a row inside the set."""

    def read(self, row: int) -> np.ndarray:
        """Returns the picture (H, W, 3) uint8 of a row. Raises ValueError if it is broken."""


def open_dataset(dataset: str, data_path: str, flag: str = "--data-path") -> ImageSet:
    """Opens a set of labelled pictures.

    Args:
        dataset: "imagenet" (any folder with one folder a class) or "digits" (scikit-learn's).
        data_path: the folder; for digits the split, "train" or "val".
        flag: that names it, for an error.

    Raises:
        ValueError: there are no images to be had there.
    """
    return DATASETS[dataset](data_path, flag)


def dataset_sha256(dataset: ImageSet, rows: Iterable[int] | None = None) -> str:
    """Returns the SHA-256 over the names and labels of `rows`, or of all, in order."""
    digest = hashlib.sha256()
    for row in range(len(dataset)) if rows is None else rows:
        digest.update(os.fsencode(f"{dataset.name_of(row)} {int(dataset.labels[row])}\n"))
    return digest.hexdigest()


class ImageFolder(ImageSet):
    """Pictures in one folder a class, in the order and under the labels of listing.list_images."""

    def __init__(self, data_path: str, flag: str) -> None:
        self._root = Path(data_path)
        self.class_names, paths = list_images(self._root, flag)
        counts = [len(paths_of_class) for paths_of_class in paths]
        self.labels = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        names = [os.fsencode(os.path.relpath(path, self._root)) for path in chain(*paths)]
        # One block of bytes: worker processes share it, where they would copy a million strings.
        self._names = np.array(names)

    def name_of(self, row: int) -> str:
        """Returns the path of a row below the folder."""
        return os.fsdecode(self._names[row])

    def read(self, row: int) -> np.ndarray:
        """Returns the picture (H, W, 3) uint8 of a row. Raises ValueError if the file is broken."""
        return read_picture(self._root / self.name_of(row))


class Digits(ImageSet):
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels, in one split by class."""

    def __init__(self, split: str, flag: str) -> None:
        if split not in DIGITS_SPLITS:
            raise ValueError(f"{flag}: expected {' or '.join(DIGITS_SPLITS)} "
                             f"(a split of the digits), got {split}")
        # Imported here: it takes a second, and folders do not need it.
        from sklearn.datasets import load_digits

        values, labels = load_digits(return_X_y=True)
        self._rows = _digits_rows(labels, split)
        grey = np.rint(values[self._rows] * (255 / 16)).astype(np.uint8)    # values are 0 .. 16
        self._pictures = grey.reshape(-1, 8, 8, 1).repeat(3, axis=3)        # (N, 8, 8, 3)
        self.class_names = [str(digit) for digit in range(10)]
        self.labels = labels[self._rows].astype(np.int64)

    def name_of(self, row: int) -> str:
        """Returns the index of a row in scikit-learn's whole set."""
        return str(self._rows[row])

    def read(self, row: int) -> np.ndarray:
        """Returns the picture (8, 8, 3) uint8 of a row."""
        return self._pictures[row]


def _digits_rows(labels: np.ndarray, split: str) -> np.ndarray:
    """Returns the rows of a split, ascending, of the set with these labels (1797,)."""
    random = np.random.Generator(np.random.Philox(key=DIGITS_SEED))
    is_val = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        rows = random.permutation(np.flatnonzero(labels == digit))
        is_val[rows[:len(rows) // DIGITS_VAL]] = True
    return np.flatnonzero(is_val == (split == "val"))


DATASETS: dict[str, Callable[[str, str], ImageSet]] = {"imagenet": ImageFolder, "digits": Digits}


def read_picture(path: str | Path) -> np.ndarray:
    """Reads an image file as RGB, without turning it by its EXIF orientation.

    Args:
        path: of any format that Pillow reads; grey, 16-bit grey, palette, CMYK and alpha (dropped)
            are converted.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: the file is missing, damaged, no image, of floats, or too large for Pillow.
    """
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode == "F":                       # Pillow would clip 0 .. 1 to black
                raise ValueError("found floating-point values, whose range nothing says")
            if image.mode.startswith("I"):              # 16-bit grey: Pillow would clip it to 255
                grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
                image = Image.fromarray(grey)
            return np.asarray(image.convert("RGB"))
    except BROKEN_IMAGE_ERRORS as error:
        raise ValueError(f"{path}: expected an image, {error or type(error).__name__}; "
                         "replace or remove the file") from error


def _resize(picture: np.ndarray, side: int) -> np.ndarray:
    """Returns a picture (H, W, 3) uint8 with a shorter side of `side` pixels, by ADM's rule.

    It is halved by averaging while its shorter side is at least twice the wanted one, then resized
    by bicubic interpolation.
    """
    image = Image.fromarray(picture)
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    new_width = round(image.width * scale)
    new_height = round(image.height * scale)
    height, width = picture.shape[:2]
    if new_width * new_height > max(MOST_PIXELS, height * width):
        raise ValueError(f"expected a picture whose sides differ less, found {width} x {height} "
                         f"pixels, which become {new_width} x {new_height} before they are cut; "
                         "replace or remove the file")
    resized = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
    return np.array(resized)                            # a copy: Pillow's own memory is read-only


def center_crop(picture: np.ndarray, size: int) -> np.ndarray:
    """Returns ADM's centre crop (size, size, 3) of a picture (H, W, 3) uint8, enlarged if small."""
    resized = _resize(picture, size)
    height, width = resized.shape[:2]
    top = (height - size) // 2
    left = (width - size) // 2
    return resized[top:top + size, left:left + size]


def enlarged_side(size: int, crop_range: float) -> int:
    """Returns the side of what crops of `size` pixels are cut from, truncated: 256 * 1.1 -> 281."""
    return int(size * crop_range)


def crop_names(ten_crop: bool, mirrored: bool) -> list[str]:
    """Returns the names of the crops of a picture, in the published order.

    Args:
        ten_crop: whether torchvision's five positions are cut, or the centre alone.
        mirrored: whether those of the mirrored picture follow.
    """
    names = list(POSITIONS) if ten_crop else ["centre"]
    return names + [name + MIRRORED for name in names] if mirrored else names


def cut_crops(wholes: torch.Tensor | np.ndarray, size: int, names: list[str]) -> torch.Tensor:
    """Cuts the named crops out of larger centre crops, as torchvision's TenCrop does.

    Args:
        wholes: (B, W, W, 3) uint8, torch or numpy.
        size: side of a crop in pixels, at most W.
        names: some of crop_names.

    Returns:
        (B, len(names), size, size, 3) uint8 tensor on the device of `wholes`.
    """
    wholes = torch.as_tensor(wholes)                                        # (B, W, W, 3)
    mirrored = wholes.flip(2)
    space = wholes.shape[1] - size
    crops = []
    for name in names:
        fraction_above, fraction_left = POSITIONS[name.removesuffix(MIRRORED)]
        top = round(fraction_above * space)
        left = round(fraction_left * space)
        source = mirrored if name.endswith(MIRRORED) else wholes
        crops.append(source[:, top:top + size, left:left + size])           # (B, size, size, 3)
    return torch.stack(crops, dim=1)


def random_crop(picture: np.ndarray, size: int, random: np.random.Generator,
                smallest_fraction: float) -> np.ndarray:
    """Cuts ADM's random crop: any window of a picture that is resized at random.

    The shorter side becomes `size` to `size / smallest_fraction` pixels.

    Args:
        picture: (H, W, 3) uint8.
        size: side of the crop in pixels.
        random: numpy Generator, which decides everything.
        smallest_fraction: least fraction of the shorter side that a crop shows, above 0, at most 1.

    Returns:
        (size, size, 3) uint8.
    """
    side = random.integers(size, math.ceil(size / smallest_fraction), endpoint=True)
    resized = _resize(picture, int(side))
    height, width = resized.shape[:2]
    top = random.integers(height - size, endpoint=True)
    left = random.integers(width - size, endpoint=True)
    return resized[top:top + size, left:left + size]


def to_float(pictures: torch.Tensor | np.ndarray) -> torch.Tensor:
    """Returns x / 127.5 - 1: images (N, 3, P, P) float32 of pictures (N, P, P, 3) uint8."""
    return torch.as_tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images: torch.Tensor, size: int | None = None,
             antialias: bool = False) -> torch.Tensor:
    """Turns images into pictures by the published rule: resize, then clamp(127.5 x + 128, 0, 255).

    Args:
        images: (N, 3, P, P) float, about in [-1, 1].
        size: side of the result in pixels; None keeps P.
        antialias: whether the bicubic resize filters; the published rule does not.

    Returns:
        (N, size, size, 3) uint8 tensor on the device of `images`; fractions are cut off.
    """
    images = images.float()
    if size is not None and size != images.shape[-1]:
        images = F.interpolate(images, size=(size, size), mode="bicubic", antialias=antialias)
    return torch.clamp(127.5 * images + 128, 0, 255).permute(0, 2, 3, 1).to(torch.uint8)
