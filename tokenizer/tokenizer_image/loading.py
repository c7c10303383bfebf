"""Reading VQ files: weights of the wanted model or a clear error, with the hashes of both."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from autoregressive.runtime.checkpoint import (
    EXPORTED,
    load_strictly,
    model_state,
    read_checkpoint,
)
from autoregressive.runtime.files import check_kinds, codebook_sha256, weights_sha256
from autoregressive.runtime.safetensors_file import read_record
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel

VQ_HINT = ("name a tokenizer with --vq-ckpt; pretrained_models/README.md says where the published "
           "ones come from")
EXPORTED_VQ = "vq.safetensors"                      # beside the GPT in a folder of export_c2i.py
VQ_KINDS = {"vq_model": str, "codebook_size": int, "codebook_embed_dim": int}


def default_vq_path(cluster_size: int) -> str:
    """Returns where balance_k_means.py puts the published VQ checkpoint, reordered."""
    return f"pretrained_models/vq_ds16_c2i-reorder-kmeans+nearest-cluster_size={cluster_size}.pt"


def exported_vq_flags(gpt_path: Path) -> dict[str, Any]:
    """Returns the flags of the VQ model that lies beside an exported GPT; none if there is none.

    Args:
        gpt_path: file of the GPT.

    Raises:
        ValueError: the file of the VQ model is damaged, or does not say what it is.
    """
    path = gpt_path.with_name(EXPORTED_VQ)
    if gpt_path.name != EXPORTED or not path.is_file():
        return {}
    record = read_record(path)
    check_kinds(record, {"settings": VQ_KINDS}, path)
    try:
        config = VQConfig.recorded_in(record["settings"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}; export the GPT again") from None
    return asdict(config) | {"vq_ckpt": str(path)}


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
    state = model_state(read_checkpoint(path, VQ_HINT), path)
    with torch.device("meta"):
        model = VQModel(config)
    load_strictly(model, state, path, "check --vq-model, --codebook-size and --codebook-embed-dim")
    hashes = {"codebook_sha256": codebook_sha256(model.quantize.embedding.weight),
              "weights_sha256": weights_sha256(state)}
    return model.eval().requires_grad_(False), hashes
