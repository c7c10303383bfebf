"""Exactly balanced clustering of a codebook, and the order of the codes inside a cluster. Pure functions on arrays.

V codes of E dimensions, K clusters of exactly S codes each, V = K * S. An `assignment` is (V,) int64, the cluster of
each code; the SSE is the sum of squared distances of the codes to the means of their clusters. Three methods:

`cluster_greedy`   Algorithm 1 of the paper (arXiv 2501.00880), as published.
`cluster_optimal`  a start by deterministic annealing with balanced soft assignments, then rounds of means and EXACT
                   assignments, alternating with swaps of two codes, until neither lowers the SSE.
`cluster_random`   the control of an experiment: clusters that mean nothing.

All compute on one thread, whatever the machine has, so results do not depend on the number of threads.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from threadpoolctl import threadpool_limits  # comes with scikit-learn

from tokenizer.annealing import anneal
from tokenizer.balanced_assignment import (
    assign_exactly,
    assignment_is_optimal,
    distance_costs,
    fill_clusters,
    fill_in_order,
    list_members,
    swap_codes,
)

GREEDY_ROUNDS = 100


@dataclass
class Clustering:
    """What a method found.

    Attributes:
        assignment: (V,) int64, the cluster of each code.
        sse: sum of squared distances to the means, in float64.
        sse_trace: the SSE after each round of hard assignments.
        num_swaps: how many swaps of two codes were made.
    """

    assignment: np.ndarray
    sse: float
    sse_trace: Sequence[float] = ()
    num_swaps: int = 0


def check_cluster_size(num_codes: int, cluster_size: int) -> None:
    """Raises ValueError unless clusters of `cluster_size` codes divide a codebook of `num_codes`."""
    if cluster_size <= 0 or num_codes % cluster_size:
        raise ValueError(f"cluster size: expected a positive divisor of the {num_codes} codes, got {cluster_size}")


def normalize_codes(codebook: torch.Tensor) -> np.ndarray:
    """Returns the codes divided by their lengths, (V, E) float32 array; zero rows stay zero.

    Args:
        codebook: (V, E) tensor of any float dtype.
    """
    return torch.nn.functional.normalize(codebook.detach().float(), dim=1).numpy()


def cluster_means(codes: np.ndarray, assignment: np.ndarray, num_clusters: int) -> np.ndarray:
    """Returns the means of the clusters, (K, E) float64."""
    return codes.astype(np.float64)[list_members(assignment, num_clusters)].mean(axis=1)


def balanced_sse(codes: np.ndarray, assignment: np.ndarray, num_clusters: int) -> float:
    """Returns the sum of squared distances of codes (V, E) to the means of their clusters, in float64."""
    means = cluster_means(codes, assignment, num_clusters)
    return float(((codes.astype(np.float64) - means[assignment]) ** 2).sum())


def start_codes(num_codes: int, num_clusters: int, seed: int) -> np.ndarray:
    """Returns the published start for a seed: (K,) int64, the first K of torch.randperm(V) after manual_seed(seed)."""
    return torch.randperm(num_codes, generator=torch.Generator().manual_seed(seed))[:num_clusters].numpy()


def cluster_random(codes: np.ndarray, num_clusters: int, seed: int) -> Clustering:
    """Deals the codes out at random: balanced clusters without structure, to compare others with.

    Args:
        codes: (V, E) float32, normalized.
        num_clusters: K, which divides V.
        seed: of the permutation whose first V / K codes are the first cluster, and so on.

    Returns:
        Clustering
    """
    num_codes = len(codes)
    assignment = np.empty(num_codes, np.int64)
    assignment[start_codes(num_codes, num_codes, seed)] = np.arange(num_codes) // (num_codes // num_clusters)
    sse = balanced_sse(codes, assignment, num_clusters)
    return Clustering(assignment, sse, [sse])


def cluster_greedy(codes: np.ndarray, start: np.ndarray, keep_best: bool = False,
                   on_round: Callable[[], object] = lambda: None) -> Clustering:
    """Clusters by Algorithm 1 of the paper.

    Each round visits the codes in ascending distance to their nearest center and gives each to its nearest cluster with
    room; ties go to the lower code and the lower cluster. It ends when old and new centers agree or after 100 rounds.

    Args:
        codes: (V, E) float32, normalized.
        start: (K,) int64, the codes that are the first centers; K divides V.
        keep_best: whether to return the round of least SSE instead of the last, which is the published behaviour.
        on_round: called after every round.

    Returns:
        Clustering
    """
    num_clusters = len(start)
    codes = codes.astype(np.float64)
    centers, assignments, trace = codes[start], [], []
    with threadpool_limits(1):
        for _ in range(GREEDY_ROUNDS):
            costs = distance_costs(codes, centers)
            distances = costs.min(axis=1) + (codes ** 2).sum(axis=1)
            assignment = fill_in_order(costs, np.argsort(distances, kind="stable"))
            assignments.append(assignment)
            trace.append(balanced_sse(codes, assignment, num_clusters))
            old_centers, centers = centers, cluster_means(codes, assignment, num_clusters)
            on_round()
            if np.allclose(centers, old_centers):
                break
    chosen = trace.index(min(trace)) if keep_best else -1
    return Clustering(assignments[chosen], trace[chosen], trace)


def cluster_optimal(codes: np.ndarray, start: np.ndarray,
                    on_round: Callable[[], object] = lambda: None) -> Clustering:
    """Clusters by annealing, exact assignments and swaps; the result satisfies `certify`.

    Args:
        codes: (V, E) float32, normalized.
        start: (K,) int64, the codes that are the first centers; K divides V.
        on_round: called after every round.

    Returns:
        Clustering
    """
    num_clusters = len(start)
    if num_clusters in (1, len(codes)):              # one answer only, up to names
        assignment = np.arange(len(codes)) * num_clusters // len(codes)
        return Clustering(assignment, balanced_sse(codes, assignment, num_clusters))
    with threadpool_limits(1):
        centers, prices = anneal(codes, start, on_round)
        codes = codes.astype(np.float64)
        assignment = fill_clusters(distance_costs(codes, centers) - prices)
        trace, total_swaps = [], 0
        while True:
            assignment = assign_exactly(distance_costs(codes, centers), assignment)
            trace.append(balanced_sse(codes, assignment, num_clusters))
            old_centers, centers = centers, cluster_means(codes, assignment, num_clusters)
            on_round()
            if np.array_equal(centers, old_centers):            # every round lowers the SSE, so it comes to this
                assignment, num_swaps = swap_codes(codes, assignment, num_clusters)
                if not num_swaps:
                    return Clustering(assignment, trace[-1], trace, total_swaps)
                total_swaps += num_swaps
                centers = cluster_means(codes, assignment, num_clusters)


def certify(codes: np.ndarray, assignment: np.ndarray, num_clusters: int) -> dict[str, bool]:
    """Checks what `cluster_optimal` promises of its result.

    Args:
        codes: (V, E) float32, normalized.
        assignment: (V,) int64.
        num_clusters: K.

    Returns:
        dict of claim -> bool: `balanced`, `assignment_is_optimal` for the means of the clusters (no negative cycle
        among them), `no_swap_improves` (no exchange of two codes lowers the SSE).
    """
    codes = codes.astype(np.float64)
    is_balanced = bool((np.bincount(assignment, minlength=num_clusters) * num_clusters == len(codes)).all())
    is_optimal = no_swap_improves = is_balanced and num_clusters in (1, len(codes))
    if is_balanced and not is_optimal:
        with threadpool_limits(1):
            costs = distance_costs(codes, cluster_means(codes, assignment, num_clusters))
            is_optimal = assignment_is_optimal(costs, assignment)
            no_swap_improves = swap_codes(codes, assignment, num_clusters)[1] == 0
    return {"balanced": is_balanced, "assignment_is_optimal": is_optimal, "no_swap_improves": no_swap_improves}


def order_clusters(codes: np.ndarray, assignment: np.ndarray, num_clusters: int) -> np.ndarray:
    """Lists the codes cluster by cluster, neighbours inside a cluster side by side.

    The member nearest the mean stands at position (S-1)//2, its nearest neighbour right of it; then in turn, the left
    end first, each end takes the unplaced code nearest to its outermost code. Distances are Euclidean between
    normalized codes; ties go to the lowest code.

    Args:
        codes: (V, E) float32, normalized.
        assignment: (V,) int64, balanced.
        num_clusters: K.

    Returns:
        (V,) int64: the old index of the code at each new index j*S + p.
    """
    members = list_members(assignment, num_clusters)
    with threadpool_limits(1):
        return np.concatenate([cluster[_chain(codes[cluster].astype(np.float64))] for cluster in members])


def _chain(points):
    """Returns the order of the points (S, E) of one cluster."""
    chain, target = deque(), points.mean(axis=0)
    for place in range(len(points)):
        distances = ((points - target) ** 2).sum(axis=1)
        distances[list(chain)] = np.inf
        nearest = distances.argmin()
        if place % 2:                                # the first at the middle, the second right of it, and in turn
            chain.append(nearest)
            target = points[chain[0]]
        else:
            chain.appendleft(nearest)
            target = points[chain[-1]]
    return list(chain)


def mapping_of(order: np.ndarray) -> np.ndarray:
    """Returns the inverse of an order, (V,) int64: mapping[old] = new."""
    return np.argsort(order)
