"""Main 4: scores an npz of samples against a reference by the five numbers of the ADM evaluator.

    python3 evaluations/c2i/evaluator.py evaluations/VIRTUAL_imagenet256_labeled.npz \
        samples/your_generated_samples.npz

On a CPU, after scripts/quickstart.sh, with a small classifier in place of Inception:

    python3 evaluations/c2i/evaluator.py results/quickstart/reference.npz \
        results/quickstart/samples-lambda1/*.npz --classifier results/quickstart/classifier.pt
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
from autoregressive.runtime.files import (
    atomic_write,
    check_output,
    file_sha256,
    read_json,
    write_json,
)
from evaluations.c2i.classifier import ClassifierFeatures
from evaluations.c2i.features import FeatureNetwork
from evaluations.c2i.inception import BACKENDS, DEFAULT_INCEPTION, open_inception
from evaluations.c2i.metrics import NEIGHBOURS
from evaluations.c2i.npz_reader import NpzImages
from evaluations.c2i.pairing import check_class_names, check_pair, kind_of
from evaluations.c2i.scores import (
    MANIFOLDS,
    TITLES,
    compute_scores,
    extract_file_features,
    needs_reference_features,
    read_statistics,
)


def metric_names(text: str) -> set[str]:
    """Returns the metrics of a comma-separated list: an argparse type."""
    names = set(text.split(","))
    if not names <= TITLES.keys():
        raise argparse.ArgumentTypeError(f"expected some of {','.join(TITLES)}, got {text}")
    return names


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Score samples against a reference: Inception score, FID, sFID, precision, "
                    "recall.", has_seed=False)
    parser.add_argument("ref_batch",
                        help="npz of the reference: pictures and perhaps ready statistics")
    parser.add_argument("sample_batch", help="npz of the samples")
    parser.add_argument("--classifier",
                        help="score with this small classifier (train_classifier.py), "
                             "not Inception")
    parser.add_argument("--metrics", type=metric_names, default=",".join(TITLES),
                        help="comma-separated choice")
    parser.add_argument("--batch-size", type=at_least(1), default=64,
                        help="pictures that the network takes at once")
    parser.add_argument("--output", help="JSON record; the printed lines go beside it with .txt; "
                                         "default: the sample file with .json, of "
                                         "reconstructions with .rfid.json")
    parser.add_argument("--backend", default="tensorflow", choices=BACKENDS,
                        help="what runs Inception; torch runs it on a GPU, too")
    parser.add_argument("--inception-path", default=DEFAULT_INCEPTION,
                        help="the frozen Inception graph; the default is downloaded once")
    parser.add_argument("--reuse", action="store_true",
                        help="take the numbers of the record if it is of the same samples, "
                             "reference and network")
    return parser


def default_output(samples: NpzImages) -> Path:
    """Returns the record beside samples; reconstructions have one of their own, by val.py."""
    suffix = ".rfid.json" if kind_of(samples) == "reconstructions" else ".json"
    return samples.path.with_suffix(suffix)


def open_files(args: Flags) -> tuple[NpzImages, NpzImages, Path]:
    """Opens both files and names the record; returns (reference, samples, path of the record).

    Raises:
        ValueError: they cannot be read, do not belong together, or hold too few pictures.
    """
    reference = NpzImages(args.ref_batch)
    samples = NpzImages(args.sample_batch)
    if samples.path.suffix != ".npz":
        raise ValueError(f"{samples.path}: expected a name ending in .npz, which results replace; "
                         "rename the file")
    check_pair(reference, samples)
    output = Path(args.output or default_output(samples))
    if output.suffix != ".json":
        raise ValueError(f"--output: expected a name ending in .json, got {output}")
    fewest = NEIGHBOURS + 1 if MANIFOLDS & args.metrics else 2
    for images in (reference, samples):
        if len(images) < fewest:
            raise ValueError(f"{images.path}: expected at least {fewest} pictures for these "
                             f"metrics, found {len(images)}")
    for path in (output, output.with_suffix(".txt")):
        check_output(path)
    return reference, samples, output


def read_labels(reference: NpzImages, samples: NpzImages,
                network: FeatureNetwork) -> np.ndarray | None:
    """Returns the labels (N,) int64 that the samples were made for.

    They are None where the samples carry none, or none that the network can judge.

    Raises:
        ValueError: the labels, or the names of the classes in a file, are not those of the network.
    """
    labels = samples.labels()
    classes = network.class_names
    if classes is None or labels is None:       # Inception's classes are not those of the labels
        return None
    check_class_names(classes, network.name, [samples, reference])
    if not 0 <= labels.min() <= labels.max() < len(classes):
        raise ValueError(f"{samples.path}: expected labels in 0 .. {len(classes) - 1}, the classes "
                         f"of {network.name}, found {labels.min()} .. {labels.max()}")
    return labels


def build_identity(reference: NpzImages, samples: NpzImages, network: FeatureNetwork,
                   ready_statistics: list[str]) -> dict[str, Any]:
    """Returns what the numbers depend on, beside the choice of metrics."""
    return {
        "samples": {
            "name": samples.path.name, "num_images": len(samples), "settings": samples.settings},
        "reference": {
            "name": reference.path.name, "sha256": file_sha256(reference.path),
            "num_images": len(reference), "ready_statistics": ready_statistics,
            "settings": reference.settings},
        "feature_network": {"name": network.name, "sha256": network.sha256}}


def read_numbers(output: Path, identity: dict[str, Any],
                 metrics: set[str]) -> dict[str, float] | None:
    """Returns the numbers of a record if it is of the same `identity` and `metrics`, else None.

    Samples that do not say how they were made count as other ones.
    """
    record = {}
    with contextlib.suppress(ValueError, OSError):              # none, or damaged: it is made again
        record = read_json(output, {"numbers": dict})
    samples_carry_settings = bool(identity["samples"]["settings"])
    expected = json.loads(json.dumps(identity))                 # as a file gives it back
    is_same = all(record.get(key) == value for key, value in expected.items())
    if not samples_carry_settings or not is_same:
        return None
    wanted_titles = {TITLES[metric] for metric in metrics}
    # A record may also hold numbers of the classifier, which are no choice of --metrics.
    found_titles = {title for title in record["numbers"] if title in TITLES.values()}
    return record["numbers"] if found_titles == wanted_titles else None


def open_network(args: Flags, session: Session) -> FeatureNetwork:
    """Returns the network of the flags: the small classifier if one is named, else Inception."""
    if args.classifier:
        return ClassifierFeatures(args.classifier, session.device)
    return open_inception(args.inception_path, args.backend, session.device)


def main(args: Flags, session: Session) -> None:
    """Scores the samples, prints the numbers and records them."""
    started = time.perf_counter()

    # Open the files and the network, and check that all of them belong together.
    with checks(session):
        check_one_process(session)
        reference, samples, output = open_files(args)
        session.hold(output, output.with_suffix(".txt"))
        network = open_network(args, session)
        for images in (reference, samples):
            images.check_side(network.image_size, network.name)
        stored = read_statistics(reference, network, args.metrics)
        labels = read_labels(reference, samples, network)
        identity = build_identity(reference, samples, network, sorted(stored))

    # Numbers that an earlier start recorded are printed again.
    if args.reuse and (numbers := read_numbers(output, identity, args.metrics)):
        print_numbers(numbers)
        print(f"recorded in {output} by an earlier start", file=sys.stderr)
        return
    print(f"{samples.path.name}: {len(samples)} samples; {reference.path.name}: {len(reference)} "
          f"reference pictures; features of {network.name}", file=sys.stderr)

    # Compute features of both files, then the numbers.
    with checks(session):                           # damage inside a file shows when it is read
        sample_features = extract_file_features(network, samples, args.batch_size, session)
        reference_features = None
        if needs_reference_features(args.metrics, stored):
            reference_features = extract_file_features(network, reference, args.batch_size, session)
        scores = compute_scores(args.metrics, sample_features, reference_features, stored, session)
    numbers = scores.numbers
    if labels is not None:
        found = sample_features.probabilities.argmax(axis=1)                        # (N,)
        numbers["Label agreement"] = float((found == labels).mean())
        numbers["Validation accuracy of the classifier"] = network.accuracy
    for warning in scores.warnings:
        print(f"warning: {warning}", file=sys.stderr)

    # Print them, and record them with what they depend on.
    lines = print_numbers(numbers)
    with atomic_write(output.with_suffix(".txt")) as file:
        file.write(lines.encode())
    write_json(output, {
        "numbers": numbers, "warnings": scores.warnings, **identity,
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "numpy": np.__version__, "scipy": scipy.__version__},
        "seconds": round(time.perf_counter() - started, 1)})
    print(f"recorded in {output}", file=sys.stderr)


def print_numbers(numbers: dict[str, float]) -> str:
    """Prints a line for every number, as ADM does; returns the lines."""
    lines = "".join(f"{title}: {number}\n" for title, number in numbers.items())
    print(lines, end="", flush=True)
    return lines


if __name__ == "__main__":
    run(main, build_parser())
