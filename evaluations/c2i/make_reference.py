"""Makes a reference npz for the evaluator out of any image folder, data set or npz.

    python evaluations/c2i/make_reference.py --data-path imagenet/train --image-size 256 \
        --num-images 10000 --output evaluations/my_reference.npz

On a CPU, from the digits inside scikit-learn:

    python evaluations/c2i/make_reference.py --dataset digits --data-path train --image-size 16 \
        --output reference.npz
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # the repository root, not this folder

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import Flags, Parser, at_least, check_one_process, checks, run
from autoregressive.runtime.failures import Failures, add_failure_args
from autoregressive.runtime.files import Spool, check_output, open_npz, open_spool
from autoregressive.runtime.log import open_logger, progress
from evaluations.c2i.classifier import ClassifierFeatures
from evaluations.c2i.features import STATISTICS, FeatureNetwork
from evaluations.c2i.metrics import StreamingStatistics
from evaluations.c2i.npz_reader import NpzImages
from tokenizer.tokenizer_image.crops import CenterCrops
from tokenizer.tokenizer_image.images import ImageSet, add_image_args, dataset_sha256, open_dataset

BATCH_IMAGES = 256      # pictures that are in memory together


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Make a reference npz out of an image folder, the digits, or an npz "
                    "(--data-path X.npz).", has_seed=False)
    add_image_args(parser)
    add_failure_args(parser)
    parser.add_argument("--output", required=True, help="the npz to write")
    parser.add_argument("--num-images", type=at_least(0), default=0,
                        help="how many pictures, evenly spread; 0 = all")
    parser.add_argument("--kind", default="fid", choices=("fid", "rfid"),
                        help="fid: real pictures, to compare samples with; "
                             "rfid: the originals of reconstructions")
    parser.add_argument("--classifier",
                        help="also store the statistics of this small classifier's features")
    return parser


@dataclass(frozen=True)
class Source:
    """Where the pictures of a reference come from.

    Attributes:
        pictures: the npz or the set of images.
        rows: (count,) int64, those to take from it, ascending.
        labels: (N,) int64 of all its pictures, or None.
        settings: what the reference records.
    """

    pictures: NpzImages | ImageSet
    rows: np.ndarray
    labels: np.ndarray | None
    settings: dict[str, Any]


def open_source(args: Flags) -> Source:
    """Opens what the flags name.

    Raises:
        ValueError: there are no such pictures there, or too few.
    """
    if Path(args.output).suffix != ".npz":
        raise ValueError(f"--output: expected a name ending in .npz, got {args.output}")
    if args.data_path.endswith(".npz"):
        if Path(args.output).resolve() == Path(args.data_path).resolve():
            raise ValueError(f"--output: expected another file than --data-path, got {args.output} "
                             "for both; the reference would replace its source, choose another "
                             "name")
        pictures = NpzImages(args.data_path)
        pictures.check_side(args.image_size, "--image-size")
        labels = pictures.labels()
        class_names = pictures.settings.get("class_names")
        resize = "none: pictures of an npz"
    else:
        pictures = open_dataset(args.dataset, args.data_path)
        labels = pictures.labels
        class_names = pictures.class_names
        resize = "ADM centre crop: box halvings, then bicubic"
    count = args.num_images or len(pictures)
    if not 2 <= count <= len(pictures):
        raise ValueError(f"--num-images: expected 2 to {len(pictures)}, the pictures of "
                         f"{args.data_path}, got {count}")
    check_output(args.output)
    rows = np.arange(count) * len(pictures) // count            # evenly spread
    return Source(pictures, rows, labels, {
        "kind": f"{args.kind} reference", "dataset": args.dataset, "source": args.data_path,
        "num_images": count, "num_source_images": len(pictures), "image_size": args.image_size,
        "resize": resize, "class_names": class_names})


def originals_sha256(source: NpzImages | ImageSet, rows: np.ndarray) -> str | None:
    """Returns what reconstructions of these pictures record as images_sha256, None if unknown."""
    if not isinstance(source, NpzImages):
        return dataset_sha256(source, rows)
    return source.settings.get("images_sha256") if len(rows) == len(source) else None


def spool_crops(spool: Spool, dataset: ImageSet, rows: np.ndarray, size: int, failures: Failures,
                session: Session) -> np.ndarray:
    """Adds the centre crops of the rows that are not broken to a spool; returns these rows.

    Args:
        spool: of pictures (size, size, 3) uint8.
        dataset: where the pictures come from.
        rows: of it, ascending.
        size: side of the crops in pixels.
        failures: what is found to be broken is added to.
        session: for the progress bar.

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


