"""Which classes are sampled: the value of --labels, and the label of every sample.

Letters: B batch.
"""

from collections.abc import Sequence

import numpy as np


def parse_labels(labels: str, num_classes: int) -> list[int] | None:
    """Returns the classes that samples take in turn; None if they are drawn at random.

    Args:
        labels: the value of --labels: random, balanced (all classes), or class indices.
        num_classes: indices are below it.

    Raises:
        ValueError: --labels is something else.
    """
    if labels == "random":
        return None
    if labels == "balanced":
        return list(range(num_classes))
    try:
        listed = [int(label) for label in labels.split(",")]
    except ValueError:
        raise ValueError("--labels: expected random, balanced or class indices like 207,360, "
                         f"got {labels}") from None
    if not 0 <= min(listed) <= max(listed) < num_classes:
        raise ValueError(f"--labels: expected indices in 0 .. {num_classes - 1}, got {labels}")
    return listed


def labels_in_turn(classes: Sequence[int], indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns the labels (B,) int64 of samples that go through `classes` again and again.

    Every stretch of samples holds the classes evenly.

    Args:
        classes: class indices.
        indices: absolute indices of the B samples.
    """
    places = np.asarray(indices, dtype=np.int64) % len(classes)
    return np.asarray(classes, dtype=np.int64)[places]
