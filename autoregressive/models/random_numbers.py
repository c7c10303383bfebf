"""The numbers that a sample is a function of.

A sample is a function of (seed, index): its label and its uniforms come from Philox with the key
[seed, index], one uniform for each position, so it does not matter which process makes it or what
else is in its batch.

Letters: B batch, T tokens.
"""

from collections.abc import Sequence

import numpy as np


def random_numbers(seed: int, indices: Sequence[int] | np.ndarray, num_classes: int,
                   num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws the label and the uniforms of samples.

    Args:
        seed: the run's seed, 0 .. 2^64 - 1.
        indices: absolute indices of the samples.
        num_classes: labels are drawn uniformly from 0 .. num_classes - 1.
        num_tokens: T.

    Returns:
        labels (B,) int64 and uniforms (B, T) float64 in [0, 1).
    """
    draws = np.empty((len(indices), 1 + num_tokens))
    for row, index in enumerate(indices):
        key = np.array([seed, index], dtype=np.uint64)
        draws[row] = np.random.Generator(np.random.Philox(key=key)).random(1 + num_tokens)
    labels = (draws[:, 0] * num_classes).astype(np.int64)
    return labels, draws[:, 1:]
