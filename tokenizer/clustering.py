"""Exactly balanced clustering of a codebook, and the order of the codes inside a cluster.

These are pure functions on arrays. Letters: V codes of E dimensions, K clusters of exactly S codes
each, V = K * S. An `assignment` is (V,) int64, the cluster of each code; the SSE is the sum of
squared distances of the codes to the means of their clusters. Three methods:

`cluster_greedy`   Algorithm 1 of the paper (arXiv 2501.00880), as published.
`cluster_optimal`  a start by deterministic annealing with balanced soft assignments, then rounds
                   of means and EXACT assignments. Early ones alternate with divisions of two
                   clusters, late ones with swaps of two codes, until neither lowers the SSE.
`cluster_random`   the control of an experiment: balanced clusters without structure.

All compute on one thread, so results do not depend on how many threads the machine has.
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
    divide_pairs,
    fill_clusters,
    fill_in_order,
    list_members,
    swap_codes,
)

GREEDY_ROUNDS = 100
SLOW_FALL = 0.99                # of the SSE in a round of exact assignments, when pairs are divided


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
    """Returns the SSE of codes (V, E) in an assignment to `num_clusters` clusters, in float64."""
    means = cluster_means(codes, assignment, num_clusters)
    return float(((codes.astype(np.float64) - means[assignment]) ** 2).sum())


def start_codes(num_codes: int, num_clusters: int, seed: int) -> np.ndarray:
    """Returns the published start for a seed: the first K of torch.randperm(V), (K,) int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_codes, generator=generator)[:num_clusters].numpy()


def cluster_random(codes: np.ndarray, num_clusters: int, seed: int) -> Clustering:
    """Deals the codes out at random: balanced clusters without structure, to compare others with.

    Args:
        codes: (V, E) float32, normalised.
        num_clusters: K, which divides V.
        seed: of the permutation whose first V / K codes are the first cluster, and so on.
    """
    num_codes = len(codes)
    cluster_size = num_codes // num_clusters
    permutation = start_codes(num_codes, num_codes, seed)
    assignment = np.empty(num_codes, np.int64)
    assignment[permutation] = np.arange(num_codes) // cluster_size
    sse = balanced_sse(codes, assignment, num_clusters)
    return Clustering(assignment, sse, [sse])


def cluster_greedy(codes: np.ndarray, start: np.ndarray, keep_best: bool = False,
                   on_round: Callable[[], object] = lambda: None) -> Clustering:
    """Clusters by Algorithm 1 of the paper.

    Each round visits the codes in ascending distance to their nearest centre and gives each to its
    nearest cluster with room; ties go to the lower code and the lower cluster. It ends when old and
    new centres agree or after 100 rounds.

    Args:
        codes: (V, E) float32, normalised.
        start: (K,) int64, the codes that are the first centres; K divides V.
        keep_best: whether to return the round of least SSE; the last one, as published, otherwise.
        on_round: called after every round.
    """
    num_clusters = len(start)
    codes = codes.astype(np.float64)
    centers = codes[start]
    assignments = []
    trace = []
    with threadpool_limits(1):
        for _ in range(GREEDY_ROUNDS):
            costs = distance_costs(codes, centers)
            distances = costs.min(axis=1) + (codes ** 2).sum(axis=1)    # costs lack the |code|^2
            assignment = fill_in_order(costs, np.argsort(distances, kind="stable"))
            assignments.append(assignment)
            trace.append(balanced_sse(codes, assignment, num_clusters))
            old_centers = centers
            centers = cluster_means(codes, assignment, num_clusters)
            on_round()
            if np.allclose(centers, old_centers):
                break
    chosen = trace.index(min(trace)) if keep_best else -1
    return Clustering(assignments[chosen], trace[chosen], trace)


