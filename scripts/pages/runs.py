"""What trainings logged, as charts and as a table of their last numbers."""

from pathlib import Path
from xml.etree.ElementTree import Element

from autoregressive.runtime.log import read_metrics
from scripts.pages.chart import Line, chart, legend
from scripts.pages.page import element, folded, table

VAL = "val_"                    # begins the names of what was measured on val
NO_CURVES = ("step", "images_seen")
SPEED = ("images_per_second", "tokens_per_second", "mfu", "memory_mib")
LARGEST = 1e100                 # of a number that is shown
Logged = list[dict[str, float]]


def read_logged(path: Path) -> Logged:
    """Returns the finite numbers in every line of a metrics.jsonl, by name."""
    logged = []
    for values in read_metrics(path):
        numbers = {name: value for name, value in values.items() if is_shown(value)}
        if "step" in numbers:
            logged.append(numbers)
    return logged


def is_shown(value: object) -> bool:
    """Returns whether a value of metrics.jsonl is a finite number, and not absurdly large."""
    return isinstance(value, int | float) and abs(value) < LARGEST


def curves(runs: dict[str, Logged]) -> list[Element]:
    """Returns a chart for each value that changed, with a line for each run, and a second for val.

    Args:
        runs: name -> what it logged; the name of a single one is not shown.
    """
    columns = _split_val(runs)
    main = []
    speed = []
    lines: list[Line] = []
    for name in _names(columns):
        drawn = _lines_of(columns, name)
        values = {value for line in drawn for _, value in line.points}
        if name in NO_CURVES or len(values) < 2 or max(len(line.points) for line in drawn) < 2:
            continue
        (speed if name in SPEED else main).append(chart("step", _title(name), drawn))
        lines += drawn
    parts = legend(lines)
    if main:
        parts.append(element("div", *main, class_="charts"))
    if speed:
        parts.append(folded("Speed and memory", element("div", *speed, class_="charts")))
    return parts


def last_values(runs: dict[str, Logged]) -> list[Element]:
    """Returns a table of the last number of each value of each run; nothing without numbers.

    Args:
        runs: name -> what it logged; the name of a single one is not shown.
    """
    columns = _split_val(runs)
    last: dict[str, dict[str, float]] = {}
    for title, logged in columns.items():
        for values in logged:
            last[title] = last.get(title, {}) | values
    rows = []
    for name in _names(columns):
        cells = [_as_text(numbers[name]) if name in numbers else "" for numbers in last.values()]
        rows.append([_title(name), *cells])
    return [table("Last numbers of the log", ["", *last], rows)] if rows else []


def _split_val(runs: dict[str, Logged]) -> dict[str, Logged]:
    """Returns, by their titles, what each run logged of training and, next to it, what of val."""
    columns = {}
    for run, logged in runs.items():
        titles = ("train", "val") if len(runs) == 1 else (run, f"{run}, val")
        train = []
        val = []
        for values in logged:
            step = {"step": values["step"]}
            of_val = {name.removeprefix(VAL): value for name, value in values.items()
                      if name.startswith(VAL)}
            of_train = {name: value for name, value in values.items() if not name.startswith(VAL)}
            if of_val:
                val.append(step | of_val)
            if of_train != step:
                train.append(of_train)
        columns |= zip(titles, (train, val), strict=True)
    return columns


def _names(columns: dict[str, Logged]) -> list[str]:
    """Returns the names of the values that were not 0 throughout."""
    names = [name for logged in columns.values() for values in logged
             for name, value in values.items() if value]
    return list(dict.fromkeys(names))


def _lines_of(columns: dict[str, Logged], name: str) -> list[Line]:
    """Returns the lines of a chart; that of val has the color of its run, and is dashed."""
    lines = []
    for number, (title, logged) in enumerate(columns.items()):
        points = [(values["step"], values[name]) for values in logged if name in values]
        run, is_val = divmod(number, 2)
        if points:
            lines.append(Line(title, points, run, is_dashed=bool(is_val)))
    return lines


def _title(name: str) -> str:
    return name.replace("_", " ")


def _as_text(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"
