"""Gathers what scripts/autoregressive/sweep_cfg.sh left into one table, one plot and sweep.json.

    python scripts/sweep_report.py sweep
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])      # the repository root instead of this folder

from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import Flags, Parser, checks, run
from autoregressive.runtime.files import read_json, write_json
from autoregressive.runtime.log import draw_curves


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Gather the results of a sweep over guidance.", draws=False)
    parser.add_argument("folder", type=Path, help="what sweep_cfg.sh wrote")
    return parser


def read_scores(folder: Path) -> list[dict]:
    """Returns the scores of all runs, dicts of cfg_scale and metrics, by guidance.

    Raises:
        ValueError: there are none.
    """
    constant = "Validation accuracy of the classifier"
    records = [read_json(path) for path in sorted(folder.glob("cfg-*/*.json"))]
    if not records:
        raise ValueError(f"{folder}: expected cfg-*/*.json, records of the evaluator, found none; run "
                         "scripts/autoregressive/sweep_cfg.sh")
    scores = [{"cfg_scale": record["samples"]["settings"]["cfg_scale"]} | record["numbers"] for record in records]
    for row in scores:
        row.pop(constant, None)
    return sorted(scores, key=lambda row: row["cfg_scale"])


def main(args: Flags, session: Session) -> None:
    with checks(session):
        scores = read_scores(args.folder)
    names = list(scores[0])[1:]
    print("guidance" + "".join(f"   {name}" for name in names))
    for row in scores:
        print(f"{row['cfg_scale']:<8g}" + "".join(f"   {row[name]:>{len(name)}.4f}" for name in names))
    if "FID" in names:
        best = min(scores, key=lambda row: row["FID"])
        print(f"lowest FID: {best['FID']:.4f} at guidance {best['cfg_scale']:g}")
    draw_curves(args.folder / "sweep.png", {name: {name: [(row["cfg_scale"], row[name]) for row in scores]}
                                            for name in names}, ylabel="score", xlabel="guidance")
    write_json(args.folder / "sweep.json", scores)
    print(f"table in {args.folder / 'sweep.json'}, plot in {args.folder / 'sweep.png'}")


if __name__ == "__main__":
    run(main, build_parser())
