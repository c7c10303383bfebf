"""Deterministic annealing with balanced soft assignments: the start of the optimal clustering.

Letters: V codes of E dimensions, K clusters of S = V / K codes, R some of the codes.

At temperature T code x belongs to cluster k with the membership
softmax_k((price_k - |x - centre_k|^2) / T): a soft assignment. Its sum over the codes is the soft
size of the cluster, which the prices hold near S. Centres move to the weighted means, and T falls
until nearly all are 0 or 1. Hot rounds see the coarse structure only, so poor local minima
are avoided. In tight groups of codes the soft sizes become steps of the prices long before that;
once these cannot follow, annealing ends, as colder rounds would undo what hot ones have found.
"""

from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, cg

START_TEMPERATURE = 0.4         # of the critical one
COOLING = 0.998                 # of the temperature in every round
FEW_CLUSTERS = 512
FASTER_COOLING = 0.997          # for more clusters: 1024 lose no SSE by it, 512 and 128 do
SHARPNESS = 0.8                 # mean largest membership of a code at which annealing ends
LAST_TEMPERATURE = 1e-3         # of the first; equal codes never belong to one alone
OVER_RELAXATION = 1.5           # centres pass their means: near a split the plain move is slow
BALANCE = 0.4                   # largest relative error of a soft size at which centres may move
MAX_BALANCING = 6               # rounds between two moves of the centres
MAX_UNBALANCED = 3              # moves in a row without balance at which annealing ends
BLOCK_ROWS = 1024               # codes computed together: all stays in the CPU's cache
DAMPING = 0.2                   # added to the Hessian's diagonal, in units of S
STEP_ERROR = 0.01               # relative residual at which conjugate gradients end
MAX_ITERATIONS = 20             # of conjugate gradients; 4 are usual
MAX_PRICE_STEP = 2.0            # in units of the temperature


def anneal(codes: np.ndarray, start: np.ndarray,
           on_round: Callable[[], object] = lambda: None) -> tuple[np.ndarray, np.ndarray]:
    """Finds centres, and the prices that balance them, by deterministic annealing.

    Args:
        codes: (V, E) float32.
        start: (K,) int64, the codes that are the first centres; K divides V.
        on_round: called after every round.

    Returns:
        centres (K, E) float64 and prices (K,) float64.
    """
    size = len(codes) / len(start)
    centers = codes[start].astype(np.float64)                                       # (K, E)
    prices = np.zeros(len(start))                                                   # (K,)
    temperature = START_TEMPERATURE * critical_temperature(codes)
    last_temperature = LAST_TEMPERATURE * temperature
    cooling = COOLING if len(start) <= FEW_CLUSTERS else FASTER_COOLING
    blocks = _blocks(codes)
    memory = np.empty((len(blocks[0]), len(start)), np.float32)     # of all memberships (R, K)
    num_rounds = 0
    rounds_at_rest = 0                              # since the centres moved
    num_unbalanced = 0                              # moves of the centres in a row
    while temperature > last_temperature and num_unbalanced < MAX_UNBALANCED:
        slopes = np.vstack([2 * centers.T, prices - (centers ** 2).sum(axis=1)])    # (E+1, K)
        slopes = (slopes / temperature).astype(np.float32)
        sums = _sum_softly(blocks, slopes, memory)                                  # (K, E+1)
        soft_sizes = sums[:, -1]                                                    # (K,)

        # Move the prices towards equal sizes. One block of the codes, another in each round, is
        # enough for the direction of the step.
        block = blocks[num_rounds % len(blocks)]
        memberships = soft_assignment(block, slopes, memory)                        # (R, K)
        prices += temperature * _price_step(memberships, soft_sizes, size)
        prices -= prices.mean()                     # only their differences count
        num_rounds += 1
        rounds_at_rest += 1
        on_round()

        # The centres wait until the sizes are about equal, but not for ever.
        is_balanced = np.abs(soft_sizes / size - 1).max() <= BALANCE
        if not is_balanced and rounds_at_rest < MAX_BALANCING:
            continue

        # Then they move, and it gets cooler, by as much as in all the rounds that this took.
        means = sums[:, :-1] / np.maximum(soft_sizes, 1e-3)[:, None]                # (K, E)
        centers += OVER_RELAXATION * (means - centers)
        temperature = cooling ** rounds_at_rest * temperature
        rounds_at_rest = 0
        num_unbalanced = 0 if is_balanced else num_unbalanced + 1
        is_sharp = memberships.max(axis=1).mean() > SHARPNESS
        if is_sharp:
            break
    return centers, prices


