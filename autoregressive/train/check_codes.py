"""A look at a code store before a week of training.

Is it whole, and do its codes belong to these images?

    python autoregressive/train/check_codes.py --code-path codes --data-path imagenet/train \
        --vq-ckpt pretrained_models/vq_ds16_c2i.pt

On a CPU, after scripts/quickstart.sh:

    python autoregressive/train/check_codes.py --code-path results/quickstart/codes \
        --dataset digits --data-path train --vq-ckpt results/quickstart/vq.pt

Prints one line a check, saves a picture of random rows beside what their codes decode to, and ends
with exit code 1 if a check fails.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The repository root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import itertools
import logging
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from autoregressive.data.codes import DAMAGED, CodeStore, add_code_args, numbered_classes
from autoregressive.data.opening import open_codes
from autoregressive.data.store_checks import verify_checksums
from autoregressive.runtime.distributed import Session, keyed_random
from autoregressive.runtime.entry import Flags, Parser, at_least, check_one_process, checks, run
from autoregressive.runtime.files import check_output, read_json
from autoregressive.runtime.log import LOGGER, open_logger, progress
from autoregressive.runtime.pictures import save_grid
from tokenizer.tokenizer_image.crops import CenterCrops
from tokenizer.tokenizer_image.encoding import CropEncoder
from tokenizer.tokenizer_image.images import (
    ImageSet,
    add_source_args,
    crop_names,
    cut_crops,
    dataset_sha256,
    enlarged_side,
    open_dataset,
    to_uint8,
)
from tokenizer.tokenizer_image.loading import load_vq
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel
from tokenizer.validation.metrics import psnr

# Fraction of a row's codes: half precision loses a few, another picture nearly all.
LEAST_REPRODUCED = 0.5
ROWS_AT_ONCE = 4096             # of the codes, while their range is looked at


class Check(NamedTuple):
    """One line of the report: whether a check was passed, what was checked, and a detail or ""."""

    is_passed: bool
    what: str
    detail: str = ""


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Check a code store against its images and its tokenizer.")
    add_code_args(parser)
    add_source_args(parser)
    parser.add_argument("--vq-ckpt", required=True,
                        help="checkpoint of the tokenizer of the extraction")
    parser.add_argument("--num-rows", type=at_least(1), default=32,
                        help="random rows to decode beside their images")
    parser.add_argument("--output",
                        help="the picture; default: check.png in the folder of the codes")
    return parser


def check_manifest(store: CodeStore) -> None:
    """Raises ValueError unless a manifest says all that is needed to make its codes again."""
    path = Path(store.path) / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{store.path}: expected a store with a manifest.json; the older layout "
                         "does not say what its codes are")
    manifest = read_json(path, {"vq_model": str, "codebook_embed_dim": int,
                                "crop_range": (int, float)})
    try:
        VQConfig.recorded_in(manifest)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {DAMAGED}") from error
    crops = manifest["crops"]
    known = crop_names(ten_crop=True, mirrored=True)
    if len(crops) != manifest["num_crops"] or not all(crop in known for crop in crops):
        raise ValueError(f"{path}: expected {manifest['num_crops']} crops by name, found {crops}; "
                         f"{DAMAGED}")
    if not 1 <= manifest["crop_range"] < math.inf:
        raise ValueError(f"{path}: expected a crop_range of at least 1, found "
                         f"{manifest['crop_range']}; {DAMAGED}")


def check_origin(store: CodeStore, dataset: ImageSet, hashes: dict[str, str]) -> Iterator[Check]:
    """Checks that images and tokenizer are those of the extraction."""
    manifest = store.manifest
    class_names = manifest["class_names"]
    is_imported = bool(manifest.get("claimed"))
    yield Check(manifest["tokenizer_sha256"] == hashes["weights_sha256"],
                "tokenizer is the one " + ("claimed" if is_imported else "of the extraction"))
    if is_imported and class_names == numbered_classes(len(dataset.class_names)):
        yield Check(True, "number of classes", "the imported codes do not tell their names")
    else:
        yield Check(class_names == dataset.class_names, "class names, in order")
    # The names of files of imported codes are not those of images.
    if not is_imported:
        yield Check(manifest["images_sha256"] == dataset_sha256(dataset),
                    "names of the images, in order")
    yield Check(np.array_equal(store.labels, dataset.labels), "labels of the images")


def check_contents(store: CodeStore, session: Session) -> Iterator[Check]:
    """Checks every byte of the store: checksums, range of the codes, labels, class counts."""
    num_images = len(store.labels)
    damage = ""
    try:
        with progress(session, num_images, "checksums", "image") as bar:
            verify_checksums(store, bar)
    except ValueError as error:
        damage = str(error)
    yield Check(not damage, "checksums of codes and labels", damage)

    codebook_size = store.manifest["codebook_size"]
    is_used = np.zeros(codebook_size + 1, dtype=bool)   # the last place: what is out of range
    with progress(session, len(store.rows), "codes", "image") as bar:
        for rows in np.array_split(store.rows, -(-len(store.rows) // ROWS_AT_ONCE)):
            codes = store.codes[rows].astype(np.int64)
            in_range = (codes >= 0) & (codes < codebook_size)
            is_used[np.where(in_range, codes, codebook_size)] = True
            bar.update(len(rows))
    num_used = np.count_nonzero(is_used[:-1])
    yield Check(not is_used[-1], f"codes are below {codebook_size}", f"{num_used} different ones")

    num_classes = len(store.manifest["class_names"])
    labels = store.labels[store.rows]
    in_range = (labels >= 0) & (labels < num_classes)
    counts = np.bincount(labels[in_range], minlength=num_classes)
    smallest = counts.min(initial=num_images)
    largest = counts.max(initial=0)
    num_broken = num_images - len(store.rows)
    yield Check(in_range.all() and (counts > 0).all(),
                f"{np.count_nonzero(counts)} classes with images",
                f"{smallest} to {largest} each, {len(store.rows)} images, {num_broken} broken")


@torch.inference_mode()
def check_rows(store: CodeStore, dataset: ImageSet, vq: VQModel, rows: np.ndarray,
               crops: np.ndarray, output: Path, session: Session) -> Iterator[Check]:
    """Encodes and decodes crops of some rows, and saves originals and results as one PNG.

    Args:
        store: CodeStore.
        dataset: the images.
        vq: the tokenizer, on the session's device.
        rows, crops: (n,) integers each: which crop of which row.
        output: the PNG.
        session: Session.
    """
    manifest = store.manifest
    size = manifest["image_size"]
    encoder = CropEncoder(vq, session.device, "none", batch_size=1)
    images = CenterCrops(dataset, enlarged_side(size, manifest["crop_range"]))
    pairs = []
    captions = []
    reproduced = []                     # fraction of the codes of each row
    for row, crop in zip(rows, crops, strict=True):
        # What the image is encoded to now: all black if it cannot be read.
        whole = images[range(row, row + 1)].pictures
        names = [manifest["crops"][crop]]
        original = cut_crops(whole, size, names)[0, 0]                              # (P, P, 3)
        codes = encoder.codes(whole, size, names)[0, 0]                             # (T,)
        stored = torch.from_numpy(store.codes[row, crop].astype(np.int64)).to(session.device)
        reproduced.append((codes == stored).float().mean().item())

        # What its stored codes decode to.
        in_range = stored.clamp(0, manifest["codebook_size"] - 1)
        decoded = to_uint8(vq.decode_codes(in_range[None], store.grid))[0].cpu()    # (P, P, 3)
        quality = psnr(original[None], decoded[None])[0]
        pairs.append(torch.cat([original, decoded], dim=1).numpy())                 # (P, 2 P, 3)
        label = store.labels[row]
        is_known = 0 <= label < len(manifest["class_names"])
        name = manifest["class_names"][label] if is_known else f"label {label}"
        captions.append(f"{quality:.1f} dB  {name}")
    save_grid(output, pairs, columns=4, captions=captions)

    wrong = rows[np.array(reproduced) < LEAST_REPRODUCED].tolist()
    detail = f"encoding them again gives {100 * np.mean(reproduced):.2f} % of the stored codes"
    if wrong:
        detail += f", below {100 * LEAST_REPRODUCED:g} % in rows {wrong}"
    yield Check(not wrong, f"codes of {len(rows)} random rows are those of their images", detail)


def main(args: Flags, session: Session) -> None:
    """Runs all checks and logs a line for each."""
    open_logger(session)

    # Open the store, its images and its tokenizer.
    with checks(session):
        check_one_process(session)
        store = open_codes(args.code_path)
        check_manifest(store)
        dataset = open_dataset(args.dataset, args.data_path)
        if len(dataset) != len(store.labels):
            raise ValueError(f"--data-path: expected the {len(store.labels)} images of "
                             f"{args.code_path}, found {len(dataset)}")
        vq, hashes = load_vq(args.vq_ckpt, VQConfig.recorded_in(store.manifest))
        vq.to(session.device)
        output = Path(args.output or Path(args.code_path) / "check.png")
        check_output(output)
        session.hold(output)

    # Choose the rows to decode, and a crop of each.
    random = keyed_random(args.global_seed, 0, 0)
    num_rows = min(args.num_rows, len(store.rows))
    rows = np.sort(random.choice(store.rows, num_rows, replace=False))
    crops = random.integers(store.codes.shape[1], size=len(rows))

    # Each check is logged as soon as it is done.
    num_failed = 0
    for check in itertools.chain(check_origin(store, dataset, hashes),
                                 check_contents(store, session),
                                 check_rows(store, dataset, vq, rows=rows, crops=crops,
                                            output=output, session=session)):
        if not check.is_passed:
            num_failed += 1
        LOGGER.log(logging.INFO if check.is_passed else logging.ERROR, "%-6s %s%s",
                   "ok" if check.is_passed else "WRONG", check.what,
                   f": {check.detail}" if check.detail else "")
    if num_failed:
        LOGGER.error("%d checks failed; images and what their codes decode to: %s", num_failed,
                     output)
        raise SystemExit(1)
    LOGGER.info("all checks passed; images and what their codes decode to: %s", output)


if __name__ == "__main__":
    run(main, build_parser())
