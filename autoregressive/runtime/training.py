"""The training loop, of whatever is trained: log, metrics, curves, validation, pictures, checkpoints, signals, resume.

What differs between one thing and another is a Trainable. The loop numbers steps as they are counted afterwards: step 1
is the first, and everything that is kept after it (a line of the log, a checkpoint) bears the number 1.
"""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from autoregressive.runtime.checkpoint import (
    delete_old_checkpoints,
    list_checkpoints,
    newest_whole_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import describe, exit_with
from autoregressive.runtime.identity import RunFolder, find_difference
from autoregressive.runtime.loader import read_ahead
from autoregressive.runtime.log import (
    LOGGER,
    MetricsFile,
    cut_log,
    draw_metrics,
    open_logger,
    progress,
    read_metrics,
)
from autoregressive.runtime.meter import Meter
from autoregressive.runtime.optim import learning_rate
from autoregressive.runtime.run_settings import RunSettings
from autoregressive.runtime.speed import Speedometer, peak_memory_mib
from autoregressive.runtime.verification import Verification

VERIFY_SECONDS = 30             # of looking at the data before the first step
DRAW_SECONDS = 60               # between two pictures of the curves, which take half a second each
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)      # clusters send them before they take a node; Ctrl-C


class Trainable(Protocol):
    """What the loop trains.

    Attributes:
        meter: means of what the steps report.
    """

    meter: Meter

    def step(self, step: int, batch: Any, lr: float) -> None:
        """Applies step number `step`, from 0, with this process's part of the batch, and adds it to the meter."""

    def validate(self) -> dict[str, float]:
        """Returns numbers on the validation images; none if there are none (all processes call this)."""

    def draw(self, path: Path) -> None:
        """Saves a picture of what the present weights can do (all processes call this)."""

    def state(self) -> dict[str, Any]:
        """Returns all that training continues from, as plain containers, on rank 0 (all processes call this)."""

    def load(self, state: dict[str, Any]) -> None:
        """Loads what `state` returned, read on every process."""


class Batches(Protocol):
    """What a Trainable is trained on; which rows come in which step follows from the seed alone.

    Attributes:
        per_epoch: steps of an epoch.
    """

    per_epoch: int

    def rows(self, step: int) -> np.ndarray:
        """Returns the rows of the data set in the batch of a step, from 0."""

    def __getitem__(self, key: tuple[int, range]) -> Any:
        """Returns the batch of a step, from 0, or rather the part of it at a range of places."""


