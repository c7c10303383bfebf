"""What a training shows while it runs: numbers in the log and in metrics.jsonl, curves, a bar.

On demand they go to TensorBoard, too.
"""

import time
from pathlib import Path

from autoregressive.runtime.distributed import Session
from autoregressive.runtime.event_files import EventFiles
from autoregressive.runtime.identity import RunFolder
from autoregressive.runtime.log import LOGGER, MetricsFile, plot_metrics, progress, read_metrics

PLOT_SECONDS = 60               # between two plots of the curves, which take half a second each
NUM_IN_BAR = 2                  # values beside the progress bar


class RunLog:
    """The log, the metrics and the progress bar of a training that begins or goes on.

    Every process has one, but rank 0 alone writes.
    """

    def __init__(self, folder: RunFolder, session: Session, curves: tuple[str, ...], *,
                 steps: int, num_steps: int, batch_size: int, log: str) -> None:
        """
        Args:
            folder: RunFolder.
            session: Session.
            curves: values that are plotted; the first two stand beside the progress bar.
            steps: that were applied; lines of metrics.jsonl that are of later ones, which a killed
                start has left, are removed.
            num_steps: length of the run.
            batch_size: images of a step.
            log: value of --log.
        """
        self._folder = folder
        self._is_main = session.is_main
        self._curves = curves
        self._batch_size = batch_size
        self._plotted = time.monotonic()
        if self._is_main:
            self._metrics = MetricsFile(folder.metrics, steps)
        self._events = None
        if self._is_main and log == "tensorboard":
            self._events = EventFiles(folder.path, steps)
        self._bar = progress(session, num_steps * batch_size, folder.path.name, "image",
                             initial=steps * batch_size)

    def advance(self) -> None:
        """Moves the bar by one step."""
        self._bar.update(self._batch_size)

    def write(self, steps: int, values: dict[str, float]) -> None:
        """Writes what was measured after `steps` steps; plots the curves every PLOT_SECONDS."""
        if not values:
            return
        LOGGER.info("step %d: %s", steps, as_text(values, ".4g"))
        if not self._is_main:
            return
        self._metrics.write(steps, **values)
        if self._events:
            self._events.write(steps, values)
        shown = [name for name in self._curves[:NUM_IN_BAR] if name in values]
        self._bar.set_postfix({name: f"{values[name]:.3f}" for name in shown}, refresh=False)
        if time.monotonic() - self._plotted > PLOT_SECONDS:
            plot_run(self._folder, self._curves)
            self._plotted = time.monotonic()

    def add_pictures(self, steps: int, path: Path) -> None:
        """Shows the PNG that was saved after `steps` steps, if one was."""
        if self._events and path.is_file():
            self._events.add_pictures(steps, path)

    def flush(self) -> None:
        """Puts all that was written so far on the disk."""
        if self._events:
            self._events.flush()

    def close(self) -> None:
        """Ends the bar and the event files."""
        self._bar.close()
        if self._events:
            self._events.close()


def plot_run(folder: RunFolder, curves: tuple[str, ...]) -> None:
    """Plots values of a run's metrics over its steps, into curves.png."""
    plot_metrics(folder.path / "curves.png", {folder.path.name: folder.metrics}, curves)


def last_values(folder: RunFolder, names: tuple[str, ...]) -> dict[str, float]:
    """Returns the last of each named value in a run's metrics, without those never written."""
    last = {}
    for values in read_metrics(folder.metrics):
        last |= values
    return {name: last[name] for name in names if name in last}


def as_text(values: dict[str, float], style: str) -> str:
    """Returns values with their names for a line of the log; `style` formats what is no int."""
    parts = []
    for name, value in values.items():
        number = str(value) if isinstance(value, int) else format(value, style)
        parts.append(f"{name.replace('_', ' ')} {number}")
    return ", ".join(parts)
