"""What a sweep over guidance is shown as: its table, its best scores, its plots, and sweep.json."""

from pathlib import Path

from autoregressive.runtime.files import read_json, write_json
from autoregressive.runtime.log import Panel
from scripts.experiments.scores import SETTINGS, Score, check_settings, is_number, points_of

# Titles of the table, and words of legends that a value needs.
TITLES = {"num_fid_samples": "samples", "cfg_scale": "scale", "cfg_schedule": "schedule",
          "beta": "beta", "cfg_start": "start", "cfg_power": "power", "cfg_scale_within": "within",
          "top_p": "top-p", "global_seed": "seed"}
UNNAMED = ("cfg_schedule",)
# What is plotted: against what, and the number.
PANELS = (("scale", "FID"), ("scale", "Inception Score"), ("scale", "Label agreement"),
          ("Precision", "Recall"))


def find_best(scores: list[Score]) -> dict[tuple[int | None, int | None], Score]:
    """Returns the score of lowest FID for each number of samples and seed; empty without FIDs.

    FIDs of different numbers of samples are not comparable: fewer samples have a higher one.
    """
    best: dict[tuple[int | None, int | None], Score] = {}
    for score in scores:
        key = (score.settings["num_fid_samples"], score.settings["global_seed"])
        if "FID" in score.numbers and (
                key not in best or score.numbers["FID"] < best[key].numbers["FID"]):
            best[key] = score
    return best


def columns_of(scores: list[Score]) -> list[str]:
    """Returns the settings that are columns of the table: the scale, and whatever differs."""
    return [name for name in SETTINGS
            if name == "cfg_scale" or len({score.settings[name] for score in scores}) > 1]


def describe(score: Score, names: list[str]) -> str:
    """Returns settings of a score in words, such as `linear, within 2`."""
    words = []
    for name in names:
        value = score.settings[name]
        if value is not None:
            words.append(str(value) if name in UNNAMED else f"{TITLES[name]} {value}")
    return ", ".join(words)


def table_of(scores: list[Score], columns: list[str]) -> list[list[str]]:
    """Returns the titles of a table, then the cells of a line for each score.

    Args:
        scores: of one sweep.
        columns: settings that come first; then come the numbers.
    """
    lines = [[TITLES[name] for name in columns] + list(scores[0].numbers)]
    for score in scores:
        cells = [score.settings[name] for name in columns]
        lines.append(["" if cell is None else str(cell) for cell in cells]
                     + [f"{number:.4f}" for number in score.numbers.values()])
    return lines


def best_in_words(scores: list[Score], columns: list[str]) -> list[str]:
    """Returns a sentence for each score of lowest FID, see find_best."""
    names = [name for name in columns if name not in ("num_fid_samples", "global_seed")]
    return [f"lowest FID of {count} samples of seed {seed}: {best.numbers['FID']:.4f} at "
            f"{describe(best, names)}" for (count, seed), best in find_best(scores).items()]


def panels_of(scores: list[Score], columns: list[str]) -> list[Panel]:
    """Returns those of PANELS whose numbers there are; if there are none, all against the scale.

    A curve joins the scores that differ in the scale alone.
    """
    titles = list(scores[0].numbers)
    known = {*titles, "scale"}
    axes = [pair for pair in PANELS if known.issuperset(pair)]
    curves: dict[str, list[Score]] = {}
    others = [name for name in columns if name != "cfg_scale"]
    for score in scores:
        curves.setdefault(describe(score, others) or "all", []).append(score)
    axes = axes or [("scale", title) for title in titles]
    return [Panel(x, y, points_of(curves, x, y)) for x, y in axes]


def write_sweep(path: Path, scores: list[Score]) -> None:
    """Writes scores of one sweep, and what they have in common, as sweep.json."""
    rows = [score.settings | score.numbers for score in scores]
    write_json(path, {"conditions": scores[0].conditions, "scores": rows})


def read_sweep(path: Path) -> list[Score]:
    """Returns the scores in a sweep.json.

    Raises:
        ValueError: it is damaged.
    """
    content = read_json(path, {"conditions": dict, "scores": list})
    scores = []
    for row in content["scores"]:
        if not isinstance(row, dict) or not is_number(row.get("cfg_scale")):
            raise ValueError(f"{path}: expected scores that hold a number under cfg_scale, found "
                             f"{row}; run scripts/sweep_report.py again")
        settings = {name: row.get(name) for name in SETTINGS}
        check_settings(settings, path)
        numbers = {name: value for name, value in row.items() if name not in SETTINGS}
        scores.append(Score(path, settings, numbers, content["conditions"]))
    titles = {tuple(score.numbers) for score in scores}
    values = [value for score in scores for value in score.numbers.values()]
    if len(titles) != 1 or not values or not all(map(is_number, values)):
        raise ValueError(f"{path}: expected the same numbers of each score, found others; run "
                         "scripts/sweep_report.py again")
    return scores
