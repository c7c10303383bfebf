"""The table of an experiment: means and 95 % intervals over seeds, differences paired by seed."""

import math
from typing import Any

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95               # of the intervals
POWER = 0.8                     # chance that a true difference of `detectable` size shows


def interval(values: list[float]) -> tuple[float, float]:
    """Returns the mean of values over seeds and half its 95 % interval by Student's t.

    Args:
        values: n numbers; half the interval of a single one is nan.
    """
    mean = float(np.mean(values))
    count = len(values)
    if count < 2:
        return mean, float("nan")
    bound = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
    return mean, float(bound * stats.sem(values))


def detectable(differences: list[float], num_pairs: int) -> float:
    """Returns the smallest true difference of two arms that would show in 8 of 10 experiments.

    It shows if its 95 % interval leaves out 0.

    Args:
        differences: seen so far, of pairs of runs: their spread is taken for that of all pairs.
        num_pairs: in an experiment.
    """
    freedom = num_pairs - 1
    error = float(np.std(differences, ddof=1)) / math.sqrt(num_pairs)
    bound = stats.t.ppf((1 + CONFIDENCE) / 2, freedom)
    # In units of the error the mean of the differences follows a noncentral t (Johnson and Welch
    # 1940).
    def excess_power(shift: float) -> float:
        return stats.nct.sf(bound, freedom, shift) - POWER

    return float(optimize.brentq(excess_power, 0, 10 * bound) * error)


def make_table(results: list[dict[str, Any]], floors: dict[str, dict[str, float]], baseline: str,
               columns: dict[str, str], seeds: dict[str, list[int]]) -> str:
    """Returns tables in Markdown: arms, arms minus the baseline, the least visible differences.

    Args:
        results: finished runs: "arm", "seed", "numbers" by name, "cfg_scale", "cpu_hours",
            "device", "commit".
        floors: title -> numbers by name, of what no arm can beat.
        baseline: the arm that differences are taken to, over the seeds that both have.
        columns: name of a number -> title.
        seeds: of each arm, in the whole experiment.
    """
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}           # by arm and seed
    for result in sorted(results, key=lambda result: result["seed"]):
        by_arm.setdefault(result["arm"], {})[result["seed"]] = result
    titles = list(columns.values())

    # What each arm reached, and what no arm can beat.
    rows = [["arm", "seeds", *titles, "guidance", "sampled on", "CPU h", "commit"]]
    for arm, runs in by_arm.items():
        numbers = [_text([_number(run, name) for run in runs.values()]) for name in columns]
        scales = sorted({f"{run['cfg_scale']:g}" for run in runs.values()})
        hours = f"{np.mean([run['cpu_hours'] for run in runs.values()]):.2f}"
        commits = sorted({run["commit"][:7] for run in runs.values()})
        devices = sorted({run["device"] for run in runs.values()})
        rows.append([arm, str(len(runs)), *numbers, ", ".join(scales), ", ".join(devices), hours,
                     ", ".join(commits)])
    for title, numbers in floors.items():
        known = [f"{numbers[name]:.4f}" if name in numbers else "" for name in columns]
        rows.append([title, "", *known, "", "", "", ""])
    tables = [rows]

    # Differences to the baseline, over the seeds that both arms have.
    base = by_arm.get(baseline, {})
    minus = [[f"minus {baseline}", "pairs", *titles]]
    least = [["least difference that shows", "pairs", *titles]]
    for arm, runs in by_arm.items():
        paired = [seed for seed in runs if seed in base]
        if arm == baseline or not paired:
            continue
        differences = []                            # of each column, over the seeds
        for name in columns:
            differences.append([_number(runs[seed], name) - _number(base[seed], name)
                                for seed in paired])
        mixed = sum(runs[seed]["device"] != base[seed]["device"] for seed in paired)
        count = str(len(paired)) + (f", {mixed} of two devices" if mixed else "")
        minus.append([arm, count, *map(_signed, differences)])
        num_pairs = len(set(seeds[arm]) & set(seeds[baseline]))
        if len(paired) > 1 and num_pairs > 1:
            shown = [f"{detectable(each, num_pairs):.4f}" for each in differences]
            least.append([arm, str(num_pairs), *shown])
    tables += [table for table in (minus, least) if len(table) > 1]
    return "\n".join(map(_markdown, tables))


def _number(run: dict[str, Any], name: str) -> float:
    """Returns a number of a finished run, nan if it has none of that name."""
    return run["numbers"].get(name, math.nan)


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
