"""Records of the evaluator, and the settings of the samples that they are of: for sweep reports."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoregressive.runtime.entry import flag_of
from autoregressive.runtime.files import read_json
from autoregressive.runtime.identity import find_difference
from autoregressive.runtime.log import Points

# What may differ between scores that are compared. Older samples do not name what they left alone.
GUIDANCE = ("cfg_scale", "cfg_schedule", "top_p", "cfg_scale_within", "cfg_start", "cfg_power",
            "beta")
UNCHANGED = {"cfg_schedule": "constant", "top_p": 1.0, "cfg_start": 1.0, "cfg_power": 1.0}
SETTINGS = ("num_fid_samples", *GUIDANCE, "global_seed")
MAY_DIFFER = {*SETTINGS, "device", "torch"}
NOT_OF_SAMPLES = "Validation accuracy of the classifier"


@dataclass(frozen=True)
class Score:
    """What a record of the evaluator says.

    Attributes:
        path: the record.
        settings: the value of each of SETTINGS, with which the samples were made; None if unknown.
        numbers: title -> number.
        conditions: what must be the same where scores are compared: model, reference, metrics, ...
    """

    path: Path
    settings: dict[str, Any]
    numbers: dict[str, float]
    conditions: dict[str, Any]

    def flags(self) -> str:
        """Returns the flags of GUIDANCE that make such samples; defaults of some are left out."""
        words = []
        for name in GUIDANCE:
            value = self.settings[name]
            is_optional = name not in ("cfg_scale", "cfg_schedule", "top_p")
            if is_optional and value == UNCHANGED.get(name):
                continue
            text = f"{value:g}" if isinstance(value, float) else str(value)
            words += [flag_of(name), text]
        return " ".join(words)


def read_score(path: Path) -> Score:
    """Reads a record of the evaluator. Raises ValueError if it lacks something, which is named."""
    record = read_json(path, {"numbers": dict, "samples": dict})
    made_with = record["samples"].get("settings")
    if not isinstance(made_with, dict) or not is_number(made_with.get("cfg_scale")):
        raise ValueError(f"{path}: expected samples with settings that hold a number under "
                         "cfg_scale, found others; remove the record and score samples of "
                         "sample_c2i_ddp.py")
    numbers = {title: number for title, number in record["numbers"].items()
               if title != NOT_OF_SAMPLES}
    if not numbers or not all(map(is_number, numbers.values())):
        raise ValueError(f"{path}: expected numbers of the evaluator, found "
                         f"{record['numbers']}; remove the record and score the samples again")
    settings = {name: made_with.get(name, UNCHANGED.get(name)) for name in SETTINGS}
    check_settings(settings, path)
    conditions = {key: value for key, value in made_with.items() if key not in MAY_DIFFER}
    for key in ("reference", "feature_network"):
        source = record.get(key)
        conditions[key] = source.get("sha256") if isinstance(source, dict) else None
    conditions["metrics"] = sorted(numbers)
    return Score(path, settings, numbers, conditions)


def check_settings(settings: dict[str, Any], path: Path) -> None:
    """Raises ValueError unless each of SETTINGS, as read from `path`, is plain or unknown."""
    for name, value in settings.items():
        if not isinstance(value, str | int | float | None):
            raise ValueError(f"{path}: expected a number or a word as {name}, found {value}; "
                             "remove the record and score the samples again")


def is_number(value: object) -> bool:
    """Returns whether a value of a record is a number, and finite."""
    return isinstance(value, int | float) and math.isfinite(value)


def read_scores(paths: Iterable[Path]) -> list[Score]:
    """Returns scores that may be compared, ordered by SETTINGS.

    Raises:
        ValueError: they differ in more than SETTINGS.
    """
    scores = [read_score(path) for path in sorted(paths)]
    for score in scores[1:]:
        if difference := find_difference(scores[0].conditions, score.conditions):
            raise ValueError(f"{score.path}: expected a score with {difference}; {scores[0].path} "
                             "is of another sweep: keep both apart by OUT, and remove the folder "
                             "of the one that does not belong here")
    return sorted(scores, key=lambda score: [_order(score.settings[name]) for name in SETTINGS])


def points_of(curves: dict[str, list[Score]], x: str, y: str) -> dict[str, Points]:
    """Returns curves of a plot.

    Args:
        curves: legend -> scores.
        x, y: titles of numbers, or "scale" for the strength of guidance.
    """
    points = {}
    for legend, scores in curves.items():
        values = [score.numbers | {"scale": score.settings["cfg_scale"]} for score in scores]
        points[legend] = [(value[x], value[y]) for value in values]
    return points


def _order(value: object) -> tuple[bool, object]:
    return isinstance(value, str), -math.inf if value is None else value
