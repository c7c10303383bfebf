"""The pieces of work of an experiment: preparations, runs, guidance; each generates commands."""

from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

from autoregressive.runtime.files import atomic_write, read_json, write_json
from autoregressive.runtime.identity import find_difference
from scripts.experiments.plan import Experiment, Run, Samples, sha256_of
from scripts.experiments.processes import JobFailed

RESULT = {"arm": str, "seed": int, "commit": str, "cfg_scale": float, "numbers": dict,
          "cpu_hours": float, "device": str, "inputs": dict}
CHOSEN = {"cfg_scale": float, "inputs": dict}
BEGUN = {"commit": str, "cpu_seconds": float}
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


# Yields commands, and WAIT while it needs what another one makes. It is sent the CPU seconds of a
# command, or JobFailed is raised where it stands; after WAIT it is sent None.
Work = Generator[Command | str, float | None, None]


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


class Works:
    """Makes the pieces of work of an experiment.

    Attributes:
        experiment: Experiment.
        failed: names of pieces that have failed; those that need them fail, too.
    """

    def __init__(self, experiment: Experiment, commit: str) -> None:
        """
        Args:
            experiment: Experiment.
            commit: whole name of the commit that new runs are made with.
        """
        self.experiment = experiment
        self.failed: set[str] = set()
        self._commit = commit
        self._record = experiment.work / "prepared.json"
        self._prepared = read_json(self._record) if self._record.exists() else {}
        self._names: set[str] = set()               # of the runs and choices that are made
        self._trained: set[str] = set()
        self._scored: set[str] = set()              # samples to choose guidance by

    def check(self) -> None:
        """Checks what is there against the experiment file.

        Raises:
            ValueError: prepared files have changed, or the commands that make them, or the flags of
                a run that a guidance was chosen by.
        """
        for step, command in self.experiment.steps().items():
            if made := self._prepared.get(step):
                path = self.experiment.work / step
                sha256 = sha256_of(path) if path.exists() else None
                check_same(self._record, {"command": command, "sha256": sha256}, made)
            elif "{data}" in self.experiment.words(command):
                raise ValueError(f"--data: expected what {step} is made of, got none; to look "
                                 "at results that are there, give --table")
        for each, chosen in self._chosen():
            check_same(self.experiment.guidance(each.arm), self.experiment.identity(each), chosen)

    def check_inputs(self, results: list[dict[str, Any]]) -> None:
        """Raises ValueError if results were made of other files than the work folder holds.

        So do the choices of guidance.
        """
        for result in results:
            each = Run(result["arm"], result["seed"])
            check_same(self.experiment.result(each), self.experiment.inputs(each), result["inputs"])
        for each, chosen in self._chosen():
            check_same(self.experiment.guidance(each.arm), self.experiment.inputs(each),
                       chosen["inputs"])

    def _chosen(self) -> list[tuple[Run, dict[str, Any]]]:
        """Returns the choices of guidance that are there, with the runs they were made by."""
        found = []
        for arm in self.experiment.plan["arms"]:
            path = self.experiment.guidance(arm)
            if path.exists():
                found.append((self.experiment.first(arm), read_json(path, CHOSEN)))
        return found

    def preparations(self) -> list[dict[str, Work]]:
        """Returns what is missing of what is made once, group after group."""
        groups = []
        for group in self.experiment.plan["prepare"]:
            groups.append({step: self._prepare(step, command) for step, command in group.items()
                           if step not in self._prepared})
        return groups

    def runs(self) -> dict[str, Work]:
        """Returns the runs that have no result, after the choices of guidance that they need."""
        experiment = self.experiment
        works: dict[str, Work] = {}
        todo = [each for each in experiment.runs if not experiment.result(each).exists()]
        for each in todo:
            if each == experiment.first(each.arm) and not experiment.guidance(each.arm).exists():
                for samples in experiment.guidance_samples(each):
                    works[samples.name] = self._score_guidance(samples)
        works |= {each.name: self._run(each) for each in todo}
        self._names = set(works)
        return works

    def write_floors(self) -> None:
        """Keeps the numbers of the floors, which have been prepared."""
        floors = {}
        for title, record in self.experiment.plan["floors"].items():
            scores = read_json(self.experiment.work / record, {"numbers": dict})
            floors[title] = scores["numbers"]
        path = self.experiment.floors()
        if not path.exists() or read_json(path) != floors:
            write_json(path, floors)

    def _prepare(self, step: str, command: str) -> Work:
        """Makes what is made once by one command, and records its hash."""
        yield Command(step, self.experiment.words(command), self._commit)
        sha256 = sha256_of(self.experiment.work / step)
        self._prepared[step] = {"command": command, "sha256": sha256}
        write_json(self._record, self._prepared)

    def _run(self, each: Run) -> Work:
        """Trains, samples and scores one run, and keeps its result."""
        experiment = self.experiment
        identity = experiment.identity(each)
        # A training that has begun stays the same run when its samples are made or scored in
        # another way.
        training = {"train": identity["train"]}
        begun = self._begun(each)
        if not begun.exists():
            write_json(begun, training | {"commit": self._commit, "cpu_seconds": 0.0})
        record = read_json(begun, BEGUN)
        check_same(begun, training, record)

        def add(seconds: float) -> None:
            record["cpu_seconds"] += seconds
            write_json(begun, record)

        def counted(words: list[str]) -> Work:
            try:
                add((yield Command(each.name, words, record["commit"])))
            except JobFailed as error:
                add(error.seconds)
                raise

        yield from counted(experiment.train_words(each))
        self._trained.add(each.name)
        scale = yield from self._choose_guidance(each, record["commit"])
        samples = experiment.scored_samples(each, scale)
        yield from counted(experiment.sample_words(samples))
        yield from counted(experiment.evaluate_words(samples))
        scores = experiment.scores(samples)
        run_folder = experiment.run_folder(each)
        numbers = read_json(run_folder / "finished.json")
        if "val_token_loss" in numbers:
            numbers["val_within_loss"] = numbers["val_token_loss"] - numbers["val_cluster_loss"]
        with atomic_write(experiment.metrics(each)) as file:
            file.write((run_folder / "metrics.jsonl").read_bytes())
        write_json(experiment.result(each), {
            "arm": each.arm, "seed": each.seed, **identity, "commit": record["commit"],
            "inputs": experiment.inputs(each), "cfg_scale": scale,
            "numbers": numbers | scores["numbers"],
            "cpu_hours": round(record["cpu_seconds"] / 3600, 3),
            "device": scores["samples"]["settings"]["device"], "versions": scores["versions"]})

    def _choose_guidance(self, each: Run, commit: str) -> Generator[str, None, float]:
        """Returns the guidance scale of an arm: that of the lowest FID of its first seed's run.

        The run of the first seed chooses it, by samples at each scale; the others wait for that.
        """
        experiment = self.experiment
        chosen = experiment.guidance(each.arm)
        first = experiment.first(each.arm)
        while each != first and not chosen.exists():
            if experiment.result(first).exists():
                return read_json(experiment.result(first), RESULT)["cfg_scale"]
            self._check_coming(first.name)
            yield WAIT
        if not chosen.exists():
            fids = {}
            for samples in experiment.guidance_samples(each):
                while samples.name not in self._scored:
                    self._check_coming(samples.name)
                    yield WAIT
                fids[samples.scale] = experiment.scores(samples)["numbers"]["FID"]
            write_json(chosen, {"arm": each.arm, "seed": each.seed, **experiment.identity(each),
                                "commit": commit, "inputs": experiment.inputs(each),
                                "cfg_scale": min(fids, key=fids.get), "fid": fids})
        return read_json(chosen, CHOSEN)["cfg_scale"]

    def _score_guidance(self, samples: Samples) -> Work:
        """Makes and scores samples at one scale, once their model is trained."""
        experiment = self.experiment
        while samples.run.name not in self._trained:
            self._check_coming(samples.run.name)
            yield WAIT
        commit = read_json(self._begun(samples.run), BEGUN)["commit"]
        yield Command(samples.name, experiment.sample_words(samples), commit)
        words = [*experiment.evaluate_words(samples), "--metrics", "fid"]
        yield Command(samples.name, words, commit)
        self._scored.add(samples.name)

    def _check_coming(self, name: str) -> None:
        """Raises JobFailed if the work of that name, which another one waits for, will not end."""
        if name in self.failed or name not in self._names:
            raise JobFailed(f"needs {name}, which did not come to its end; start again")

    def _begun(self, each: Run) -> Path:
        """Returns the record of a run that has begun."""
        return self.experiment.folder(each) / "begun.json"
