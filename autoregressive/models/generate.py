"""Sampling tokens: one decode step, and the loop over positions.

Every token has one uniform number of its own (random_numbers.py), so that a sample does not depend
on the process that computes it.

Letters: B batch, T tokens, V codes.
"""

from typing import Protocol

import torch
from torch import Tensor

from autoregressive.models.cache import DecodePosition
from autoregressive.models.gpt import GPT
from autoregressive.models.sampler import Sampler, apply_guidance, choose
from autoregressive.runtime.compute import to_device


class DecodeState:
    """The tensors that the steps of a batch read and write.

    They stay in place, so that a captured step serves every later batch.

    Attributes:
        cache: KVCache of the pictures and, with guidance, of as many rows again for the null label.
        uniforms: (B, T) float64.
        tokens: (B, T) int64, filled as far as `index`.
        index: (1,) int64, advanced in place by every step: the position of the next token.
        scales: (T, 2) float32, the strengths of guidance at every position.
    """

    def __init__(self, model: GPT, batch_size: int, is_guided: bool) -> None:
        """Allocates them on the model's device.

        Args:
            model: GPT.
            batch_size: B.
            is_guided: whether any token is sampled with guidance.
        """
        num_tokens = model.config.num_tokens
        device = model.norm.weight.device
        self.cache = model.new_cache(2 * batch_size if is_guided else batch_size)
        self.uniforms = torch.empty(batch_size, num_tokens, dtype=torch.float64, device=device)
        self.tokens = torch.empty(batch_size, num_tokens, dtype=torch.int64, device=device)
        self.index = torch.zeros(1, dtype=torch.int64, device=device)
        self.scales = torch.ones(num_tokens, 2, device=device)

    def begin(self, model: GPT, labels: Tensor, uniforms: Tensor, sampler: Sampler) -> None:
        """Samples the first token of a new batch: labels (B,), uniforms (B, T) on the device."""
        self.uniforms.copy_(uniforms)
        self.index.zero_()
        is_guided = sampler.num_guided(len(self.scales)) > 0
        if is_guided:
            self.scales.copy_(to_device(sampler.scales(len(self.scales)), self.scales.device))
            null = torch.full_like(labels, model.config.num_classes)
            labels = torch.cat([labels, null])                      # (2B,)
        self._append(model.prefill(labels, self.cache), sampler, is_guided)

    def step(self, model: GPT, at: DecodePosition, sampler: Sampler, is_guided: bool) -> None:
        """Samples the token at `at`, whose index is self.index: what a CUDA graph captures."""
        previous = self.tokens.index_select(1, at.index - 1)[:, 0]  # (B,)
        if is_guided:
            logits = model.decode_step(previous.repeat(2), at, self.cache)      # (2B, V)
        else:                           # from where guidance ends, the null label is left out
            logits = model.decode_step(previous, at, self.cache.rows(len(previous)))    # (B, V)
        self._append(logits, sampler, is_guided)

    def _append(self, logits: Tensor, sampler: Sampler, is_guided: bool) -> None:
        """Samples the next token from its logits, (2B, V) with guidance and else (B, V)."""
        if is_guided:
            scales = self.scales.index_select(0, self.index)[0]     # (2,)
            logits = apply_guidance(logits, scales, sampler)        # (B, V)
        uniforms = self.uniforms.index_select(1, self.index)[:, 0]  # (B,)
        tokens = choose(logits, uniforms, sampler)                  # (B,)
        self.tokens.index_copy_(1, self.index, tokens[:, None])
        self.index += 1


class Steps(Protocol):
    """How the steps of a batch are run: one by one, or captured."""

    def begin(self, labels: Tensor, uniforms: Tensor, sampler: Sampler) -> DecodeState:
        """Returns the state of a new batch, whose first token is sampled.

        Args:
            labels: (B,) int64 on the model's device.
            uniforms: (B, T) float64 on the model's device.
            sampler: Sampler.
        """

    def step(self, state: DecodeState, position: int, sampler: Sampler) -> None:
        """Samples the token at a position, 1 .. T - 1; those before it are there."""


class EagerSteps:
    """Steps that run as they are, and read no more of the cache than is filled."""

    def __init__(self, model: GPT) -> None:
        self._model = model

    def begin(self, labels: Tensor, uniforms: Tensor, sampler: Sampler) -> DecodeState:
        """See Steps; allocates anew for every batch."""
        is_guided = sampler.num_guided(uniforms.shape[1]) > 0
        state = DecodeState(self._model, len(labels), is_guided)
        state.begin(self._model, labels, uniforms, sampler)
        return state

    def step(self, state: DecodeState, position: int, sampler: Sampler) -> None:
        """See Steps."""
        at = DecodePosition(state.index, length=position + 1)
        is_guided = position < sampler.num_guided(len(state.scales))
        state.step(self._model, at, sampler, is_guided)


@torch.inference_mode()
def generate(model: GPT, labels: Tensor, uniforms: Tensor, sampler: Sampler,
             steps: Steps | None = None) -> Tensor:
    """Samples the tokens of pictures, position by position, with a key-value cache.

    Args:
        model: in evaluation mode.
        labels: (B,) int64 on the model's device.
        uniforms: (B, T) float64 on the model's device, one for each token.
        sampler: Sampler.
        steps: how to run the model's steps; None is EagerSteps.

    Returns:
        (B, T) int64 tokens.
    """
    steps = steps or EagerSteps(model)
    state = steps.begin(labels, uniforms, sampler)
    for position in range(1, uniforms.shape[1]):
        steps.step(state, position, sampler)
    return state.tokens.clone()         # a later batch may be put in the same place
