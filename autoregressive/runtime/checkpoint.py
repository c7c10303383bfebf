"""Checkpoints: saved whole, read without running anything that lies in them, loaded strictly."""

import argparse
import errno
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from autoregressive.runtime.files import Kinds, atomic_write, check_file, check_kinds
from autoregressive.runtime.log import LOGGER
from autoregressive.runtime.safetensors_file import (
    is_safetensors,
    read_safetensors,
    save_safetensors,
)

# Keys under which the weights lie: ours and DDP's, DeepSpeed's, others'. FSDP writes a bare dict.
STATE_KEYS = ("model", "module", "state_dict")
WRAPPER_PREFIXES = ("_orig_mod.", "module.")         # torch.compile, DistributedDataParallel
# Tables and caches in published files.
DROPPED_KEYS = re.compile(r"freqs_cis|layers\.\d+\.attention\.kv_cache\..*")
CHECKPOINT_SUFFIX = ".pt"
CONSOLIDATED = "consolidated.pth"                    # LlamaGen's name for gathered shards
EXPORTED = "model.safetensors"                       # a hub's name, which export_c2i.py writes
# Keys of a checkpoint of our training, and their types.
OPTIMIZER_KINDS: Kinds = {"state": dict, "param_groups": list}
OWN_KINDS: Kinds = {"model": dict, "optimizer": OPTIMIZER_KINDS, "steps": int, "processes": list,
                    "settings": dict}
# What torch.load raises on damage, beside pickle's error.
DAMAGED_CHECKPOINT = (RuntimeError, OSError, EOFError, KeyError, AttributeError, UnicodeDecodeError,
                      zipfile.BadZipFile)
NUM_SHOWN = 4                                        # differences of weights in an error
Saved = Any                                          # what a file holds; whoever reads it checks it


def save_checkpoint(path: str | Path, payload: object) -> None:
    """Saves tensors and plain containers at `path`, atomically; equal payloads give equal bytes.

    A name in .safetensors gives such a file, of a state dict `model` and plain data beside it.
    """
    if is_safetensors(path):
        save_safetensors(path, payload)
        return
    with atomic_write(path) as file:
        target = _WatchedFile(file)
        try:
            torch.save(payload, target)
        except RuntimeError as error:               # what torch makes of a write that fails
            raise target.error or error from error


class _WatchedFile:
    """A file to write to that remembers why a write failed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.flush = file.flush
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Writes bytes; keeps an error before it raises it."""
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise


def read_checkpoint(path: str | Path, hint: str = "", check_sums: bool = True) -> Saved:
    """Reads a file of tensors and plain containers; no code in it ever runs.

    Older files may hold an argparse.Namespace, too.

    Args:
        path: a file made by torch.save, or a .safetensors; tensors of these and of a zip-format
            file are mapped, not copied, and lie on the CPU.
        hint: what to do if there is no such file.
        check_sums: whether to read every byte and compare its checksum, half a second a GB.

    Returns:
        what was saved.

    Raises:
        ValueError: the file is missing, damaged, or holds any other type, which the message names.
    """
    check_file(path, hint)
    if is_safetensors(path):
        return read_safetensors(path)
    is_zip = zipfile.is_zipfile(path)
    try:
        if is_zip and check_sums:
            _check_sums(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)    # of what is refused here or by readers
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip or None)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global|type|class) ([\w.]+\.[\w.]+)", str(error))
        if found:
            raise ValueError(f"{path}: expected tensors and plain containers, found "
                             f"{found.group(1)}; refused, since loading it could run "
                             "code") from None
        raise ValueError(f"{path}: expected a checkpoint written by torch.save, found other or "
                         "damaged content; copy or download the file again") from None
    except DAMAGED_CHECKPOINT as error:
        is_of_disk = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
        if is_of_disk:
            error.filename = str(path)
            raise
        says_why = isinstance(error, (RuntimeError, OSError, zipfile.BadZipFile)) and str(error)
        reason = str(error).splitlines()[0] if says_why else "no checkpoint at all, or cut off"
        raise ValueError(f"{path}: expected a whole checkpoint, found a damaged one ({reason}); "
                         "copy or download the file again") from None


def _check_sums(path: str | Path) -> None:
    """Raises BadZipFile if a byte has changed, which torch.load does not see in mapped tensors."""
    with zipfile.ZipFile(path) as archive:
        has_sums = any(part.CRC for part in archive.infolist())     # torch can leave them out
        if has_sums and (damaged := archive.testzip()):
            raise zipfile.BadZipFile(f"{damaged} has changed since it was written")


def model_state(payload: object, path: str | Path) -> dict[str, Tensor]:
    """Returns the state dict inside a checkpoint of any published layout, with plain names.

    Args:
        payload: what read_checkpoint returned.
        path: named in the error.

    Returns:
        dict of name -> tensor, without wrapper prefixes, tables and caches.

    Raises:
        ValueError: there is no state dict in it.
    """
    state = payload
    for key in STATE_KEYS:
        if isinstance(payload, dict) and isinstance(payload.get(key), dict):
            state = payload[key]
            break
    are_weights = isinstance(state, dict) and all(
        isinstance(name, str) and torch.is_tensor(value) for name, value in state.items())
    if not are_weights or not state:
        found = type(payload).__name__
        if isinstance(payload, dict):
            found = f"keys {', '.join(map(str, list(payload)[:6]))}"
        raise ValueError(f"{path}: expected a state dict, bare or under {' / '.join(STATE_KEYS)}, "
                         f"found {found}")
    for name, tensor in state.items():
        if tensor.layout != torch.strided:
            raise ValueError(f"{path}: expected dense weights, found a sparse {name}; take another "
                             "checkpoint")
    return {name: tensor for name, tensor in _without_prefixes(state).items()
            if not DROPPED_KEYS.fullmatch(name)}


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in WRAPPER_PREFIXES * 2:     # twice: a compiled model in DDP has both, in any order
        if all(name.startswith(prefix) for name in state):
            state = {name[len(prefix):]: tensor for name, tensor in state.items()}
    return state


