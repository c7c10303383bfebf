"""What a training run leaves while it goes on: progress bar, log, metrics, curves; and when it saves."""

import time

from autoregressive.runtime.interrupt import Interrupt
from autoregressive.runtime.log import LOGGER, MetricsFile, draw_metrics, progress, read_metrics
from autoregressive.train.monitor import peak_memory_mib

DRAW_SECONDS = 60               # between two pictures of the curves, which take half a second each
CURVES = ("token_loss", "cluster_loss", "cluster_accuracy", "grad_norm")
FINAL = ("token_loss", "cluster_loss")


class Journal:
    """Writes down the updates of a Trainer, and stops a run that is not finite.

    Args:
        folder: RunFolder.
        trainer: Trainer, or another with bad_update, drain and, where images are held out, evaluate.
        batches: TokenBatches of the training images, or others with batch_size and rows(update).
        held_out: TokenBatches of others, or None.
        speed: Speedometer.
        updates: range of the updates to come.
        log_every, eval_every: updates between two lines of the log; between two held-out losses.
        session: Session.
        curves: what is drawn; `final`: what the end of the run records, of the last line that holds it.
    """

    def __init__(self, folder, trainer, batches, held_out, speed, updates, log_every, eval_every, session,
                 curves=CURVES, final=FINAL):
        self.curves, self.final = curves, final
        self.folder, self.trainer, self.batches, self.held_out = folder, trainer, batches, held_out
        self.speed, self.updates, self.session = speed, updates, session
        self.log_every, self.eval_every = log_every, eval_every
        self.metrics = MetricsFile(folder.path / "metrics.jsonl", updates.start) if session.is_main else None
        self._drawn = time.monotonic()
        self.bar = progress(session, updates.stop * batches.batch_size, folder.path.name, "image",
                            initial=updates.start * batches.batch_size)

    def after(self, done, lr):
        """Notes that `done` updates were applied, the last one with learning rate `lr`."""
        self.bar.update(self.batches.batch_size)
        self.speed.add(self.batches.batch_size)
        if done == self.updates.start + 1:
            LOGGER.info("peak memory of the first update: %.0f MiB", peak_memory_mib(self.session.device))
        is_due = done % self.log_every == 0 or done == self.updates.stop
        if is_due or self.session.device.type == "cpu":          # where looking costs no wait for the device
            self._stop_if_bad()
        if is_due:
            self._write(done, self.trainer.drain(self.session), lr=lr, images_seen=done * self.batches.batch_size,
                        **self.speed.read())
        if self.held_out and (done % self.eval_every == 0 or done == self.updates.stop):
            self._write(done, self.trainer.evaluate(self.held_out, self.session))
            self.speed.read()                                    # the evaluation's time is not the training's

    def note(self, done, **values):
        """Writes numbers that come from elsewhere, after `done` updates."""
        self._write(done, values)

    def _stop_if_bad(self):
        bad = self.trainer.bad_update(self.session)
        if bad >= 0:
            raise FloatingPointError(f"update {bad + 1}: loss or gradient is not finite, in rows "
                                     f"{self.batches.rows(bad).tolist()}; it changed no weight. Lower --lr, or look at "
                                     "these rows")

    def _write(self, done, values, **more):
        values |= more
        LOGGER.info("update %d: %s", done, ", ".join(f"{name.replace('_', ' ')} {value:.4g}"
                                                     for name, value in values.items()))
        if self.metrics:
            self.metrics.write(done, **values)
            self.bar.set_postfix({name: f"{values[name]:.3f}" for name in self.final if name in values}, refresh=False)
            if done == self.updates.stop or time.monotonic() - self._drawn > DRAW_SECONDS:
                draw_metrics(self.folder.path / "curves.png", {self.folder.path.name: self.metrics.path}, self.curves)
                self._drawn = time.monotonic()

    def close(self, **more):
        """Records that the run came to its end, with `more` numbers."""
        self.bar.close()
        if self.metrics:
            last = [row for row in read_metrics(self.metrics.path) if self.final[0] in row][-1]
            numbers = {name: last[name] for name in self.final}
            self.folder.mark_finished({"updates": self.updates.stop, **numbers, **more})
            LOGGER.info("%s; checkpoints in %s", ", ".join(f"{name.replace('_', ' ')} {value:.3f}"
                                                           for name, value in numbers.items()), self.folder.checkpoints)


class SaveSchedule:
    """Says after which updates a checkpoint is due, the same on all processes.

    Args:
        every: updates between two checkpoints, one or several numbers; 0 is never.
        minutes: minutes between two checkpoints; 0 is never.
        num_updates: the end of the run, where one is always due.
        session: Session.
    """

    def __init__(self, every, minutes, num_updates, session):
        self.every, self.minutes, self.num_updates, self.session = every, minutes, num_updates, session
        self._interrupt, self._saved = Interrupt(), time.monotonic()

    def after(self, done):
        """Returns whether a checkpoint is due after `done` updates, and the signal that asks to leave, 0 if none."""
        late = self.session.is_main and 0 < self.minutes * 60 <= time.monotonic() - self._saved     # by one clock
        agreed = self.session.largest(2 * self._interrupt.received + late)      # one look around for both questions
        is_due = agreed > 0 or done == self.num_updates or any(every and done % every == 0 for every in self.every)
        if is_due:
            self._saved = time.monotonic()
        return is_due, agreed // 2