def _blocks(codes: np.ndarray) -> list[np.ndarray]:
    """Deals the codes out to blocks (R, E+1) of at most BLOCK_ROWS, with a last column of ones.

    So a product with their memberships sums up the memberships next to the codes.
    """
    with_ones = np.concatenate([codes, np.ones((len(codes), 1), np.float32)], axis=1)   # (V, E+1)
    num_blocks = -(-len(codes) // BLOCK_ROWS)
    return [np.ascontiguousarray(with_ones[first::num_blocks]) for first in range(num_blocks)]


def _sum_softly(blocks: list[np.ndarray], slopes: np.ndarray, memory: np.ndarray) -> np.ndarray:
    """Returns the sum of every cluster's codes in a soft assignment and its size, (K, E+1) float64.

    The column of ones beside the codes sums memberships alone: the size is the last column.
    """
    sums = np.zeros(slopes.T.shape)
    for block in blocks:
        sums += soft_assignment(block, slopes, memory).T @ block
    return sums


def soft_assignment(block: np.ndarray, slopes: np.ndarray, memory: np.ndarray) -> np.ndarray:
    """Returns the memberships softmax(block @ slopes), (R, K) float32.

    Args:
        block: (R, E+1) float32, of _blocks.
        slopes: (E+1, K) float32, 2 centre_k / T above (price_k - |centre_k|^2) / T.
        memory: (R or more, K) float32, which the memberships overwrite: to fill fresh memory
            takes longer than to compute them.
    """
    logits = torch.from_numpy(np.matmul(block, slopes, out=memory[:len(block)]))
    # torch's softmax is several times faster than NumPy's exp.
    return torch.softmax(logits, 1, out=logits).numpy()


def critical_temperature(codes: np.ndarray) -> float:
    """Returns twice the largest variance of the codes in any direction, 0 when they are all equal.

    Above this temperature the state with all centres at the mean is stable, so annealing has
    nothing to find there.
    """
    deviations = codes.astype(np.float64) - codes.mean(axis=0, dtype=np.float64)
    critical = 2 * np.linalg.eigvalsh(deviations.T @ deviations / len(codes))[-1]
    is_more_than_rounding = critical > 1e-12 * (codes ** 2).sum(axis=1).max()
    return critical if is_more_than_rounding else 0.0


def _price_step(memberships: np.ndarray, soft_sizes: np.ndarray, size: float) -> np.ndarray:
    """Returns a Newton step of the prices to equal soft sizes, (K,) in units of the temperature.

    Args:
        memberships: (R, K), soft assignment of some of the codes, for the Hessian.
        soft_sizes: (K,) of all codes.
        size: S, the size that every cluster is to have.
    """
    scale = soft_sizes.sum() / len(memberships)     # from these codes to all of them
    damping = DAMPING * size
    errors = size - soft_sizes                                                      # (K,)
    if len(errors) <= FEW_CLUSTERS:
        step = _solve_directly(memberships, scale, damping, errors)
    else:
        step = _solve_iteratively(memberships, scale, damping, errors)
    return np.clip(step, -MAX_PRICE_STEP, MAX_PRICE_STEP)


def _solve_directly(memberships: np.ndarray, scale: float, damping: float,
                    errors: np.ndarray) -> np.ndarray:
    """Returns Hessian^-1 errors, (K,), for the damped Hessian of memberships (R, K) times scale."""
    # How much two clusters have of the same codes.
    overlap = (memberships.T @ memberships).astype(np.float64)                      # (K, K)
    overlap *= scale
    np.fill_diagonal(overlap, 0)
    hessian = np.diag(overlap.sum(axis=1) + damping) - overlap
    return np.linalg.solve(hessian, errors)


def _solve_iteratively(memberships: np.ndarray, scale: float, damping: float,
                       errors: np.ndarray) -> np.ndarray:
    """Returns about the same by conjugate gradients, without the K^3 operations of the other."""
    # The memberships of a code sum to 1, so these are the row sums of their whole product.
    row_sums = scale * memberships.sum(axis=0)                                      # (K,)
    diagonal = row_sums - scale * np.einsum("rk,rk->k", memberships, memberships) + damping

    def times_hessian(step: np.ndarray) -> np.ndarray:
        changes = memberships @ step.astype(np.float32)                             # (R,)
        return (row_sums + damping) * step - scale * (changes @ memberships)

    shape = (len(errors), len(errors))
    hessian = LinearOperator(shape, times_hessian, dtype=np.float64)
    inverse_diagonal = LinearOperator(shape, lambda step: step / diagonal, dtype=np.float64)
    step, _ = cg(hessian, errors, rtol=STEP_ERROR, maxiter=MAX_ITERATIONS, M=inverse_diagonal)
    return step
