"""Exactly balanced clustering of a codebook, and the order of the codes inside a cluster. Pure functions on arrays.

V codes of E dimensions, K clusters of exactly S codes each, V = K * S. An `assignment` is (V,) int64, the cluster of
each code; the SSE is the sum of squared distances of the codes to the means of their clusters. Two methods:

`cluster_greedy`   Algorithm 1 of the paper (arXiv 2501.00880), as published.
`cluster_optimal`  a start by deterministic annealing with balanced soft assignments, then rounds of means and EXACT
                   assignments, alternating with swaps of two codes, until neither lowers the SSE.

Both compute on one thread, whatever the machine has, so results do not depend on the number of threads.
"""

from dataclasses import dataclass, field

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
    sse_trace: list = field(default_factory=list)
    num_swaps: int = 0


def require_cluster_size(num_codes, cluster_size):
    """Raises ValueError unless clusters of `cluster_size` codes divide a codebook of `num_codes`."""
    if cluster_size <= 0 or num_codes % cluster_size:
        raise ValueError(f"cluster size: expected a positive divisor of the {num_codes} codes, got {cluster_size}")


def normalize_codes(codebook):
    """Returns the codes divided by their lengths, (V, E) float32 array; zero rows stay zero.

    Args:
        codebook: (V, E) tensor of any float dtype.
    """
    return torch.nn.functional.normalize(codebook.detach().float(), dim=1).numpy()


def cluster_means(codes, assignment, num_clusters):
    """Returns the means of the clusters, (K, E) float64."""
    return codes.astype(np.float64)[np.argsort(assignment, kind="stable")].reshape(
        num_clusters, -1, codes.shape[1]).mean(axis=1)


def balanced_sse(codes, assignment, num_clusters):
    """Returns the sum of squared distances of codes (V, E) to the means of their clusters, in float64."""
    means = cluster_means(codes, assignment, num_clusters)
    return float(((codes.astype(np.float64) - means[assignment]) ** 2).sum())


def start_codes(num_codes, num_clusters, seed):
    """Returns the published start for a seed: (K,) int64, the first K of torch.randperm(V) after manual_seed(seed)."""
    return torch.randperm(num_codes, generator=torch.Generator().manual_seed(seed))[:num_clusters].numpy()


def cluster_greedy(codes, start, keep_best=False, on_round=lambda: None):
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
    centers = codes[start].astype(np.float64)
    rounds = []
    with threadpool_limits(1):
        for _ in range(GREEDY_ROUNDS):
            costs = distance_costs(codes.astype(np.float64), centers)
            nearest = costs.argmin(axis=1)
            distances = costs.min(axis=1) + (codes.astype(np.float64) ** 2).sum(axis=1)
            assignment = fill_in_order(costs, np.argsort(distances, kind="stable"), nearest)
            rounds.append((balanced_sse(codes, assignment, num_clusters), assignment))
            old_centers, centers = centers, cluster_means(codes, assignment, num_clusters)
            on_round()
            if np.allclose(centers, old_centers, rtol=1e-5, atol=1e-8):
                break
    sse, assignment = min(rounds, key=lambda found: found[0]) if keep_best else rounds[-1]
    return Clustering(assignment, sse, [found[0] for found in rounds])


def cluster_optimal(codes, start, on_round=lambda: None):
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
        return _polish(codes, assignment, centers, on_round)


def _polish(codes, assignment, centers, on_round):
    trace, total_swaps = [], 0
    while True:
        while True:                                  # exact rounds: ever lower, so they end
            assignment = assign_exactly(distance_costs(codes, centers), assignment)
            trace.append(balanced_sse(codes, assignment, len(centers)))
            old_centers, centers = centers, cluster_means(codes, assignment, len(centers))
            on_round()
            if np.array_equal(centers, old_centers):
                break
        assignment, num_swaps = swap_codes(codes, assignment, len(centers))
        if not num_swaps:
            return Clustering(assignment, trace[-1], trace, total_swaps)
        total_swaps += num_swaps
        centers = cluster_means(codes, assignment, len(centers))


def certify(codes, assignment, num_clusters):
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


def order_clusters(codes, assignment, num_clusters):
    """Lists the codes cluster by cluster, neighbours inside a cluster side by side.

    The member nearest the mean stands at position (S-1)//2, its nearest neighbour right of it; then in turn, the left
    end first, each end takes the unplaced code nearest to its outermost code; when one side is full the other goes on.
    Distances are Euclidean between normalized codes; ties go to the lowest code.

    Args:
        codes: (V, E) float32, normalized.
        assignment: (V,) int64, balanced.
        num_clusters: K.

    Returns:
        (V,) int64: the old index of the code at each new index j*S + p.
    """
    members = np.argsort(assignment, kind="stable").reshape(num_clusters, -1)
    with threadpool_limits(1):
        return np.concatenate([cluster[_chain(codes[cluster].astype(np.float64))] for cluster in members])


def _chain(points):
    """Returns the order of the points (S, E) of one cluster."""
    size = len(points)
    middle = left = right = (size - 1) // 2
    is_placed = np.zeros(size, dtype=bool)
    places = np.empty(size, dtype=np.int64)

    def place(position, target):
        distances = ((points - target) ** 2).sum(axis=1)
        distances[is_placed] = np.inf
        places[position] = distances.argmin()
        is_placed[places[position]] = True

    place(middle, points.mean(axis=0))
    grow_right = True
    for _ in range(size - 1):
        if grow_right:
            right += 1
            place(right, points[places[right - 1]])
        else:
            left -= 1
            place(left, points[places[left + 1]])
        grow_right = left == 0 or (not grow_right and right < size - 1)
    return places


def mapping_of(order):
    """Returns the inverse of an order, (V,) int64: mapping[old] = new."""
    mapping = np.empty(len(order), dtype=np.int64)
    mapping[order] = np.arange(len(order))
    return mapping
