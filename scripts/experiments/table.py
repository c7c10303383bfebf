"""The table of an experiment: means with 95 % intervals over seeds, and differences to the baseline, paired by seed."""

import math
from typing import Any

import numpy as np
from scipy import optimize, stats

CONFIDENCE, POWER = 0.95, 0.8


def interval(values: list[float]) -> tuple[float, float]:
    """Returns the mean of values over seeds, and half the width of its 95 % interval by Student's t; nan for one value.

    Args:
        values: n numbers.
    """
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return mean, float("nan")
    return mean, float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * stats.sem(values))


def detectable(differences: list[float], num_seeds: int) -> float:
    """Returns the smallest true difference of two arms whose 95 % interval leaves out 0 in 8 of 10 experiments.

    Args:
        differences: seen so far, of pairs of runs: their spread is taken for that of all seeds.
        num_seeds: pairs in an experiment.
    """
    freedom = num_seeds - 1
    error = float(np.std(differences, ddof=1)) / math.sqrt(num_seeds)
    bound = stats.t.ppf((1 + CONFIDENCE) / 2, freedom)
    # In units of the error the mean of the differences follows a noncentral t (Johnson and Welch 1940).
    shift = optimize.brentq(lambda shift: stats.nct.sf(bound, freedom, shift) - POWER, 0, 10 * bound)
    return float(shift * error)


def make_table(results: list[dict[str, Any]], floors: dict[str, dict[str, float]], baseline: str,
               columns: dict[str, str], num_seeds: int) -> str:
    """Returns tables in Markdown: every arm; every arm minus the baseline; the least difference that would show.

    Args:
        results: finished runs: "arm", "seed", "numbers" by name, "cfg_scale", "cpu_hours", "commit".
        floors: title -> numbers by name, of what no arm can beat.
        baseline: the arm that differences are taken to, over the seeds that both have.
        columns: name of a number -> title.
        num_seeds: seeds of the whole experiment.
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
    least = [[f"what {num_seeds} seeds can show", "pairs", *titles]]
    for arm, runs in by_arm.items():
        seeds = [seed for seed in runs if seed in base]
        if arm == baseline or not seeds:
            continue
        differences = [[runs[seed]["numbers"].get(name, math.nan) - base[seed]["numbers"].get(name, math.nan)
                        for seed in seeds] for name in columns]
        rows.append([arm, str(len(seeds)), *map(_signed, differences)])
        if len(seeds) > 1 and num_seeds > 1:
            least.append([arm, str(len(seeds)), *(f"{detectable(each, num_seeds):.4f}" for each in differences)])
    return "\n".join([text, *(_markdown(table) for table in (rows, least) if len(table) > 1)])


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
