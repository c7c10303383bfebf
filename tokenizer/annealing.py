"""Deterministic annealing with balanced soft assignments: the start of the optimal clustering.

At temperature T code x belongs to cluster k with the share softmax_k((price_k - |x - center_k|^2) / T). Prices are
held where every cluster has a soft size of about S = V / K, centers move to the means of their shares, and T falls
until nearly every share is 0 or 1. Hot rounds see the coarse structure only, so poor local minima are passed by.
"""

import numpy as np
import torch

START_TEMPERATURE = 0.4         # of the critical one
COOLING = 0.998                 # of the temperature in every round
SHARPNESS = 0.8                 # mean share of the nearest cluster at which annealing ends
LAST_TEMPERATURE = 1e-3         # of the first; equal codes keep shares from ever being sharp
OVER_RELAXATION = 1.5           # centers move past their means: near a split the plain move is slow
BALANCE = 0.4                   # largest relative error of a soft size at which the centers may move
MAX_BALANCING = 6               # rounds between two moves of the centers
BLOCK_ROWS = 1024               # codes handled together: their shares stay in the processor's cache
DAMPING = 0.2                   # added to the Hessian's diagonal, in units of S
MAX_PRICE_STEP = 2.0            # in units of the temperature


def anneal(codes, start, on_round=lambda: None):
    """Finds centers, and the prices that balance them, by deterministic annealing.

    Args:
        codes: (V, E) float32.
        start: (K,) int64, the codes that are the first centers; K divides V.
        on_round: called after every round.

    Returns:
        centers (K, E) float64 and prices (K,) float64.
    """
    size = len(codes) / len(start)
    centers, prices = codes[start].astype(np.float64), np.zeros(len(start))
    temperature = START_TEMPERATURE * critical_temperature(codes)
    last_temperature = LAST_TEMPERATURE * temperature
    with_ones = np.concatenate([codes, np.ones((len(codes), 1), np.float32)], axis=1)  # (V, E+1)
    num_blocks = -(-len(codes) // BLOCK_ROWS)
    blocks = [np.ascontiguousarray(with_ones[first::num_blocks]) for first in range(num_blocks)]
    num_rounds = balancing = 0
    while temperature > last_temperature:
        slopes = np.vstack([2 * centers.T, prices - (centers ** 2).sum(axis=1)]) / temperature
        slopes = slopes.astype(np.float32)                                              # (E+1, K)
        sums = sum((soft_shares(block, slopes).T @ block for block in blocks), np.zeros(1))  # (K, E+1)
        soft_sizes = sums[:, -1]
        sample = soft_shares(blocks[num_rounds % num_blocks], slopes)                   # stands for all codes
        prices += temperature * _price_step(sample, soft_sizes, size)
        prices -= prices.mean()
        num_rounds, balancing = num_rounds + 1, balancing + 1
        on_round()
        if np.abs(soft_sizes / size - 1).max() > BALANCE and balancing < MAX_BALANCING:
            continue
        means = sums[:, :-1] / np.maximum(soft_sizes, 1e-3)[:, None]
        centers += OVER_RELAXATION * (means - centers)
        temperature, balancing = COOLING ** balancing * temperature, 0
        if sample.max(axis=1).mean() > SHARPNESS:
            break
    return centers, prices


def soft_shares(rows, slopes):
    """Returns softmax(rows @ slopes), (R, K) float32; torch's softmax is several times faster than NumPy's exp."""
    logits = torch.from_numpy(rows @ slopes)
    return torch.softmax(logits, 1, out=logits).numpy()


def critical_temperature(codes):
    """Returns twice the largest variance of the codes in any direction, 0 when they are all equal.

    Above this temperature the state with all centers at the mean is stable, so annealing has nothing to find there.
    """
    deviations = codes.astype(np.float64) - codes.mean(axis=0, dtype=np.float64)
    critical = 2 * np.linalg.eigvalsh(deviations.T @ deviations / len(codes))[-1]
    return critical if critical > 1e-12 * (codes ** 2).sum(axis=1).max() else 0.0


def _price_step(sample, soft_sizes, size):
    """Returns a Newton step of the prices to equal soft sizes, in units of the temperature."""
    overlap = (sample.T @ sample).astype(np.float64) * (soft_sizes.sum() / len(sample))     # (K, K)
    np.fill_diagonal(overlap, 0)
    hessian = np.diag(overlap.sum(axis=1) + DAMPING * size) - overlap
    return np.clip(np.linalg.solve(hessian, size - soft_sizes), -MAX_PRICE_STEP, MAX_PRICE_STEP)
