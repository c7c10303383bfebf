"""Gathers what scripts/autoregressive/sweep_cfg.sh left into one table, one plot and sweep.json.

    python scripts/sweep_report.py sweep
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])      # the root, not this folder

from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import Flags, Parser, at_least, checks, run
from autoregressive.runtime.files import check_file, check_output, file_sha256, write_json
from autoregressive.runtime.log import LOGGER, Panel, open_logger, plot_panels
from scripts.experiments.scores import SETTINGS, Score, points_of, read_score, read_scores

RECORDS = "*-samples/*/*.json"
# Titles of the table, and words of legends that a value needs.
TITLES = {"num_fid_samples": "samples", "cfg_scale": "scale", "cfg_schedule": "schedule",
          "beta": "beta", "cfg_start": "start", "cfg_power": "power", "cfg_scale_within": "within",
          "top_p": "top-p", "global_seed": "seed"}
UNNAMED = ("cfg_schedule",)
# What is plotted: against what, and the number.
PANELS = (("scale", "FID"), ("scale", "Inception Score"), ("scale", "Label agreement"),
          ("Precision", "Recall"))


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Gather the results of a sweep over guidance.", has_seed=False)
    parser.add_argument("folder", type=Path, help="what sweep_cfg.sh wrote")
    parser.add_argument("--reference", type=Path,
                        help="leave out scores against another reference than this npz")
    parser.add_argument("--best-of", type=at_least(1), metavar="N",
                        help="only print the flags of the lowest FID of N samples of --seed")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of --best-of")
    return parser


def find_scores(folder: Path, reference_sha256: str | None) -> list[Score]:
    """Returns the scores of a sweep.

    Args:
        folder: of the sweep.
        reference_sha256: scores against another reference are left out; None takes all.

    Raises:
        ValueError: there are none, or they are not of one sweep.
    """
    paths = list(folder.glob(RECORDS))
    if reference_sha256 is not None:
        others = [path for path in paths
                  if read_score(path).conditions["reference"] != reference_sha256]
        paths = [path for path in paths if path not in others]
        if others:
            LOGGER.warning("left out %d scores against another reference, such as %s", len(others),
                           min(others))
    if not paths:
        raise ValueError(f"{folder}: expected {RECORDS}, records of the evaluator, found none; "
                         "run scripts/autoregressive/sweep_cfg.sh")
    return read_scores(paths)


def find_best(scores: list[Score]) -> dict[tuple[int | None, int | None], Score]:
    """Returns the score of lowest FID for each number of samples and seed; empty without FIDs.

    FIDs of different numbers of samples are not comparable: fewer samples have a higher one.
    """
    best: dict[tuple[int | None, int | None], Score] = {}
    for score in scores:
        key = (score.settings["num_fid_samples"], score.settings["global_seed"])
        if "FID" in score.numbers and (
                key not in best or score.numbers["FID"] < best[key].numbers["FID"]):
            best[key] = score
    return best


def columns_of(scores: list[Score]) -> list[str]:
    """Returns the settings that are columns of the table: the scale, and whatever differs."""
    return [name for name in SETTINGS
            if name == "cfg_scale" or len({score.settings[name] for score in scores}) > 1]


def describe(score: Score, names: list[str]) -> str:
    """Returns settings of a score in words, such as `linear, within 2`."""
    words = []
    for name in names:
        value = score.settings[name]
        if value is not None:
            words.append(str(value) if name in UNNAMED else f"{TITLES[name]} {value}")
    return ", ".join(words)


def print_table(scores: list[Score], columns: list[str]) -> None:
    """Prints a line for each score: its settings, then its numbers."""
    lines = [[TITLES[name] for name in columns] + list(scores[0].numbers)]
    for score in scores:
        cells = [score.settings[name] for name in columns]
        lines.append(["" if cell is None else str(cell) for cell in cells]
                     + [f"{number:.4f}" for number in score.numbers.values()])
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for line in lines:
        print("   ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    for (count, seed), best in find_best(scores).items():
        names = [name for name in columns if name not in ("num_fid_samples", "global_seed")]
        print(f"lowest FID of {count} samples of seed {seed}: {best.numbers['FID']:.4f} at "
              f"{describe(best, names)}")


def panels_of(scores: list[Score], columns: list[str]) -> list[Panel]:
    """Returns those of PANELS whose numbers there are; if there are none, all against the scale.

    A curve joins the scores that differ in the scale alone.
    """
    titles = list(scores[0].numbers)
    known = {*titles, "scale"}
    axes = [pair for pair in PANELS if known.issuperset(pair)]
    curves: dict[str, list[Score]] = {}
    others = [name for name in columns if name != "cfg_scale"]
    for score in scores:
        curves.setdefault(describe(score, others) or "all", []).append(score)
    axes = axes or [("scale", title) for title in titles]
    return [Panel(x, y, points_of(curves, x, y)) for x, y in axes]


def main(args: Flags, session: Session) -> None:
    """Reads the scores of all runs; prints, plots and writes them."""
    if not args.best_of:                # whose standard output is nothing but the flags
        open_logger(session)
    with checks(session):
        reference_sha256 = None
        if args.reference:
            check_file(args.reference, "name the npz of the reference")
            reference_sha256 = file_sha256(args.reference)
        scores = find_scores(args.folder, reference_sha256)
        if args.best_of:
            best = find_best(scores).get((args.best_of, args.seed))
            if best is None:
                raise ValueError(f"{args.folder}: expected an FID of {args.best_of} samples of "
                                 f"seed {args.seed} to choose by, found none; score with it, or "
                                 "leave the choice out by NUM_FINAL_SAMPLES=0")
            print(best.flags())
            return
        for name in ("sweep.png", "sweep.json"):
            check_output(args.folder / name)

    columns = columns_of(scores)
    print_table(scores, columns)
    plot_panels(args.folder / "sweep.png", panels_of(scores, columns), marker="o")
    rows = [score.settings | score.numbers for score in scores]
    write_json(args.folder / "sweep.json", {"conditions": scores[0].conditions, "scores": rows})
    print(f"table in {args.folder / 'sweep.json'}, plot in {args.folder / 'sweep.png'}")


if __name__ == "__main__":
    run(main, build_parser())