class TrainingRun:
    """One run: it finds where it stands, runs the steps that are missing, and leaves everything in its folder.

    Attributes:
        folder: RunFolder.
        num_steps: length of the run.
        steps: how many were applied.
    """

    def __init__(self, folder: RunFolder, trainable: Trainable, batches: Batches, settings: RunSettings,
                 session: Session, *, record: dict[str, Any], speed: Speedometer, curves: tuple[str, ...],
                 result: tuple[str, ...], draw_every: int = 0):
        """
        Args:
            folder: RunFolder.
            trainable: what is trained.
            batches: what it is trained on.
            settings: RunSettings.
            session: Session.
            record: plain dict that travels in the checkpoints: what a reader must know of the weights.
            speed: Speedometer.
            curves: values of the metrics that are drawn; the first two stand beside the progress bar.
            result: values of the metrics that the end of the run records.
            draw_every: steps between two pictures; 0 is never.
        """
        self.folder, self.trainable, self.batches, self.session = folder, trainable, batches, session
        self.settings, self.record, self.curves, self.result_names = settings, record, curves, result
        self.speed, self.draw_every = speed, draw_every
        self.num_steps = settings.num_steps(batches.per_epoch)
        self.steps = 0
        self._received_signal = 0
        self._verification = None

    def verify_data(self, verify: Callable[[], None]) -> None:
        """Looks at the data once in a run, on rank 0: what takes long goes on beside the first steps.

        Args:
            verify: raises ValueError if the data are not what they were.

        Raises:
            ValueError: it did so within VERIFY_SECONDS; later, `train` ends with it.
        """
        if self.session.is_main and not self.folder.verified.exists():
            self._verification = Verification(verify, self.folder.verified)
            self._verification.start()
            if error := self._verification.result(VERIFY_SECONDS):
                raise error

    def resume(self, start: Any = None) -> None:
        """Continues from the folder's newest whole checkpoint, else from `start`, else from nothing.

        Args:
            start: path and payload of a file: another run's checkpoint if it holds an optimizer's state; or None.
        """
        path, skipped = None, []
        if self.session.is_main:
            path, skipped = newest_whole_checkpoint(self.folder.checkpoints)     # reads every byte: on one process
            for damaged in list_checkpoints(self.folder.checkpoints)[::-1][:len(skipped)]:
                damaged.rename(damaged.with_suffix(".damaged"))                 # or --keep-checkpoints would keep it
        path, skipped = self.session.gather((path, skipped))[0]
        payload = read_checkpoint(path) if path else None
        hashes = [name for name in self.record if name.endswith("sha256")]
        if payload and (difference := find_difference(self.record, payload["settings"], hashes)):
            exit_with(f"{path}: expected a checkpoint of this run with {difference}; remove it")
        if path is None and start and "optimizer" in start.payload:
            path, payload = start.path, start.payload
        if path is not None:
            self.steps = payload["steps"]
        if self.session.is_main:
            cut_log(self.folder.path / "log.txt", self.steps)
        open_logger(self.session, self.folder.path / "log.txt")
        for line in skipped:
            LOGGER.warning("%s", line)
        if path is not None:
            LOGGER.info("continuing from %s", path)
            self._load(path, payload)

    def train(self) -> None:
        """Runs the steps that are missing.

        Raises:
            FloatingPointError: a loss or gradient was not finite.
            SystemExit: a signal asked to leave; everything is saved.
        """
        settings, session, first = self.settings, self.session, self.steps
        batch_size, is_cpu = settings.global_batch_size, session.device.type == "cpu"
        for number in STOP_SIGNALS:                             # before the workers start, which inherit this
            signal.signal(number, self._remember_signal)
        self.speed.read()                                       # what came before does not count
        if session.is_main:
            self._metrics = MetricsFile(self.folder.path / "metrics.jsonl", first)
        self._saved = self._drawn = time.monotonic()
        self._bar = progress(session, self.num_steps * batch_size, self.folder.path.name, "image",
                             initial=first * batch_size)
        part = session.share_of(batch_size)
        batches = read_ahead(self.batches, ((step, part) for step in range(first, self.num_steps)),
                             settings.num_workers, pinned=not is_cpu)
        for step, batch in enumerate(batches, first):
            lr = learning_rate(step, self.num_steps, settings.lr, settings.warmup, settings.lr_schedule)
            self.trainable.step(step, batch, lr)
            self.steps = step + 1
            is_last = self.steps == self.num_steps
            self._bar.update(batch_size)
            self.speed.add(batch_size)
            if step == first:
                LOGGER.info("peak memory of the first step: %.0f MiB", peak_memory_mib(session.device))

            is_logged = is_last or self._is_due(settings.log_every)
            if is_logged or is_cpu:                             # where looking costs no wait for the device
                self._check_finite()
            if is_logged:
                means = self.trainable.meter.read(session)
                self._write(means | {"lr": lr, "images_seen": self.steps * batch_size} | self.speed.read())
            if is_last or self._is_due(settings.val_every):
                self._write({f"val_{name}": value for name, value in self.trainable.validate().items()})
                self.speed.read()                               # the validation's time is not the training's
            if self._is_due(self.draw_every):
                self.trainable.draw(self.folder.path / "pictures" / f"{self.steps:07d}.png")
            self._save_or_leave()
        self._bar.close()

    def _write(self, values: dict[str, float]) -> None:
        """Writes numbers into the log and the metrics, and now and then the curves."""
        if not values:
            return
        LOGGER.info("step %d: %s", self.steps, _as_text(values, ".4g"))
        if self.session.is_main:
            self._metrics.write(self.steps, **values)
            self._bar.set_postfix({name: f"{values[name]:.3f}" for name in self.curves[:2] if name in values},
                                  refresh=False)
            if time.monotonic() - self._drawn > DRAW_SECONDS:
                self._draw_curves()
                self._drawn = time.monotonic()

    def _save_or_leave(self) -> None:
        """Saves a checkpoint if one is due; leaves if a signal asked to."""
        settings = self.settings
        is_late = 0 < settings.ckpt_minutes * 60 <= time.monotonic() - self._saved
        is_last = self.steps == self.num_steps
        error = self._verification.result(None if is_last else 0) if self._verification else None
        votes = self.session.gather((is_late, error, self._received_signal))
        is_late, error, _ = votes[0]                            # by the clock of rank 0
        if error:
            exit_with(describe(error))
        received = max(number for _, _, number in votes)        # whoever received it, all leave
        is_due = self._is_due(settings.ckpt_steps) or self._is_due(settings.ckpt_every * self.batches.per_epoch)
        if is_last or is_late or received or is_due:
            self._check_finite()                                # saving waits for the device anyway
            self._save()
            self._saved = time.monotonic()
        if received:
            LOGGER.info("signal %d after step %d%s", received, self.steps,
                        "" if settings.no_local_save else ": the same command continues")
            raise SystemExit(128 + received)

    def result(self) -> dict[str, float]:
        """Returns the last values in the metrics of what the end of the run records."""
        last = {}
        for row in read_metrics(self.folder.path / "metrics.jsonl"):
            last |= row
        return {name: last[name] for name in self.result_names if name in last}

    def finish(self) -> None:
        """Draws the curves and records that the run came to its end, with its last numbers (rank 0 alone does)."""
        if not self.session.is_main:
            return
        self._draw_curves()
        result = self.result()
        self.folder.mark_finished({"steps": self.steps} | result)
        LOGGER.info("%s; results in %s", _as_text(result, ".3f"), self.folder.path)

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.steps % every == 0

    def _remember_signal(self, number: int, _frame: Any) -> None:
        if number == self._received_signal == signal.SIGINT:
            raise KeyboardInterrupt                             # a second Ctrl-C does not wait
        self._received_signal = self._received_signal or number

    def _check_finite(self) -> None:
        bad = self.trainable.meter.first_bad_step(self.session)
        if bad >= 0:
            raise FloatingPointError(f"step {bad + 1}: loss or gradient is not finite, in rows "
                                     f"{self.batches.rows(bad).tolist()}; it changed no weight. Lower --lr, or look at "
                                     "these rows")

    def _draw_curves(self) -> None:
        draw_metrics(self.folder.path / "curves.png", {self.folder.path.name: self.folder.path / "metrics.jsonl"},
                     self.curves)

    def _save(self) -> None:
        if self.settings.no_local_save:
            return
        state, meter = self.trainable.state(), self.trainable.meter
        is_cuda = self.session.device.type == "cuda"
        processes = self.session.gather({"cpu": torch.get_rng_state(), "sums": meter.sums.cpu(), "count": meter.count,
                                         "cuda": torch.cuda.get_rng_state() if is_cuda else None})
        error = None
        if self.session.is_main:
            images_seen = self.steps * self.settings.global_batch_size
            try:
                save_checkpoint(self.folder.checkpoints / f"{self.steps:07d}.pt", state | {
                    "steps": self.steps, "processes": processes, "settings": self.record, "images_seen": images_seen})
                delete_old_checkpoints(self.folder.checkpoints, self.settings.keep_checkpoints)
            except OSError as failure:              # a full disk
                error = describe(failure)
        if error := self.session.gather(error)[0]:
            exit_with(error)

    def _load(self, path: Path, payload: dict[str, Any]) -> None:
        self.trainable.load(payload)
        processes, meter = payload.get("processes"), self.trainable.meter
        if processes is None:
            LOGGER.warning("%s: holds no random numbers and no means of the log: the data go on where they were, "
                           "dropout draws other numbers", path)
        elif len(processes) == self.session.world_size:
            own = processes[self.session.rank]
            meter.sums, meter.count = own["sums"].to(meter.device), own["count"]
            torch.set_rng_state(own["cpu"])
            if own["cuda"] is not None and self.session.device.type == "cuda":
                torch.cuda.set_rng_state(own["cuda"])
        else:
            LOGGER.warning("%s: written by %d processes, continued by %d: the data go on where they were, dropout "
                           "draws other numbers", path, len(processes), self.session.world_size)
            meter.sums = (sum(process["sums"] for process in processes) / len(processes)).to(meter.device)
            meter.count = processes[0]["count"]


def _as_text(values: dict[str, float], style: str) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value if isinstance(value, int) else format(value, style)}"
                     for name, value in values.items())
