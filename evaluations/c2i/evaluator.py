"""Main 4: scores an npz of samples against a reference npz with the five numbers of the ADM evaluator.

    python3 evaluations/c2i/evaluator.py evaluations/VIRTUAL_imagenet256_labeled.npz samples/your_generated_samples.npz

On a CPU, after scripts/quickstart.sh, with a small classifier in place of Inception:

    python3 evaluations/c2i/evaluator.py results/quickstart/reference.npz results/quickstart/samples-lambda1/*.npz \
        --classifier results/quickstart/classifier.pt
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # the repository root, not this folder

import argparse
import contextlib
import json
import platform
import time
from typing import Any

import numpy as np
import scipy
import torch

from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import Flags, Parser, at_least, check_one_process, checks, run
from autoregressive.runtime.files import atomic_write, check_output, file_sha256, read_json, write_json
from autoregressive.runtime.log import progress
from evaluations.c2i.classifier import ClassifierFeatures
from evaluations.c2i.features import STATISTICS, FeatureNetwork, Features, extract_features
from evaluations.c2i.inception import BACKENDS, DEFAULT_INCEPTION, open_inception
from evaluations.c2i.metrics import (
    NEIGHBOURS,
    check_covariance,
    check_finite,
    feature_statistics,
    frechet_distance,
    inception_score,
    precision_recall,
)
from evaluations.c2i.npz_reader import NpzImages
from evaluations.c2i.pairing import check_class_names, check_pair

TITLES = {"is": "Inception Score", "fid": "FID", "sfid": "sFID", "precision": "Precision", "recall": "Recall"}
SPACES = {"fid": "pool", "sfid": "spatial"}     # the features whose Gaussians are compared
MANIFOLDS = {"precision", "recall"}


def metric_names(text: str) -> set[str]:
    """Returns the metrics of a comma-separated list."""
    names = set(text.split(","))
    if not names <= TITLES.keys():
        raise argparse.ArgumentTypeError(f"expected some of {','.join(TITLES)}, got {text}")
    return names


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Score samples against a reference: Inception score, FID, sFID, precision, recall.",
                    draws=False)
    parser.add_argument("ref_batch", help="npz of the reference: pictures and perhaps ready statistics")
    parser.add_argument("sample_batch", help="npz of the samples")
    parser.add_argument("--classifier", help="score with this small classifier (train_classifier.py), not Inception")
    parser.add_argument("--metrics", type=metric_names, default=",".join(TITLES), help="comma-separated choice")
    parser.add_argument("--batch-size", type=at_least(1), default=64, help="pictures that the network takes at once")
    parser.add_argument("--output", help="JSON record; the printed lines go beside it with .txt; "
                                         "default: the sample file with .json")
    parser.add_argument("--backend", default="tensorflow", choices=BACKENDS,
                        help="what runs Inception; torch runs it on a GPU, too")
    parser.add_argument("--inception-path", default=DEFAULT_INCEPTION,
                        help="the frozen Inception graph; the default is downloaded once")
    parser.add_argument("--reuse", action="store_true",
                        help="take the numbers of the record if it is of the same samples, reference and network")
    return parser


def open_files(args: Flags) -> tuple[NpzImages, NpzImages, Path]:
    """Opens both files and names the record; returns (reference, samples, path of the record)."""
    reference, samples = NpzImages(args.ref_batch), NpzImages(args.sample_batch)
    if samples.path.suffix != ".npz":
        raise ValueError(f"{samples.path}: expected a name ending in .npz, which results replace; rename the file")
    check_pair(reference, samples)
    output = Path(args.output or samples.path.with_suffix(".json"))
    if output.suffix != ".json":
        raise ValueError(f"--output: expected a name ending in .json, got {output}")
    fewest = NEIGHBOURS + 1 if MANIFOLDS & args.metrics else 2
    for images in (reference, samples):
        if len(images) < fewest:
            raise ValueError(f"{images.path}: expected at least {fewest} pictures for these metrics, "
                             f"found {len(images)}")
    for path in (output, output.with_suffix(".txt")):
        check_output(path)
    return reference, samples, output


def read_statistics(reference: NpzImages, network: FeatureNetwork,
                    metrics: set[str]) -> dict[str, tuple[np.ndarray, np.ndarray, None]]:
    """Returns the ready statistics of a reference that `metrics` need: dict of metric -> (mean, covariance, None)."""
    known = reference.settings.get("feature_network_sha256", network.sha256)
    pool, spatial, _ = network.features(np.zeros((1, *reference.shape[1:]), np.uint8))
    statistics = {}
    for metric, size in (("fid", pool.shape[1]), ("sfid", spatial.shape[1])):
        names = STATISTICS[SPACES[metric]]
        arrays = [reference.array(name) for name in names]
        if metric not in metrics or all(array is None for array in arrays):
            continue
        shapes = [getattr(array, "shape", None) for array in arrays]
        if any(array is not None and array.dtype.kind not in "fiu" for array in arrays):
            raise ValueError(f"{reference.path}: expected numbers under {' and '.join(names)}, found "
                             "another type; make the reference again")
        if shapes != [(size,), (size, size)] or known != network.sha256:
            raise ValueError(f"{reference.path}: expected {' and '.join(names)} of {network.name} with {size} "
                             f"features, found shapes {shapes[0]} and {shapes[1]}, or another network's statistics; "
                             "make the reference again with this network")
        try:
            for array in arrays:
                check_finite(array)
            check_covariance(arrays[1])
        except ValueError as error:
            raise ValueError(f"{reference.path}: {' and '.join(names)}: {error}; make the reference "
                             "again") from error
        statistics[metric] = (*arrays, None)
    return statistics


def read_labels(reference: NpzImages, samples: NpzImages, network: FeatureNetwork) -> np.ndarray | None:
    """Returns the labels that the samples were made for, if they carry some that the network can judge, else None.

    Raises:
        ValueError: the labels, or the names of the classes in a file, are not those of the network.
    """
    labels, classes = samples.labels(), network.settings["class_names"]
    if classes is None or labels is None:           # Inception's classes are not those of the labels
        return None
    check_class_names(classes, network.name, [samples, reference])
    if not 0 <= labels.min() <= labels.max() < len(classes):
        raise ValueError(f"{samples.path}: expected labels in 0 .. {len(classes) - 1}, the classes of {network.name}, "
                         f"found {labels.min()} .. {labels.max()}")
    return labels


def describe(reference: NpzImages, samples: NpzImages, network: FeatureNetwork,
             ready_statistics: list[str]) -> dict[str, Any]:
    """Returns what the numbers depend on, beside the choice of metrics."""
    return {"samples": {"name": samples.path.name, "num_images": len(samples), "settings": samples.settings},
            "reference": {"name": reference.path.name, "sha256": file_sha256(reference.path),
                          "num_images": len(reference), "ready_statistics": ready_statistics,
                          "settings": reference.settings},
            "feature_network": {"name": network.name, "sha256": network.sha256}}


def read_numbers(output: Path, identity: dict[str, Any], metrics: set[str]) -> dict[str, float] | None:
    """Returns the numbers of a record if it is of the same `identity` and `metrics`, else None.

    Samples that do not say how they were made count as other ones.
    """
    record = {}
    with contextlib.suppress(ValueError, OSError):              # none, or damaged: it is made again
        record = read_json(output, {"numbers": dict})
    expected = json.loads(json.dumps(identity))                 # as a file gives it back
    is_same = all(record.get(key) == value for key, value in expected.items())
    titles = {TITLES[metric] for metric in metrics}
    if not is_same or not identity["samples"]["settings"] or titles != record["numbers"].keys() & TITLES.values():
        return None
    return record["numbers"]


def main(args: Flags, session: Session) -> None:
    started = time.perf_counter()
    with checks(session):
        check_one_process(session)
        reference, samples, output = open_files(args)
        session.hold(output, output.with_suffix(".txt"))
        network = ClassifierFeatures(args.classifier, session.device) if args.classifier else \
            open_inception(args.inception_path, args.backend, session.device)
        for images in (reference, samples):
            images.check_side(network.image_size, network.name)
        stored = read_statistics(reference, network, args.metrics)
        labels = read_labels(reference, samples, network)
        identity = describe(reference, samples, network, sorted(stored))
    if args.reuse and (numbers := read_numbers(output, identity, args.metrics)):
        print_numbers(numbers)
        print(f"recorded in {output} by an earlier start", file=sys.stderr)
        return
    print(f"{samples.path.name}: {len(samples)} samples; {reference.path.name}: {len(reference)} reference pictures; "
          f"features of {network.name}", file=sys.stderr)

    is_needed = args.metrics & (MANIFOLDS | SPACES.keys() - stored.keys())
    with checks(session):                           # damage inside a file shows when it is read
        sample_features = extract(network, samples, args.batch_size, session)
        reference_features = extract(network, reference, args.batch_size, session) if is_needed else None
        numbers, warnings = compute(args.metrics, sample_features, reference_features, stored, session)
    if labels is not None:
        numbers["Label agreement"] = float((sample_features.probabilities.argmax(axis=1) == labels).mean())
        numbers["Validation accuracy of the classifier"] = network.settings["accuracy"]
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)

    lines = print_numbers(numbers)
    with atomic_write(output.with_suffix(".txt")) as file:
        file.write(lines.encode())
    write_json(output, {
        "numbers": numbers, "warnings": warnings, **identity,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                     "scipy": scipy.__version__},
        "seconds": round(time.perf_counter() - started, 1)})
    print(f"recorded in {output}", file=sys.stderr)


def print_numbers(numbers: dict[str, float]) -> str:
    """Prints a line for every number, as ADM does; returns the lines."""
    lines = "".join(f"{title}: {number}\n" for title, number in numbers.items())
    print(lines, end="", flush=True)
    return lines


def extract(network: FeatureNetwork, images: NpzImages, batch_size: int, session: Session) -> Features:
    """Returns the Features of a file, with a progress bar."""
    with progress(session, len(images), images.path.name, "image") as bar:
        return extract_features(network, images, batch_size, bar.update)


def compute(metrics: set[str], samples: Features, reference: Features | None,
            stored: dict[str, tuple[np.ndarray, np.ndarray, None]],
            session: Session) -> tuple[dict[str, float], list[str]]:
    """Computes the numbers of `metrics`.

    Args:
        metrics: keys of TITLES.
        samples, reference: Features; the reference's may be None where all that is asked for is in `stored`.
        stored: what read_statistics returned.
        session: whose device computes distances.

    Returns:
        the numbers by title, in the order of ADM, and a warning for every covariance of fewer pictures than dimensions.
    """
    numbers, warnings = {}, []
    if "is" in metrics:
        numbers["is"] = inception_score(samples.probabilities)
    for metric in sorted(metrics & SPACES.keys()):
        statistics = {"reference": stored[metric]} if metric in stored else {}
        for kind, features in (("sample", samples), ("reference", reference)):
            if kind in statistics:
                continue
            array = getattr(features, SPACES[metric])
            statistics[kind] = feature_statistics(array)
            count, size = array.shape
            if count < size:
                warnings.append(f"{TITLES[metric]} is biased upwards: {count} {kind} pictures for {size} features; "
                                "compare it with results of equal numbers only")
        (mu1, sigma1, factor1), (mu2, sigma2, factor2) = statistics["reference"], statistics["sample"]
        try:
            numbers[metric] = frechet_distance(mu1, sigma1, mu2, sigma2, factor1, factor2)
        except ValueError as error:
            raise ValueError(f"{TITLES[metric]}: {error}") from error
    if MANIFOLDS & metrics:
        pools = [torch.from_numpy(features.pool).to(session.device) for features in (reference, samples)]
        with progress(session, 2 * len(pools[0]) + len(pools[1]), "precision and recall", "row") as bar:
            numbers["precision"], numbers["recall"] = precision_recall(*pools, advance=bar.update)
    return {title: numbers[name] for name, title in TITLES.items() if name in metrics}, warnings


if __name__ == "__main__":
    run(main, build_parser())
