"""What a result depends on, as one plain dict, compared by whatever continues or reads the result.

An identity holds the flags that matter (Flags.identity) and the hashes of weights, codebook,
mapping and data. It is written before the work. Training keeps it in config.json, a code store in
manifest.json, samples beside their rows and inside the npz.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from autoregressive.runtime.files import check_output, read_json, write_json
from autoregressive.runtime.log import LOGGER


def find_difference(expected: dict[str, Any], found: dict[str, Any],
                    keys: Iterable[str] | None = None) -> str | None:
    """Returns the first difference of two identities as text; None if they are equal.

    Args:
        expected, found: plain dicts; a key that one of them lacks counts as None.
        keys: the keys to compare; None compares all of both.

    Returns:
        `key value, found one with value`, which completes an error message.
    """
    if keys is None:
        keys = dict.fromkeys([*expected, *found])
    for key in keys:
        if found.get(key) != expected.get(key):
            return f"{key} {_shorten(expected.get(key))}, found one with {_shorten(found.get(key))}"
    return None


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_recorded(flag: str, given: object, recorded: object, source: str | Path) -> None:
    """Raises ValueError if a flag differs from what file `source` has recorded; None is unknown."""
    if recorded not in (None, given):
        raise ValueError(f"{flag}: expected {recorded} as in {source}, got {given}")


def check_codebook(expected: str | None, found: str | None, expected_source: str | Path,
                   found_source: str | Path) -> None:
    """Compares the hashes of the codebook in two files; warns if one of them is unknown.

    Raises:
        ValueError: both are known and differ.
    """
    if expected is None or found is None:
        unknown = expected_source if expected is None else found_source
        LOGGER.warning("%s: carries no hash of its codebook, so it cannot be checked", unknown)
    elif expected != found:
        raise ValueError(f"{found_source}: expected the codebook {expected[:12]} of "
                         f"{expected_source}, got {found[:12]}; these files come from different "
                         "runs, take those of one run of balance_k_means.py on the checkpoint of "
                         "the extraction")


@dataclass(frozen=True)
class RunFolder:
    """A folder {results_dir}/{index:03d}-{name} of one training run.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def log(self) -> Path:
        """The file of the lines of the log."""
        return self.path / "log.txt"

    @property
    def metrics(self) -> Path:
        """The file of the numbers of the run, a JSON object a line."""
        return self.path / "metrics.jsonl"

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
        """Creates the folder if it is new and records `config` in it (rank 0 calls this).

        Raises:
            ValueError: something that cannot be written is in the way.
        """
        config_file = self.path / "config.json"
        for output in (config_file, self.log, self.metrics, self.path / "finished.json"):
            check_output(output)
        write_json(config_file, config)             # first: it says whose folder this is
        self.checkpoints.mkdir(exist_ok=True)
        for unfinished in self.path.rglob(".*.tmp"):            # of a start that was killed
            unfinished.unlink()

    def is_finished(self, num_steps: int) -> bool:
        """Says whether the run came to its end after at least `num_steps` steps."""
        return self.result is not None and self.result["steps"] >= num_steps

    def mark_finished(self, result: dict[str, Any]) -> None:
        """Records that the run came to its end, with its result (plain data)."""
        write_json(self.path / "finished.json", result)


def find_run_folder(results_dir: str | Path, name: str, identity: dict[str, Any],
                    defaults: dict[str, Any], new_run: bool = False) -> RunFolder:
    """Finds the run folder that the same command continues, or names a new one; writes nothing.

    Args:
        results_dir: where run folders lie.
        name: what follows the index in the folder's name.
        identity: of the run. What else a config.json records may differ.
        defaults: of every flag; they stand for flags that an older config.json does not know.
        new_run: whether to name a new folder even if one could be continued.

    Returns:
        RunFolder: the newest of the same identity; if there is none, a new one, whose folder may
        exist without a config.json.
    """
    numbered = _numbered_folders(Path(results_dir))
    expected = json.loads(json.dumps(identity))     # as a file gives it back
    nearest: _Other | None = None
    begun = None
    for each in numbered:
        if each.name != name:
            continue
        folder = RunFolder(each.path)
        config = each.path / "config.json"
        if not config.is_file():
            # A start was killed in it before it could say whose folder this is: take that over.
            if not folder.checkpoints.exists():
                begun = folder
            continue
        if new_run:
            continue
        found = json.loads(json.dumps(defaults)) | read_json(config)
        differing = [key for key, value in expected.items() if found.get(key) != value]
        if not differing:
            return folder
        if nearest is None or len(differing) < len(nearest.differing):
            nearest = _Other(each.path, differing)
    if begun:
        return begun

    # A new folder, and what tells this run from the one that is most like it.
    next_index = numbered[0].index + 1 if numbered else 0
    folder = RunFolder(Path(results_dir) / f"{next_index:03d}-{name}")
    if nearest:
        LOGGER.info("%s: a new run; %s is another one, by %s", folder.path, nearest.path,
                    ", ".join(nearest.differing))
    return folder


class _Numbered(NamedTuple):
    """A folder {index:03d}-{name}."""

    index: int
    name: str
    path: Path


class _Other(NamedTuple):
    """A run folder that cannot be continued, and the keys of its identity that are others."""

    path: Path
    differing: list[str]


def _numbered_folders(results_dir: Path) -> list[_Numbered]:
    """Returns what is numbered like a run folder, the newest first."""
    numbered = []
    for path in results_dir.iterdir():
        if match := re.match(r"(\d{3,})-(.*)", path.name):
            numbered.append(_Numbered(int(match.group(1)), match.group(2), path))
    return sorted(numbered, reverse=True)
