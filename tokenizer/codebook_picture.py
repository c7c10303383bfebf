"""A picture of a codebook before and after its codes are put in order."""

from pathlib import Path

import numpy as np
import torch

from autoregressive.runtime.files import atomic_write

MOST_CODES = 512        # a side of the picture; larger codebooks are thinned out
NUM_GAPS = 40           # points of a curve


def plot_codebooks(path: Path, codes: np.ndarray, order: np.ndarray) -> None:
    """Plots the distances between codes, before and after, and how they grow with the index.

    Args:
        path: of the PNG.
        codes: (V, E) float32, normalised.
        order: (V,) int64, the old index of the code at each new index.
    """
    # Imported here: it takes half a second.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.2), layout="constrained")
    before, after, growth = figure.subplots(1, 3)
    for axis, title, arranged in ((before, "before", codes), (after, "after", codes[order])):
        image = axis.imshow(_distances(arranged), cmap="viridis", vmin=0, vmax=2,
                            extent=(0, len(codes), len(codes), 0))
        axis.set(title=f"distance of codes, {title}", xlabel="index", ylabel="index")
        gaps, means = _mean_distances(arranged)
        growth.semilogx(gaps, means, label=title)
    figure.colorbar(image, ax=after)
    growth.set(title="mean distance of two codes", xlabel="difference of their indices",
               ylim=(0, None))
    growth.grid(alpha=0.3)
    growth.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


def _distances(codes: np.ndarray) -> np.ndarray:
    """Returns the distances of some of the codes to each other, evenly spread over the codebook."""
    step = max(1, len(codes) // MOST_CODES)
    block = torch.from_numpy(codes[::step])
    # Not by a matrix product, whose rounding depends on the number of threads.
    return torch.cdist(block, block, compute_mode="donot_use_mm_for_euclid_dist").numpy()


def _mean_distances(codes: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Returns differences of indices, and the mean distance of two codes that far apart."""
    gaps = np.unique(np.geomspace(1, max(1, len(codes) // 2), NUM_GAPS).astype(int))
    gaps = gaps[gaps < len(codes)]                  # a single code has no neighbour
    means = [np.linalg.norm(codes[gap:] - codes[:-gap], axis=1).mean() for gap in gaps]
    return gaps, means
