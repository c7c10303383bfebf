"""What a result depends on, as one plain dict: written before the work, compared by whatever continues or reads it.

An identity holds the flags that matter (Flags.identity) and the hashes of weights, codebook, mapping and data. Training
keeps it in config.json, a code store in manifest.json, samples beside their rows and inside the npz.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoregressive.runtime.files import check_output, read_json, write_json
from autoregressive.runtime.log import LOGGER


def find_difference(expected: dict[str, Any], found: dict[str, Any], keys: Iterable[str] | None = None) -> str | None:
    """Returns the first difference of two identities as text, `key value, found one with value`; None if equal.

    Args:
        expected, found: plain dicts; a key that one of them lacks counts as None.
        keys: the keys to compare; None compares all of both.
    """
    for key in dict.fromkeys([*expected, *found]) if keys is None else keys:
        if found.get(key) != expected.get(key):
            return f"{key} {_shorten(expected.get(key))}, found one with {_shorten(found.get(key))}"
    return None


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_recorded(flag: str, given: Any, recorded: Any, source: str | Path) -> None:
    """Raises ValueError if a flag is given as another value than file `source` has recorded; None is unknown."""
    if recorded not in (None, given):
        raise ValueError(f"{flag}: expected {recorded} as in {source}, got {given}")


def check_codebook(expected: str | None, found: str | None, expected_source: str | Path,
                   found_source: str | Path) -> None:
    """Compares the hashes of the codebook in two files: differing ones are an error, unknown ones a warning.

    Raises:
        ValueError: both are known and differ.
    """
    if expected is None or found is None:
        unknown = expected_source if expected is None else found_source
        LOGGER.warning("%s: carries no hash of its codebook, so it cannot be checked", unknown)
    elif expected != found:
        raise ValueError(f"{found_source}: expected the codebook {expected[:12]} of {expected_source}, got "
                         f"{found[:12]}; these files come from different runs, take those of one run of "
                         "balance_k_means.py on the checkpoint of the extraction")


@dataclass(frozen=True)
class RunFolder:
    """A folder {results_dir}/{index:03d}-{name} of one training run.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def verified(self) -> Path:
        """An empty file that says that the data were found to be what their checksums say."""
        return self.path / "verified"

    @property
    def result(self) -> dict[str, Any] | None:
        """What mark_finished recorded; None while the run has not come to its end."""
        path = self.path / "finished.json"
        return read_json(path, {"steps": int}) if path.is_file() else None

    def start(self, config: dict[str, Any]) -> None:
        """Creates the folder if it is new and records `config` in it (rank 0 alone calls this, which holds it).

        Raises:
            ValueError: something that cannot be written is in the way.
        """
        for name in ("config.json", "log.txt", "metrics.jsonl", "finished.json"):
            check_output(self.path / name)
        write_json(self.path / "config.json", config)           # first: it says whose folder this is
        self.checkpoints.mkdir(exist_ok=True)
        for unfinished in self.path.rglob(".*.tmp"):            # of a start that was killed
            unfinished.unlink()

    def is_finished(self, num_steps: int) -> bool:
        """Says whether the run came to its end after at least `num_steps` steps."""
        return self.result is not None and self.result["steps"] >= num_steps

    def mark_finished(self, result: dict[str, Any]) -> None:
        """Records that the run came to its end, with its result (plain data)."""
        write_json(self.path / "finished.json", result)


def find_run_folder(results_dir: str | Path, name: str, identity: dict[str, Any], defaults: dict[str, Any],
                    new_run: bool = False) -> RunFolder:
    """Finds the run folder that the same command should continue, or names a new one. Writes nothing.

    Args:
        results_dir: where run folders lie.
        name: what follows the index in the folder's name.
        identity: of the run. What else a config.json records may differ.
        defaults: default of every flag: it stands for a flag that an older config.json does not know.
        new_run: whether to name a new folder even if one could be continued.

    Returns:
        RunFolder: the newest of the same identity; if there is none, one that does not exist yet.
    """
    numbered = [(int(match.group(1)), path) for path in Path(results_dir).iterdir()
                if (match := re.match(r"(\d{3,})-", path.name))]
    expected = json.loads(json.dumps(identity))                 # as a file gives it back
    nearest = begun = None
    for _, path in sorted(numbered, reverse=True):
        if path.name.split("-", 1)[1] != name:
            continue
        if not (path / "config.json").is_file():
            if not (path / "checkpoints").exists():             # a start was killed before it said what it is
                begun = RunFolder(path)
            continue
        if new_run:
            continue
        found = json.loads(json.dumps(defaults)) | read_json(path / "config.json")
        differing = [key for key, value in expected.items() if found.get(key) != value]
        if not differing:
            return RunFolder(path)
        if nearest is None or len(differing) < len(nearest[1]):
            nearest = (path, differing)
    if begun:
        return begun
    index = max((index for index, _ in numbered), default=-1) + 1
    folder = RunFolder(Path(results_dir) / f"{index:03d}-{name}")
    if nearest:
        LOGGER.info("%s: a new run; %s is another one, by %s", folder.path, nearest[0], ", ".join(nearest[1]))
    return folder
