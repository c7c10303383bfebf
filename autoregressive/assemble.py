"""Builds and loads GPT, VQ model and mapping together, and refuses parts that come from different runs.

The chain of hashes: the codes' manifest names the codebook they index (original order); the mapping's side file names
that codebook and the reordered one; a GPT checkpoint names the reordered one; the VQ checkpoint that decodes is hashed
when it is read. Published files carry no hashes: what is unknown is a warning, what differs is an error.
"""

import torch

from autoregressive.models.gpt import GPT, describe_gpt, gpt_config
from autoregressive.runtime.checkpoint import find_checkpoint, load_strictly, model_state, read_checkpoint
from autoregressive.runtime.files import codebook_sha256, weights_sha256
from autoregressive.runtime.log import LOGGER
from tokenizer.tokenizer_image.vq_model import VQModel

VQ_HINT = "name a tokenizer with --vq-ckpt; pretrained_models/README.md says where the published ones come from"


def default_vq_path(cluster_size):
    """Returns where balance_k_means.py puts the published VQ checkpoint with its codebook reordered."""
    return f"pretrained_models/vq_ds16_c2i-reorder-kmeans+nearest-cluster_size={cluster_size}.pt"


def load_vq(path, name, codebook_size, codebook_embed_dim):
    """Loads a VQ model for inference.

    Args:
        path: checkpoint of any layout that runtime.checkpoint reads.
        name: size in VQ_MODELS.
        codebook_size: V.
        codebook_embed_dim: E.

    Returns:
        (model on the CPU in evaluation mode, dict with codebook_sha256 and weights_sha256).

    Raises:
        ValueError: unreadable, or weights of another model.
    """
    state = model_state(read_checkpoint(path, VQ_HINT), path)
    with torch.device("meta"):
        model = VQModel(name, codebook_size, codebook_embed_dim)
    load_strictly(model, state, path, "check --vq-model, --codebook-size and --codebook-embed-dim")
    hashes = {"codebook_sha256": codebook_sha256(model.quantize.embedding.weight),
              "weights_sha256": weights_sha256(state)}
    return model.eval().requires_grad_(False), hashes


def load_gpt(path, name, **settings):
    """Loads a GPT for sampling.

    Args:
        path: checkpoint, or a folder whose newest is taken.
        name: size in GPT_MODELS.
        settings: fields of GPTConfig: grid, vocab_size, num_classes.

    Returns:
        (model on the CPU in evaluation mode, path of the file, dict of the settings it was saved with: empty for
        published files).

    Raises:
        ValueError: unreadable, weights of another model, or trained for another grid.
    """
    path = find_checkpoint(path)
    payload = read_checkpoint(path)
    state = model_state(payload, path)
    record = payload.get("settings", {}) if isinstance(payload.get("model"), dict) else {}
    with torch.device("meta"):
        model = GPT(gpt_config(name, **settings))
    load_strictly(model, state, path, f"{describe_gpt(state)}; asked for {name} with {settings['vocab_size']} codes "
                  f"and {settings['num_classes']} classes")
    trained_grid = record.get("grid", settings["grid"])
    if trained_grid != settings["grid"]:
        raise ValueError(f"{path}: expected weights trained on a grid of {settings['grid']}, got {trained_grid}; "
                         "give the --image-size and --downsample-size of the training")
    if "grid" not in record:
        LOGGER.warning("%s: names no grid; %d x %d tokens are assumed", path, settings["grid"], settings["grid"])
    return model.eval().requires_grad_(False), path, record


def check_same(what, expected, found, expected_source, found_source):
    """Compares two hashes of one thing: differing ones are an error, unknown ones a warning.

    Raises:
        ValueError: both are known and differ.
    """
    if expected is None or found is None:
        unknown = expected_source if expected is None else found_source
        LOGGER.warning("%s: carries no hash of its %s, so it cannot be checked", unknown, what)
    elif expected != found:
        raise ValueError(f"{found_source}: expected the {what} {expected[:12]} of {expected_source}, got {found[:12]}; "
                         "these files come from different runs of balance_k_means.py, take both from one")
