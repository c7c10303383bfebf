"""Gathers what guidance.sh left into one table, one plot and guidance.json.

    python scripts/experiments/guidance_report.py results/guidance/mine
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The repository root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import Flags, Parser, checks, run
from autoregressive.runtime.files import check_output, write_json
from autoregressive.runtime.log import Panel, plot_panels
from scripts.experiments.scores import Score, points_of, read_scores
from scripts.experiments.table import interval

WAYS = ("constant", "linear", "power-cosine", "split")
TITLES = ("FID", "Precision", "Recall", "Label agreement")


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Gather a comparison of ways to guide a model.", has_seed=False)
    parser.add_argument("folder", type=Path, help="what guidance.sh wrote")
    return parser


def read_ways(folder: Path) -> dict[str, tuple[list[Score], list[Score]]]:
    """Returns, of every way, the scores of the search and those at the scales that it chose.

    Raises:
        ValueError: there are none of a way, or they cannot be compared.
    """
    read_scores(folder.glob("*/*-samples/*/*.json"))        # all of one model and reference
    ways = {}
    for way in WAYS:
        searched = read_scores((folder / way).glob("2000-samples/*/*.json"))
        scored = read_scores((folder / way).glob("10000-samples/*/*.json"))
        if not searched or not scored:
            raise ValueError(f"{folder / way}: expected scores of guidance.sh, found none; run it "
                             "to its end")
        if len({score.flags() for score in scored}) > 1:
            raise ValueError(f"{folder / way}/10000-samples: expected scores of one setting, found "
                             "several; remove those that are not of the last search")
        ways[way] = (searched, scored)
    return ways


def print_table(ways: dict[str, tuple[list[Score], list[Score]]], titles: list[str]) -> None:
    """Prints, in Markdown, each way at the scales that it chose: means and 95 % intervals.

    The last column is the difference to constant guidance, seed by seed.
    """
    print(f"| guidance | flags | {' | '.join(titles)} | FID minus constant |")
    print("|---" * (3 + len(titles)) + "|")
    constant = {score.settings["global_seed"]: score.numbers["FID"]
                for score in ways["constant"][1]}
    for way, (_, scored) in ways.items():
        cells = [way, f"`{scored[0].flags()}`"]
        for title in titles:
            mean, half = interval([score.numbers[title] for score in scored])
            cells.append(f"{mean:.4f} ± {half:.4f}")
        differences = [score.numbers["FID"] - constant[score.settings["global_seed"]]
                       for score in scored]
        mean, half = interval(differences)
        cells.append("" if way == "constant" else f"{mean:+.4f} ± {half:.4f}")
        print(f"| {' | '.join(cells)} |")


def panels_of(ways: dict[str, tuple[list[Score], list[Score]]], titles: list[str]) -> list[Panel]:
    """Returns the FID of the search against the scale; if it is known, label agreement, too."""
    axes = [("scale", "FID")]
    if "Label agreement" in titles:
        axes += [("scale", "Label agreement"), ("Label agreement", "FID")]
    curves: dict[str, list[Score]] = {}
    for way, (searched, _) in ways.items():
        for score in searched:
            legend = way
            if way == "power-cosine":
                legend += f", power {score.settings['cfg_power']:g}"
            if way == "split":
                legend += f", within {score.settings['cfg_scale_within']:g}"
            curves.setdefault(legend, []).append(score)
    return [Panel(x, f"{y}, 2,000 samples", points_of(curves, x, y)) for x, y in axes]


def main(args: Flags, session: Session) -> None:
    """Reads the scores of all ways; prints, plots and writes them."""
    with checks(session):
        ways = read_ways(args.folder)
        for name in ("guidance.png", "guidance.json"):
            check_output(args.folder / name)
    _, scored = ways["constant"]
    titles = [title for title in TITLES if title in scored[0].numbers]
    print_table(ways, titles)
    plot_panels(args.folder / "guidance.png", panels_of(ways, titles), marker="o")
    rows = {way: [score.settings | score.numbers for part in parts for score in part]
            for way, parts in ways.items()}
    write_json(args.folder / "guidance.json", {"conditions": scored[0].conditions} | rows)
    print(f"plot in {args.folder / 'guidance.png'}, numbers in {args.folder / 'guidance.json'}")


if __name__ == "__main__":
    run(main, build_parser())
