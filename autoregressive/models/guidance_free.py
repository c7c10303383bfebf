"""Guidance-free training (GFT, arXiv 2501.15420): strength of guidance as an input of the model.

In training each image has a number beta of its own, and its logits are

    z = beta * z_cond(beta) + (1 - beta) * stopgrad(z_uncond(1))

At a fixed beta a GPT so trained samples in one pass what another one samples in two, guided by
1 / beta.

Letters: B batch, D width.
"""

import math

import torch
from torch import Tensor, nn

from autoregressive.models.sampler import Sampler
from autoregressive.runtime.entry import flag_of

FREQUENCIES = 256               # numbers that describe beta
LONGEST = 10000.0               # wavelength, in units of beta / 1000
PREFIX = "t_embedder."          # of the published names of its weights


class BetaEmbedding(nn.Module):
    """Turns beta into what is added to the condition token; names and shapes as published."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills the weights so that beta changes nothing at first: the last layer is zero."""
        nn.init.normal_(self.mlp[0].weight, std=0.02)
        for tensor in (self.mlp[0].bias, self.mlp[2].weight, self.mlp[2].bias):
            nn.init.zeros_(tensor)

    def forward(self, betas: Tensor) -> Tensor:
        """Returns (B, D) from betas (B,) in 0 .. 1."""
        half = FREQUENCIES // 2
        exponents = torch.arange(half, device=betas.device) / half
        frequencies = torch.exp(-math.log(LONGEST) * exponents)     # (128,)
        angles = 1000 * betas.float()[:, None] * frequencies                # (B, 128)
        described = torch.cat([angles.cos(), angles.sin()], dim=-1)     # (B, 256)
        return self.mlp(described.to(self.mlp[0].weight.dtype))


def embedding_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of the embedding of beta, with their whole names; {} if there is none."""
    return {name: tensor for name, tensor in state.items() if name.startswith(PREFIX)}


def is_guidance_free(state: dict[str, Tensor]) -> bool:
    """Returns whether a state dict is that of a GPT which was trained guidance-free."""
    return bool(embedding_of(state))


@torch.no_grad()
def fold_beta(state: dict[str, Tensor], beta: float) -> dict[str, Tensor]:
    """Returns the weights of the ordinary GPT that a guidance-free one is at a fixed beta.

    The embedding of beta is added to every row of the label table, in float32. Those of an ordinary
    one are returned as they are.
    """
    if not is_guidance_free(state):
        return state
    name = "cls_embedding.embedding_table.weight"
    table = state[name]                                             # (num_classes + 1, D)
    embedding = BetaEmbedding(table.shape[1])
    embedding.load_state_dict({key.removeprefix(PREFIX): value
                               for key, value in embedding_of(state).items()})
    folded = {key: value for key, value in state.items() if not key.startswith(PREFIX)}
    folded[name] = (table.float() + embedding(torch.tensor([beta]))).to(table.dtype)
    return folded


def choose_beta(given: float | None, is_free: bool, sampler: Sampler) -> float | None:
    """Returns the beta to sample at; None for an ordinary GPT.

    Args:
        given: --beta, or None.
        is_free: whether the GPT was trained guidance-free.
        sampler: whose guidance it replaces.

    Raises:
        ValueError: --beta for an ordinary GPT, or guidance that a guidance-free one cannot follow.
    """
    if not is_free:
        if given is not None:
            raise ValueError("--beta: expected a GPT trained guidance-free, got an ordinary one; "
                             "give --cfg-scale")
        return None
    ordinary = Sampler()
    for name in ("cfg_schedule", "cfg_start", "cfg_power", "cfg_interval", "cfg_scale_within"):
        if getattr(sampler, name) != getattr(ordinary, name):
            raise ValueError(f"{flag_of(name)}: expected none for a GPT trained guidance-free, "
                             "which is sampled in one pass; give --beta alone")
    if given is None and sampler.cfg_scale < 1:
        raise ValueError("--cfg-scale: expected at least 1 for a GPT trained guidance-free, got "
                         f"{sampler.cfg_scale:g}; give --beta")
    return given or 1 / sampler.cfg_scale
