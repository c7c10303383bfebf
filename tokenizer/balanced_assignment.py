"""Steps of balanced clustering: exact assignments to given centres, swaps, divisions of pairs.

Letters: V codes of E dimensions belong to K clusters of exactly S = V / K.

Moving one code from cluster a to b costs at least w[a, b] = min over i in a of
(cost[i, b] - cost[i, a]), so an assignment is optimal exactly when the graph of these K x K weights
has no negative cycle. Cycles are found and cancelled among K nodes, however many codes there are.
"""

import itertools

import numpy as np
import torch

TOLERANCE = 1e-10       # of the largest cost: smaller differences of float64 sums are rounding
LARGE_SSE = 1.5         # of the mean one: clusters with more are divided anew, in pairs
MIN_GAIN = 1e-4         # by which the squared gap of two centres has to grow then, relative
LOOK_EVERY = 4          # steps between two searches for cycles: these are short, so they show early


def distance_costs(codes: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Returns the squared distances (V, K) of codes (V, E) to centres (K, E), both float64.

    They lack the |code|^2, which no assignment changes.
    """
    costs = codes @ (-2 * centers.T)
    costs += (centers ** 2).sum(axis=1)             # in place: fresh memory costs more than sums
    return costs


def fill_clusters(costs: np.ndarray) -> np.ndarray:
    """Assigns every code to its cheapest cluster that is not full, codes with most to lose first.

    Args:
        costs: (V, K) float64, K at least 2.

    Returns:
        (V,) int64: the cluster of each code, S codes in every cluster.
    """
    two_cheapest = np.partition(costs, 1, axis=1)
    losses = two_cheapest[:, 0] - two_cheapest[:, 1]    # (V,) negative: what the first choice saves
    return fill_in_order(costs, np.argsort(losses, kind="stable"))


def fill_in_order(costs: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Visits codes in `order` and gives each to its cheapest cluster with room.

    Args:
        costs: (V, K) floats.
        order: (V,) permutation of the codes.

    Returns:
        (V,) int64: the cluster of each code.
    """
    num_codes, num_clusters = costs.shape
    room = [num_codes // num_clusters] * num_clusters
    closed = np.zeros(num_clusters)                  # infinity where a cluster is full
    assignment = costs.argmin(axis=1).tolist()
    for code in order.tolist():
        cluster = assignment[code]
        if not room[cluster]:
            cluster = int((costs[code] + closed).argmin())
            assignment[code] = cluster
        room[cluster] -= 1
        if not room[cluster]:
            closed[cluster] = np.inf
    return np.array(assignment, dtype=np.int64)


def list_members(assignment: np.ndarray, num_clusters: int) -> np.ndarray:
    """Returns (K, S) int64: the codes of each cluster, ascending."""
    return np.argsort(assignment, kind="stable").reshape(num_clusters, -1)


def move_weights(costs: np.ndarray, members: np.ndarray,
                 clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds the cheapest code to move out of some clusters into each other cluster.

    Args:
        costs: (V, K) float64.
        members: (K, S) int64.
        clusters: (A,) int64, the clusters to leave.

    Returns:
        weights (A, K) float64, what the move costs, 0 from a cluster to itself; and slots (A, K)
        int64, which member of the cluster the code is.
    """
    leaving = costs[members[clusters]]                                              # (A, S, K)
    leaving -= np.take_along_axis(leaving, clusters[:, None, None], axis=2)
    weights, slots = torch.from_numpy(leaving).min(dim=1)   # twice as fast as NumPy's argmin
    return weights.numpy(), slots.numpy()


def find_negative_cycles(weights: np.ndarray, tolerance: float) -> list[list[int]]:
    """Finds disjoint cycles of negative weight by Bellman and Ford's method from all nodes at once.

    Args:
        weights: (K, K) float64, zero diagonal.
        tolerance: a path counts as shorter only by more than this.

    Returns:
        list of cycles, each a list of nodes a, b, c, .. with a -> b -> c -> .. -> a; empty exactly
        when there is none.
    """
    num_nodes = len(weights)
    arriving = np.ascontiguousarray(weights.T)      # no copy if the columns of weights are
    extended = np.empty_like(arriving)              # [node, the one before it]
    lengths = np.zeros(num_nodes)
    previous = np.full(num_nodes, -1)
    for step in range(1, num_nodes + 1):
        np.add(lengths, arriving, out=extended)
        shortest = extended.min(axis=1)
        shorter = shortest < lengths - tolerance
        if not shorter.any():
            return []
        lengths = np.where(shorter, shortest, lengths)
        previous = np.where(shorter, extended.argmin(axis=1), previous)
        is_due = step % LOOK_EVERY == 0 or step == num_nodes
        if is_due and (cycles := _cycles_of(previous.tolist())):
            return cycles
    return []


def _cycles_of(previous: list[int]) -> list[list[int]]:
    """Returns the cycles of a graph in which every node has at most one predecessor (-1: none)."""
    cycles = []
    visited = {-1}
    for node in range(len(previous)):
        path = []
        while node not in visited:
            visited.add(node)
            path.append(node)
            node = previous[node]
        if node in path:                            # it came back to a node of its own
            backwards = path[path.index(node):]
            cycles.append(backwards[::-1])
    return cycles


def assign_exactly(costs: np.ndarray, assignment: np.ndarray) -> np.ndarray:
    """Returns the balanced assignment of least total cost.

    It cancels negative cycles of a given assignment until there are none.

    Args:
        costs: (V, K) float64.
        assignment: (V,) int64, any balanced assignment; the nearer to the best, the faster.

    Returns:
        (V,) int64: a balanced assignment whose graph has no negative cycle.
    """
    num_clusters = costs.shape[1]
    tolerance = TOLERANCE * np.abs(costs).max()
    members = list_members(assignment, num_clusters)
    weights, slots = move_weights(costs, members, np.arange(num_clusters))
    weights = np.asfortranarray(weights)            # as find_negative_cycles reads it
    while cycles := find_negative_cycles(weights, tolerance):
        for cycle in cycles:
            # Each cluster of a cycle gives its cheapest code to the next one. The code that comes
            # takes the slot of the one that leaves.
            receivers = np.roll(cycle, -1)
            left_slots = slots[cycle, receivers]                # in the cluster that gives
            free_slots = np.roll(left_slots, -1)                # in the cluster that receives
            members[receivers, free_slots] = members[cycle, left_slots]
        # Cycles are disjoint, so that each cluster has changed once; all others are as they were.
        changed = np.concatenate(cycles)
        weights[changed], slots[changed] = move_weights(costs, members, changed)
    return _assignment_of(members)


def _assignment_of(members: np.ndarray) -> np.ndarray:
    """Returns the assignment (V,) int64 of members (K, S): the inverse of list_members."""
    return np.argsort(members, axis=None) // members.shape[1]


def assignment_is_optimal(costs: np.ndarray, assignment: np.ndarray) -> bool:
    """Returns whether no other balanced assignment costs less: there is no negative cycle."""
    return np.array_equal(assign_exactly(costs, assignment), assignment)


def swap_changes(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns (S, S) float64: how much the SSE changes when first[i] and second[j] change places.

    With d = second[j] - first[i] the means c_a and c_b of the two move by d/S and -d/S, so the
    change is -2 d.(c_a - c_b) - 2 |d|^2 / S.

    Args:
        first: (S, E) float64, all codes of one cluster.
        second: (S, E) float64, all codes of another.
    """
    size = len(first)
    gap = first.mean(axis=0) - second.mean(axis=0)                                  # c_a - c_b
    # Multiplied out, the change has a term of first[i], one of second[j], and one of both.
    leave = 2 * (first @ gap) - 2 * (first ** 2).sum(axis=1) / size                 # (S,)
    enter = -2 * (second @ gap) - 2 * (second ** 2).sum(axis=1) / size              # (S,)
    return leave[:, None] + enter + 4 / size * (first @ second.T)


def swap_candidates(codes: np.ndarray, members: np.ndarray, tolerance: float) -> np.ndarray:
    """Returns the pairs of clusters a < b, (pairs, 2), in which a swap may lower the SSE.

    The bound on what a swap changes misses none of those that do.
    """
    num_clusters, size = members.shape
    centers = codes[members].mean(axis=1)                                           # (K, E)
    radii = np.linalg.norm(codes[members] - centers[:, None], axis=2).max(axis=1)   # (K,)
    gaps = np.linalg.norm(centers[:, None] - centers, axis=2)                       # (K, K)
    costs = distance_costs(codes, centers)
    weights, _ = move_weights(costs, members, np.arange(num_clusters))              # (K, K)
    bound = weights + weights.T - 2 * (radii[:, None] + radii + gaps) ** 2 / size
    return np.argwhere(np.triu(bound < -tolerance, k=1))


def swap_codes(codes: np.ndarray, assignment: np.ndarray,
               num_clusters: int) -> tuple[np.ndarray, int]:
    """Swaps pairs of codes as long as a swap lowers the SSE.

    Args:
        codes: (V, E) float64.
        assignment: (V,) int64, balanced.
        num_clusters: K.

    Returns:
        the improved assignment (V,) int64, and the number of swaps made: 0 certifies that none
        lowers the SSE.
    """
    members = list_members(assignment, num_clusters)
    tolerance = TOLERANCE * (codes ** 2).sum(axis=1).max()
    num_swaps = 0
    for a, b in swap_candidates(codes, members, tolerance):
        while True:
            changes = swap_changes(codes[members[a]], codes[members[b]])            # (S, S)
            improves = changes.min() < -tolerance
            if not improves:
                break
            i, j = np.unravel_index(changes.argmin(), changes.shape)
            members[a, i], members[b, j] = members[b, j], members[a, i]
            num_swaps += 1
    return _assignment_of(members), num_swaps


def divide_pairs(codes: np.ndarray, assignment: np.ndarray,
                 num_clusters: int) -> tuple[np.ndarray, int]:
    """Divides pairs of clusters of large SSE anew, in halves along the longest axis of both.

    Clusters that hold what is left over of several tight groups of codes have a large SSE, and no
    swap of two codes lowers it: all codes of a group have to change places together.

    Args:
        codes: (V, E) float64.
        assignment: (V,) int64, balanced.
        num_clusters: K.

    Returns:
        the assignment (V,) int64, of lower SSE if any pair was divided, and the number of those.
    """
    members = list_members(assignment, num_clusters)
    deviations = codes[members] - codes[members].mean(axis=1, keepdims=True)        # (K, S, E)
    sses = (deviations ** 2).sum(axis=(1, 2))                                       # (K,)
    tolerance = TOLERANCE * (codes ** 2).sum(axis=1).max()
    size = members.shape[1]
    num_divided = 0
    for a, b in itertools.combinations(np.flatnonzero(sses > LARGE_SSE * sses.mean()), 2):
        union = members[[a, b]].ravel()                                             # (2S,)
        points = codes[union] - codes[union].mean(axis=0)
        longest_axis = np.linalg.eigh(points.T @ points)[1][:, -1]
        order = np.argsort(points @ longest_axis, kind="stable")
        # Both halves have the union's mean between them, so the SSE falls as their gap grows.
        gap = points[order[:size]].mean(axis=0)
        old_gap = points[:size].mean(axis=0)
        if gap @ gap > (1 + MIN_GAIN) * (old_gap @ old_gap) + tolerance:
            members[a] = union[order[:size]]
            members[b] = union[order[size:]]
            num_divided += 1
    return _assignment_of(members), num_divided
