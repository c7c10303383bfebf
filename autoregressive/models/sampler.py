"""How a token is sampled from logits: guidance, temperature, filters, the inverse of the CDF.

Letters: B batch, T tokens, V codes.
"""

import argparse
import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autoregressive.models.cluster_loss import check_cluster_size
from autoregressive.models.guidance import add_guidance_args, guide, guide_split, strengths
from autoregressive.runtime.entry import at_least, fraction_above_0

SMALLEST_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class Sampler:
    """How tokens are sampled from logits.

    Attributes:
        cfg_scale: strength of classifier-free guidance; a constant one of at most 1 means none.
        cfg_interval: c >= 0 guides tokens 0 .. c + 1 only, at the strengths that they have without
            it; -1 guides all.
        temperature: divides the logits.
        top_k: keep the k largest logits (ties stay); 0 keeps all.
        top_p: keep tokens while the mass before them is at most p; 1 keeps all.
        greedy: take the largest logit instead of sampling.
        cfg_schedule, cfg_start, cfg_power: of the strength, as in guidance.py.
        cfg_scale_within: strength of split guidance inside a cluster; None is plain guidance.
        cluster_size: codes per cluster, for split guidance.
    """

    cfg_scale: float = 1.5
    cfg_interval: int = -1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    cfg_schedule: str = "constant"
    cfg_start: float = 1.0
    cfg_power: float = 1.0
    cfg_scale_within: float | None = None
    cluster_size: int = 0

    def check(self, vocab_size: int) -> None:
        """Raises ValueError for settings that mean nothing for a codebook of `vocab_size`."""
        if self.temperature == 0 and not self.greedy:
            raise ValueError("--temperature: expected more than 0, got 0; use --greedy for the "
                             "limit")
        if self.greedy and (self.top_k or self.top_p < 1):
            raise ValueError("--greedy: expected no --top-k and no --top-p beside it, which change "
                             "nothing; leave them out")
        if self.top_k > vocab_size:
            raise ValueError(f"--top-k: expected 0 (off) to {vocab_size} codes, got {self.top_k}")
        if self.cfg_schedule == "constant" and self.cfg_start != Sampler.cfg_start:
            raise ValueError("--cfg-start: expected --cfg-schedule linear or power-cosine, which "
                             "begin there, got constant")
        if self.cfg_schedule != "power-cosine" and self.cfg_power != Sampler.cfg_power:
            raise ValueError("--cfg-power: expected --cfg-schedule power-cosine, whose power it "
                             f"is, got {self.cfg_schedule}")
        if self.cfg_scale_within is not None:
            check_cluster_size(vocab_size, self.cluster_size)

    def scales(self, num_tokens: int) -> np.ndarray:
        """Returns the strengths of guidance (T, 2) float64: of the cluster, and of the code in it.

        Without cfg_scale_within they are equal. Where both are 1 a token is not guided.
        """
        is_split = self.cfg_scale_within is not None
        if self.cfg_schedule == "constant" and self.cfg_scale <= 1 and not is_split:
            return np.ones((num_tokens, 2))
        within = self.cfg_scale_within if is_split else self.cfg_scale
        columns = [strengths(num_tokens, self.cfg_schedule, end, self.cfg_start, self.cfg_power)
                   for end in (self.cfg_scale, within)]
        scales = np.stack(columns, axis=1)
        if self.cfg_interval >= 0:
            scales[self.cfg_interval + 2:] = 1
        return scales

    def num_guided(self, num_tokens: int) -> int:
        """Returns how many of the first tokens are sampled with the null label beside the label.

        That is up to the last guided token, those before it with a strength of 1 among them: the
        null label's keys and values are needed of every token.
        """
        return _num_guided(self, num_tokens)


@functools.lru_cache
def _num_guided(sampler: Sampler, num_tokens: int) -> int:
    guided = np.flatnonzero((sampler.scales(num_tokens) != 1).any(axis=1))
    return int(guided[-1]) + 1 if len(guided) else 0


def add_sampler_args(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of Sampler."""
    group = parser.add_argument_group("sampler")
    add_guidance_args(group)
    group.add_argument("--temperature", type=at_least(0.0), default=1.0, help="divides the logits")
    group.add_argument("--top-k", type=at_least(0), default=0,
                       help="keep this many of the largest logits; 0 keeps all")
    group.add_argument("--top-p", type=fraction_above_0, default=1.0,
                       help="keep the most likely tokens of this mass; 1 keeps all")
    group.add_argument("--greedy", action="store_true",
                       help="take the most likely token instead of sampling")


def apply_guidance(logits: Tensor, scales: Tensor, sampler: Sampler) -> Tensor:
    """Returns guided logits (B, V).

    Args:
        logits: (2B, V), first all with their label, then all with the null label.
        scales: (2,), the row of Sampler.scales at their position.
        sampler: says whether guidance is plain or split.
    """
    scale, scale_within = scales
    if sampler.cfg_scale_within is None:
        return guide(logits, scale)
    return guide_split(logits, scale, scale_within, sampler.cluster_size)


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Sets logits outside the k largest, then outside the top mass p, to -inf.

    Args:
        logits: (B, V) float.
        top_k: values below the k-th largest go, ties stay; 0 is off.
        top_p: in descending order a token stays while the mass before it is <= p; 1 is off.

    Returns:
        (B, V), a new tensor where anything is filtered.
    """
    if top_k:
        largest = logits.topk(min(top_k, logits.shape[-1])).values  # (B, k), descending
        smallest_kept = largest[:, -1:]                             # (B, 1)
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)  # (B, V) each
        mass = ordered.softmax(-1).cumsum(-1)
        goes = torch.zeros_like(mass, dtype=torch.bool)             # in descending order
        goes[:, 1:] = mass[:, :-1] > top_p                          # the first token always stays
        logits = logits.masked_fill(goes.scatter(-1, order, goes), -torch.inf)
    return logits


def probabilities(logits: Tensor, sampler: Sampler) -> Tensor:
    """Returns the distribution (B, V) that tokens are sampled from, given guided logits (B, V)."""
    scaled = logits / max(sampler.temperature, SMALLEST_TEMPERATURE)
    return filter_logits(scaled, sampler.top_k, sampler.top_p).softmax(-1)


def invert_cdf(distribution: Tensor, uniforms: Tensor) -> Tensor:
    """Samples one token from each distribution, by inverting its cumulative distribution.

    Args:
        distribution: (B, V) non-negative, need not sum to exactly 1.
        uniforms: (B,) float64 in [0, 1).

    Returns:
        (B,) int64: the first token whose cumulative mass exceeds uniform * total; never one of
        probability 0.
    """
    cdf = distribution.to(torch.float64, copy=True).cumsum_(-1)     # (B, V), in place
    total = cdf[:, -1]                                              # (B,)
    tokens = torch.searchsorted(cdf, (uniforms * total)[:, None], right=True)[:, 0]
    # Rounding may push a uniform past the end: the last token of non-zero probability is there.
    last = torch.searchsorted(cdf, total[:, None].contiguous())[:, 0]
    return torch.minimum(tokens, last)


def choose(logits: Tensor, uniforms: Tensor, sampler: Sampler) -> Tensor:
    """Returns the next tokens (B,) from guided logits (B, V) and uniforms (B,) float64."""
    if sampler.greedy:
        return logits.argmax(-1)
    return invert_cdf(probabilities(logits, sampler), uniforms)
