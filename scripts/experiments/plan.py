"""What an experiment is: one JSON file of arms and seeds, its commands, and where their files lie.

    {"prepare": [{"STEP": "command", ...}, ...],    made once, group after group; a step is the path
                                                    of what it makes
     "train": "flags", "sample": "flags", "evaluate": "arguments",
     "arms": {"ARM": {"train": "flags", "sample": "flags", "seeds": [0, ...]}, ...},
     "baseline": "ARM",
     "seeds": [0, 1, ...],                          of arms that name none
     "guidance": {"scales": [1.0, ...], "num_samples": 2000, "seed": 1000},
     "num_samples": 10000, "sampling_seed": 0,
     "columns": {"NUMBER": "title", ...},
     "floors": {"title": "PATH", ...}}              records of the evaluator that steps made, to
                                                    compare with

Commands run in the work folder. In them {work}/PATH is a path in it, {data} is what --data names,
and {samples} the npz to score. What train, sample and evaluate name as {work}/PATH are the inputs
of a run: results keep their hashes.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoregressive.runtime.files import check_kinds, file_sha256, read_json

KINDS = {"prepare": list, "train": str, "sample": str, "evaluate": str, "arms": dict,
         "baseline": str, "seeds": list, "guidance": dict, "num_samples": int, "sampling_seed": int,
         "columns": dict, "floors": dict}
ARM_KINDS = {"train": str, "sample": str, "seeds": list}
GUIDANCE_KINDS = {"scales": list, "num_samples": int, "seed": int}
ROOT = Path(__file__).resolve().parents[2]
TRAIN = "autoregressive/train/train_c2i.py"
SAMPLE = "autoregressive/sample/sample_c2i_ddp.py"
EVALUATE = "evaluations/c2i/evaluator.py"


@dataclass(frozen=True)
class Run:
    """One training of an arm with a seed."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder, its log and its result."""
        return f"{self.arm}-seed{self.seed}"


@dataclass(frozen=True)
class Samples:
    """Samples of a run.

    Attributes:
        run: whose model they are of.
        scale: of the guidance.
        num_samples: how many.
        seed: of sampling.
    """

    run: Run
    scale: float
    num_samples: int
    seed: int

    @property
    def folder_name(self) -> str:
        """The name of their folder, in that of the run."""
        return f"samples-{self.num_samples}-seed{self.seed}-cfg-{self.scale:g}"

    @property
    def name(self) -> str:
        """What tells them from all others of an experiment."""
        return f"{self.run.name}-{self.folder_name}"


