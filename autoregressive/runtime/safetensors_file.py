"""Weights as .safetensors, the files that hubs expect.

The tensors lie in it under their published names. What else a checkpoint holds (settings, hashes,
steps) is one JSON object in its metadata, which hold text alone; files of others have none.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from autoregressive.runtime.files import atomic_write

SUFFIX = ".safetensors"
RECORD = "iar_record"                               # the key of the metadata
OF_TENSORS = ("model", "ema", "optimizer")          # parts of a checkpoint that are no text
# What the package raises on damage; the others are of torch, of sizes and types that it lacks.
DAMAGED = (SafetensorError, RuntimeError, TypeError, AttributeError)


def is_safetensors(path: str | Path) -> bool:
    """Returns whether a file is one of this kind, by its name."""
    return Path(path).suffix == SUFFIX


def save_safetensors(path: str | Path, payload: dict[str, Any]) -> None:
    """Saves `model`, a state dict, as tensors and the rest of a checkpoint as JSON, atomically.

    Equal payloads give equal bytes, for which the metadata have one key only: the package writes
    several in any order.
    """
    record = dict(payload)
    state = {name: tensor.contiguous() for name, tensor in record.pop("model").items()}
    metadata = {RECORD: json.dumps(record)} if record else None
    content = save(state, metadata)
    with atomic_write(path) as file:
        file.write(content)


def read_safetensors(path: str | Path) -> dict[str, Any]:
    """Returns what save_safetensors saved; of a file of others its bare state dict, on the CPU.

    Raises:
        ValueError: the file is damaged, or its metadata are.
    """
    record = read_record(path)
    try:
        state = load_file(path)                     # mapped, not copied
    except DAMAGED as error:
        raise _damage(path, error) from None
    return record | {"model": state} if record else state


def read_record(path: str | Path) -> dict[str, Any]:
    """Returns what such a file holds beside its tensors, which are not read; {} if it is of others.

    Raises:
        ValueError: the file is damaged, or its metadata are.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except DAMAGED as error:
        raise _damage(path, error) from None
    if RECORD not in metadata:
        return {}
    try:
        record = json.loads(metadata[RECORD])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON under {RECORD} in its metadata, {error}; copy or "
                         "download the file again") from None
    if not isinstance(record, dict) or any(name in record for name in OF_TENSORS):
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{path}: expected a JSON object without tensors under {RECORD} in its "
                         f"metadata, found {found}; take another file")
    return record


def _damage(path: str | Path, error: Exception) -> ValueError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(f"{path}: expected a whole safetensors file, found a damaged one ({reason}); "
                      "copy or download the file again")
