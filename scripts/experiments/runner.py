"""Does the pieces of work of an experiment: one loop starts their commands and waits for them."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections import deque
from pathlib import Path

import torch

from autoregressive.runtime.log import LOGGER
from scripts.experiments.plan import ROOT
from scripts.experiments.processes import Job, JobFailed, Jobs
from scripts.experiments.works import WAIT, Command, Work, Works

POLL_SECONDS = 0.5
Outcome = float | JobFailed | None     # of a command, as Jobs.poll says it


def make_clone(work: Path, commit: str) -> Path:
    """Returns a clone of the repository at a commit, made if it is missing."""
    tree = work / "trees" / commit[:12]
    if not tree.exists():
        unfinished = tree.with_name(f".{tree.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        subprocess.run(["git", "clone", "-q", "--no-checkout", ROOT, unfinished], check=True)
        subprocess.run(["git", "-C", unfinished, "checkout", "-q", commit], check=True)
        unfinished.rename(tree)
    return tree


def gpus() -> list[str | None]:
    """Returns the GPUs that jobs may see, one each; [None] without GPUs.

    They are named as in CUDA_VISIBLE_DEVICES.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
    return [name for name in names if name] or [None]


class Runner:
    """Runs what is missing of an experiment."""

    def __init__(self, works: Works, num_jobs: int) -> None:
        """
        Args:
            works: the pieces of work.
            num_jobs: commands at a time.
        """
        self._jobs = Jobs(works.experiment.work)
        self._works = works
        slots = gpus()
        self._slots = [slots[number % len(slots)] for number in range(num_jobs)]

    def prepare(self) -> bool:
        """Makes what is made once; says whether all of it came to its end."""
        for group in self._works.preparations():
            if not self._finish(group):
                return False
        self._works.write_floors()
        return True

    def run(self) -> bool:
        """Runs every run that has no result; says whether all came to their end."""
        return self._finish(self._works.runs())

    def _finish(self, works: dict[str, Work]) -> bool:
        """Does pieces of work, some at a time, in their order; says whether all came to their end.

        One that fails does not stop the others.
        """
        ready: deque[tuple[str, Outcome]] = deque((name, None) for name in works)
        running: list[tuple[str, Job]] = []
        slots = list(self._slots)
        received: list[int] = []
        # Signals are handled between two rounds: in the midst of a start a process would be lost.
        handlers = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            handlers[number] = signal.signal(number, lambda number, _frame: received.append(number))
        try:
            while ready or running:
                if received:
                    raise SystemExit(128 + received[0])

                # Start the next command of what is ready, as long as there is room for it.
                parked = []
                while ready and slots and not self._jobs.are_paused:
                    name, outcome = ready.popleft()
                    command = self._next(name, works[name], outcome)
                    if command is WAIT:
                        parked.append((name, None))
                    elif command:
                        tree = make_clone(self._works.experiment.work, command.commit)
                        words = [str(tree / command.words[0]), *command.words[1:]]
                        running.append((name, self._jobs.start(command.name, words, slots.pop(0))))
                ready.extendleft(reversed(parked))

                # What has ended goes on before the others, so that runs end one after the other.
                time.sleep(POLL_SECONDS)
                for name, job in list(running):
                    if (outcome := self._jobs.poll(job)) is not None:
                        ready.appendleft((name, outcome))
                        running.remove((name, job))
                        slots.append(job.slot)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            stopped = self._jobs.stop([job for _, job in running])
            ended = zip([name for name, _ in running], stopped, strict=True)
            # They add up what their commands have used.
            for name, outcome in [*ready, *ended]:
                if isinstance(outcome, float):
                    outcome = JobFailed("asked to leave", outcome)
                if outcome:
                    with contextlib.suppress(JobFailed):
                        works[name].throw(outcome)
        return not self._works.failed & works.keys()

    def _next(self, name: str, work: Work, outcome: Outcome) -> Command | str | None:
        """Returns the next command of a piece of work, or WAIT; None if it has ended, or failed.

        Args:
            name: of the work.
            work: the work.
            outcome: of its last command; None before the first, and after WAIT.
        """
        try:
            if isinstance(outcome, JobFailed):
                return work.throw(outcome)
            return work.send(outcome)
        except StopIteration:
            LOGGER.info("%s is done", name)
        except Exception as error:                  # of this piece alone: the others go on
            self._fail(name, error)
        return None

    def _fail(self, name: str, error: Exception) -> None:
        LOGGER.error("%s: %s", name, error)
        self._works.failed.add(name)

