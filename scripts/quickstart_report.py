"""Gathers what scripts/quickstart.sh left into one table, three pictures and report.json.

    python scripts/quickstart_report.py results/quickstart
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])      # the root, not this folder

import platform
from typing import Any

import numpy as np
import torch

from autoregressive.runtime.checkpoint import read_checkpoint
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import Flags, Parser, checks, run
from autoregressive.runtime.files import check_output, file_sha256, read_json, write_json
from autoregressive.runtime.log import plot_metrics
from autoregressive.runtime.pictures import save_grid
from scripts.pages.quickstart import (
    ACCURACY,
    CAVEAT,
    CODES,
    LOSSES,
    METRICS,
    NUMBER,
    TOKENIZER,
    facts,
    results,
)
from tokenizer.tokenizer_image.images import center_crop, open_dataset, to_float, to_uint8
from tokenizer.tokenizer_image.loading import load_vq
from tokenizer.tokenizer_image.vq_model import VQConfig

LAMBDAS = (1, 0)
SHOWN_PER_CLASS = 4
SIDE = 16                       # of a picture in pixels
VQ_FLAGS = {"vq_model": str, "codebook_size": int}
HANDED_ON = ("vq.pt", "classifier.pt", "reference.npz", "codes/*.npy", "*cluster_size=16.pt",
             "gpt-lambda?/*/checkpoints/*.pt", "samples-lambda?/*.npz")


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Gather the results of the quickstart.", has_seed=False)
    parser.add_argument("folder", type=Path, help="what scripts/quickstart.sh wrote")
    return parser


def only(folder: Path, pattern: str) -> Path:
    """Returns the one path of `folder` that matches. Raises ValueError if there is none or more."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise ValueError(f"{folder / pattern}: expected one, found {len(found)}; remove {folder} "
                         "and run scripts/quickstart.sh again")
    return found[0]


def read_results(folder: Path) -> dict[str, Any]:
    """Returns all numbers of the quickstart as plain data.

    Raises:
        ValueError: a record lacks something.
    """
    runs = {}
    for weight in LAMBDAS:
        run_folder = only(folder, f"gpt-lambda{weight}/000-*")
        config = read_json(run_folder / "config.json", VQ_FLAGS)
        runs[f"lambda {weight}"] = {"training": read_json(run_folder / "finished.json", LOSSES),
                                    "config": config,
                                    "evaluation": read_evaluation(folder, weight)}
    tokenizer = read_json(folder / "vq.json", TOKENIZER)
    tokenizer["config"] = read_json(only(folder, "vq/000-*") / "config.json")
    classifier_path = folder / "classifier.pt"
    classifier = read_checkpoint(classifier_path)
    if not isinstance(classifier, dict) or "settings" not in classifier:
        raise ValueError(f"{classifier_path}: expected a classifier with settings, found none; "
                         "remove it and run scripts/quickstart.sh again")
    return {"tokenizer": tokenizer,
            "classifier": classifier["settings"],
            "codes": read_json(folder / "codes" / "manifest.json", CODES),
            "reordering": read_json(only(folder, "report-kmeans*.json")), "runs": runs}


def read_evaluation(folder: Path, weight: int) -> dict[str, Any]:
    """Returns the record of the evaluator. Raises ValueError if it lacks one of METRICS."""
    path = only(folder, f"samples-lambda{weight}/*.json")
    record = read_json(path, {"numbers": dict})
    missing = [title for title in (*METRICS, ACCURACY)
               if not isinstance(record["numbers"].get(title), NUMBER)]
    if missing:
        raise ValueError(f"{path}: expected numbers under {', '.join(missing)}, found none; remove "
                         "it and run scripts/quickstart.sh again")
    return record


def hash_files(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of every file that a step handed to the next one."""
    paths = [path for pattern in HANDED_ON for path in folder.glob(pattern)]
    return {str(path.relative_to(folder)): file_sha256(path) for path in sorted(paths)}


@torch.inference_mode()
def save_digits(folder: Path, config: dict[str, Any]) -> None:
    """Saves a grid with a row for each digit: real ones, their reconstructions, generated ones.

    Args:
        folder: of the quickstart.
        config: what a training recorded of the VQ model.
    """
    dataset = open_dataset("digits", "val")
    shown = first_of_each_class(dataset.labels)
    real = np.stack([center_crop(dataset.read(row), SIDE) for row in shown])
    vq, _ = load_vq(folder / "vq.pt", VQConfig.recorded_in(config))
    codes = vq.quantize.codes(vq.encode(to_float(real)))
    sources = {"real": real, "rebuilt": to_uint8(vq.decode_codes(codes, SIDE // vq.downsampling))}
    for weight in LAMBDAS:
        with np.load(only(folder, f"samples-lambda{weight}/*.npz"), allow_pickle=False) as samples:
            sources[f"lambda {weight}"] = samples["arr_0"][first_of_each_class(samples["labels"])]
    by_digit = [pictures.reshape(10, SHOWN_PER_CLASS, SIDE, SIDE, 3)
                for pictures in sources.values()]
    grid = np.concatenate(by_digit, axis=1)         # (10, sources * SHOWN_PER_CLASS, P, P, 3)
    captions = []
    for digit in range(10):
        for name in sources:
            captions += [f"{name}: {digit}"] * SHOWN_PER_CLASS
    save_grid(folder / "digits.png", grid.reshape(-1, SIDE, SIDE, 3), columns=grid.shape[1],
              captions=captions)


def first_of_each_class(labels: np.ndarray) -> list[int]:
    """Returns the first SHOWN_PER_CLASS rows of every digit, digit by digit."""
    rows = []
    for digit in range(10):
        rows.extend(np.flatnonzero(labels == digit)[:SHOWN_PER_CLASS])
    return rows


def print_table(report: dict[str, Any]) -> None:
    """Prints the numbers that a person wants to see first."""
    print()
    for title, text in facts(report).items():
        print(f"{title:28}{text}")
    print("\n" + " " * 28 + "".join(f"{name:>14}" for name in report["runs"]))
    for title, *cells in results(report):
        print(f"{title:28}" + "".join(f"{cell:>14}" for cell in cells))


def main(args: Flags, session: Session) -> None:
    """Reads what every step of the quickstart left, and writes the report."""
    with checks(session):
        report = read_results(args.folder)
        metrics = {f"lambda {weight}": only(args.folder, f"gpt-lambda{weight}/000-*/metrics.jsonl")
                   for weight in LAMBDAS}
        for name in ("digits.png", "curves.png", "report.json"):
            check_output(args.folder / name)
    save_digits(args.folder, report["runs"]["lambda 1"]["config"])
    plot_metrics(args.folder / "curves.png", metrics)
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "numpy": np.__version__}
    report |= {"files_sha256": hash_files(args.folder), "versions": versions}
    write_json(args.folder / "report.json", report)
    print_table(report)
    print(f"\n{CAVEAT}\npictures, curves and report.json in {args.folder}")


if __name__ == "__main__":
    run(main, build_parser())
