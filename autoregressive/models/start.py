"""What the training of a GPT starts from: a checkpoint to go on from, or weights alone.

Letters: V codes.
"""

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT
from autoregressive.models.guidance_free import is_guidance_free
from autoregressive.models.loading import (
    GPTFile,
    describe_gpt,
    move_rows_to_tokens,
    name_moments,
)
from autoregressive.runtime.checkpoint import check_weights, model_state
from autoregressive.runtime.entry import flag_of
from autoregressive.runtime.identity import check_recorded
from autoregressive.runtime.log import LOGGER


@dataclass(frozen=True)
class StartSettings:
    """The flags that say what a training starts from, under their names.

    Attributes:
        gpt_ckpt: checkpoint or its folder; None starts from nothing.
        weights_only: whether to start from the weights, whatever else the file holds.
        init_from_original: whether the file is a GPT over codes in their original order.
    """

    gpt_ckpt: str | None
    weights_only: bool
    init_from_original: bool

    def check(self) -> None:
        """Raises ValueError for a flag that is given without --gpt-ckpt."""
        for name in ("init_from_original", "weights_only"):
            if getattr(self, name) and not self.gpt_ckpt:
                raise ValueError(f"{flag_of(name)}: expected --gpt-ckpt, the GPT to start from, "
                                 "got none")


def add_start_args(group: argparse._ActionsContainer) -> None:
    """Declares the flags of StartSettings but --gpt-ckpt, which add_gpt_args declares."""
    group.add_argument("--weights-only", action="store_true",
                       help="start from the weights of --gpt-ckpt, whatever else it holds")
    group.add_argument("--init-from-original", action="store_true",
                       help="--gpt-ckpt is a GPT over codes in their original order, such as "
                            "LlamaGen's: move its rows to their tokens")


def read_start(file: GPTFile | None, config: GPTConfig, settings: StartSettings, *,
               tokens: np.ndarray, mapping_path: Path, mapping_sha256: str) -> GPTFile | None:
    """Returns what a training starts from.

    Args:
        file: the checkpoint, or None.
        config: of the GPT to train.
        settings: StartSettings.
        tokens: (V,) int64, code -> token, of the run's mapping.
        mapping_path: its file, named in errors.
        mapping_sha256: its hash.

    Returns:
        GPTFile whose `state` is over tokens, perhaps that of an ordinary GPT though the model is
        guidance-free; if the weights alone are taken, its `payload` is empty and it does not
        continue. None without a checkpoint.

    Raises:
        ValueError: it is of another model, or over other tokens.
    """
    if file is None:
        return None
    _check_tokens(file, mapping_path, mapping_sha256, settings.init_from_original)
    is_ordinary = config.guidance_free and not is_guidance_free(file.state)
    if is_ordinary:
        LOGGER.info("%s: an ordinary GPT, whose weights alone are trained guidance-free", file.path)
    starts_anew = settings.weights_only or settings.init_from_original or is_ordinary
    payload = {}
    if file.continues and not starts_anew:
        moments = name_moments(file.payload["optimizer"], file.state, file.path)
        steps = file.payload.get("steps")
        if steps and not moments["state"]:
            raise ValueError(f"{file.path}: expected moments of the optimizer after {steps} "
                             "steps, found none; start from the weights alone: --weights-only")
        payload = file.payload | {"model": file.state, "optimizer": moments}
        if payload.get("ema"):
            payload["ema"] = model_state({"model": payload["ema"]}, file.path)
    state = file.state
    if settings.init_from_original:
        state = move_rows_to_tokens(state, tokens, file.path)
    if is_ordinary:
        config = dataclasses.replace(config, guidance_free=False)
    with torch.device("meta"):
        check_weights(GPT(config), state, file.path, describe_gpt(state))
    return dataclasses.replace(file, state=state, payload=payload)


def _check_tokens(file: GPTFile, mapping_path: Path, mapping_sha256: str,
                  init_from_original: bool) -> None:
    """Raises ValueError if a GPT was trained on other tokens; unknown ones are a warning."""
    is_over_tokens = "mapping_sha256" in file.settings
    if init_from_original and is_over_tokens:
        raise ValueError("--init-from-original: expected a GPT over codes in their original order, "
                         f"found {file.path}, which was trained on tokens; leave the flag out")
    if is_over_tokens:
        check_recorded("--mapping-path", mapping_sha256, file.settings["mapping_sha256"], file.path)
    elif not init_from_original:
        LOGGER.warning("%s: carries no hashes, so it cannot be checked that it was trained on the "
                       "tokens of %s; a GPT over codes in their original order needs "
                       "--init-from-original", file.path, mapping_path)


def check_start(file: GPTFile | None, num_steps: int, *, needs_ema: bool,
                needs_scaler: bool) -> None:
    """Checks that a run can begin with what read_start returned.

    Args:
        file: what it returned.
        num_steps: length of the run.
        needs_ema: whether the run keeps an average of the weights.
        needs_scaler: whether it scales its loss, as in fp16.

    Raises:
        ValueError: the checkpoint is as long as the run, or lacks what the run goes on with.
    """
    if file is None or not file.continues:
        return
    steps = file.payload.get("steps")
    if not isinstance(steps, int) or not 0 <= steps < num_steps:
        raise ValueError(f"{file.path}: expected a checkpoint of fewer than the run's {num_steps} "
                         f"steps, found {steps}; lengthen the run, or start from the weights "
                         "alone: --weights-only")
    if needs_ema and "ema" not in file.payload:
        raise ValueError(f"{file.path}: expected an average of the weights for --ema, found none; "
                         "start without --ema, or from the weights alone: --weights-only")
    if needs_scaler and not file.payload.get("scaler"):
        raise ValueError(f"{file.path}: expected the loss scale of a run in fp16, found none; "
                         "start from the weights alone: --weights-only")
