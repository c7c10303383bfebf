"""Reading GPT files: what one holds, whether it is what was asked for, and the model it makes.

Letters: V codes.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoregressive.models.config import GPT_MODELS, GPTConfig
from autoregressive.models.gpt import GPT
from autoregressive.models.guidance_free import embedding_of, is_guidance_free
from autoregressive.runtime.checkpoint import (
    OPTIMIZER_KINDS,
    find_checkpoint,
    load_strictly,
    model_state,
    read_checkpoint,
)
from autoregressive.runtime.files import check_kinds
from autoregressive.runtime.identity import check_recorded
from autoregressive.runtime.log import LOGGER

PUBLIC_MATRICES = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w3",
                   "feed_forward.w2")
PUBLIC_NORMS = ("attention_norm", "ffn_norm")
LABEL_TABLE = "cls_embedding.embedding_table.weight"
# Flags that a checkpoint's settings name.
RECORDED = ("gpt_model", "image_size", "num_classes", "cluster_size")
SIZES = ("image_size", "num_classes", "cluster_size", "vocab_size", "grid")
# Types of what settings may name.
KINDS = dict.fromkeys(SIZES, int) | {"gpt_model": str, "class_names": (list, type(None)),
         "label_dropout": (int, float), "recipe": (str, type(None))}


@dataclass(frozen=True)
class GPTFile:
    """What a GPT checkpoint holds.

    Attributes:
        path: the file.
        state: dict of name -> tensor, plain names.
        settings: what was recorded with the weights; empty for published files.
        payload: all that was saved.
    """

    path: Path
    state: dict[str, Tensor]
    settings: dict[str, Any]
    payload: dict[str, Any]

    @property
    def continues(self) -> bool:
        """Whether a training that starts from it goes on with its optimizer, steps and average."""
        return "optimizer" in self.payload

    def flags(self) -> dict[str, Any]:
        """Returns the values of flags that the file records, or its weights tell."""
        settings = self.settings
        flags = sizes_of(self.state) | {name: settings[name] for name in RECORDED
                                        if name in settings}
        if "vocab_size" in settings:
            flags["codebook_size"] = settings["vocab_size"]
        if "image_size" in settings and "grid" in settings:
            flags["downsample_size"] = settings["image_size"] // settings["grid"]
        return flags


def add_weights_arg(group: argparse._ActionsContainer) -> None:
    """Declares which weights of a checkpoint are taken."""
    group.add_argument("--weights", default="raw", choices=("raw", "ema"),
                       help="of the GPT: as trained, or averaged")


def read_gpt(path: str | Path | None, weights: str = "raw", bare: bool = False) -> GPTFile:
    """Reads the weights of a GPT, and what is recorded with them.

    Args:
        path: checkpoint, or a folder whose newest is taken.
        weights: "raw", or "ema" for their moving average.
        bare: whether the file must be a bare state dict, as --from-fsdp promises.

    Raises:
        ValueError: no path, an unreadable file, or one without what was asked for.
    """
    if path is None:
        raise ValueError("--gpt-ckpt: expected a checkpoint of the GPT or its folder, got none")
    path = find_checkpoint(path)
    payload = read_checkpoint(path)
    parts = payload if isinstance(payload, dict) else {}
    is_bare = bool(parts) and all(map(torch.is_tensor, parts.values()))
    if bare and not is_bare:
        raise ValueError(f"{path}: expected a bare state dict for --from-fsdp, found "
                         f"{', '.join(map(str, payload))}; leave the flag out")
    if weights == "ema" and not parts.get("ema"):
        raise ValueError(f"{path}: expected an average of the weights for --weights ema, found "
                         "none; train with --ema")
    state = model_state({"model": payload["ema"]} if weights == "ema" else payload, path)
    settings = parts.get("settings", {}) if isinstance(parts.get("model"), dict) else {}
    check_kinds({"settings": settings}, {"settings": dict}, path)
    check_kinds(settings, {name: kind for name, kind in KINDS.items() if name in settings}, path)
    for name in SIZES:
        if settings.get(name, 1) < 1:
            raise ValueError(f"{path}: expected a {name} of at least 1, found {settings[name]}; "
                             "take another checkpoint")
    if settings.get("gpt_model", "GPT-B") not in GPT_MODELS:
        raise ValueError(f"{path}: expected a GPT of {', '.join(GPT_MODELS)}, found "
                         f"{settings['gpt_model']}; take another checkpoint")
    return GPTFile(path, state, settings, payload)


def build_gpt(file: GPTFile, config: GPTConfig) -> GPT:
    """Makes the model of a file's weights, which are not copied.

    Returns:
        GPT on the CPU, in evaluation mode.

    Raises:
        ValueError: weights of another model, or trained for another grid.
    """
    with torch.device("meta"):
        model = GPT(config)
    load_strictly(model, file.state, file.path,
                  f"{describe_gpt(file.state)}; asked for {config.name} with "
                  f"{config.vocab_size} codes and {config.num_classes} classes")
    trained_grid = file.settings.get("grid", config.grid)
    if trained_grid != config.grid:
        raise ValueError(f"{file.path}: expected weights trained on a grid of {config.grid}, got "
                         f"{trained_grid}; give the --image-size and --downsample-size of the "
                         "training")
    if "grid" not in file.settings:
        LOGGER.warning("%s: names no grid; %d x %d tokens are assumed", file.path, config.grid,
                       config.grid)
    return model.eval().requires_grad_(False)


def check_fitting(file: GPTFile, cluster_size: int, num_classes: int, *, is_guided: bool) -> None:
    """Raises ValueError if a file contradicts the flags, or the need of a null label."""
    recorded = file.settings
    check_recorded("--cluster-size", cluster_size, recorded.get("cluster_size"), file.path)
    class_names = recorded.get("class_names")
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(f"{file.path}: expected class_names of {num_classes} classes, found "
                         f"{len(class_names)}; take another checkpoint of the run")
    if is_guided and recorded.get("label_dropout") == 0:
        raise ValueError(f"--cfg-scale: expected at most 1 for {file.path}, which was trained "
                         "without label dropout and knows no null label; leave guidance out")
    patch = file.payload.get("patch", 1)
    if patch != 1:
        LOGGER.warning("%s: trained on patches of %s x %s tokens so far; its pictures are noise "
                       "until it is trained on tokens", file.path, patch, patch)


def sizes_of(state: dict[str, Tensor]) -> dict[str, Any]:
    """Returns the flags that a GPT's weights tell by their shapes; {} if they are none of a GPT.

    gpt_model is missing if the size has no name.
    """
    for name in ("tok_embeddings.weight", LABEL_TABLE):
        if name not in state or state[name].dim() != 2:
            return {}
    vocab_size, width = state["tok_embeddings.weight"].shape
    sizes = {"codebook_size": vocab_size, "num_classes": len(state[LABEL_TABLE]) - 1}
    num_layers = count_layers(state)
    for name, size in GPT_MODELS.items():
        if size.num_layers == num_layers and size.width == width:
            return sizes | {"gpt_model": name}
    return sizes


def count_layers(state: dict[str, Tensor]) -> int:
    """Returns how many blocks the weights of a GPT are of."""
    return len({name.split(".")[1] for name in state if name.startswith("layers.")})


def describe_gpt(state: dict[str, Tensor]) -> str:
    """Says in words which GPT a state dict holds: size, codes, classes; "" if it is none."""
    sizes = sizes_of(state)
    if not sizes:
        return ""
    width = state["tok_embeddings.weight"].shape[1]
    nameless = f"a GPT of no listed size ({count_layers(state)} layers, width {width})"
    trained = ", trained guidance-free" if is_guidance_free(state) else ""
    return (f"the file holds {sizes.get('gpt_model', nameless)} with {sizes['codebook_size']} "
            f"codes and {sizes['num_classes']} classes{trained}")


def move_rows_to_tokens(state: dict[str, Tensor], mapping: np.ndarray,
                        path: Path) -> dict[str, Tensor]:
    """Returns the weights of a GPT over codes in their original order as those of one over tokens.

    Args:
        state: dict of name -> tensor.
        mapping: (V,) int64, code -> token: where the rows of embedding and head go.
        path: named in the error.

    Raises:
        ValueError: the weights are not of this codebook.
    """
    code_of_token = torch.from_numpy(mapping).argsort()             # (V,)
    moved = dict(state)
    for name in ("tok_embeddings.weight", "output.weight"):
        num_codes = len(state.get(name, ()))
        if num_codes != len(mapping):
            raise ValueError(f"{path}: expected {name} of {len(mapping)} codes, as the mapping "
                             f"has, found {num_codes}")
        moved[name] = state[name][code_of_token]                    # (V, D)
    return moved


def name_moments(optimizer: dict[str, Any], weights: dict[str, Tensor],
                 path: Path) -> dict[str, Any]:
    """Returns the optimizer state of a public checkpoint by the names of its parameters.

    The files of LlamaGen, IAR and GFT number the parameters in the order of their own model:
    matrices first, then norms and biases.

    Args:
        optimizer: "state" and "param_groups" as torch saves them; those of our own files come back
            as they are.
        weights: dict of name -> tensor, the model that it belongs to.
        path: named in the error.

    Raises:
        ValueError: the state is of another model.
    """
    check_kinds({"optimizer": optimizer}, {"optimizer": OPTIMIZER_KINDS}, path)
    state = optimizer["state"]
    groups = optimizer["param_groups"]
    if all(isinstance(name, str) for name in state):
        return optimizer
    names = _public_order(weights)
    for number, name in enumerate(names):
        moments = state.get(number)
        has_moments = isinstance(moments, dict) and "exp_avg" in moments
        found = tuple(moments["exp_avg"].shape) if has_moments else None
        expected = tuple(weights[name].shape) if name in weights else None
        if found is None or found != expected:
            raise ValueError(f"{path}: expected moments {number} of {name} {expected}, found "
                             f"{found}; start from the weights alone: --weights-only")
    numbers = []
    for group in groups:
        numbers += group["params"]
    if sorted(numbers) != list(range(len(names))):
        raise ValueError(f"{path}: expected moments of {len(names)} parameters in param_groups, "
                         "found others; start from the weights alone: --weights-only")
    named_groups = []
    for group in groups:
        named_groups.append(group | {"params": [names[number] for number in group["params"]]})
    return {"state": {name: state[number] for number, name in enumerate(names)},
            "param_groups": named_groups}


def _public_order(weights: dict[str, Tensor]) -> list[str]:
    """Returns the names of a GPT's parameters in the order of the public optimizers."""
    layers = [int(name.split(".")[1]) for name in weights if name.startswith("layers.")]
    matrices = ["cls_embedding.embedding_table.weight", "tok_embeddings.weight"]
    vectors = []
    for layer in range(1 + max(layers)):
        matrices += [f"layers.{layer}.{name}.weight" for name in PUBLIC_MATRICES]
        vectors += [f"layers.{layer}.{name}.weight" for name in PUBLIC_NORMS]
    matrices.append("output.weight")
    vectors.append("norm.weight")
    for name, tensor in embedding_of(weights).items():      # of beta, GFT's last module
        (matrices if tensor.ndim > 1 else vectors).append(name)
    return matrices + vectors
