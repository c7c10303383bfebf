"""Log lines, metrics, curves and progress bars."""

import itertools
import json
import logging
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from autoregressive.runtime.files import atomic_write

if TYPE_CHECKING:                                   # distributed.py imports this file
    from autoregressive.runtime.distributed import Session

LOGGER = logging.getLogger("iar")
FEW_POINTS = 10                 # of a curve, which are then marked
Points = list[tuple[float, float]]                  # (x, y), in the order of a curve


class MetricsFile:
    """metrics.jsonl: one JSON object a line, each with a `step`; cut back to a step on resume.

    Attributes:
        path: the file.
    """

    def __init__(self, path: str | Path, resume_step: int = 0) -> None:
        """Keeps the lines up to `resume_step`, removes later ones."""
        self.path = Path(path)
        kept = [values for values in read_metrics(self.path) if values["step"] <= resume_step]
        with atomic_write(self.path) as file:
            for values in kept:
                file.write(json.dumps(values).encode() + b"\n")

    def write(self, step: int, **values: float) -> None:
        """Appends a line of named values."""
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def cut_log(path: str | Path, resume_step: int) -> None:
    """Cuts a log.txt back to the lines before the first `step N` with N above `resume_step`."""
    if not Path(path).is_file():
        return
    kept = []
    for line in Path(path).read_text("utf-8", "backslashreplace").splitlines(keepends=True):
        found = re.search(r"\] step (\d+)", line)
        if found and int(found.group(1)) > resume_step:
            break
        kept.append(line)
    with atomic_write(path) as file:
        file.write("".join(kept).encode())


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Returns the values in every line of a metrics.jsonl, by name.

    They end before the first line that is broken by a kill or damage.
    """
    lines = []
    if Path(path).is_file():
        for line in Path(path).read_bytes().splitlines():
            try:
                values = json.loads(line)
            except ValueError:
                break
            if not isinstance(values, dict) or not isinstance(values.get("step"), int):
                break
            lines.append(values)
    return lines


def open_logger(session: "Session", path: str | Path | None = None) -> logging.Logger:
    """Has LOGGER print on rank 0, above the progress bars, and append to `path`; returns it.

    Other ranks print errors only.
    """
    LOGGER.handlers.clear()
    LOGGER.propagate = False
    LOGGER.setLevel(logging.INFO if session.is_main else logging.ERROR)
    handlers: list[logging.Handler] = [_BarHandler()]
    if path and session.is_main:
        handlers.append(logging.FileHandler(path, encoding="utf-8", errors="backslashreplace"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
        LOGGER.addHandler(handler)
    return LOGGER


class _BarHandler(logging.Handler):
    """Prints above the progress bars; escapes what the terminal cannot show, as in file names."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one record."""
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        tqdm.write(self.format(record).encode(encoding, "backslashreplace").decode(encoding))


class _Bar(tqdm):
    """A progress bar that is printed once more where it ends, unless its delay is not over then."""

    def close(self) -> None:
        """Ends the bar; tqdm itself stays silent if nothing was printed before."""
        self.last_print_t = time.time()
        super().close()


def progress(session: "Session", total: int | None, description: str, unit: str,
             initial: int = 0) -> tqdm:
    """Returns a progress bar on rank 0, a silent one on others.

    Work of less than a second shows none. Where it is not on a terminal, it is printed twice a
    minute at most, and once more at the end of the work.

    Args:
        session: Session.
        total: units of the whole work; None if that is not known.
        description: of the work.
        unit: what is counted.
        initial: units that are done already.
    """
    is_watched = sys.stderr.isatty()
    return _Bar(total=total, initial=initial, desc=description, unit=unit,
                disable=not session.is_main, mininterval=0.2 if is_watched else 30, delay=1,
                dynamic_ncols=is_watched)


@dataclass(frozen=True)
class Panel:
    """One pair of axes of a plot.

    Attributes:
        xlabel, ylabel: of the axes.
        curves: legend -> points.
        halves: legend -> half the height of a band around each of its points; of some curves.
    """

    xlabel: str
    ylabel: str
    curves: dict[str, Points]
    halves: dict[str, list[float]] = field(default_factory=dict)


def plot_panels(path: str | Path, panels: list[Panel], marker: str = "",
                columns: int | None = None) -> None:
    """Plots panels into one PNG.

    Args:
        path: the PNG.
        panels: at least one.
        marker: matplotlib's name of what stands at every point; "" is nothing, where lines have
            more than FEW_POINTS.
        columns: panels side by side, at most; None is all.
    """
    import matplotlib  # here: it takes half a second, and only rank 0 plots

    matplotlib.use("Agg")
    from matplotlib import pyplot

    legends = dict.fromkeys(legend for panel in panels for legend in panel.curves)
    columns = min(columns or len(panels), len(panels))
    rows = -(-len(panels) // columns)
    size = (5.5 * columns, 4 * rows + 0.2 * -(-len(legends) // columns))       # inches
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False,
                                   layout="constrained")
    for axis in axes.flat[len(panels):]:
        axis.remove()
    palette = pyplot.get_cmap("tab10" if len(legends) <= 10 else "tab20").colors
    colors = dict(zip(legends, itertools.cycle(palette)))
    lines = {}
    for axis, panel in zip(axes.flat, panels, strict=False):
        for legend, points in panel.curves.items():
            if not points:
                continue
            few = "o" if len(points) <= FEW_POINTS else ""      # one alone is no line
            lines[legend], = axis.plot(*zip(*points, strict=True), marker=marker or few,
                                       color=colors[legend])
            if legend in panel.halves:
                steps, values = np.transpose(points)
                half = np.array(panel.halves[legend])
                axis.fill_between(steps, values - half, values + half, color=colors[legend],
                                  alpha=0.2, linewidth=0)
        axis.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
        axis.grid(alpha=0.3)
    # Below the panels, where it hides nothing.
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=columns)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)


def plot_metrics(path: str | Path, runs: dict[str, Path],
                 names: tuple[str, ...] = ("token_loss", "cluster_loss")) -> None:
    """Plots what was logged in runs, a panel for each name, into one PNG.

    Args:
        path: the PNG.
        runs: legend -> metrics.jsonl.
        names: of values in its lines; those of validation stand in the panels of training.
    """
    logged = {legend: read_metrics(metrics) for legend, metrics in runs.items()}
    panels = []
    for name in names:
        curves = {}
        for legend, lines in logged.items():
            for prefix, kind in (("", ""), ("val_", ", val")):
                points = [(values["step"], values[prefix + name]) for values in lines
                          if prefix + name in values]
                if points or not prefix:
                    curves[legend + kind] = points
        panels.append(Panel("steps", name.replace("_", " "), curves))
    plot_panels(path, panels)
