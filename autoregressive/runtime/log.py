"""Log lines, metrics, curves and progress bars."""

import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from autoregressive.runtime.files import atomic_write

LOGGER = logging.getLogger("iar")


class MetricsFile:
    """metrics.jsonl: one JSON object a line, each with a `step`; cut back to a step on resume."""

    def __init__(self, path, resume_step=0):
        self.path = Path(path)
        kept = [row for row in read_metrics(self.path) if row["step"] <= resume_step]
        with atomic_write(self.path) as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in kept)

    def write(self, step, **values):
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def cut_log(path, resume_step):
    """Cuts a log.txt back to the lines before the first `step N` with N above a step."""
    if Path(path).is_file():
        lines = Path(path).read_text("utf-8", "backslashreplace").splitlines(keepends=True)
        beyond = (place for place, line in enumerate(lines)
                  if (found := re.search(r"\] step (\d+)", line)) and int(found.group(1)) > resume_step)
        with atomic_write(path) as file:
            file.write("".join(lines[:next(beyond, len(lines))]).encode())


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.jsonl, up to the first that a kill or damage has left in pieces."""
    rows = []
    if Path(path).is_file():
        for line in Path(path).read_bytes().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                break
            rows.append(row)
    return rows


def open_logger(session, path=None):
    """Lets LOGGER print on rank 0 (above the progress bar) and append to `path`; other ranks print errors only."""
    LOGGER.handlers.clear()
    LOGGER.propagate = False
    LOGGER.setLevel(logging.INFO if session.is_main else logging.ERROR)
    handlers = [_BarHandler()] + ([_file_handler(path)] if path and session.is_main else [])
    for handler in handlers:
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
        LOGGER.addHandler(handler)
    return LOGGER


def _file_handler(path):
    return logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")


class _BarHandler(logging.Handler):
    """Prints above the progress bars; what the terminal cannot show, as names of files may hold it, is escaped."""

    def emit(self, record):
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        tqdm.write(self.format(record).encode(encoding, "backslashreplace").decode(encoding))


def progress(session, total, description, unit, initial=0):
    """Returns a tqdm bar on rank 0 (silent on others); where nobody watches it prints twice a minute at most."""
    watched = sys.stderr.isatty()
    return tqdm(total=total, initial=initial, desc=description, unit=unit, disable=not session.is_main,
                mininterval=0.2 if watched else 30, dynamic_ncols=watched)


def draw_curves(path, curves, ylabel="loss", xlabel="steps"):
    """Draws named curves into one PNG.

    Args:
        path: the PNG.
        curves: dict of panel title -> dict of legend -> list of (step, value).
        ylabel, xlabel: labels of the axes.
    """
    import matplotlib  # here: it takes half a second, and only rank 0 draws

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(5.5 * len(curves), 4), squeeze=False, layout="constrained")
    for axis, (title, lines) in zip(axes[0], curves.items(), strict=True):
        for legend, points in lines.items():
            axis.plot(*zip(*points, strict=True), label=legend) if points else None
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axis.grid(alpha=0.3)
        axis.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)


def draw_metrics(path, runs, names=("token_loss", "cluster_loss")):
    """Draws what was logged in runs, a panel for each name, into one PNG.

    Args:
        path: the PNG.
        runs: dict of legend -> metrics.jsonl.
        names: fields of its rows.
    """
    logged = {legend: read_metrics(metrics) for legend, metrics in runs.items()}
    draw_curves(path, {name.replace("_", " "): {legend: [(row["step"], row[name]) for row in rows if name in row]
                                                for legend, rows in logged.items()} for name in names}, ylabel="")
