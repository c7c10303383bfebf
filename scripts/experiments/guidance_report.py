"""Gathers what guidance.sh left into one table, one plot and guidance.json.

    python scripts/experiments/guidance_report.py results/guidance/mine
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The repository root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from typing import Any

from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import Flags, Parser, checks, run
from autoregressive.runtime.files import check_output, read_json, write_json
from autoregressive.runtime.log import Panel, plot_panels
from scripts.experiments.table import interval

WAYS = ("constant", "linear", "power-cosine", "split")
TITLES = ("FID", "Precision", "Recall", "Label agreement")
SETTINGS = ("cfg_scale", "cfg_schedule", "cfg_start", "cfg_power", "cfg_scale_within")


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Gather a comparison of ways to guide a model.", has_seed=False)
    parser.add_argument("folder", type=Path, help="what guidance.sh wrote")
    return parser


def read_scores(paths: list[Path]) -> list[dict[str, Any]]:
    """Returns the settings and the numbers of records of the evaluator, by guidance and seed."""
    rows = []
    for path in paths:
        record = read_json(path, {"numbers": dict, "samples": dict})
        settings = record["samples"]["settings"]
        row = {name: settings[name] for name in (*SETTINGS, "global_seed", "num_fid_samples")}
        rows.append(row | {title: record["numbers"][title] for title in TITLES})
    return sorted(rows, key=lambda row: (row["cfg_scale"], row["global_seed"]))


def read_way(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Returns what was searched and what was scored of one way. Raises ValueError if it lacks any.
    """
    found = {"searched": read_scores(sorted(folder.glob("2000-samples/*/*.json"))),
             "scored": read_scores(sorted(folder.glob("scored/*/*.json")))}
    if not found["searched"] or not found["scored"]:
        raise ValueError(f"{folder}: expected scores of guidance.sh, found none; run it to its end")
    return found


def print_table(ways: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Prints, in Markdown, each way at the scales that it chose: means and 95 % intervals.

    The last column is the difference to constant guidance, seed by seed.
    """
    print("| guidance | scale | within | power | " + " | ".join(TITLES) + " | FID minus constant |")
    print("|---" * (5 + len(TITLES)) + "|")
    constant = {row["global_seed"]: row["FID"] for row in ways["constant"]["scored"]}
    for way, found in ways.items():
        chosen = found["scored"][0]
        within = chosen["cfg_scale_within"] or ""
        power = chosen["cfg_power"] if chosen["cfg_schedule"] == "power-cosine" else ""
        cells = [way, chosen["cfg_scale"], within, power]
        for title in TITLES:
            mean, half = interval([row[title] for row in found["scored"]])
            cells.append(f"{mean:.4f} ± {half:.4f}")
        if way != "constant":
            mean, half = interval([row["FID"] - constant[row["global_seed"]]
                                   for row in found["scored"]])
            cells.append(f"{mean:+.4f} ± {half:.4f}")
        print("| " + " | ".join(map(str, cells)) + " |")


def panels_of(ways: dict[str, dict[str, list[dict[str, Any]]]]) -> list[Panel]:
    """Returns FID and label agreement against the scale, and against each other."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for way, found in ways.items():
        for row in found["searched"]:
            legend = way
            if way == "power-cosine":
                legend += f", power {row['cfg_power']:g}"
            if way == "split":
                legend += f", within {row['cfg_scale_within']:g}"
            curves.setdefault(legend, []).append(row)
    panels = []
    for xlabel, ylabel in (("cfg_scale", "FID"), ("cfg_scale", "Label agreement"),
                           ("Label agreement", "FID")):
        points = {legend: [(row[xlabel], row[ylabel]) for row in rows]
                  for legend, rows in curves.items()}
        panels.append(Panel(xlabel.replace("_", " "), f"{ylabel}, 2,000 samples", points))
    return panels


def main(args: Flags, session: Session) -> None:
    """Reads the scores of all ways; prints, plots and writes them."""
    with checks(session):
        ways = {way: read_way(args.folder / way) for way in WAYS}
        for name in ("guidance.png", "guidance.json"):
            check_output(args.folder / name)
    print_table(ways)
    plot_panels(args.folder / "guidance.png", panels_of(ways), marker="o")
    write_json(args.folder / "guidance.json", ways)


if __name__ == "__main__":
    run(main, build_parser())
