"""The mapping of a codebook: which token a code becomes when similar codes are put side by side.

A code is an index into the codebook as the tokenizer was trained, which stores of codes hold. A
token is an index into the reordered codebook, which the GPT reads and predicts: mapping[code].

Letters: V codes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoregressive.runtime.checkpoint import read_checkpoint
from autoregressive.runtime.files import check_kinds, mapping_sha256, read_json
from autoregressive.runtime.log import LOGGER
from autoregressive.runtime.nearby import files_in, only_one

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8,
            torch.uint8, torch.uint16, torch.uint32, torch.uint64)


@dataclass(frozen=True)
class Mapping:
    """Old code -> token, with the hashes that travel with it.

    Attributes:
        path: its file.
        tokens: (V,) int64, a permutation.
        hashes: dict with mapping_sha256, and, where its side file lies beside it, codebook_sha256
            (of the reordered codebook), original_codebook_sha256, cluster_size.
    """

    path: Path
    tokens: np.ndarray
    hashes: dict[str, Any]


def default_mapping_path(cluster_size: int) -> str:
    """Returns where balance_k_means.py puts the mapping of the published codebook."""
    return f"pretrained_models/mapping-kmeans+nearest-cluster_size={cluster_size}.pt"


def read_side_file(path: Path) -> dict[str, Any]:
    """Returns what lies beside a mapping: Mapping.hashes.

    Raises:
        ValueError: it is damaged.
    """
    record = read_json(path, {"mapping_sha256": str})
    check_kinds(record, {"cluster_size": int} if "cluster_size" in record else {}, path)
    return record


def find_mapping(folders: list[Path], wanted: str | None, cluster_size: int,
                 is_given: bool) -> Path | None:
    """Returns the mapping in some folders whose side file names a codebook in its original order.

    Of several, one of the cluster size is taken, and one of the default method.

    Args:
        folders: where to look, not in folders inside them.
        wanted: codebook_sha256 of the codes; None, which is unknown, finds nothing.
        cluster_size: --cluster-size.
        is_given: whether the flag is given, so that the published one of its size comes first.

    Raises:
        ValueError: several fit.
    """
    fitting: dict[str, Path] = {}
    sizes = {}
    for side_file in files_in(folders, "mapping-*.pt.json") if wanted else ():
        try:
            record = read_side_file(side_file)
        except ValueError as error:                 # of a file that nobody has named
            LOGGER.warning("%s; it is left out", error)
            continue
        path = side_file.with_suffix("")
        if record.get("original_codebook_sha256") == wanted and path.is_file():
            fitting.setdefault(record["mapping_sha256"], path)      # a copy fits as well
            sizes[path] = record.get("cluster_size")
    paths = list(fitting.values())
    of_size = [path for path in paths if sizes[path] == cluster_size]
    if of_size or (is_given and Path(default_mapping_path(cluster_size)).is_file()):
        paths = of_size
    of_default = [path for path in paths
                  if path.name == Path(default_mapping_path(sizes[path])).name]
    return only_one(of_default or paths, "--mapping-path", "mapping of these codes")


def read_mapping(path: str | Path, codebook_size: int) -> Mapping:
    """Reads a mapping and checks that it is a permutation of the codebook.

    Args:
        path: file of an integer tensor (V,); `{path}.json` beside it holds its hashes.
        codebook_size: V.

    Raises:
        ValueError: missing, of another kind or size, no permutation, or not what its side file
            says.
    """
    tokens = read_checkpoint(path, "make the mapping with balance_k_means.py or name it with "
                                   "--mapping-path")
    found = tuple(getattr(tokens, "shape", ()))
    if found != (codebook_size,):
        raise ValueError(f"{path}: expected a mapping of {codebook_size} codes, got shape {found}; "
                         "run balance_k_means.py on the checkpoint that the codes were extracted "
                         "with")
    is_dense = tokens.layout == torch.strided
    if tokens.dtype not in INTEGERS or not is_dense or tokens.is_meta:
        kind = "dense" if is_dense else "sparse"
        raise ValueError(f"{path}: expected a dense tensor of integers, got a {kind} one of "
                         f"{tokens.dtype}; run balance_k_means.py again")
    tokens = tokens.long()
    if not np.array_equal(np.sort(tokens.numpy()), np.arange(codebook_size)):
        raise ValueError(f"{path}: expected a permutation of 0 .. {codebook_size - 1}, got "
                         "repeated or other numbers; run balance_k_means.py again")
    hashes = {"mapping_sha256": mapping_sha256(tokens)}
    side_file = Path(f"{path}.json")
    if side_file.is_file():
        recorded = read_side_file(side_file)
        if recorded["mapping_sha256"] != hashes["mapping_sha256"]:
            raise ValueError(f"{path}: expected the mapping that {side_file.name} describes, got "
                             "another; run balance_k_means.py again")
        hashes = recorded
    return Mapping(Path(path), tokens.numpy(), hashes)
