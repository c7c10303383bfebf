"""The files of a reordered codebook: their names, the record in them, and whose they are.

Letters: V codes.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoregressive.runtime.checkpoint import STATE_KEYS, model_state, read_checkpoint
from autoregressive.runtime.files import codebook_sha256, mapping_sha256, read_json
from autoregressive.runtime.identity import find_difference
from tokenizer.tokenizer_image.loading import CODEBOOK

WEIGHTS = (*STATE_KEYS, "ema")      # parts of a checkpoint that may hold the codebook
DEFAULT_METHOD = "optimal"          # its files carry the published names
HASHES = ("codebook_sha256", "mapping_sha256", "original_codebook_sha256")


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The files of one command; the mapping, which is first, is held while they are written.

    Attributes:
        mapping: (V,) int64, old code -> token.
        record: JSON beside the mapping, with hashes of what it belongs to.
        picture: distances of the codes, before and after.
        report: JSON with the numbers of the clustering.
        reordered: the VQ checkpoint with its codebook in the new order.
    """

    mapping: Path
    record: Path
    picture: Path
    report: Path
    reordered: Path

    def all(self) -> Iterator[Path]:
        """Yields every path."""
        yield from dataclasses.astuple(self)


def build_record(identity: dict[str, Any], codebook: Tensor, mapping: Tensor) -> dict[str, Any]:
    """Returns what travels with both files, so that nobody combines those of different runs.

    Args:
        identity: what else they depend on.
        codebook: (V, E) as it was.
        mapping: (V,) int64, old code -> token.
    """
    hashes = {"codebook_sha256": codebook_sha256(codebook[order_of(mapping)]),
              "original_codebook_sha256": codebook_sha256(codebook),
              "mapping_sha256": mapping_sha256(mapping)}
    return hashes | identity


def order_of(mapping: Tensor) -> np.ndarray:
    """Returns the old code (V,) int64 at each place of the new order."""
    return np.argsort(mapping.numpy())


def name_outputs(vq_ckpt: str, output_dir: str | None, cluster_size: int,
                 method: str | None) -> Outputs:
    """Returns where files go; the published method, or an unknown one, has the published names."""
    folder = Path(output_dir or Path(vq_ckpt).parent)
    suffix = f"kmeans+nearest-cluster_size={cluster_size}"
    if method not in (None, DEFAULT_METHOD):
        suffix += f"-{method}"
    mapping = folder / f"mapping-{suffix}.pt"
    return Outputs(
        mapping=mapping,
        record=Path(f"{mapping}.json"),
        picture=folder / f"codebook-{suffix}.png",
        report=folder / f"report-{suffix}.json",
        reordered=folder / f"{Path(vq_ckpt).stem}-reorder-{suffix}.pt")


def check_mapping_file(outputs: Outputs, identity: dict[str, Any]) -> None:
    """Raises ValueError if another mapping than that of this command lies where it goes.

    Args:
        outputs: of name_outputs.
        identity: of build_identity, or the whole record once the mapping is found.
    """
    if outputs.record.exists():
        record = read_json(outputs.record, {"mapping_sha256": str})
        if difference := _find_difference(identity, record):
            raise _refusal(outputs.record, f"a mapping with {difference}")
    if not outputs.mapping.exists():
        return
    if not outputs.record.exists():
        raise _refusal(outputs.mapping, f"it with {outputs.record.name}, found a mapping of others")
    found = read_checkpoint(outputs.mapping)
    if not torch.is_tensor(found) or mapping_sha256(found) != record["mapping_sha256"]:
        raise _refusal(outputs.mapping,
                       f"what {outputs.record.name} describes, found another mapping")


def check_reordered_file(path: Path, state: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Raises ValueError if anything but `state`, reordered as `record` says, lies at `path`.

    Args:
        path: where the reordered checkpoint goes.
        state: the original weights by name.
        record: as the identity of check_mapping_file.
    """
    if not path.exists():
        return
    payload = read_checkpoint(path)
    found = payload.get("reordering") if isinstance(payload, dict) else None
    if not isinstance(found, dict):
        raise _refusal(path, "a checkpoint of balance_k_means.py, found none of its records")
    if difference := _find_difference(record, found):
        raise _refusal(path, f"a checkpoint with {difference}")
    others = model_state(payload, path)
    for name in {*state, *others} - {CODEBOOK}:
        is_same = name in state and name in others and torch.equal(state[name], others[name])
        if not is_same:
            raise _refusal(path, f"the weights of the tokenizer, found another {name}")


def _find_difference(identity: dict[str, Any], record: dict[str, Any]) -> str | None:
    """Returns how a record differs from an identity, which may lack hashes; None if it does not."""
    later = set(HASHES) - identity.keys()                       # what is known after the work only
    known = {key: value for key, value in record.items() if key not in later}
    return find_difference(identity, known)


def _refusal(path: Path, expected: str) -> ValueError:
    """Returns the error of a file that this command would replace, and is not its own."""
    return ValueError(f"{path}: expected {expected}; choose another --output-dir, "
                      "or replace it with --overwrite")


def permute_codebooks(payload: dict[str, Any], order: np.ndarray) -> dict[str, Any]:
    """Returns the checkpoint with the rows of all its codebooks in the new order.

    A bare state dict comes back under `model`.
    """
    parts = {key: _permuted(payload[key], order) for key in WEIGHTS
             if isinstance(payload.get(key), dict)}
    return payload | parts if parts else {"model": _permuted(payload, order)}


def _permuted(state: dict[str, Tensor], order: np.ndarray) -> dict[str, Tensor]:
    """Returns a state dict with the codes (V, E) of its codebook in the new order."""
    permuted = {key: value[order] for key, value in state.items()
                if f".{key}".endswith(f".{CODEBOOK}")}          # it may have wrapper prefixes
    return state | permuted                                     # of the type that it was
