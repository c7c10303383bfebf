"""Makes a reference npz, for the evaluator to compare with, out of any image folder, data set or npz.

    python evaluations/c2i/make_reference.py --data-path imagenet/train --image-size 256 --num-images 10000 \
        --output evaluations/my_reference.npz

On a CPU, from the digits inside scikit-learn:

    python evaluations/c2i/make_reference.py --dataset digits --data-path train --image-size 16 --output reference.npz
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # the repository root, not this folder

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import Flags, Parser, at_least, check_one_process, checks, run
from autoregressive.runtime.files import Spool, check_output, open_npz, open_spool
from autoregressive.runtime.log import open_logger, progress
from evaluations.c2i.classifier import ClassifierFeatures
from evaluations.c2i.features import STATISTICS, FeatureNetwork
from evaluations.c2i.metrics import StreamingStatistics
from evaluations.c2i.npz_reader import NpzImages
from tokenizer.tokenizer_image.crops import CenterCrops, Failures, add_failure_args
from tokenizer.tokenizer_image.images import ImageSet, add_image_args, dataset_sha256, open_dataset

BATCH_IMAGES = 256      # pictures that are in memory together


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Make a reference npz out of an image folder, the digits, or an npz (--data-path X.npz).",
                    draws=False)
    add_image_args(parser)
    add_failure_args(parser)
    parser.add_argument("--output", required=True, help="the npz to write")
    parser.add_argument("--num-images", type=at_least(0), default=0, help="how many pictures, evenly spread; 0 = all")
    parser.add_argument("--kind", default="fid", choices=("fid", "rfid"),
                        help="fid: real pictures, to compare samples with; rfid: the originals of reconstructions")
    parser.add_argument("--classifier", help="also store the statistics of this small classifier's features")
    return parser


def open_source(args: Flags) -> tuple[NpzImages | ImageSet, np.ndarray, np.ndarray | None, dict[str, Any]]:
    """Opens what the flags name.

    Returns:
        the source of pictures; the rows to take from it, which ascend; its labels or None; the settings to record.
    """
    if Path(args.output).suffix != ".npz":
        raise ValueError(f"--output: expected a name ending in .npz, got {args.output}")
    if args.data_path.endswith(".npz"):
        if Path(args.output).resolve() == Path(args.data_path).resolve():
            raise ValueError(f"--output: expected another file than --data-path, got {args.output} for both; the "
                             "reference would replace its source, choose another name")
        source, resize = NpzImages(args.data_path), "none: pictures of an npz"
        source.check_side(args.image_size, "--image-size")
        labels, class_names = source.labels(), source.settings.get("class_names")
    else:
        source, resize = open_dataset(args.dataset, args.data_path), "ADM centre crop: box halvings, then bicubic"
        labels, class_names = source.labels, source.class_names
    count = args.num_images or len(source)
    if not 2 <= count <= len(source):
        raise ValueError(f"--num-images: expected 2 to {len(source)}, the pictures of {args.data_path}, got {count}")
    check_output(args.output)
    rows = np.arange(count) * len(source) // count
    return source, rows, labels, {
        "kind": f"{args.kind} reference", "dataset": args.dataset, "source": args.data_path, "num_images": count,
        "num_source_images": len(source), "image_size": args.image_size, "resize": resize, "class_names": class_names}


def originals_sha256(source: NpzImages | ImageSet, rows: np.ndarray) -> str | None:
    """Returns what reconstructions of the same pictures record as images_sha256, None if unknown."""
    if not isinstance(source, NpzImages):
        return dataset_sha256(source, rows)
    return source.settings.get("images_sha256") if len(rows) == len(source) else None


def spool_crops(spool: Spool, dataset: ImageSet, rows: np.ndarray, size: int, failures: Failures,
                session: Session) -> np.ndarray:
    """Adds the centre crops of the rows that are not broken to a spool; returns these rows.

    Raises:
        SystemExit: more are broken than may be; they are listed.
    """
    crops = CenterCrops(dataset, size)
    with progress(session, len(rows), "read", "image") as bar:
        for row in rows.tolist():
            crop = crops[range(row, row + 1)]
            failures.add(crop.failures)
            spool.add(crop.whole())
            bar.update()
    failures.check()
    return np.setdiff1d(rows, list(failures.found))


def read_npz(source: NpzImages, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Returns the pictures (P, P, 3) uint8 of rows of an npz, as they are."""
    every = itertools.chain.from_iterable(source.batches(BATCH_IMAGES))
    return itertools.compress(every, np.isin(range(len(source)), rows))


def write_reference(path: str, pictures: Iterable[np.ndarray], shape: tuple[int, ...], settings: dict[str, Any],
                    labels: np.ndarray | None, network: FeatureNetwork | None,
                    advance: Callable[[int], None]) -> None:
    """Writes a reference, streaming its pictures.

    Args:
        path: the npz.
        pictures: yields N pictures (P, P, 3) uint8.
        shape: (N, P, P, 3).
        settings: plain dict, stored as JSON text.
        labels: (N,) int64 or None.
        network: FeatureNetwork whose statistics are stored, or None.
        advance: called with the number of pictures written, for a progress bar.
    """
    statistics = [StreamingStatistics() for _ in STATISTICS]
    pictures = iter(pictures)

    def batches():
        while batch := list(itertools.islice(pictures, BATCH_IMAGES)):
            batch = np.stack(batch)
            if network:
                for known, features in zip(statistics, network.features(batch)[:2], strict=True):
                    known.add(features)
            yield batch
            advance(len(batch))

    with open_npz(path, settings) as npz:
        npz.add_rows("arr_0", np.uint8, shape, batches())
        if labels is not None:
            npz.add("labels", labels)
        if network:
            for (mean, covariance), known in zip(STATISTICS.values(), statistics, strict=True):
                npz.add(mean, known.mean)
                npz.add(covariance, known.covariance)


def main(args: Flags, session: Session) -> None:
    logger = open_logger(session)
    size, network = args.image_size, None
    with checks(session):
        check_one_process(session)
        source, rows, labels, settings = open_source(args)
        session.hold(args.output)
        if args.classifier:
            network = ClassifierFeatures(args.classifier, session.device)
            settings |= {"feature_network": network.name, "feature_network_sha256": network.sha256}
            if network.image_size != size:
                raise ValueError(f"--image-size: expected {network.image_size} for {network.name}, got {size}")
    with open_spool(Path(args.output).parent, (size, size, 3)) as spool, checks(session):
        if isinstance(source, NpzImages):
            pictures = read_npz(source, rows)
        else:
            failures = Failures(len(rows), args.max_failures)
            rows = spool_crops(spool, source, rows, size, failures, session)
            pictures = spool
            if failures.found:
                settings |= {"num_images": len(rows), "failed": [
                    {"row": row, "path": path, "reason": reason}
                    for row, (path, reason) in sorted(failures.found.items())]}
        if args.kind == "rfid":
            settings["images_sha256"] = originals_sha256(source, rows)
        with progress(session, len(rows), "make the reference", "image") as bar:
            write_reference(args.output, pictures, (len(rows), size, size, 3), settings,
                            None if labels is None else labels[rows], network, bar.update)
    logger.info("%d pictures of %s in %s", len(rows), args.data_path, args.output)


if __name__ == "__main__":
    run(main, build_parser())