def name_differences(expected: Iterable[str], found: Iterable[str]) -> list[str]:
    """Returns a text for each name that a state lacks, and for each that it should not have."""
    missing = [f"missing {name}" for name in expected if name not in found]
    return missing + [f"unexpected {name}" for name in found if name not in expected]


def summarise(differences: list[str]) -> str:
    """Returns the first few of several differences as a text, and how many more there are."""
    shown = "; ".join(differences[:NUM_SHOWN])
    if len(differences) > NUM_SHOWN:
        shown += f"; and {len(differences) - NUM_SHOWN} more"
    return shown


def check_weights(module: nn.Module, state: dict[str, Tensor], path: str | Path,
                  hint: str = "") -> None:
    """Checks that a state dict can be loaded into a module.

    Args:
        module: its keys and shapes must be those of `state`.
        state: dict of name -> tensor.
        path: named in the error.
        hint: appended to the error: what the file holds, what to do.

    Raises:
        ValueError: keys or shapes differ, or a weight is not finite; the message names them.
    """
    expected = module.state_dict()
    differences = name_differences(expected, state)
    for name, tensor in expected.items():
        if name in state and state[name].shape != tensor.shape:
            found = tuple(state[name].shape)
            differences.append(f"{name} expected {tuple(tensor.shape)}, got {found}")
    if differences:
        advice = f". {hint}" if hint else ""
        raise ValueError(f"{path}: weights do not fit the model: {summarise(differences)}{advice}")
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.to(expected[name].dtype).isfinite().all():
            raise ValueError(f"{path}: expected finite weights, found NaN or infinity in {name}; "
                             "take another checkpoint")


def load_strictly(module: nn.Module, state: dict[str, Tensor], path: str | Path,
                  hint: str = "") -> None:
    """Loads a state dict into a module, after check_weights, whose arguments and errors these are.

    A module on the meta device takes the tensors of the file themselves where they have its dtype
    (no second copy of the weights); others are filled in place.
    """
    check_weights(module, state, path, hint)
    expected = module.state_dict()
    on_meta = any(tensor.is_meta for tensor in expected.values())
    if on_meta:                             # the file's precision must not decide the model's
        state = {name: tensor.to(expected[name].dtype) for name, tensor in state.items()}
    module.load_state_dict(state, strict=True, assign=on_meta)


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Returns the complete checkpoints of a folder, oldest step first; their names are steps."""
    found = [path for path in Path(folder).glob(f"*{CHECKPOINT_SUFFIX}") if path.stem.isdigit()]
    return sorted(found, key=lambda path: int(path.stem))


class Skipped(NamedTuple):
    """A file that is named like a checkpoint and is none, and why: a line for the log."""

    path: Path
    reason: str


def newest_whole_checkpoint(
        folder: str | Path,
        kinds: Kinds = OWN_KINDS) -> tuple[Path | None, list[Skipped]]:
    """Finds the newest checkpoint of a folder with the keys of `kinds`, every byte intact.

    Returns:
        its path, None if there is none, and the newer files that are no such checkpoints.
    """
    skipped = []
    for path in reversed(list_checkpoints(folder)):
        try:
            payload = read_checkpoint(path)
            check_kinds(payload if isinstance(payload, dict) else {}, kinds, path)
            return path, skipped
        except ValueError as error:
            skipped.append(Skipped(path, f"{error}; trying the checkpoint before it"))
    return None, skipped


def delete_old_checkpoints(folder: str | Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints of a folder; 0 keeps all."""
    if keep == 0:
        return
    for path in list_checkpoints(folder)[:-keep]:
        path.unlink()


def find_checkpoint(path: str | Path) -> Path:
    """Returns a file, or the newest whole checkpoint of a folder: of a run, or of its checkpoints.

    In a folder of export_c2i.py it is the GPT's, in one of LlamaGen's sharded training
    {step}/consolidated.pth of the newest step.

    Args:
        path: the file, which is taken as it is, or the folder.

    Raises:
        ValueError: neither.
    """
    path = Path(path)
    if not path.is_dir():
        check_file(path, "name a checkpoint or the checkpoints folder of a training run")
        return path
    if (path / EXPORTED).is_file():
        return path / EXPORTED
    for folder in (path, path / "checkpoints"):
        for kinds in (OWN_KINDS, {}):               # the rule of training; then whatever is whole
            newest, skipped = newest_whole_checkpoint(folder, kinds)
            if newest is not None:
                for damaged in skipped:
                    LOGGER.warning("%s", damaged.reason)
                return newest
    sharded = (path, *path.iterdir(), *path.glob("checkpoints/*"))
    folders = [folder for folder in sharded if (folder / CONSOLIDATED).is_file()]
    if not folders:
        raise ValueError(f"{path}: expected a checkpoint (<steps>{CHECKPOINT_SUFFIX}) in this "
                         "folder, found none; name a file, or the checkpoints folder of a training "
                         "run")
    newest = max(folders, key=lambda each: int(each.name) if each.name.isdigit() else -1)
    return newest / CONSOLIDATED
