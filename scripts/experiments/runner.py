"""Runs what is missing of an experiment: pieces of work, each a generator of commands."""

import os
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from autoregressive.runtime.files import read_json, write_json
from autoregressive.runtime.identity import find_difference
from autoregressive.runtime.log import LOGGER
from scripts.experiments.plan import ROOT, Experiment, Run, Samples, sha256_of
from scripts.experiments.processes import Job, JobFailed, Jobs

POLL_SECONDS = 0.5
RESULT = {"arm": str, "seed": int, "commit": str, "cfg_scale": float, "numbers": dict,
          "cpu_hours": float, "inputs": dict}
WAIT = "wait"


class Command(NamedTuple):
    """A command of a piece of work.

    Attributes:
        name: of its log.
        words: path of the script in the repository, and its arguments.
        commit: of the repository.
    """

    name: str
    words: list[str]
    commit: str


# Yields commands, and WAIT while it needs what another one makes; is sent the CPU seconds of each.
Work = Generator[Command | str, float, None]


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


def check_same(path: Path, expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Raises ValueError unless `found`, read from `path`, agrees with all of `expected`."""
    if difference := find_difference(expected, found, expected):
        raise ValueError(f"{path}: expected one with {difference}; remove it, or give what is new "
                         "another name")


def read_results(experiment: Experiment) -> list[dict[str, Any]]:
    """Returns the finished runs of the experiment's arms and seeds.

    Raises:
        ValueError: one was made by other flags than the experiment file holds, or of other files
            than another one.
    """
    found = []
    inputs = {}
    for each in experiment.runs:
        path = experiment.result(each)
        if path.exists():
            result = read_json(path, RESULT)
            check_same(path, experiment.identity(each), result)
            shared = {name: inputs[name] for name in result["inputs"] if name in inputs}
            check_same(path, shared, result["inputs"])
            inputs |= result["inputs"]
            found.append(result)
    return found


class Runner:
    """Runs what is missing.

    Each piece of work is a generator of commands; one loop starts them and waits for them all.

    Attributes:
        experiment: Experiment.
        jobs: its processes.
    """

    def __init__(self, experiment: Experiment, commit: str, num_jobs: int) -> None:
        """
        Args:
            experiment: Experiment.
            commit: whole name of the commit that new runs are made with.
            num_jobs: commands at a time.
        """
        self.experiment = experiment
        self.jobs = Jobs(experiment.work)
        self._commit = commit
        slots = gpus()
        self._slots = [slots[number % len(slots)] for number in range(num_jobs)]
        self._record = experiment.work / "prepared.json"
        self._prepared = read_json(self._record) if self._record.exists() else {}
        self._failed: set[str] = set()

    def check(self) -> None:
        """Raises ValueError if prepared files have changed, or the commands that make them have."""
        for step, command in self.experiment.steps().items():
            if made := self._prepared.get(step):
                path = self.experiment.work / step
                sha256 = sha256_of(path) if path.exists() else None
                check_same(self._record, {"command": command, "sha256": sha256}, made)
            elif "{data}" in self.experiment.words(command):
                raise ValueError(f"--data: expected what {step} is made of, got none")

    def check_inputs(self, results: list[dict[str, Any]]) -> None:
        """Raises ValueError if results were made of other files than the work folder holds."""
        for result in results:
            each = Run(result["arm"], result["seed"])
            check_same(self.experiment.result(each), self.experiment.inputs(each), result["inputs"])

    def prepare(self) -> bool:
        """Makes what is made once; says whether all of it came to its end."""
        for group in self.experiment.plan["prepare"]:
            works = {step: self._prepare(step, command) for step, command in group.items()
                     if step not in self._prepared}
            if not self._finish(works):
                return False
        floors = {}
        for title, record in self.experiment.plan["floors"].items():
            scores = read_json(self.experiment.work / record, {"numbers": dict})
            floors[title] = scores["numbers"]
        path = self.experiment.floors()
        if not path.exists() or read_json(path) != floors:
            write_json(path, floors)
        return True

    def run(self) -> bool:
        """Runs every run that has no result; says whether all came to their end."""
        todo = [each for each in self.experiment.runs if not self.experiment.result(each).exists()]
        return self._finish({each.name: self._run(each) for each in todo})

    def _finish(self, works: dict[str, Work]) -> bool:
        """Does pieces of work, some at a time, in their order; says whether all came to their end.

        One that fails does not stop the others.
        """
        ready: deque[tuple[str, float | None]] = deque((name, None) for name in works)
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
                while ready and slots and not self.jobs.are_paused:
                    name, seconds = ready.popleft()
                    command = self._next(name, works[name], seconds)
                    if command is WAIT:
                        parked.append((name, None))
                    elif command:
                        script = make_clone(self.experiment.work, command.commit) / command.words[0]
                        words = [str(script), *command.words[1:]]
                        running.append((name, self.jobs.start(command.name, words, slots.pop(0))))
                ready.extend(parked)

                # What has ended goes on before the others, so that runs end one after the other.
                time.sleep(POLL_SECONDS)
                for name, job in list(running):
                    try:
                        seconds = self.jobs.poll(job)
                        if seconds is None:
                            continue
                        ready.appendleft((name, seconds))
                    except JobFailed as error:
                        self._fail(name, error)
                    running.remove((name, job))
                    slots.append(job.slot)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.jobs.stop([job for _, job in running])
        return not self._failed & works.keys()

    def _next(self, name: str, work: Work, seconds: float | None) -> Command | str | None:
        """Returns the next command of a piece of work, or WAIT; None if it has ended, or failed.

        Args:
            name: of the work.
            work: the work.
            seconds: CPU seconds of its last command; None before the first, and after WAIT.
        """
        try:
            return work.send(seconds)
        except StopIteration:
            LOGGER.info("%s is done", name)
        except Exception as error:                  # of this piece alone: the others go on
            self._fail(name, error)
        return None

    def _fail(self, name: str, error: Exception) -> None:
        LOGGER.error("%s: %s", name, error)
        self._failed.add(name)

    def _prepare(self, step: str, command: str) -> Work:
        """Makes what is made once by one command, and records its hash."""
        yield Command(step, self.experiment.words(command), self._commit)
        sha256 = sha256_of(self.experiment.work / step)
        self._prepared[step] = {"command": command, "sha256": sha256}
        write_json(self._record, self._prepared)

    def _run(self, each: Run) -> Work:
        """Trains, samples and scores one run, and keeps its result."""
        experiment = self.experiment
        plan = experiment.plan
        identity = experiment.identity(each)
        # A training that has begun stays the same run when its samples are made or scored in
        # another way.
        training = {"train": identity["train"]}
        begun = experiment.folder(each) / "begun.json"
        if not begun.exists():
            write_json(begun, training | {"commit": self._commit, "cpu_seconds": 0.0})
        record = read_json(begun, {"commit": str, "cpu_seconds": float})
        check_same(begun, training, record)

        def counted(words: list[str]) -> Work:
            record["cpu_seconds"] += yield Command(each.name, words, record["commit"])
            write_json(begun, record)

        yield from counted(experiment.train_words(each))
        scale = yield from self._choose_guidance(each, record["commit"])
        samples = Samples(each, scale, plan["num_samples"], plan["sampling_seed"])
        yield from counted(experiment.sample_words(samples))
        yield from counted(experiment.evaluate_words(samples))
        scores = experiment.scores(samples)
        numbers = read_json(experiment.run_folder(each) / "finished.json")
        if "val_token_loss" in numbers:
            numbers["val_within_loss"] = numbers["val_token_loss"] - numbers["val_cluster_loss"]
        write_json(experiment.result(each), {
            "arm": each.arm, "seed": each.seed, **identity, "commit": record["commit"],
            "inputs": experiment.inputs(each), "cfg_scale": scale,
            "numbers": numbers | scores["numbers"],
            "cpu_hours": round(record["cpu_seconds"] / 3600, 3), "versions": scores["versions"]})

    def _choose_guidance(self, each: Run, commit: str) -> Generator[Command | str, float, float]:
        """Returns the guidance scale of an arm: that of the lowest FID of its first seed's run.

        The run of the first seed chooses it, by samples at each scale; the others wait for that.
        """
        experiment = self.experiment
        guidance = experiment.plan["guidance"]
        chosen = experiment.guidance(each.arm)
        first = experiment.first(each.arm)
        identity = experiment.identity(each)
        while each != first and not chosen.exists():
            if experiment.result(first).exists():
                return read_json(experiment.result(first), RESULT)["cfg_scale"]
            if first.name in self._failed:
                raise JobFailed(f"waits for the guidance that {first.name} did not come to choose")
            yield WAIT
        if not chosen.exists():
            fids = {}
            for scale in map(float, guidance["scales"]):
                samples = Samples(each, scale, guidance["num_samples"], guidance["seed"])
                yield Command(each.name, experiment.sample_words(samples), commit)
                words = [*experiment.evaluate_words(samples), "--metrics", "fid"]
                yield Command(each.name, words, commit)
                fids[scale] = experiment.scores(samples)["numbers"]["FID"]
            write_json(chosen, {"arm": each.arm, "seed": each.seed, **identity, "commit": commit,
                                "inputs": experiment.inputs(each),
                                "cfg_scale": min(fids, key=fids.get), "fid": fids})
        record = read_json(chosen, {"cfg_scale": float})
        check_same(chosen, identity, record)
        return record["cfg_scale"]
