"""Classifier-free guidance: how it moves the logits, and how strong it is at each token.

Letters: B batch, T tokens, V codes, K clusters, S codes per cluster, V = K * S. With logits z_cond
of the label and z_uncond of the null label, and g(x; a) = x_uncond + (x_cond - x_uncond) * a:

    plain   z_v = g(z_v; a)
    split   z_v = g(s_j; a) + g(z_v - s_j; b)           j the cluster of v, s_j its logsumexp

Split guidance chooses the cluster at strength a, and the code inside it at strength b; at a = b it
is plain guidance. The strength of the token at position t follows, with r = t / T, from s_0 to s:

    constant        s
    linear          s_0 + (s - s_0) r                           RandAR, LPD (arXiv 2507.01957)
    power-cosine    s_0 + (s - s_0) (1 - cos(pi r^p)) / 2       RAR, with s_0 = 1
"""

import argparse

import numpy as np
from torch import Tensor

from autoregressive.runtime.entry import above, at_least, between

SCHEDULES = ("constant", "linear", "power-cosine")
STRENGTH = between(-1000.0, 1000.0)


def add_guidance_args(group: argparse._ActionsContainer) -> None:
    """Declares the flags of guidance."""
    group.add_argument("--cfg-scale", type=STRENGTH, default=1.5,
                       help="classifier-free guidance; a constant one of at most 1 means none")
    group.add_argument("--cfg-interval", type=at_least(-1), default=-1,
                       help="guide tokens 0 to this + 1 only; -1 guides all")
    group.add_argument("--cfg-schedule", default="constant", choices=SCHEDULES,
                       help="how guidance goes from --cfg-start at the first token towards "
                            "--cfg-scale at the last")
    group.add_argument("--cfg-start", type=STRENGTH, default=1.0,
                       help="guidance of the first token in a schedule that is not constant")
    group.add_argument("--cfg-power", type=above(0.0), default=1.0,
                       help="power of the position in --cfg-schedule power-cosine; RAR takes 1.2 "
                            "to 2.75, with --cfg-scale 6.9 to 16")
    group.add_argument("--cfg-scale-within", type=STRENGTH,
                       help="guidance of the choice inside a cluster, apart from --cfg-scale, "
                            "which then guides the choice of the cluster; default: the same")


def strengths(num_tokens: int, schedule: str, end: float, start: float, power: float) -> np.ndarray:
    """Returns the strength of guidance (T,) float64 at every position, as the equations above say.

    Args:
        num_tokens: T.
        schedule: one of SCHEDULES.
        end: s, which a schedule that is not constant approaches and never reaches.
        start: s_0.
        power: p of the power-cosine schedule.
    """
    if schedule == "constant":
        return np.full(num_tokens, end)
    progress = np.arange(num_tokens) / num_tokens
    if schedule == "power-cosine":
        progress = (1 - np.cos(np.pi * progress**power)) / 2
    return start + (end - start) * progress


def guide(logits: Tensor, scale: float | Tensor) -> Tensor:
    """Returns guided logits (B, V): uncond + (cond - uncond) * scale.

    Args:
        logits: (2B, V), first all with their label, then all with the null label.
        scale: strength of the guidance, a number or a scalar on the device.
    """
    cond, uncond = logits.chunk(2)                                  # (B, V) each
    return uncond + (cond - uncond) * scale


def guide_split(logits: Tensor, scale: float | Tensor, scale_within: float | Tensor,
                cluster_size: int) -> Tensor:
    """Returns logits (B, V) whose cluster and whose code inside the cluster are guided apart.

    They are not normalised again. At equal scales they are those of `guide` up to rounding.

    Args:
        logits: (2B, V), as for guide.
        scale: strength of the guidance of the cluster.
        scale_within: of the code inside its cluster; at 1 two codes of one cluster keep the ratio
            that they have with the label.
        cluster_size: S, a divisor of V.
    """
    z = logits.unflatten(-1, (-1, cluster_size))                    # (2B, K, S)
    s = z.logsumexp(-1, keepdim=True)                               # (2B, K, 1)
    guided = guide(s, scale) + guide(z - s, scale_within)           # (B, K, S)
    return guided.flatten(1)                                        # (B, V)
