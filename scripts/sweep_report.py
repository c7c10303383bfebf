"""Gathers what scripts/autoregressive/sweep_cfg.sh left into one table, one plot and sweep.json.

    python scripts/sweep_report.py sweep
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])      # the root, not this folder

import math
from dataclasses import dataclass, fields
from typing import Any

from autoregressive.models.sampler import Sampler
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import Flags, Parser, at_least, checks, flag_of, run
from autoregressive.runtime.files import (
    check_file,
    check_output,
    file_sha256,
    read_json,
    write_json,
)
from autoregressive.runtime.identity import find_difference
from autoregressive.runtime.log import LOGGER, Panel, open_logger, plot_panels

# What may differ within one sweep: a column of the table each, if it does.
SWEPT = ("cfg_schedule", "cfg_start", "cfg_power", "cfg_scale_within", "beta", "top_p",
         "cfg_scale")
COLUMNS = ("num_fid_samples", *SWEPT, "global_seed")
MAY_DIFFER = {*COLUMNS, "device", "torch"}
CONSTANT = "Validation accuracy of the classifier"
RECORDS = "*-samples/*/*.json"


@dataclass(frozen=True)
class Score:
    """What a record of the evaluator says.

    Attributes:
        path: the record.
        settings: the value of each of COLUMNS, with which the samples were made; None if unknown.
        numbers: title -> number.
        conditions: what must be the same in one sweep.
    """

    path: Path
    settings: dict[str, Any]
    numbers: dict[str, float]
    conditions: dict[str, Any]

    def flags(self) -> str:
        """Returns the flags of SWEPT that make such samples."""
        return " ".join(f"{flag_of(name)} {self.settings[name]}" for name in SWEPT
                        if self.settings[name] is not None)


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Gather the results of a sweep over guidance.", has_seed=False)
    parser.add_argument("folder", type=Path, help="what sweep_cfg.sh wrote")
    parser.add_argument("--reference", type=Path,
                        help="leave out scores against another reference than this npz")
    parser.add_argument("--best-of", type=at_least(1), metavar="N",
                        help="only print the flags of the lowest FID of N samples")
    return parser


def read_score(path: Path) -> Score:
    """Reads a record of the evaluator. Raises ValueError if it lacks something, which is named."""
    record = read_json(path, {"numbers": dict, "samples": dict})
    made_with = record["samples"].get("settings")
    if not isinstance(made_with, dict) or not _is_number(made_with.get("cfg_scale")):
        raise ValueError(f"{path}: expected samples with settings that hold a number under "
                         "cfg_scale, found others; remove the record and score samples of "
                         "sample_c2i_ddp.py")
    numbers = {title: number for title, number in record["numbers"].items() if title != CONSTANT}
    if not numbers or not all(map(_is_number, numbers.values())):
        raise ValueError(f"{path}: expected numbers of the evaluator, found "
                         f"{record['numbers']}; remove the record and score the samples again")
    defaults = {field.name: field.default for field in fields(Sampler)}
    settings = {name: made_with.get(name, defaults.get(name)) for name in COLUMNS}
    conditions = {key: value for key, value in made_with.items() if key not in MAY_DIFFER}
    for key in ("reference", "feature_network"):
        source = record.get(key)
        conditions[key] = source.get("sha256") if isinstance(source, dict) else None
    conditions["metrics"] = sorted(numbers)
    return Score(path, settings, numbers, conditions)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def read_scores(folder: Path, reference_sha256: str | None) -> list[Score]:
    """Returns the scores of all runs, ordered by COLUMNS.

    Args:
        folder: of the sweep.
        reference_sha256: scores against another reference are left out; None takes all.

    Raises:
        ValueError: there are none, or they are not of one sweep.
    """
    scores = [read_score(path) for path in sorted(folder.glob(RECORDS))]
    if reference_sha256 is not None:
        others = [score for score in scores if score.conditions["reference"] != reference_sha256]
        scores = [score for score in scores if score.conditions["reference"] == reference_sha256]
        if others:
            LOGGER.warning("left out %d scores against another reference, such as %s", len(others),
                           others[0].path)
    if not scores:
        raise ValueError(f"{folder}: expected {RECORDS}, records of the evaluator, found none; "
                         "run scripts/autoregressive/sweep_cfg.sh")
    for score in scores[1:]:
        if difference := find_difference(scores[0].conditions, score.conditions):
            raise ValueError(f"{score.path}: expected a score with {difference}; {scores[0].path} "
                             "is of another sweep, keep both apart by OUT")
    return sorted(scores, key=_order)


def _order(score: Score) -> list[tuple[bool, Any]]:
    return [(value is not None, value) for value in score.settings.values()]


def best_by_samples(scores: list[Score]) -> dict[int | None, Score]:
    """Returns the score of lowest FID for each number of samples; empty if there is no FID.

    FIDs of different numbers of samples are not comparable: fewer samples have a higher one.
    """
    best: dict[int | None, Score] = {}
    for score in scores:
        count = score.settings["num_fid_samples"]
        if "FID" in score.numbers and (
                count not in best or score.numbers["FID"] < best[count].numbers["FID"]):
            best[count] = score
    return best


def columns_of(scores: list[Score]) -> list[str]:
    """Returns the columns of the table: the scale, and whatever differs between the scores."""
    return [name for name in COLUMNS
            if name == "cfg_scale" or len({score.settings[name] for score in scores}) > 1]


def describe(score: Score, columns: list[str]) -> str:
    """Returns the settings of a score in words."""
    return ", ".join(f"{name.replace('_', ' ')} {score.settings[name]}" for name in columns)


def print_table(scores: list[Score], columns: list[str]) -> None:
    """Prints a line for each score: its settings, then its numbers."""
    titles = [name.replace("_", " ") for name in columns] + list(scores[0].numbers)
    print("   ".join(titles))
    for score in scores:
        cells = [str(score.settings[name]) for name in columns]
        cells += [f"{number:.4f}" for number in score.numbers.values()]
        print("   ".join(f"{cell:>{len(title)}}"
                         for cell, title in zip(cells, titles, strict=True)))
    for count, best in best_by_samples(scores).items():
        print(f"lowest FID of {count} samples: {best.numbers['FID']:.4f} at "
              f"{describe(best, columns)}")


def panels_of(scores: list[Score], columns: list[str]) -> list[Panel]:
    """Returns every number against the scale, but recall against precision if there are both.

    A curve joins the scores that differ in the scale alone.
    """
    titles = list(scores[0].numbers)
    pair = ("Precision", "Recall")
    axes = [("cfg scale", title) for title in titles]
    if set(pair) <= set(titles):
        axes = [(x, y) for x, y in axes if y not in pair] + [pair]
    curves: dict[str, list[Score]] = {}
    others = [name for name in columns if name != "cfg_scale"]
    for score in scores:
        curves.setdefault(describe(score, others) or "all", []).append(score)
    panels = []
    for xlabel, ylabel in axes:
        points = {}
        for legend, of_curve in curves.items():
            points[legend] = [(score.numbers.get(xlabel, score.settings["cfg_scale"]),
                               score.numbers[ylabel]) for score in of_curve]
        panels.append(Panel(xlabel, ylabel, points))
    return panels


def main(args: Flags, session: Session) -> None:
    """Reads the scores of all runs; prints, plots and writes them."""
    if not args.best_of:                # whose standard output is nothing but the flags
        open_logger(session)
    with checks(session):
        reference_sha256 = None
        if args.reference:
            check_file(args.reference, "name the npz of the reference")
            reference_sha256 = file_sha256(args.reference)
        scores = read_scores(args.folder, reference_sha256)
        if args.best_of:
            best = best_by_samples(scores).get(args.best_of)
            if best is None:
                raise ValueError(f"{args.folder}: expected an FID of {args.best_of} samples to "
                                 "choose by, found none; score with it, or leave the choice out "
                                 "by NUM_FINAL_SAMPLES=0")
            print(best.flags())
            return
        for name in ("sweep.png", "sweep.json"):
            check_output(args.folder / name)

    columns = columns_of(scores)
    print_table(scores, columns)
    plot_panels(args.folder / "sweep.png", panels_of(scores, columns), marker="o")
    rows = []
    for score in scores:
        rows.append({name: score.settings[name] for name in columns} | score.numbers)
    write_json(args.folder / "sweep.json", rows)
    print(f"table in {args.folder / 'sweep.json'}, plot in {args.folder / 'sweep.png'}")


if __name__ == "__main__":
    run(main, build_parser())
