"""Deterministic annealing with balanced soft assignments: the start of the optimal clustering.

Letters: V codes of E dimensions, K clusters of S = V / K codes, R some of the codes.

At temperature T code x belongs to cluster k with the share
softmax_k((price_k - |x - center_k|^2) / T). Prices are held where every cluster has a soft size of
about S, centers move to the means of their shares, and T falls until nearly every share is 0 or 1.
Hot rounds see the coarse structure only, so poor local minima are avoided.
"""

from collections.abc import Callable

import numpy as np
import torch

START_TEMPERATURE = 0.4         # of the critical one
COOLING = 0.998                 # of the temperature in every round
SHARPNESS = 0.8                 # mean share of the nearest cluster at which annealing ends
LAST_TEMPERATURE = 1e-3         # of the first; equal codes keep shares from ever being sharp
OVER_RELAXATION = 1.5           # centers pass their means: near a split the plain move is slow
BALANCE = 0.4                   # largest relative error of a soft size at which centers may move
MAX_BALANCING = 6               # rounds between two moves of the centers
BLOCK_ROWS = 1024               # codes computed together: their shares stay in the CPU's cache
DAMPING = 0.2                   # added to the Hessian's diagonal, in units of S
MAX_PRICE_STEP = 2.0            # in units of the temperature


def anneal(codes: np.ndarray, start: np.ndarray,
           on_round: Callable[[], object] = lambda: None) -> tuple[np.ndarray, np.ndarray]:
    """Finds centers, and the prices that balance them, by deterministic annealing.

    Args:
        codes: (V, E) float32.
        start: (K,) int64, the codes that are the first centers; K divides V.
        on_round: called after every round.

    Returns:
        centers (K, E) float64 and prices (K,) float64.
    """
    size = len(codes) / len(start)
    centers = codes[start].astype(np.float64)                                       # (K, E)
    prices = np.zeros(len(start))                                                   # (K,)
    temperature = START_TEMPERATURE * critical_temperature(codes)
    last_temperature = LAST_TEMPERATURE * temperature
    blocks = _blocks(codes)
    num_rounds = 0
    balancing = 0                                   # rounds since the centers moved
    while temperature > last_temperature:
        # The soft sizes of the clusters and the sums of their shares, at the present prices.
        slopes = np.vstack([2 * centers.T, prices - (centers ** 2).sum(axis=1)]) / temperature
        slopes = slopes.astype(np.float32)                                          # (E+1, K)
        sums = np.zeros(1)
        for block in blocks:
            sums = sums + soft_shares(block, slopes).T @ block                      # (K, E+1)
        soft_sizes = sums[:, -1]                                                    # (K,)

        # Prices move towards equal soft sizes; one block of the codes stands for all of them.
        sample = soft_shares(blocks[num_rounds % len(blocks)], slopes)              # (R, K)
        prices += temperature * _price_step(sample, soft_sizes, size)
        prices -= prices.mean()
        num_rounds += 1
        balancing += 1
        on_round()

        # Once the sizes are about equal, the centers move and the temperature falls.
        is_unbalanced = np.abs(soft_sizes / size - 1).max() > BALANCE
        if is_unbalanced and balancing < MAX_BALANCING:
            continue
        means = sums[:, :-1] / np.maximum(soft_sizes, 1e-3)[:, None]                # (K, E)
        centers += OVER_RELAXATION * (means - centers)
        temperature = COOLING ** balancing * temperature
        balancing = 0
        if sample.max(axis=1).mean() > SHARPNESS:
            break
    return centers, prices


def _blocks(codes: np.ndarray) -> list[np.ndarray]:
    """Deals the codes out to blocks (R, E+1) of at most BLOCK_ROWS, with a last column of ones.

    The shares' product with a block sums the shares in that column, next to the codes.
    """
    with_ones = np.concatenate([codes, np.ones((len(codes), 1), np.float32)], axis=1)   # (V, E+1)
    num_blocks = -(-len(codes) // BLOCK_ROWS)
    return [np.ascontiguousarray(with_ones[first::num_blocks]) for first in range(num_blocks)]


def soft_shares(rows: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    """Returns softmax(rows @ slopes), (R, K) float32, of rows (R, E+1) and slopes (E+1, K)."""
    logits = torch.from_numpy(rows @ slopes)
    # torch's softmax is several times faster than NumPy's exp.
    return torch.softmax(logits, 1, out=logits).numpy()


def critical_temperature(codes: np.ndarray) -> float:
    """Returns twice the largest variance of the codes in any direction, 0 when they are all equal.

    Above this temperature the state with all centers at the mean is stable, so annealing has
    nothing to find there.
    """
    deviations = codes.astype(np.float64) - codes.mean(axis=0, dtype=np.float64)
    critical = 2 * np.linalg.eigvalsh(deviations.T @ deviations / len(codes))[-1]
    is_more_than_rounding = critical > 1e-12 * (codes ** 2).sum(axis=1).max()
    return critical if is_more_than_rounding else 0.0


def _price_step(sample: np.ndarray, soft_sizes: np.ndarray, size: float) -> np.ndarray:
    """Returns a Newton step of the prices to equal soft sizes, (K,) in units of the temperature.

    Args:
        sample: (R, K) shares of some of the codes, for the Hessian.
        soft_sizes: (K,) of all codes.
        size: S, the size that every cluster is to have.
    """
    overlap = (sample.T @ sample).astype(np.float64) * (soft_sizes.sum() / len(sample))  # (K, K)
    np.fill_diagonal(overlap, 0)
    hessian = np.diag(overlap.sum(axis=1) + DAMPING * size) - overlap
    step = np.linalg.solve(hessian, size - soft_sizes)
    return np.clip(step, -MAX_PRICE_STEP, MAX_PRICE_STEP)
