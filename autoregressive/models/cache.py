"""The key-value cache of decoding, products with it, and the place in it where a step stands.

Letters: B batch, G key-value heads, L length of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoregressive.models.config import GPTConfig


@dataclass(frozen=True)
class DecodePosition:
    """Where a decode step stands: the place that it writes, and how much of the cache it reads.

    Attributes:
        index: (1,) int64 on the device: the place in the sequence.
        length: positions that are read, from the first: more than `index`, at most L.
        hidden: (length,) bool, which of them are not filled yet; None if all are.
    """

    index: Tensor
    length: int
    hidden: Tensor | None = None

    @classmethod
    def in_bucket(cls, index: Tensor, length: int) -> DecodePosition:
        """Returns a position for any index of a bucket, so that one captured step serves them all.

        Args:
            index: (1,) int64 on the device.
            length: of the bucket, counted from the first position of the sequence.
        """
        return cls(index, length, torch.arange(length, device=index.device) > index)


@dataclass(frozen=True, eq=False)
class KVCache:
    """Keys and values of all layers, allocated once for a batch, written in place by decode_step.

    Each layer has tensors of its own: if a compiler saw a part of one large tensor written, it
    would copy all of it.

    Attributes:
        keys, values: of every layer, (B, G, L, head_dim).
    """

    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def empty(cls, config: GPTConfig, batch_size: int, dtype: torch.dtype,
              device: torch.device) -> KVCache:
        """Returns a cache of zeros for `batch_size` sequences of config.num_tokens positions."""
        shape = (batch_size, config.kv_heads, config.num_tokens, config.head_dim)
        layers = range(config.num_layers)
        return cls(keys=[torch.zeros(shape, dtype=dtype, device=device) for _ in layers],
                   values=[torch.zeros(shape, dtype=dtype, device=device) for _ in layers])

    def rows(self, count: int) -> KVCache:
        """Returns a cache that shares the first `count` rows with this one."""
        return KVCache(keys=[keys[:count] for keys in self.keys],
                       values=[values[:count] for values in self.values])


def multiply_in_float32(rows: Tensor, cached: Tensor) -> Tensor:
    """Returns rows @ cached, computed and returned in float32.

    Scores and probabilities rounded to bfloat16 give attention up to five times the error.

    Args:
        rows: (..., R, S).
        cached: (..., S, N), of the cache.

    Returns:
        (..., R, N).
    """
    if torch.compiler.is_compiling():
        # A compiler fuses this, but would put a float32 copy of the cache before a matrix product.
        return (rows.float()[..., None] * cached.float()[..., None, :, :]).sum(-2)
    return rows.float() @ cached.float()
