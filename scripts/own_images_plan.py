"""Chooses sizes for a folder of images, and lays out which of them train and which judge.

    python scripts/own_images_plan.py /data/my_images results/mine

`images` in the output folder then holds links to them, in train/ and val/. The chosen sizes are
explained on the error stream, and printed in the order of the fields of Plan.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])      # the root, not this folder

import hashlib
import json
import os
from dataclasses import asdict, astuple, dataclass

import numpy as np
from PIL import Image

from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import Flags, Parser, at_least, checks, run
from autoregressive.runtime.files import check_writable_folder, read_json, write_json
from autoregressive.runtime.identity import find_difference
from tokenizer.tokenizer_image.listing import list_images

VAL_EVERY = 10                  # of a class without a val folder, every tenth image judges
SMALL = 48                      # pictures with a shorter median side are taken at 32 pixels
FEW = 1000                      # images; with fewer the codebook is smaller
TOKENIZER_EPOCHS, TOKENIZER_BATCH = 20, 32
CLASSIFIER_EPOCHS, GPT_EPOCHS, GPT_BATCH = 30, 30, 64       # a batch of the classifier is as large
FEWEST_IMAGES = 66              # a batch of the GPT, beside the share that its training holds out
FEWEST_STEPS = 600
# At 32 pixels; at 64 half of the first, a quarter of the others.
MOST_TOKENIZER_STEPS, MOST_CLASSIFIER_STEPS, MOST_GPT_STEPS = 1500, 2000, 3000
MOST_SAMPLES = 2000
OTHER_PARTS = ("train", "val", "test", "valid", "validation")   # names of folders that are no class

Split = dict[str, dict[str, list[str]]]         # train or val -> class -> paths


@dataclass(frozen=True)
class Plan:
    """What the steps of scripts/own_images.sh are given.

    Attributes:
        image_size: pixels of a picture's side; 4 pixels are a token.
        codebook_size: codes of the tokenizer.
        cluster_size: codes per cluster.
        tokenizer_steps, classifier_steps, gpt_steps: of the three trainings.
        num_samples: pictures that are scored.
    """

    image_size: int
    codebook_size: int
    cluster_size: int
    tokenizer_steps: int
    classifier_steps: int
    gpt_steps: int
    num_samples: int


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Choose sizes for a folder of images.", has_seed=False)
    parser.add_argument("images", type=Path,
                        help="folder of class folders, or of train and val that hold such")
    parser.add_argument("output", type=Path, help="folder of all results")
    parser.add_argument("--tokenizer-steps", type=at_least(0), default=0,
                        help="length of the tokenizer's training; 0: by the number of images")
    parser.add_argument("--gpt-steps", type=at_least(0), default=0,
                        help="length of the GPT's training; 0: by the number of images")
    return parser


def list_split(images: Path) -> Split:
    """Returns the images that train and those that judge.

    Raises:
        ValueError: a folder is missing or empty, a class has one image alone, or it is no class.
    """
    if (images / "train").is_dir() and (images / "val").is_dir():
        split = {part: list_by_class(images / part) for part in ("train", "val")}
        differing = split["train"].keys() ^ split["val"].keys()
        if differing:
            raise ValueError(f"{images}: expected equal class folders in train and val, found "
                             f"{', '.join(sorted(differing))} in one of them; rename or remove it")
        return split
    for name in OTHER_PARTS:
        inside = list((images / name).iterdir()) if (images / name).is_dir() else []
        if inside and all(path.is_dir() for path in inside):
            raise ValueError(f"{images}: expected class folders, or train and val that hold such, "
                             f"found {name} with folders inside; give it as IMAGES, or rename the "
                             "two to train and val")
    split = {"train": {}, "val": {}}
    for name, paths in list_by_class(images).items():
        if len(paths) < 2:
            raise ValueError(f"{images / name}: expected at least 2 images of a class, found 1; "
                             "one of them judges what the others train")
        held = paths[VAL_EVERY - 1::VAL_EVERY] or paths[-1:]
        split["val"][name] = held
        split["train"][name] = [path for path in paths if path not in set(held)]
    return split


def list_by_class(folder: Path) -> dict[str, list[str]]:
    """Returns the paths of the images of every class; raises ValueError as list_images does."""
    names, paths = list_images(folder, "IMAGES")
    return dict(zip(names, paths, strict=True))


def drop_broken(split: Split) -> tuple[list[int], list[str]]:
    """Removes the images whose header cannot be read from a split, in place.

    Returns:
        the shorter sides of those that train, in pixels, and the paths of what was removed.

    Raises:
        ValueError: a class has none left.
    """
    sides = []
    broken = []
    for part, classes in split.items():
        for name, paths in classes.items():
            whole = []
            for path in paths:
                try:
                    with Image.open(path) as image:
                        side = min(image.size)
                except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                    broken.append(path)
                    continue
                whole.append(path)
                if part == "train":
                    sides.append(side)
            if not whole:
                raise ValueError(f"{Path(paths[0]).parent}: expected images that can be read in "
                                 f"{part}, found none; replace them, or remove the class")
            classes[name] = whole
    return sides, broken


def choose_plan(sides: list[int], tokenizer_steps: int = 0, gpt_steps: int = 0) -> Plan:
    """Returns the sizes for the images that train.

    Args:
        sides: their shorter sides in pixels.
        tokenizer_steps, gpt_steps: lengths of the trainings; 0 chooses them.
    """
    count = len(sides)
    is_small = np.median(sides) < SMALL
    half, quarter = (1, 1) if is_small else (2, 4)
    for_tokenizer = np.clip(TOKENIZER_EPOCHS * count // TOKENIZER_BATCH, FEWEST_STEPS,
                            MOST_TOKENIZER_STEPS // half)
    for_classifier = min(max(1, CLASSIFIER_EPOCHS * count // GPT_BATCH),
                         MOST_CLASSIFIER_STEPS // quarter)
    for_gpt = np.clip(GPT_EPOCHS * count // GPT_BATCH, FEWEST_STEPS, MOST_GPT_STEPS // quarter)
    return Plan(image_size=32 if is_small else 64, codebook_size=512 if count < FEW else 1024,
                cluster_size=16 if count < FEW else 32,
                tokenizer_steps=tokenizer_steps or int(for_tokenizer),
                classifier_steps=for_classifier, gpt_steps=gpt_steps or int(for_gpt),
                num_samples=min(MOST_SAMPLES, count))


def check_places(images: Path, output: Path) -> None:
    """Raises ValueError if images and results lie inside each other, whose folders would mix."""
    for inner, outer in ((output, images), (images, output / "images")):
        if inner.resolve().is_relative_to(outer.resolve()):
            raise ValueError(f"{output}: expected a folder outside {images}, whose folders are "
                             "classes, and not around it; name another one for the results")


def check_record(record: dict[str, object], path: Path) -> None:
    """Raises ValueError if results of another plan were begun in the folder of `path`.

    A GPT may be trained for longer.
    """
    links = path.with_name("images")
    if not path.is_file():
        if links.exists():
            raise ValueError(f"{links}: expected none in a new folder of results, found it there; "
                             "name another folder")
        return
    fixed = record.keys() - {"gpt_steps"}
    if difference := find_difference(record, read_json(path), sorted(fixed)):
        raise ValueError(f"{path}: expected a plan with {difference}; the images or the lengths "
                         "are others: name another folder for the results")


def link_images(split: Split, output: Path) -> None:
    """Makes links to the images of a split in `output`, those that are missing."""
    for part, classes in split.items():
        for name, paths in classes.items():
            (output / part / name).mkdir(parents=True, exist_ok=True)
            for number, path in enumerate(paths):
                link = output / part / name / f"{number:07d}-{Path(path).name}"
                if not link.is_symlink():
                    link.symlink_to(path)


def main(args: Flags, session: Session) -> None:
    """Lists the images, chooses the sizes, makes the links, prints the plan."""
    with checks(session):
        check_places(args.images, args.output)
        split = list_split(Path(os.path.abspath(args.images)))     # for the links; as it was named
        sides, broken = drop_broken(split)
        if len(sides) < FEWEST_IMAGES:
            raise ValueError(f"{args.images}: expected at least {FEWEST_IMAGES} images to train "
                             f"on, found {len(sides)}; add some")
        plan = choose_plan(sides, args.tokenizer_steps, args.gpt_steps)
        listed = hashlib.sha256(json.dumps(split).encode()).hexdigest()
        record = asdict(plan) | {"broken": broken, "images_sha256": listed}
        check_writable_folder(args.output)
        check_record(record, args.output / "plan.json")
    write_json(args.output / "plan.json", record)           # first: it says whose links these are
    link_images(split, args.output / "images")
    for path in broken:
        print(f"{path}: not read as an image, left out", file=sys.stderr)
    num_val = sum(map(len, split["val"].values()))
    print(f"{len(sides)} images of {len(split['train'])} classes train, {num_val} judge; the "
          f"median of their shorter sides is {np.median(sides):g} pixels.\n"
          f"Chosen: pictures of {plan.image_size} pixels, {(plan.image_size // 4) ** 2} tokens of "
          f"{plan.codebook_size} codes, clusters of {plan.cluster_size}; {plan.tokenizer_steps} "
          f"steps for the tokenizer, {plan.gpt_steps} for the GPT.", file=sys.stderr)
    print(*astuple(plan))


if __name__ == "__main__":
    run(main, build_parser())
