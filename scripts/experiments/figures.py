"""Figures of an experiment: validation losses with bands over the seeds, samples of its arms."""

from pathlib import Path

import numpy as np

from autoregressive.runtime.log import Panel, Points, plot_panels, read_metrics
from autoregressive.runtime.pictures import save_grid
from scripts.experiments.plan import Experiment, Run
from scripts.experiments.table import interval

LOSS = "val_token_loss"
PANELS = 3                      # side by side
SHOWN_PER_CLASS = 2             # samples


def draw_curves(experiment: Experiment, finished: list[Run], path: Path) -> None:
    """Draws the validation token loss of every arm, and that minus the baseline's, paired by seed.

    The first panel has the losses; each difference has a panel of its own, and its own y axis.
    Bands are 95 % intervals over the seeds; an arm of one seed has none. Losses in a stage of
    patches are left out: they are of other predictions.

    Args:
        experiment: Experiment.
        finished: runs that have results.
        path: the PNG.
    """
    losses = {run: _read_losses(experiment.metrics(run)) for run in finished
              if experiment.metrics(run).exists()}
    baseline = experiment.plan["baseline"]
    whole = Panel("steps", "val token loss", {})
    panels = [whole]
    for arm in experiment.plan["arms"]:
        runs = [run for run in losses if run.arm == arm]
        _add_curve(whole, arm, [losses[run] for run in runs])
        pairs = [(losses[run], losses[Run(baseline, run.seed)]) for run in runs
                 if Run(baseline, run.seed) in losses]
        if arm == baseline or not pairs:
            continue
        differences = [{step: own[step] - base[step] for step in own if step in base}
                       for own, base in pairs]
        zeros = [(step, 0.0) for step in _shared_steps(differences)]
        panels.append(Panel(f"steps, {len(pairs)} pairs", f"loss, {arm} minus {baseline}",
                            {baseline: zeros}))
        _add_curve(panels[-1], arm, differences)
    plot_panels(path, panels, columns=PANELS)


def _read_losses(path: Path) -> dict[int, float]:
    """Returns the validation loss by step, without those in a stage of patches."""
    losses = {}
    patch = 1
    for values in read_metrics(path):
        patch = values.get("patch", patch)
        if LOSS in values and patch == 1:
            losses[values["step"]] = values[LOSS]
    return losses


def _add_curve(panel: Panel, arm: str, losses: list[dict[int, float]]) -> None:
    """Adds the mean of an arm's losses, and its band, to a panel, where all have one."""
    if not losses:
        return
    points: Points = []
    halves = []
    for step in _shared_steps(losses):
        mean, half = interval([each[step] for each in losses])
        points.append((step, mean))
        halves.append(half)
    panel.curves[arm] = points
    if len(losses) > 1:
        panel.halves[arm] = halves


def _shared_steps(losses: list[dict[int, float]]) -> list[int]:
    """Returns the steps at which all have a loss."""
    return sorted(set.intersection(*map(set, losses)))


def draw_samples(experiment: Experiment, scales: dict[str, float], path: Path) -> bool:
    """Draws samples of the arms' first seeds, a row for each arm; says whether there are any.

    Pictures of one column are of the same class, and made with the same random numbers.

    Args:
        experiment: Experiment.
        scales: guidance scale by arm; arms without one, or without samples, are left out.
        path: the PNG.
    """
    rows = []
    titles = []
    for arm, scale in scales.items():
        samples = experiment.scored_samples(experiment.first(arm), scale)
        for found in experiment.samples_folder(samples).glob("*.npz"):
            with np.load(found) as archive:
                images, labels = archive["arr_0"], archive["labels"]
            shown = [np.flatnonzero(labels == label)[:SHOWN_PER_CLASS]
                     for label in np.unique(labels)]
            rows.append(images[np.concatenate(shown)])
            titles.append(f"{arm}, guidance {scale:g}")
    if rows:
        save_grid(path, np.concatenate(rows), columns=len(rows[0]), row_titles=titles)
    return bool(rows)
