"""Gathers what scripts/autoregressive/sweep_cfg.sh left into one table, one plot and sweep.json.

    python scripts/sweep_report.py sweep
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])      # the repository root instead of this folder

from autoregressive.runtime.entry import Parser, checks, run
from autoregressive.runtime.files import read_json, write_json
from autoregressive.runtime.log import draw_curves


def build_parser():
    """Returns the parser of this script's command line."""
    parser = Parser("Gather the results of a sweep over guidance.", draws=False)
    parser.add_argument("folder", type=Path, help="what sweep_cfg.sh wrote")
    return parser


def read_scores(folder):
    """Returns the scores of all runs: list of (guidance, dict of metric -> number), by guidance.

    Raises:
        ValueError: there are none.
    """
    constant = "Held-out accuracy of the classifier"
    records = [read_json(path) for path in sorted(folder.glob("cfg-*/*.json"))]
    if not records:
        raise ValueError(f"{folder}: expected cfg-*/*.json, records of the evaluator, found none; run "
                         "scripts/autoregressive/sweep_cfg.sh")
    return sorted(((record["samples"]["settings"]["cfg_scale"],
                    {name: value for name, value in record["numbers"].items() if name != constant})
                   for record in records), key=lambda item: item[0])


def main(args, session):
    with checks(session):
        scores = read_scores(args.folder)
    names = list(scores[0][1])
    print("guidance" + "".join(f"   {name}" for name in names))
    for scale, values in scores:
        print(f"{scale:<8g}" + "".join(f"   {values[name]:>{len(name)}.4f}" for name in names))
    if "FID" in names:
        best = min(scores, key=lambda item: item[1]["FID"])
        print(f"lowest FID: {best[1]['FID']:.4f} at guidance {best[0]:g}")
    draw_curves(args.folder / "sweep.png", {name: {name: [(scale, values[name]) for scale, values in scores]}
                                            for name in names}, ylabel="score", xlabel="guidance")
    write_json(args.folder / "sweep.json", [{"cfg_scale": scale, **values} for scale, values in scores])
    print(f"table in {args.folder / 'sweep.json'}, plot in {args.folder / 'sweep.png'}")


if __name__ == "__main__":
    run(main, build_parser())
