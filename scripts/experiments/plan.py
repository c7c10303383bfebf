"""What an experiment is: one JSON file of arms and seeds, the commands that it stands for, and where their files lie.

    {"prepare": [{"STEP": "command", ...}, ...],    made once, group after group; a step is the path of what it makes
     "train": "flags", "sample": "flags", "evaluate": "arguments",
     "arms": {"ARM": {"train": "flags", "sample": "flags"}, ...}, "baseline": "ARM", "seeds": [0, 1, ...],
     "guidance": {"scales": [1.0, ...], "num_samples": 2000, "seed": 1000},
     "num_samples": 10000, "sampling_seed": 0,
     "columns": {"NUMBER": "title", ...},
     "floors": {"title": "PATH", ...}}              records of the evaluator that steps made, to compare with

Commands run in the work folder. In them {work}/PATH is a path in it, {data} is what --data names, and {samples} the npz
to score. What train, sample and evaluate name as {work}/PATH are the inputs of a run: results keep their hashes.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoregressive.runtime.files import check_kinds, file_sha256, read_json

KINDS = {"prepare": list, "train": str, "sample": str, "evaluate": str, "arms": dict, "baseline": str, "seeds": list,
         "guidance": dict, "num_samples": int, "sampling_seed": int, "columns": dict,
         "floors": dict}
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
        return f"{self.arm}-seed{self.seed}"


class Experiment:
    """An experiment file and its folders.

    Attributes:
        plan: what stands in the file.
        work: folder of everything that is not committed.
        runs: every Run, all arms of the first seed first.
    """

    def __init__(self, path: str | Path, work: Path | None, data: str | None):
        """
        Args:
            path: the experiment file; finished runs are kept in the folder `results` beside it.
            work: the work folder; None is results/experiments/NAME in the repository, by the file's folder.
            data: what {data} stands for.

        Raises:
            ValueError: the file is no experiment, or a command has a {name} that nothing stands for.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path}: expected an experiment file, found none")
        self.plan = read_json(path, KINDS)
        arms, seeds = self.plan["arms"], self.plan["seeds"]
        if self.plan["baseline"] not in arms:
            raise ValueError(f"{path}: expected a baseline among {', '.join(arms)}, got {self.plan['baseline']}")
        for name, arm in arms.items():
            check_kinds(arm if isinstance(arm, dict) else {}, {"train": str, "sample": str}, f"{path}, arm {name}")
        if not seeds or len(set(seeds)) < len(seeds) or not all(isinstance(seed, int) for seed in seeds):
            raise ValueError(f"{path}: expected different whole numbers as seeds, got {seeds}")
        check_kinds(self.plan["guidance"], {"scales": list, "num_samples": int, "seed": int}, f"{path}, guidance")
        self.work = work or ROOT / "results/experiments" / path.absolute().parent.name
        self.runs = [Run(arm, seed) for seed in seeds for arm in arms]
        self._results, self._data = path.parent / "results", data
        for command in (*self.steps().values(), *(text for run in self.runs for text in self._texts(run))):
            self.words(command, samples="")

    def steps(self) -> dict[str, str]:
        """Returns the commands of everything that is made once, by what they make, in order."""
        return {step: command for group in self.plan["prepare"] for step, command in group.items()}

    def identity(self, run: Run) -> dict[str, Any]:
        """Returns what the result of a run depends on, as the experiment file says it."""
        arm = self.plan["arms"][run.arm]
        names = ("evaluate", "guidance", "num_samples", "sampling_seed")
        return {"train": f"{self.plan['train']} {arm['train']}", "sample": f"{self.plan['sample']} {arm['sample']}",
                **{name: self.plan[name] for name in names}}

    def _texts(self, run: Run) -> list[str]:
        identity = self.identity(run)
        return [identity[name] for name in ("train", "sample", "evaluate")]

    def inputs(self, run: Run) -> dict[str, str]:
        """Returns the SHA-256 of every file that the commands of a run read, by its path in the work folder."""
        paths = re.findall(r"\{work\}/(\S+)", " ".join(self._texts(run)))
        return {path: sha256_of(self.work / path) for path in sorted(set(paths))}

    def first(self, arm: str) -> Run:
        """Returns the run that chooses the guidance of an arm."""
        return Run(arm, self.plan["seeds"][0])

    def result(self, run: Run) -> Path:
        """Returns where the result of a run is kept."""
        return self._results / f"{run.name}.json"

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

    def words(self, command: str, **names: Any) -> list[str]:
        """Returns the words of a command whose {names} are filled in. Raises ValueError if it has others."""
        known = {"work": ".", "data": self._data or "{data}"} | names
        try:
            return [word.format(**known) for word in shlex.split(command)]
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"expected the names {', '.join(known)} in {{}}, found {error} in: {command}") from error

    def train_words(self, run: Run) -> list[str]:
        """Returns the training command of a run."""
        return [TRAIN, *self.words(self.identity(run)["train"]), "--global-seed", str(run.seed),
                "--results-dir", str(self.folder(run))]

    def sample_words(self, run: Run, scale: float, num_samples: int, seed: int) -> list[str]:
        """Returns the command that draws samples of a run at one guidance scale, into a folder of their own."""
        return [SAMPLE, *self.words(self.identity(run)["sample"]), "--gpt-ckpt", str(self.run_folder(run)),
                "--cfg-scale", str(scale), "--num-fid-samples", str(num_samples), "--global-seed", str(seed),
                "--sample-dir", str(self._samples(run, scale, num_samples, seed))]

    def evaluate_words(self, run: Run, scale: float, num_samples: int, seed: int) -> list[str]:
        """Returns the command that scores the samples of sample_words."""
        (samples,) = self._samples(run, scale, num_samples, seed).glob("*.npz")
        return [EVALUATE, *self.words(self.plan["evaluate"], samples=samples), "--reuse"]

    def scores(self, run: Run, scale: float, num_samples: int, seed: int) -> dict[str, Any]:
        """Returns the record that evaluate_words left."""
        (path,) = self._samples(run, scale, num_samples, seed).glob("*.json")
        return read_json(path, {"numbers": dict, "versions": dict})

    def _samples(self, run: Run, scale: float, num_samples: int, seed: int) -> Path:
        return self.folder(run) / f"samples-{num_samples}-seed{seed}-cfg-{scale:g}"


def sha256_of(path: Path) -> str:
    """Returns what a prepared file is known by: its SHA-256; of a folder, that of the manifest in it."""
    return file_sha256(path / "manifest.json" if path.is_dir() else path)
