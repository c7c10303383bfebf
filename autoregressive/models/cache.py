"""The key-value cache of decoding, and the place in it where a step stands.

Letters: B batch, G key-value heads, L length of the cache.
"""

import torch


class DecodePosition:
    """Where a decode step stands: the index it writes, and how much of the cache it reads.

    A position given as a number reads exactly what is filled. A position on the device (for graphs that are recorded
    once and run for many positions) reads `length`, a bucket of it, and hides what is not filled yet.
    """

    def __init__(self, position, device, length=None):
        """
        Args:
            position: int, or int64 tensor (1,) on the device; then `length`, above it, is needed.
        """
        if isinstance(position, int):
            self.index = torch.arange(position, position + 1, device=device)
            self.length, self.hidden = position + 1, None
        else:
            self.index, self.length = position, length
            self.hidden = torch.arange(length, device=device) > position


class KVCache:
    """Keys and values of all layers, allocated once for a batch and written in place by GPT.decode_step."""

    def __init__(self, config, batch_size, dtype, device):
        shape = (config.num_layers, batch_size, config.kv_heads, config.num_tokens, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)                  # (layers, B, G, L, head_dim)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def rows(self, count):
        """Returns a cache that shares the first `count` rows with this one."""
        part = object.__new__(KVCache)
        part.keys, part.values = self.keys[:, :count], self.values[:, :count]
        return part
