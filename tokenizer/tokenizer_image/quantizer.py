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
    """The terms that a quantiser adds to a training loss, weighted; each a float32 scalar.

    Attributes:
        codebook: pulls codes towards the features that they stand for.
        commitment: pulls features towards their codes.
        entropy: makes every choice of a code sharp, and the use of all codes even.
    """

    codebook: Tensor
    commitment: Tensor
    entropy: Tensor


class Quantizer(nn.Module):
    """A codebook looked up by direction: features and codes are L2-normalised first.

    The stored codes (V, E) are raw; everything that leaves this module is normalised.
    """

    def __init__(self, codebook_size: int, codebook_embed_dim: int) -> None:
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
        """Returns the normalised vectors (B, E, h, w) of codes.

        Args:
            codes: (B, T) int64, T = h * w in raster order.
            h: rows of the feature map.
            w: columns of the feature map.
        """
        vectors = F.normalize(self.embedding(codes), dim=-1)                        # (B, T, E)
        return vectors.transpose(1, 2).unflatten(2, (h, w)).contiguous()            # (B, E, h, w)

    def forward(self, latents: Tensor,
                entropy_ratio: float = 0.0) -> tuple[Tensor, QuantizerLosses, Tensor]:
        """Quantises latents (B, E, h, w), letting gradients pass straight through.

        Args:
            latents: (B, E, h, w) float of any precision.
            entropy_ratio: weight of the entropy term; 0 leaves it out.

        Returns:
            z_q (B, E, h, w) float32, QuantizerLosses, codes (B, T) int64.
        """
        batch, _, h, w = latents.shape
        z = _rows(latents)                                                          # (N, E)
        indices = nearest_codes(z, self._codebook())                                # (N,)
        z_q = F.normalize(self.embedding(indices).float(), dim=1)                   # (N, E)
        codebook_loss = F.mse_loss(z_q, z.detach())
        commitment = COMMITMENT_WEIGHT * F.mse_loss(z, z_q.detach())
        entropy = z.new_zeros(())
        if entropy_ratio:
            entropy = entropy_ratio * _entropy(z, self._codebook())
        losses = QuantizerLosses(codebook_loss, commitment, entropy)
        z_q = z + (z_q - z).detach()                # straight-through
        z_q = z_q.view(batch, h, w, -1).permute(0, 3, 1, 2).contiguous()            # (B, E, h, w)
        return z_q, losses, indices.view(batch, -1)

    def _codebook(self) -> Tensor:
        """Returns the normalised codes (V, E) float32."""
        return F.normalize(self.embedding.weight.float(), dim=1)

    @torch.no_grad()
    def remember_usage(self, codes: Tensor) -> None:
        """Appends codes of any shape to the last 65,536 in `codebook_used`, newest at the end."""
        recent = torch.cat([self.codebook_used, codes.flatten().to(self.codebook_used)])
        self.codebook_used.copy_(recent[-USAGE_WINDOW:])


def _rows(latents: Tensor) -> Tensor:
    """Returns latents (B, E, h, w) as normalised vectors (N, E) float32, N = B * h * w."""
    return F.normalize(latents.float().permute(0, 2, 3, 1).flatten(0, 2), dim=1)


def _entropy(z: Tensor, codebook: Tensor) -> Tensor:
    """Returns mean_n H(p_n) - H(mean_n p_n), of the soft assignments p_n (V,) of vectors to codes.

    It is least where a vector has one code, and all vectors together use all of them.

    Args:
        z: (N, E) float32, normalised.
        codebook: (V, E) float32, normalised.
    """
    entropies = []
    assignments = []
    for rows in _chunks(z, codebook):
        # Computed again in the backward pass, so that no (n, V) matrix outlives its chunk.
        entropy, assignment = checkpoint(_assignment_sums, rows, codebook, use_reentrant=False)
        entropies.append(entropy)
        assignments.append(assignment)
    sample_entropy = sum(entropies) / len(z)                                        # mean_n H(p_n)
    mean_p = sum(assignments) / len(z)                                              # (V,)
    return sample_entropy + (mean_p * torch.log(mean_p + 1e-5)).sum()


def _assignment_sums(rows: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sums over rows (n, E) of the entropy of p, a scalar, and of p, (V,)."""
    with full_float32(rows.device):
        logits = -_squared_distances(rows, codebook) / ENTROPY_TEMPERATURE          # (n, V)
    log_p = F.log_softmax(logits, dim=1)
    p = log_p.exp()
    return -(p * log_p).sum(), p.sum(0)


def _squared_distances(rows: Tensor, codebook: Tensor) -> Tensor:
    """Returns the squared distances (n, V) of rows (n, E) to the codes, less |row|^2.

    That is one value a row, which changes neither an argmin nor a softmax over the codes.
    """
    return torch.addmm(codebook.square().sum(1), rows, codebook.t(), alpha=-2)


def _chunks(z: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
    """Returns z (N, E) in chunks of rows whose distances to all codes fit the device's budget."""
    budget = CPU_BUDGET if z.device.type == "cpu" else GPU_BUDGET
    return z.split(max(1, budget // len(codebook)))


@torch.no_grad()
def nearest_codes(z: Tensor, codebook: Tensor) -> Tensor:
    """Finds the nearest code of every vector, in float32 whatever autocast and TF32 settings hold.

    Args:
        z: (N, E) float vectors.
        codebook: (V, E) float codes.

    Returns:
        (N,) int64: index of the code at the smallest Euclidean distance.
    """
    z = z.float()
    codebook = codebook.float()
    with full_float32(z.device):
        nearest = [_squared_distances(rows, codebook).argmin(1) for rows in _chunks(z, codebook)]
    return torch.cat(nearest)


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Computes float32 matrix products of the block in full float32.

    Autocast is off, and so are the TF32 and bfloat16 kernels; afterwards all is as it was.
    """
    with torch.autocast(device.type, enabled=False), contextlib.ExitStack() as on_exit:
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            for switch in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
                on_exit.callback(setattr, switch, "fp32_precision", switch.fp32_precision)
                switch.fp32_precision = "ieee"
        else:                                   # torch before 2.9 has one switch for all of them
            precision = torch.get_float32_matmul_precision()
            on_exit.callback(torch.set_float32_matmul_precision, precision)
            torch.set_float32_matmul_precision("highest")
        yield
