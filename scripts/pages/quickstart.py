"""The numbers of a quickstart that its report prints and its page shows."""

from pathlib import Path
from typing import Any

from autoregressive.runtime.files import Kinds, check_kinds, read_json

METRICS = ("Inception Score", "FID", "sFID", "Precision", "Recall", "Label agreement")
ACCURACY = "Validation accuracy of the classifier"
CAVEAT = ("one seed decides nothing, it shows that all works; seeds and intervals are in "
          "scripts/experiments/README.md")
NUMBER = (int, float)
LOSSES: Kinds = {"token_loss": NUMBER, "cluster_loss": NUMBER}
CODES: Kinds = {"dataset": str, "num_images": int, "image_size": int, "codebook_size": int}
TOKENIZER: Kinds = {"psnr": NUMBER, "codes_used": int}
RUN: Kinds = {"training": LOSSES,
              "evaluation": {"numbers": dict.fromkeys((*METRICS, ACCURACY), NUMBER)}}


def read_report(path: Path) -> dict[str, Any]:
    """Reads a report.json. Raises ValueError if it lacks a number that is shown."""
    report = read_json(path, {"tokenizer": TOKENIZER, "codes": CODES, "runs": dict})
    check_kinds(report, dict.fromkeys(report, dict), path)
    check_kinds(report["runs"], dict.fromkeys(report["runs"], RUN), path)
    return report


def facts(report: dict[str, Any]) -> dict[str, str]:
    """Returns, in words, what all runs share: the data, the tokenizer and the classifier."""
    codes = report["codes"]
    tokenizer = report["tokenizer"]
    found = {
        "data": f"{codes['dataset']}, {codes['num_images']} images of {codes['image_size']} pixels "
                "to train on",
        "reconstruction (val)": f"{tokenizer['psnr']:.2f} dB, {tokenizer['codes_used']} of "
                                f"{codes['codebook_size']} codes used"}
    for run in report["runs"].values():
        accuracy = run["evaluation"]["numbers"][ACCURACY]
        found["classifier (val)"] = (f"{100 * accuracy:.2f} % right (all scores below are from it, "
                                     "not from Inception)")
    return found


def results(report: dict[str, Any]) -> list[list[str]]:
    """Returns a row for each number of the runs, with a cell for each run after its title."""
    runs = report["runs"].values()
    rows = []
    for loss in LOSSES:
        rows.append(["training " + loss.replace("_", " "),
                     *(f"{run['training'][loss]:.3f}" for run in runs)])
    for metric in METRICS:
        rows.append([metric, *(f"{run['evaluation']['numbers'][metric]:.4f}" for run in runs)])
    return rows
