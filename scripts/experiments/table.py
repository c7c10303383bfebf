"""The table of an experiment: means with 95 % intervals over seeds, and differences to the baseline, paired by seed."""

import math
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


def interval(values: list[float]) -> tuple[float, float]:
    """Returns the mean of values over seeds, and half the width of its 95 % interval by Student's t; nan for one value.

    Args:
        values: n numbers.
    """
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return mean, float("nan")
    return mean, float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * stats.sem(values))


def make_table(results: list[dict[str, Any]], floors: dict[str, dict[str, float]], baseline: str,
               columns: dict[str, str]) -> str:
    """Returns two tables in Markdown: every arm, and every arm minus the baseline.

    Args:
        results: finished runs: "arm", "seed", "numbers" by name, "cfg_scale", "cpu_hours", "commit".
        floors: title -> numbers by name, of what no arm can beat.
        baseline: the arm that differences are taken to, over the seeds that both have.
        columns: name of a number -> title.
    """
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for result in sorted(results, key=lambda result: result["seed"]):
        by_arm.setdefault(result["arm"], {})[result["seed"]] = result
    titles = list(columns.values())
    rows = [["arm", "seeds", *titles, "guidance", "CPU h", "commit"]]
    for arm, runs in by_arm.items():
        numbers = [_text([run["numbers"].get(name, math.nan) for run in runs.values()]) for name in columns]
        scales = sorted({f"{run['cfg_scale']:g}" for run in runs.values()})
        hours = f"{np.mean([run['cpu_hours'] for run in runs.values()]):.2f}"
        commits = sorted({run["commit"][:7] for run in runs.values()})
        rows.append([arm, str(len(runs)), *numbers, ", ".join(scales), hours, ", ".join(commits)])
    for title, numbers in floors.items():
        known = [f"{numbers[name]:.4f}" if name in numbers else "" for name in columns]
        rows.append([title, "", *known, "", "", ""])
    text = _markdown(rows)
    base = by_arm.get(baseline, {})
    rows = [[f"minus {baseline}", "pairs", *titles]]
    for arm, runs in by_arm.items():
        seeds = [seed for seed in runs if seed in base]
        if arm == baseline or not seeds:
            continue
        differences = [[runs[seed]["numbers"].get(name, math.nan) - base[seed]["numbers"].get(name, math.nan)
                        for seed in seeds] for name in columns]
        rows.append([arm, str(len(seeds)), *map(_signed, differences)])
    return f"{text}\n{_markdown(rows)}" if len(rows) > 1 else text


def _text(values: list[float]) -> str:
    mean, half = interval(values)
    return f"{mean:.4f}" if math.isnan(half) else f"{mean:.4f} ± {half:.4f}"


def _signed(values: list[float]) -> str:
    mean, half = interval(values)
    return f"{mean:+.4f}" if math.isnan(half) else f"{mean:+.4f} ± {half:.4f}"


def _markdown(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines) + "\n"
