"""The training loop of whatever is trained: log, validation, pictures, checkpoints, signals.

What differs between one thing and another is a Trainable. The loop numbers steps as they are
counted afterwards: step 1 is the first, and everything that is kept after it (a line of the log, a
checkpoint) bears the number 1.
"""

import signal
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from types import FrameType
from typing import Any, NamedTuple

from autoregressive.runtime.checkpoint import (
    Skipped,
    delete_old_checkpoints,
    newest_whole_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import checks, exit_with, message_of
from autoregressive.runtime.identity import RunFolder, find_difference
from autoregressive.runtime.loader import read_ahead
from autoregressive.runtime.log import LOGGER, cut_log, open_logger
from autoregressive.runtime.process_state import load_process_states, process_state
from autoregressive.runtime.run_log import RunLog, as_text, last_values, plot_run
from autoregressive.runtime.run_settings import RunSettings
from autoregressive.runtime.speed import Speedometer, peak_memory_mib
from autoregressive.runtime.trainable import Batches, Start, Trainable
from autoregressive.runtime.verification import Verification

VERIFY_SECONDS = 30             # that the first step waits for the verification of the data
# A run saves and leaves on these: clusters send the first two before they take a node; Ctrl-C.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Vote(NamedTuple):
    """What a process says after a step, before all agree on whether to save or to leave.

    Attributes:
        is_late: whether `ckpt_minutes` have passed since the last checkpoint, by its clock.
        has_error: whether it found that the data are not what they were.
        signal: of STOP_SIGNALS, the first that it received; 0 is none.
    """

    is_late: int
    has_error: int
    signal: int


@dataclass(eq=False)
class TrainingRun:
    """One run: it finds where it stands, runs the steps that are missing, leaves all in its folder.

    Attributes:
        folder: where the run lies.
        trainable: what is trained.
        batches: what it is trained on.
        settings: how long the run is, its learning rate, and when something happens.
        session: Session.
        checkpoint_settings: plain dict, in every checkpoint: what a reader must know of it.
        speed: measures rates.
        curves: values of the metrics that are plotted; the first two stand beside the progress bar.
        result: values of the metrics that the end of the run records.
        pictures_every: steps between two pictures of what it has learned; 0 is never.
        stage_ends: the step before which each stage ends; () if there is one.
        num_steps: length of the run.
        steps: how many were applied.
    """

    folder: RunFolder
    trainable: Trainable
    batches: Batches
    settings: RunSettings
    session: Session
    _: KW_ONLY
    checkpoint_settings: dict[str, Any]
    speed: Speedometer
    curves: tuple[str, ...]
    result: tuple[str, ...]
    pictures_every: int = 0
    stage_ends: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.num_steps = self.settings.num_steps(self.batches.per_epoch)
        self.steps = 0
        self._received_signal = 0
        self._verification: Verification | None = None

    def verify_data(self, verify: Callable[[], None]) -> None:
        """Verifies the data once in a run, on rank 0; if it takes long, beside the first steps.

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

    def resume(self, start: Start | None = None,
               check_start: Callable[[], None] = lambda: None) -> None:
        """Continues from the folder's newest whole checkpoint, else from `start`, else begins anew.

        Args:
            start: another run's file, which counts here only if it `continues`; or None.
            check_start: raises ValueError if the run cannot go on from `start`.
        """
        # The newest checkpoint of this run. Rank 0 alone looks for it, since that reads every byte.
        path = None
        skipped: list[Skipped] = []
        if self.session.is_main:
            path, skipped = newest_whole_checkpoint(self.folder.checkpoints)
            for damaged in skipped:                 # or --keep-checkpoints would keep them
                damaged.path.rename(damaged.path.with_suffix(".damaged"))
        path, skipped = self.session.from_main((path, skipped))
        payload = read_checkpoint(path, check_sums=False) if path else None
        own_settings = self.checkpoint_settings
        hashes = [name for name in own_settings if name.endswith("sha256")]
        if payload and (difference := find_difference(own_settings, payload["settings"], hashes)):
            exit_with(f"{path}: expected a checkpoint of this run with {difference}; remove it")

        # Without one, the checkpoint of another run that this one is to go on from.
        if path is None and start and start.continues:
            with checks(self.session):              # damaged checkpoints hid this until now
                check_start()
            path = start.path
            payload = start.payload

        # The log, cut back to that step, then everything else.
        if payload is not None:
            self.steps = payload["steps"]
        if self.session.is_main:
            cut_log(self.folder.log, self.steps)
        open_logger(self.session, self.folder.log)
        for damaged in skipped:
            LOGGER.warning("%s", damaged.reason)
        if payload is not None:
            LOGGER.info("continuing from %s", path)
            self.trainable.load(payload)
            load_process_states(payload.get("processes"), self.trainable.meter, self.session, path)

    def train(self) -> None:
        """Runs the steps that are missing.

        Raises:
            FloatingPointError: a loss or gradient was not finite.
            SystemExit: a signal asked to leave; everything is saved.
        """
        settings = self.settings
        session = self.session
        batch_size = settings.global_batch_size
        first = self.steps

        # Before the workers start: a signal in between would end the run unsaved.
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember_signal)

        # Batches that workers read ahead of the steps, and what the steps are reported to.
        part = session.part_of(batch_size)                  # places in the batch
        keys = ((step, part) for step in range(first, self.num_steps))
        batches = read_ahead(self.batches, keys, settings.num_workers,
                             pinned=session.device.type == "cuda")
        self.speed.read()                                   # what came before does not count
        self._saved = time.monotonic()
        self._log = RunLog(self.folder, session, self.curves, steps=first, num_steps=self.num_steps,
                           batch_size=batch_size, log=settings.log)

        learning_rate = settings.learning_rate(self.batches.per_epoch, self.stage_ends)
        for step, batch in enumerate(batches, first):
            lr = learning_rate.at(step)
            self.trainable.step(step, batch, lr)
            self.steps = step + 1
            self.speed.add(batch_size, step)
            self._log.advance()
            if step == first or step in self.stage_ends:
                peak = peak_memory_mib(session.device)
                LOGGER.info("peak memory after step %d: %.0f MiB", self.steps, peak)
            self._report(lr)
            self._save_or_leave()
        self._log.close()

    def _report(self, lr: float) -> None:
        """Logs, validates and saves pictures if that is due after a step."""
        settings = self.settings
        is_last = self.steps == self.num_steps
        is_logged = is_last or self.steps in self.stage_ends or self._is_due(settings.log_every)
        is_validated = is_last or self._is_due(settings.val_every)
        has_pictures = self._is_due(self.pictures_every)
        # A check waits for a GPU, so there it is made only before what waits for it anyway.
        waits = is_logged or is_validated or has_pictures
        if waits or self.session.device.type == "cpu":
            self._check_finite()
        if is_logged:
            means = self.trainable.meter.read(self.session)
            progress = {"lr": lr, "images_seen": self.steps * settings.global_batch_size}
            self._log.write(self.steps, means | progress | self.speed.read())
        if is_validated:
            with self.speed.paused():
                found = self.trainable.validate()
            self._log.write(self.steps, {f"val_{name}": value for name, value in found.items()})
        if has_pictures:
            path = self.folder.path / "pictures" / f"{self.steps:07d}.png"
            with self.speed.paused():
                self.trainable.save_pictures(path)
            self._log.add_pictures(self.steps, path)

    def _save_or_leave(self) -> None:
        """Saves a checkpoint if one is due; leaves if a signal asked to, or the data changed."""
        settings = self.settings
        is_last = self.steps == self.num_steps

        # Rank 0 verifies the data; only the last step waits for the verification to end.
        error = None
        if self._verification:
            error = self._verification.result(seconds=None if is_last else 0)

        # Each process says what it knows, so that all do the same. The clock of rank 0 decides
        # whether a checkpoint is late.
        patience = settings.ckpt_minutes * 60
        is_late = patience > 0 and time.monotonic() - self._saved >= patience
        own = Vote(is_late, error is not None, self._received_signal)
        votes = [Vote(*numbers) for numbers in self.session.gather_integers(*own)]
        main = votes[0]
        if main.has_error:
            exit_with(message_of(error) if error else "")   # rank 0, which has it, prints it
        received = max(vote.signal for vote in votes)       # whoever received it, all leave

        epochs_are_due = self._is_due(settings.ckpt_every * self.batches.per_epoch)
        is_due = is_last or main.is_late or epochs_are_due or self._is_due(settings.ckpt_steps)
        if is_due or received:
            self._check_finite()                            # saving waits for the device anyway
            self._log.flush()                               # a run that resumes misses no step
            with self.speed.paused():
                self._save()
            self._saved = time.monotonic()
        if received:
            LOGGER.info("signal %d after step %d%s", received, self.steps,
                        "" if settings.no_local_save else ": the same command continues")
            raise SystemExit(128 + received)

    def read_result(self) -> dict[str, float]:
        """Returns the last value of each of `result` in the metrics."""
        return last_values(self.folder, self.result)

    def finish(self) -> None:
        """Plots the curves and records that the run came to its end, with its last numbers.

        Rank 0 alone does so.
        """
        if not self.session.is_main:
            return
        plot_run(self.folder, self.curves)
        result = self.read_result()
        self.folder.mark_finished({"steps": self.steps} | result)
        LOGGER.info("%s; results in %s", as_text(result, ".3f"), self.folder.path)

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.steps % every == 0

    def _remember_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == self._received_signal == signal.SIGINT:
            raise KeyboardInterrupt                         # a second Ctrl-C does not wait
        self._received_signal = self._received_signal or number

    def _check_finite(self) -> None:
        bad = self.trainable.meter.first_bad_step(self.session)
        if bad >= 0:
            rows = self.batches.rows(bad).tolist()
            raise FloatingPointError(f"step {bad + 1}: loss or gradient is not finite, in rows "
                                     f"{rows}; it changed no weight. Lower --lr, or look at these "
                                     "rows")

    def _save(self) -> None:
        """Saves a checkpoint, unless the run keeps none; a full disk ends all processes."""
        settings = self.settings
        if settings.no_local_save:
            return
        state = self.trainable.state()
        own = process_state(self.trainable.meter, self.session.device)
        processes = self.session.gather(own)
        error = None
        if self.session.is_main:
            path = self.folder.checkpoints / f"{self.steps:07d}.pt"
            images_seen = self.steps * settings.global_batch_size
            payload = state | {"steps": self.steps, "processes": processes,
                               "settings": self.checkpoint_settings, "images_seen": images_seen}
            try:
                save_checkpoint(path, payload)
                delete_old_checkpoints(self.folder.checkpoints, settings.keep_checkpoints)
            except OSError as failure:                      # a full disk
                error = message_of(failure)
        if error := self.session.from_main(error):
            exit_with(error)