def read_pictures(source: NpzImages, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the pictures (P, P, 3) uint8 of ascending rows of an npz, as they are."""
    every = itertools.chain.from_iterable(source.batches(BATCH_IMAGES))
    return itertools.compress(every, np.isin(range(len(source)), rows))


def write_reference(path: str, pictures: Iterable[np.ndarray], shape: tuple[int, ...],
                    settings: dict[str, Any], labels: np.ndarray | None,
                    network: FeatureNetwork | None,
                    advance: Callable[[int], None]) -> None:
    """Writes a reference, streaming its pictures.

    Args:
        path: the npz.
        pictures: yields N pictures (P, P, 3) uint8.
        shape: (N, P, P, 3).
        settings: plain dict, stored as JSON text.
        labels: (N,) int64 or None.
        network: whose statistics of the pictures are stored, or None.
        advance: called with the number of pictures written, for a progress bar.
    """
    statistics = {space: StreamingStatistics() for space in STATISTICS}
    pictures = iter(pictures)

    def batches() -> Iterator[np.ndarray]:
        """Yields the pictures in batches (n, P, P, 3), having added their features."""
        while batch := list(itertools.islice(pictures, BATCH_IMAGES)):
            batch = np.stack(batch)
            if network:
                features = network.features(batch)
                for space, moments in statistics.items():
                    moments.add(getattr(features, space))
            yield batch
            advance(len(batch))

    with open_npz(path, settings) as npz:
        npz.add_rows("arr_0", np.uint8, shape, batches())
        if labels is not None:
            npz.add("labels", labels)
        if network:
            for space, (mean_name, covariance_name) in STATISTICS.items():
                npz.add(mean_name, statistics[space].mean)
                npz.add(covariance_name, statistics[space].covariance)


def main(args: Flags, session: Session) -> None:
    """Writes the reference that the flags describe."""
    logger = open_logger(session)
    size = args.image_size
    network = None

    # Open the pictures, and the classifier if its statistics are wanted.
    with checks(session):
        check_one_process(session)
        source = open_source(args)
        settings = source.settings
        session.hold(args.output)
        if args.classifier:
            network = ClassifierFeatures(args.classifier, session.device)
            settings["feature_network"] = network.name
            settings["feature_network_sha256"] = network.sha256
            if network.image_size != size:
                raise ValueError(f"--image-size: expected {network.image_size} for {network.name}, "
                                 f"got {size}")

    # Images are read first, since an npz begins with how many of them are whole.
    with open_spool(Path(args.output).parent, (size, size, 3)) as spool, checks(session):
        rows = source.rows
        if isinstance(source.pictures, NpzImages):
            pictures = read_pictures(source.pictures, rows)
        else:
            failures = Failures(len(rows), args.max_failures)
            rows = spool_crops(spool, source.pictures, rows, size, failures, session)
            pictures = spool
            if failures.found:
                settings["num_images"] = len(rows)
                settings["failed"] = [{"row": row, "path": path, "reason": reason}
                                      for row, (path, reason) in sorted(failures.found.items())]
        if args.kind == "rfid":
            settings["images_sha256"] = originals_sha256(source.pictures, rows)

        # Then they are written, with the statistics of their features.
        labels = None if source.labels is None else source.labels[rows]
        with progress(session, len(rows), "make the reference", "image") as bar:
            write_reference(args.output, pictures, (len(rows), size, size, 3), settings,
                            labels=labels, network=network, advance=bar.update)
    logger.info("%d pictures of %s in %s", len(rows), args.data_path, args.output)


if __name__ == "__main__":
    run(main, build_parser())
