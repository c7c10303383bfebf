"""Gathers what scripts/autoregressive/sweep_cfg.sh left into one table, one plot and sweep.json.

    python scripts/sweep_report.py sweep
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])      # the root, not this folder

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import Flags, Parser, checks, run
from autoregressive.runtime.files import (
    check_file,
    check_output,
    file_sha256,
    read_json,
    write_json,
)
from autoregressive.runtime.identity import find_difference
from autoregressive.runtime.log import LOGGER, open_logger, plot_curves

MAY_DIFFER = {"cfg_scale", "global_seed", "device", "torch"}    # of the settings, within one sweep
CONSTANT = "Validation accuracy of the classifier"


@dataclass(frozen=True)
class Score:
    """What a record of the evaluator says.

    Attributes:
        path: the record.
        cfg_scale: guidance of the samples.
        seed: of the samples; None if it is not recorded.
        numbers: title -> number.
        conditions: what must be the same in one sweep.
    """

    path: Path
    cfg_scale: float
    seed: int | None
    numbers: dict[str, float]
    conditions: dict[str, Any]


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Gather the results of a sweep over guidance.", has_seed=False)
    parser.add_argument("folder", type=Path, help="what sweep_cfg.sh wrote")
    parser.add_argument("--reference", type=Path,
                        help="leave out scores against another reference than this npz")
    return parser


def read_score(path: Path) -> Score:
    """Reads a record of the evaluator. Raises ValueError if it lacks something, which is named."""
    record = read_json(path, {"numbers": dict, "samples": dict})
    settings = record["samples"].get("settings")
    if not isinstance(settings, dict) or not _is_number(settings.get("cfg_scale")):
        raise ValueError(f"{path}: expected samples with settings that hold a number under "
                         "cfg_scale, found others; remove the record and score samples of "
                         "sample_c2i_ddp.py")
    numbers = {title: number for title, number in record["numbers"].items() if title != CONSTANT}
    if not numbers or not all(map(_is_number, numbers.values())):
        raise ValueError(f"{path}: expected numbers of the evaluator, found "
                         f"{record['numbers']}; remove the record and score the samples again")
    conditions = {key: value for key, value in settings.items() if key not in MAY_DIFFER}
    for key in ("reference", "feature_network"):
        made_with = record.get(key)
        conditions[key] = made_with.get("sha256") if isinstance(made_with, dict) else None
    conditions["metrics"] = sorted(numbers)
    return Score(path, settings["cfg_scale"], settings.get("global_seed"), numbers, conditions)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def read_scores(folder: Path, reference_sha256: str | None) -> list[Score]:
    """Returns the scores of all runs, by guidance and seed.

    Args:
        folder: of the sweep.
        reference_sha256: scores against another reference are left out; None takes all.

    Raises:
        ValueError: there are none, or they are not of one sweep.
    """
    scores = [read_score(path) for path in sorted(folder.glob("cfg-*/*.json"))]
    if reference_sha256 is not None:
        others = [score for score in scores if score.conditions["reference"] != reference_sha256]
        scores = [score for score in scores if score.conditions["reference"] == reference_sha256]
        if others:
            LOGGER.warning("left out %d scores against another reference, such as %s", len(others),
                           others[0].path)
    if not scores:
        raise ValueError(f"{folder}: expected cfg-*/*.json, records of the evaluator, found none; "
                         "run scripts/autoregressive/sweep_cfg.sh")
    for score in scores[1:]:
        if difference := find_difference(scores[0].conditions, score.conditions):
            raise ValueError(f"{score.path}: expected a score with {difference}; {scores[0].path} "
                             "is of another sweep, keep both apart by OUT")
    return sorted(scores, key=lambda score: (score.cfg_scale, str(score.seed)))


def lines_of(scores: list[Score], title: str) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Yields the legend and the points of every line in the plot of a number."""
    seeds = dict.fromkeys(score.seed for score in scores)
    for seed in seeds:
        points = [(score.cfg_scale, score.numbers[title]) for score in scores if score.seed == seed]
        yield f"seed {seed}" if len(seeds) > 1 else title, points


def main(args: Flags, session: Session) -> None:
    """Reads the scores of all runs; prints, plots and writes them."""
    open_logger(session)
    with checks(session):
        reference_sha256 = None
        if args.reference:
            check_file(args.reference, "name the npz of the reference")
            reference_sha256 = file_sha256(args.reference)
        scores = read_scores(args.folder, reference_sha256)
        for name in ("sweep.png", "sweep.json"):
            check_output(args.folder / name)

    # The table.
    names = list(scores[0].numbers)
    has_seeds = len({score.seed for score in scores}) > 1
    print("guidance" + ("   seed" if has_seeds else "") + "".join(f"   {name}" for name in names))
    for score in scores:
        seed = f"   {score.seed!s:>4}" if has_seeds else ""
        print(f"{score.cfg_scale:<8g}" + seed +
              "".join(f"   {score.numbers[name]:>{len(name)}.4f}" for name in names))
    if "FID" in names:
        best = min(scores, key=lambda score: score.numbers["FID"])
        print(f"lowest FID: {best.numbers['FID']:.4f} at guidance {best.cfg_scale:g}"
              + (f", seed {best.seed}" if has_seeds else ""))

    # The plot, and all numbers for whoever reads on.
    plot_curves(args.folder / "sweep.png", {name: dict(lines_of(scores, name)) for name in names},
                ylabel="score", xlabel="guidance")
    rows = []
    for score in scores:
        seed = {"global_seed": score.seed} if has_seeds else {}
        rows.append({"cfg_scale": score.cfg_scale} | seed | score.numbers)
    write_json(args.folder / "sweep.json", rows)
    print(f"table in {args.folder / 'sweep.json'}, plot in {args.folder / 'sweep.png'}")


if __name__ == "__main__":
    run(main, build_parser())
