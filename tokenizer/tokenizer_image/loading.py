"""Reading VQ files: weights of the wanted model or a clear error, with the hashes of both."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoregressive.runtime.checkpoint import load_strictly, model_state, read_checkpoint
from autoregressive.runtime.entry import Flags
from autoregressive.runtime.files import codebook_sha256, weights_sha256
from autoregressive.runtime.log import LOGGER
from autoregressive.runtime.nearby import files_in, only_one
from tokenizer.tokenizer_image.vq_model import VQ_MODELS, VQConfig, VQModel

VQ_HINT = ("name a tokenizer with --vq-ckpt; pretrained_models/README.md says where the published "
           "ones come from")
CODEBOOK = "quantize.embedding.weight"
REORDERED = "*-reorder-*.pt"        # names that balance_k_means.py gives to its tokenizers
EXPORTED_VQ = "vq.safetensors"      # beside the GPT in a folder of export_c2i.py


def default_vq_path(cluster_size: int) -> str:
    """Returns where balance_k_means.py puts the published VQ checkpoint, reordered."""
    return f"pretrained_models/vq_ds16_c2i-reorder-kmeans+nearest-cluster_size={cluster_size}.pt"


def find_vq(folders: list[Path], wanted: str | None) -> Path | None:
    """Returns the reordered tokenizer in some folders whose codebook has a hash.

    Args:
        folders: where to look, not in folders inside them.
        wanted: codebook_sha256; None, which is unknown, finds nothing.

    Raises:
        ValueError: several different ones have it.
    """
    fitting = []
    for path in files_in(folders, REORDERED) if wanted else ():
        try:
            state = model_state(read_checkpoint(path), path)
        except ValueError as error:                 # of a file that nobody has named
            LOGGER.warning("%s; it is left out", error)
            continue
        if CODEBOOK in state and codebook_sha256(state[CODEBOOK]) == wanted:
            fitting.append((path, state))
    paths = [path for path, _ in fitting]
    if len(fitting) > 1:                            # copies are no other ones
        different = {weights_sha256(state): path for path, state in reversed(fitting)}
        paths = list(different.values())[::-1]
    return only_one(paths, "--vq-ckpt", "tokenizer of this codebook")


def recorded_flags(path: str | Path) -> dict[str, Any]:
    """Returns the flags of VQConfig that a tokenizer's file tells by the shapes of its weights.

    Those that it does not tell are left out: all of them if it is no tokenizer of ours.

    Raises:
        ValueError: the file is missing or unreadable.
    """
    return _flags_of(_read_state(path))


def load_vq(path: str | Path, config: VQConfig) -> tuple[VQModel, dict[str, str]]:
    """Loads a VQ model for inference.

    Args:
        path: checkpoint of any layout that runtime.checkpoint reads.
        config: what it must hold.

    Returns:
        (model on the CPU in evaluation mode, dict with codebook_sha256 and weights_sha256).

    Raises:
        ValueError: unreadable, or weights of another model.
    """
    return _build(_read_state(path), path, config)


def open_vq(args: Flags, path: str | Path) -> tuple[VQModel, dict[str, str]]:
    """Loads a VQ model as load_vq does, of what it holds.

    Args:
        args: flags of add_vq_args; those that were not given are set to what the file tells, those
            that were are compared with it.
        path: the file.

    Raises:
        ValueError: as load_vq, or a flag was given with another value.
    """
    state = _read_state(path)
    args.take(_flags_of(state), path)
    return _build(state, path, VQConfig(**args.pick(VQConfig)))


def _read_state(path: str | Path) -> dict[str, Tensor]:
    return model_state(read_checkpoint(path, VQ_HINT), path)


def _flags_of(state: dict[str, Tensor]) -> dict[str, Any]:
    codebook = state.get(CODEBOOK)
    if codebook is None or codebook.dim() != 2:
        return {}
    shapes = {name: tensor.shape for name, tensor in state.items()}
    codebook_size, width = codebook.shape
    sizes = {"codebook_size": codebook_size, "codebook_embed_dim": width}
    for name in VQ_MODELS:
        with torch.device("meta"):
            model = VQModel(VQConfig(name, **sizes))
        if {key: tensor.shape for key, tensor in model.state_dict().items()} == shapes:
            return {"vq_model": name, **sizes}
    return sizes


def _build(state: dict[str, Tensor], path: str | Path,
           config: VQConfig) -> tuple[VQModel, dict[str, str]]:
    if CODEBOOK not in state:
        raise ValueError(f"{path}: expected a tokenizer with {CODEBOOK}, found "
                         f"{', '.join(list(state)[:3])}, ...; name the tokenizer's file with "
                         "--vq-ckpt")
    with torch.device("meta"):
        model = VQModel(config)
    load_strictly(model, state, path, "check --vq-model, --codebook-size and --codebook-embed-dim")
    hashes = {"codebook_sha256": codebook_sha256(model.quantize.embedding.weight),
              "weights_sha256": weights_sha256(state)}
    return model.eval().requires_grad_(False), hashes
