"""The key-value cache of decoding, and the place in it where a step stands.

Letters: B batch, G key-value heads, L length of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from autoregressive.models.gpt import GPTConfig


@dataclass(frozen=True)
class DecodePosition:
    """Where a decode step stands: the place that it writes, and how much of the cache it reads.

    Attributes:
        index: (1,) int64 on the device: the place in the sequence.
        length: positions that are read, from the first: more than `index`, at most L.
        hidden: (length,) bool, what of them is not filled yet; None if all are.
    """

    index: Tensor
    length: int
    hidden: Tensor | None = None

    @classmethod
    def in_bucket(cls, index: Tensor, length: int) -> DecodePosition:
        """Returns a position that a step recorded for all of a bucket can stand at: its length is the bucket's."""
        return cls(index, length, torch.arange(length, device=index.device) > index)


class KVCache:
    """Keys and values of all layers, allocated once for a batch and written in place by GPT.decode_step.

    Each layer has tensors of its own: a compiler that sees a part of one large tensor written copies all of it.

    Attributes:
        keys, values: of every layer, (B, G, L, head_dim).
    """

    def __init__(self, config: GPTConfig, batch_size: int, dtype: torch.dtype, device: torch.device):
        shape = (batch_size, config.kv_heads, config.num_tokens, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]

    def rows(self, count: int) -> KVCache:
        """Returns a cache that shares the first `count` rows with this one."""
        part = object.__new__(KVCache)
        part.keys = [keys[:count] for keys in self.keys]
        part.values = [values[:count] for values in self.values]
        return part
