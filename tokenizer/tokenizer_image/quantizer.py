"""The quantiser of the VQ tokenizers, and the search for the nearest code.

Letters: B batch, T tokens, V codes, E code dimension, N vectors, h and w sides of a feature map.
Attributes that appear in state-dict keys (embedding, codebook_used) keep their published names.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

COMMITMENT_WEIGHT = 0.25
ENTROPY_TEMPERATURE = 0.01
USAGE_WINDOW = 65536            # indices that codebook_used remembers
CPU_BUDGET = 2**20              # distances held at once: 4 MiB, which stays in the cache
GPU_BUDGET = 2**26              # 256 MiB


class QuantizerLosses(NamedTuple):
    """The terms that a quantiser adds to a training loss, weighted; each a float32 scalar."""

    codebook: Tensor
    commitment: Tensor
    entropy: Tensor


class Quantizer(nn.Module):
    """A codebook looked up by direction: features and codes are L2-normalised first.

    The stored codes (V, E) are raw; everything that leaves this module is normalised.
    """

    def __init__(self, codebook_size, codebook_embed_dim):
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, codebook_embed_dim)
        with torch.no_grad():
            self.embedding.weight.uniform_(-1 / codebook_size, 1 / codebook_size)
            self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=1))
        self.register_buffer("codebook_used", torch.zeros(USAGE_WINDOW))

    def codes(self, latents: Tensor) -> Tensor:
        """Returns the codes (B, T) int64, in raster order, of latents (B, E, h, w)."""
        return nearest_codes(_rows(latents), self._codebook()).view(len(latents), -1)

    def vectors(self, codes: Tensor, h: int, w: int) -> Tensor:
        """Returns the normalised vectors (B, E, h, w) of codes (B, T) int64, T = h * w in raster order."""
        vectors = F.normalize(self.embedding(codes), dim=-1)                        # (B, T, E)
        return vectors.transpose(1, 2).unflatten(2, (h, w)).contiguous()            # (B, E, h, w)

    def forward(self, latents, entropy_ratio=0.0):
        """Quantises latents (B, E, h, w), letting gradients pass straight through.

        Returns:
            z_q (B, E, h, w) float32, QuantizerLosses, codes (B, T) int64.
        """
        batch, _, h, w = latents.shape
        z = _rows(latents)                                                          # (N, E), N = B*h*w
        indices = nearest_codes(z, self._codebook())
        z_q = F.normalize(self.embedding(indices).float(), dim=1)                   # (N, E)
        losses = QuantizerLosses(
            codebook=F.mse_loss(z_q, z.detach()),
            commitment=COMMITMENT_WEIGHT * F.mse_loss(z, z_q.detach()),
            entropy=entropy_ratio * _entropy(z, self._codebook()) if entropy_ratio else z.new_zeros(()))
        z_q = z + (z_q - z).detach()                                                # straight-through
        z_q = z_q.view(batch, h, w, -1).permute(0, 3, 1, 2).contiguous()
        return z_q, losses, indices.view(batch, -1)

    def _codebook(self):
        return F.normalize(self.embedding.weight.float(), dim=1)

    @torch.no_grad()
    def record_usage(self, codes: Tensor) -> None:
        """Appends codes (any shape) to the memory of the last 65,536 indices, newest at the end."""
        recent = torch.cat([self.codebook_used, codes.flatten().to(self.codebook_used)])
        self.codebook_used.copy_(recent[-USAGE_WINDOW:])


def _rows(latents):
    return F.normalize(latents.float().permute(0, 2, 3, 1).flatten(0, 2), dim=1)    # (B, E, h, w) -> (N, E)


def _entropy(z, codebook):
    # mean_n H(p_n) + sum_v a_v log(a_v + 1e-5), a = mean_n p_n: sharp for one vector, flat over all of them.
    # In chunks that are computed again in the backward pass, so that no (N, V) matrix outlives its chunk.
    chunks = [checkpoint(_assignment_sums, rows, codebook, use_reentrant=False) for rows in _chunks(z, codebook)]
    sample_entropy, assignments = (sum(parts) / len(z) for parts in zip(*chunks, strict=True))
    return sample_entropy + (assignments * torch.log(assignments + 1e-5)).sum()


def _assignment_sums(rows, codebook):
    with full_float32(rows.device):
        logits = -_squared_distances(rows, codebook) / ENTROPY_TEMPERATURE          # (n, V)
    log_p = F.log_softmax(logits, dim=1)
    p = log_p.exp()
    return -(p * log_p).sum(), p.sum(0)


def _squared_distances(rows, codebook):
    # |z|^2 is left out: one value a row, which changes neither an argmin nor a softmax over the codes.
    return torch.addmm(codebook.square().sum(1), rows, codebook.t(), alpha=-2)      # (n, V)


def _chunks(z, codebook):
    budget = CPU_BUDGET if z.device.type == "cpu" else GPU_BUDGET
    return z.split(max(1, budget // len(codebook)))


@torch.no_grad()
def nearest_codes(z: Tensor, codebook: Tensor) -> Tensor:
    """Finds the nearest code of every vector, in float32 whatever autocast and TF32 settings are in force.

    Args:
        z: (N, E) float vectors.
        codebook: (V, E) float codes.

    Returns:
        (N,) int64: index of the code at the smallest Euclidean distance.
    """
    z, codebook = z.float(), codebook.float()
    with full_float32(z.device):
        return torch.cat([_squared_distances(rows, codebook).argmin(1) for rows in _chunks(z, codebook)])


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Computes float32 matrix products of the block in full float32: autocast off, TF32 and bfloat16 kernels off."""
    with torch.autocast(device.type, enabled=False), contextlib.ExitStack() as on_exit:
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            for switch in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
                on_exit.callback(setattr, switch, "fp32_precision", switch.fp32_precision)
                switch.fp32_precision = "ieee"
        else:                                                   # torch before 2.9 has one switch for all of them
            on_exit.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        yield
