"""Gathers what scripts/autoregressive/sweep_cfg.sh left into one table, one plot and sweep.json.

    python scripts/sweep_report.py sweep
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])      # the root, not this folder

from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import Flags, Parser, at_least, checks, run
from autoregressive.runtime.files import check_file, check_output, file_sha256
from autoregressive.runtime.log import LOGGER, open_logger, plot_panels
from scripts.experiments.scores import Score, read_score, read_scores
from scripts.experiments.sweep import (
    best_in_words,
    columns_of,
    find_best,
    panels_of,
    table_of,
    write_sweep,
)

RECORDS = "*-samples/*/*.json"


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


def print_table(scores: list[Score], columns: list[str]) -> None:
    """Prints a line for each score: its settings, then its numbers."""
    lines = table_of(scores, columns)
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for line in lines:
        print("   ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    for sentence in best_in_words(scores, columns):
        print(sentence)


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
    write_sweep(args.folder / "sweep.json", scores)
    print(f"table in {args.folder / 'sweep.json'}, plot in {args.folder / 'sweep.png'}")


if __name__ == "__main__":
    run(main, build_parser())
