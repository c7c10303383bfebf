"""Checkpoints: saved whole, read without running anything that lies in them, loaded strictly."""

import argparse
import pickle
import re
import zipfile
from pathlib import Path

import torch

from autoregressive.runtime.files import atomic_write, check_file
from autoregressive.runtime.log import LOGGER

STATE_KEYS = ("model", "module", "state_dict")       # our own and DDP, DeepSpeed, others; a bare dict comes from FSDP
WRAPPER_PREFIXES = ("_orig_mod.", "module.")         # torch.compile, DistributedDataParallel
DROPPED_KEYS = re.compile(r"freqs_cis|layers\.\d+\.attention\.kv_cache\..*")    # tables and caches in published files
CHECKPOINT_SUFFIX = ".pt"


def save_checkpoint(path, payload):
    """Saves tensors and plain containers at `path`, atomically; equal payloads give equal bytes."""
    with atomic_write(path) as file:
        torch.save(payload, file)


def read_checkpoint(path, hint=""):
    """Reads a file of tensors, plain containers and, in older files, an argparse.Namespace; no code in it ever runs.

    Args:
        path: a file made by torch.save; tensors of a zip-format file are mapped, not copied, and lie on the CPU.
        hint: what to do if there is no such file.

    Returns:
        what was saved.

    Raises:
        ValueError: the file is missing, damaged, or holds any other type, which the message names.
    """
    check_file(path, hint)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global|type|class) ([\w.]+\.[\w.]+)", str(error))
        if found:
            raise ValueError(f"{path}: expected tensors and plain containers, found {found.group(1)}; refused, since "
                             "loading it could run code") from None
        raise ValueError(f"{path}: expected a checkpoint written by torch.save, found other or damaged content; "
                         "copy or download the file again") from None
    except (RuntimeError, EOFError, KeyError, AttributeError, UnicodeDecodeError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: expected a whole checkpoint, found a damaged one ({reason}); "
                         "copy or download the file again") from None


def model_state(payload, path):
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
    if not isinstance(state, dict) or not state or not all(torch.is_tensor(value) for value in state.values()):
        is_dict = isinstance(payload, dict)
        found = f"keys {', '.join(map(str, list(payload)[:6]))}" if is_dict else type(payload).__name__
        raise ValueError(f"{path}: expected a state dict, bare or under {' / '.join(STATE_KEYS)}, found {found}")
    return {name: tensor for name, tensor in _without_prefixes(state).items() if not DROPPED_KEYS.fullmatch(name)}


def _without_prefixes(state):
    for prefix in WRAPPER_PREFIXES * 2:              # twice: a compiled model in DDP carries both, in either order
        if all(name.startswith(prefix) for name in state):
            state = {name[len(prefix):]: tensor for name, tensor in state.items()}
    return state


def load_strictly(module, state, path, hint=""):
    """Loads a state dict into a module whose keys and shapes must be the same.

    A module on the meta device takes the tensors of the file themselves (no second copy of the weights); others are
    filled in place.

    Args:
        module: the module to fill.
        state: dict of name -> tensor.
        path: named in the error.
        hint: appended to the error: what the file holds, what to do.

    Raises:
        ValueError: keys or shapes differ; the message names them.
    """
    expected = module.state_dict()
    differences = [f"missing {name}" for name in expected if name not in state]
    differences += [f"unexpected {name}" for name in state if name not in expected]
    differences += [f"{name} expected {tuple(expected[name].shape)}, got {tuple(state[name].shape)}"
                    for name in expected if name in state and expected[name].shape != state[name].shape]
    if differences:
        shown = "; ".join(differences[:4]) + (f"; and {len(differences) - 4} more" if len(differences) > 4 else "")
        raise ValueError(f"{path}: weights do not fit the model: {shown}" + (f". {hint}" if hint else ""))
    on_meta = any(tensor.is_meta for tensor in expected.values())
    if on_meta:                                      # the file's precision must not decide the model's
        state = {name: tensor.to(expected[name].dtype) for name, tensor in state.items()}
    module.load_state_dict(state, strict=True, assign=on_meta)


def list_checkpoints(folder):
    """Returns the complete checkpoints of a folder, oldest step first (their names are numbers of steps)."""
    found = [path for path in Path(folder).glob(f"*{CHECKPOINT_SUFFIX}") if path.stem.isdigit()]
    return sorted(found, key=lambda path: int(path.stem))


def newest_whole_checkpoint(folder):
    """Reads the newest checkpoint of a folder whose every byte is as it was written; says which ones it passes over.

    Returns:
        (path, what was saved); (None, None) if there is none.
    """
    for path in reversed(list_checkpoints(folder)):
        try:
            payload = read_checkpoint(path)
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():    # compares every part with its checksum
                    raise ValueError(f"{path}: expected a whole checkpoint, found a damaged part {damaged}")
            return path, payload
        except (ValueError, zipfile.BadZipFile) as error:
            LOGGER.warning("%s; continuing from the checkpoint before it", error)
    return None, None


def delete_old_checkpoints(folder, keep):
    """Deletes all but the newest `keep` checkpoints of a folder; 0 keeps all."""
    for path in list_checkpoints(folder)[:-keep] if keep else []:
        path.unlink()


def find_checkpoint(path):
    """Returns `path` if it is a file, or the newest complete checkpoint of the folder `path`.

    Raises:
        ValueError: neither.
    """
    path = Path(path)
    if path.is_dir():
        found = list_checkpoints(path) or list_checkpoints(path / "checkpoints")
        if not found:
            raise ValueError(f"{path}: expected a checkpoint (<steps>{CHECKPOINT_SUFFIX}) in this folder, found none; "
                             "name a file, or the checkpoints folder of a training run")
        return found[-1]
    check_file(path, "name a checkpoint or the checkpoints folder of a training run")
    return path
