"""Reading VQ files: weights of the wanted model or a clear error, with the hashes of both."""

from pathlib import Path

import torch

from autoregressive.runtime.checkpoint import load_strictly, model_state, read_checkpoint
from autoregressive.runtime.files import codebook_sha256, weights_sha256
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel

VQ_HINT = ("name a tokenizer with --vq-ckpt; pretrained_models/README.md says where the published "
           "ones come from")


def default_vq_path(cluster_size: int) -> str:
    """Returns where balance_k_means.py puts the published VQ checkpoint, reordered."""
    return f"pretrained_models/vq_ds16_c2i-reorder-kmeans+nearest-cluster_size={cluster_size}.pt"


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