class Experiment:
    """An experiment file and its folders.

    Attributes:
        plan: what stands in the file.
        work: folder of everything that is not committed.
        runs: every Run, all arms of the first seed first.
    """

    def __init__(self, path: str | Path, work: Path | None, data: str | None,
                 baseline: str | None = None) -> None:
        """
        Args:
            path: the experiment file; finished runs are kept in the folder `results` beside it.
            work: the work folder; None is results/experiments/NAME in the repository, NAME that of
                the file's folder.
            data: what {data} stands for.
            baseline: the arm that differences are taken to; None is that of the file.

        Raises:
            ValueError: the file is no experiment, or a command has a {name} without a meaning.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path}: expected an experiment file, found none")
        self.plan = read_json(path, KINDS)
        arms = self.plan["arms"]
        seeds = self.plan["seeds"]
        baseline = baseline or self.plan["baseline"]
        self.plan["baseline"] = baseline
        if baseline not in arms:
            raise ValueError(f"{path}: expected a baseline among {', '.join(arms)}, got {baseline}")
        _check_seeds(path, seeds)
        for name, arm in arms.items():
            if isinstance(arm, dict):
                arm.setdefault("seeds", seeds)
            check_kinds(arm if isinstance(arm, dict) else {}, ARM_KINDS, f"{path}, arm {name}")
            _check_seeds(f"{path}, arm {name}", arm["seeds"])
        check_kinds(self.plan["guidance"], GUIDANCE_KINDS, f"{path}, guidance")
        self.work = work or ROOT / "results/experiments" / path.absolute().parent.name
        by_seed = dict.fromkeys([seed for arm in arms.values() for seed in arm["seeds"]])
        self.runs = [Run(name, seed) for seed in by_seed for name, arm in arms.items()
                     if seed in arm["seeds"]]
        self._results = path.parent / "results"
        self._data = data
        self._check_commands()

    def _check_commands(self) -> None:
        """Raises ValueError if a command has a {name} without a meaning."""
        for command in self.steps().values():
            self.words(command, samples="")
        for run in self.runs:
            for command in self._texts(run):
                self.words(command, samples="")

    def steps(self) -> dict[str, str]:
        """Returns the commands of everything that is made once, by what they make, in order."""
        steps = {}
        for group in self.plan["prepare"]:
            steps |= group
        return steps

    def identity(self, run: Run) -> dict[str, Any]:
        """Returns what the result of a run depends on, as the experiment file says it."""
        arm = self.plan["arms"][run.arm]
        identity = {"train": f"{self.plan['train']} {arm['train']}",
                    "sample": f"{self.plan['sample']} {arm['sample']}"}
        for name in ("evaluate", "guidance", "num_samples", "sampling_seed"):
            identity[name] = self.plan[name]
        return identity

    def _texts(self, run: Run) -> list[str]:
        """Returns the flags and arguments of the commands of a run, with their {names}."""
        identity = self.identity(run)
        return [identity[name] for name in ("train", "sample", "evaluate")]

    def inputs(self, run: Run) -> dict[str, str]:
        """Returns the SHA-256 of every file that the commands of a run read.

        The keys are paths in the work folder.
        """
        paths = re.findall(r"\{work\}/(\S+)", " ".join(self._texts(run)))
        return {path: sha256_of(self.work / path) for path in sorted(set(paths))}

    def first(self, arm: str) -> Run:
        """Returns the run that chooses the guidance of an arm."""
        return Run(arm, self.plan["arms"][arm]["seeds"][0])

    def guidance_samples(self, run: Run) -> list[Samples]:
        """Returns the samples of a run by which the guidance of its arm is chosen."""
        guidance = self.plan["guidance"]
        return [Samples(run, float(scale), guidance["num_samples"], guidance["seed"])
                for scale in guidance["scales"]]

    def scored_samples(self, run: Run, scale: float) -> Samples:
        """Returns the samples of a run that its result holds the scores of."""
        return Samples(run, scale, self.plan["num_samples"], self.plan["sampling_seed"])

    def result(self, run: Run) -> Path:
        """Returns where the result of a run is kept."""
        return self._results / f"{run.name}.json"

    def metrics(self, run: Run) -> Path:
        """Returns where the losses of a run's training are kept."""
        return self._results / f"{run.name}.jsonl"

    def guidance(self, arm: str) -> Path:
        """Returns where the choice of an arm's guidance is kept."""
        return self._results / f"{arm}-guidance.json"

    def floors(self) -> Path:
        """Returns where the numbers of the floors are kept."""
        return self._results / "floors.json"

    def folder(self, run: Run) -> Path:
        """Returns the work folder of a run."""
        return self.work / "runs" / run.name

    def run_folder(self, run: Run) -> Path:
        """Returns the run folder that the training of a run made."""
        (found,) = self.folder(run).glob("0*-*")
        return found

    def words(self, command: str, **names: str | Path) -> list[str]:
        """Returns the words of a command whose {names} are filled in.

        Args:
            command: text of the experiment file.
            names: what names stand for, beside {work} and {data}.

        Raises:
            ValueError: the command has other names.
        """
        known = {"work": ".", "data": self._data or "{data}"} | names
        try:
            return [word.format(**known) for word in shlex.split(command)]
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"expected the names {', '.join(known)} in {{}}, found {error} in: "
                             f"{command}") from error

    def train_words(self, run: Run) -> list[str]:
        """Returns the training command of a run."""
        return [TRAIN, *self.words(self.identity(run)["train"]), "--global-seed", str(run.seed),
                "--results-dir", str(self.folder(run))]

    def sample_words(self, samples: Samples) -> list[str]:
        """Returns the command that makes samples, in a folder of their own."""
        words = self.words(self.identity(samples.run)["sample"])
        return [SAMPLE, *words, "--gpt-ckpt", str(self.run_folder(samples.run)),
                "--cfg-scale", str(samples.scale), "--num-fid-samples", str(samples.num_samples),
                "--global-seed", str(samples.seed),
                "--sample-dir", str(self.samples_folder(samples))]

    def evaluate_words(self, samples: Samples) -> list[str]:
        """Returns the command that scores samples, once they are there."""
        (path,) = self.samples_folder(samples).glob("*.npz")
        return [EVALUATE, *self.words(self.plan["evaluate"], samples=path), "--reuse"]

    def scores(self, samples: Samples) -> dict[str, Any]:
        """Returns the record that the command of evaluate_words has left."""
        (path,) = self.samples_folder(samples).glob("*.json")
        return read_json(path, {"numbers": dict, "samples": dict, "versions": dict})

    def samples_folder(self, samples: Samples) -> Path:
        """Returns the folder of samples."""
        return self.folder(samples.run) / samples.folder_name


def _check_seeds(where: str | Path, seeds: list[Any]) -> None:
    """Raises ValueError unless seeds are different whole numbers."""
    are_different = len(set(map(repr, seeds))) == len(seeds)
    if not seeds or not are_different or not all(isinstance(seed, int) for seed in seeds):
        raise ValueError(f"{where}: expected different whole numbers as seeds, got {seeds}")


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a prepared file; of a folder, that of the manifest in it."""
    return file_sha256(path / "manifest.json" if path.is_dir() else path)