def cluster_optimal(codes: np.ndarray, start: np.ndarray,
                    on_round: Callable[[], object] = lambda: None) -> Clustering:
    """Clusters by annealing, exact assignments and small moves; the result satisfies `certify`.

    Args:
        codes: (V, E) float32, normalised.
        start: (K,) int64, the codes that are the first centres; K divides V.
        on_round: called after every round.
    """
    num_clusters = len(start)
    if _is_trivial(codes, num_clusters):
        assignment = np.arange(len(codes)) * num_clusters // len(codes)
        return Clustering(assignment, balanced_sse(codes, assignment, num_clusters))
    with threadpool_limits(1):
        centers, prices = anneal(codes, start, on_round)
        codes = codes.astype(np.float64)
        assignment = fill_clusters(distance_costs(codes, centers) - prices)
        trace = []
        total_swaps = 0
        may_divide = True
        while True:
            assignment = assign_exactly(distance_costs(codes, centers), assignment)
            trace.append(balanced_sse(codes, assignment, num_clusters))
            old_centers = centers
            centers = cluster_means(codes, assignment, num_clusters)
            on_round()
            falls_slowly = len(trace) > 1 and trace[-1] >= SLOW_FALL * trace[-2]
            if may_divide and falls_slowly:
                assignment, num_divided = divide_pairs(codes, assignment, num_clusters)
                may_divide = num_divided > 0
                centers = cluster_means(codes, assignment, num_clusters)
            if may_divide or not np.array_equal(centers, old_centers):
                continue                        # every round lowers the SSE, so this ends
            assignment, num_swaps = swap_codes(codes, assignment, num_clusters)
            if num_swaps == 0:
                return Clustering(assignment, trace[-1], trace, total_swaps)
            total_swaps += num_swaps
            centers = cluster_means(codes, assignment, num_clusters)


def _is_trivial(codes: np.ndarray, num_clusters: int) -> bool:
    """Returns whether there is only one balanced clustering, up to the names of the clusters."""
    return num_clusters in (1, len(codes))


def certify(codes: np.ndarray, assignment: np.ndarray, num_clusters: int) -> dict[str, bool]:
    """Checks what `cluster_optimal` promises of its result.

    Args:
        codes: (V, E) float32, normalised.
        assignment: (V,) int64.
        num_clusters: K.

    Returns:
        dict of claim -> bool: `balanced`, `assignment_is_optimal` for the means of the clusters (no
        negative cycle among them), `no_swap_improves` (no exchange of two codes lowers the SSE).
    """
    codes = codes.astype(np.float64)
    sizes = np.bincount(assignment, minlength=num_clusters)
    is_balanced = bool((sizes * num_clusters == len(codes)).all())
    is_optimal = is_balanced
    no_swap_improves = is_balanced
    if is_balanced and not _is_trivial(codes, num_clusters):
        with threadpool_limits(1):
            costs = distance_costs(codes, cluster_means(codes, assignment, num_clusters))
            is_optimal = assignment_is_optimal(costs, assignment)
            _, num_swaps = swap_codes(codes, assignment, num_clusters)
            no_swap_improves = num_swaps == 0
    return {"balanced": is_balanced, "assignment_is_optimal": is_optimal,
            "no_swap_improves": no_swap_improves}


def order_clusters(codes: np.ndarray, assignment: np.ndarray, num_clusters: int) -> np.ndarray:
    """Lists the codes cluster by cluster, neighbours inside a cluster side by side.

    The member nearest the mean stands at position (S-1)//2, its nearest neighbour right of it; then
    in turn, the left end first, each end takes the unplaced code nearest to its outermost code.
    Distances are Euclidean between normalised codes; ties go to the lowest code.

    Args:
        codes: (V, E) float32, normalised.
        assignment: (V,) int64, balanced.
        num_clusters: K.

    Returns:
        (V,) int64: the old index of the code at each new index j*S + p.
    """
    ordered = []
    with threadpool_limits(1):
        for members in list_members(assignment, num_clusters):
            chain = _chain(codes[members].astype(np.float64))
            ordered.append(members[chain])
    return np.concatenate(ordered)


def _chain(points: np.ndarray) -> list[int]:
    """Returns the order of the points (S, E) of one cluster."""
    chain = deque()
    target = points.mean(axis=0)
    for place in range(len(points)):
        distances = ((points - target) ** 2).sum(axis=1)
        distances[list(chain)] = np.inf
        nearest = distances.argmin()
        if place % 2 == 1:          # the first in the middle, the second right of it, and in turn
            chain.append(nearest)
            target = points[chain[0]]
        else:
            chain.appendleft(nearest)
            target = points[chain[-1]]
    return list(chain)


def mapping_of(order: np.ndarray) -> np.ndarray:
    """Returns the inverse of an order, (V,) int64: mapping[old] = new."""
    return np.argsort(order)
