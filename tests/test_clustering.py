"""The balanced clustering.

Its sizes, its exactness against brute force, the published method against its fixture.
"""

import itertools

import numpy as np
import pytest
import torch

from autoregressive.models.cluster_loss import check_cluster_size
from tokenizer import annealing, balanced_assignment, clustering
from tokenizer.annealing import critical_temperature


def random_codes(num_codes, dimensions=3, seed=0):
    codes = np.random.default_rng(seed).standard_normal((num_codes, dimensions))
    return (codes / np.linalg.norm(codes, axis=1, keepdims=True)).astype(np.float32)


def clumped_codes(num_codes, dimensions=4, seed=0):
    """Returns codes in few tight clumps of uneven weight."""
    random = np.random.default_rng(seed)
    clumps = random.standard_normal((7, dimensions))
    clump_of_code = random.choice(7, num_codes, p=np.arange(1, 8) / 28)
    codes = clumps[clump_of_code] + 0.2 * random.standard_normal((num_codes, dimensions))
    return (codes / np.linalg.norm(codes, axis=1, keepdims=True)).astype(np.float32)


def lumpy_codes(num_codes, num_groups, dimensions=8):
    """Returns codes in groups a hundred times tighter than their distances, of uneven weight."""
    random = np.random.default_rng(0)
    groups = random.standard_normal((num_groups, dimensions))
    weights = random.dirichlet(np.ones(num_groups))
    group_of_code = random.choice(num_groups, num_codes, p=weights)
    codes = groups[group_of_code] + 0.03 * random.standard_normal((num_codes, dimensions))
    return (codes / np.linalg.norm(codes, axis=1, keepdims=True)).astype(np.float32)


def balanced_assignments(num_codes, num_clusters):
    """Yields every balanced assignment, clusters named."""
    names = np.repeat(np.arange(num_clusters), num_codes // num_clusters).tolist()
    for assignment in sorted(set(itertools.permutations(names))):
        yield np.array(assignment)


def total_cost(costs, assignment):
    return costs[np.arange(len(costs)), assignment].sum()


# ----------------------------------------------------------------------------- the published method

def test_greedy_equals_the_published_algorithm(fixture):
    published = fixture("kmeans_sphere")
    codes = clustering.normalize_codes(published["embedding"])
    found = clustering.cluster_greedy(codes, published["init_indices"].numpy())
    assert np.array_equal(found.assignment, published["assign"].numpy())
    assert found.sse == pytest.approx(published["sse"], rel=1e-6)
    np.testing.assert_allclose(found.sse_trace, published["sse_trace"].numpy(), rtol=1e-6)


def test_first_greedy_round_equals_the_published_one(fixture, monkeypatch):
    published = fixture("kmeans_sphere")
    monkeypatch.setattr(clustering, "GREEDY_ROUNDS", 1)
    codes = clustering.normalize_codes(published["embedding"])
    found = clustering.cluster_greedy(codes, published["init_indices"].numpy())
    assert np.array_equal(found.assignment, published["assign_iter1"].numpy())


def test_published_start_and_order_and_mapping_are_reproduced(fixture):
    published = fixture("kmeans_sphere")
    start = clustering.start_codes(512, published["n_clusters"], seed=42)
    assert np.array_equal(start, published["init_indices"].numpy())
    codes = clustering.normalize_codes(published["embedding"])
    order = clustering.order_clusters(codes, published["assign"].numpy(), published["n_clusters"])
    assert torch.equal(published["embedding"][order], published["reordered"])
    assert torch.equal(torch.from_numpy(clustering.mapping_of(order)), published["mapping"])


def test_keep_best_returns_the_round_of_least_sse(fixture):
    published = fixture("kmeans_sphere")
    codes = clustering.normalize_codes(published["embedding"])
    found = clustering.cluster_greedy(codes, published["init_indices"].numpy(), keep_best=True)
    assert found.sse == min(found.sse_trace) < found.sse_trace[-1]
    assert found.sse == clustering.balanced_sse(codes, found.assignment, published["n_clusters"])


def test_greedy_ties_go_to_the_lower_code_and_the_lower_cluster():
    codes = np.tile(np.float32([[1, 0]]), (6, 1))
    found = clustering.cluster_greedy(codes, np.array([5, 3, 1]))
    assert found.assignment.tolist() == [0, 0, 1, 1, 2, 2]


# ------------------------------------------------------------------------------------- any codebook

def degenerate(name):
    codes = random_codes(30)
    if name == "duplicates":
        codes[::2] = codes[0]
    elif name == "zeros":
        codes[:20] = 0
    elif name == "equal":
        codes[:] = codes[3]
    return codes


@pytest.mark.parametrize("name", ["plain", "duplicates", "zeros", "equal"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 15, 30])
@pytest.mark.parametrize("method", [clustering.cluster_optimal, clustering.cluster_greedy])
def test_every_cluster_gets_its_codes_and_the_mapping_is_a_permutation(method, size, name):
    codes = degenerate(name)
    num_clusters = len(codes) // size
    found = method(codes, clustering.start_codes(len(codes), num_clusters, seed=1))
    assert np.bincount(found.assignment, minlength=num_clusters).tolist() == [size] * num_clusters
    order = clustering.order_clusters(codes, found.assignment, num_clusters)
    mapping = clustering.mapping_of(order)
    assert np.array_equal(mapping[order], np.arange(len(codes)))
    assert np.array_equal(mapping // size, found.assignment)        # token // S is the cluster
    if method is clustering.cluster_optimal:
        assert all(clustering.certify(codes, found.assignment, num_clusters).values())


@pytest.mark.parametrize("dimensions", [1, 17])
def test_codes_of_any_dimension_are_clustered(dimensions):
    codes = random_codes(24, dimensions)
    found = clustering.cluster_optimal(codes, clustering.start_codes(24, 4, seed=0))
    assert np.bincount(found.assignment).tolist() == [6] * 4


@pytest.mark.parametrize("size", [0, -2, 7, 25])
def test_a_cluster_size_that_does_not_divide_the_codebook_is_refused(size):
    with pytest.raises(ValueError, match=f"divisor of the 24 codes, got {size}"):
        check_cluster_size(24, size)


def test_zero_rows_stay_zero_when_normalized():
    codes = clustering.normalize_codes(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    np.testing.assert_allclose(codes, [[0, 0], [0.6, 0.8]], rtol=1e-6)


# ---------------------------------------------------------------------------------------- exactness

@pytest.mark.parametrize("num_codes, num_clusters", [(8, 2), (6, 3), (9, 3), (8, 4)])
def test_exact_assignment_costs_no_more_than_any_other(num_codes, num_clusters):
    for seed in range(4):
        costs = np.random.default_rng(seed).standard_normal((num_codes, num_clusters))
        everything = [total_cost(costs, assignment)
                      for assignment in balanced_assignments(num_codes, num_clusters)]
        starts = (balanced_assignment.fill_clusters(costs), np.arange(num_codes) % num_clusters)
        for start in starts:
            found = balanced_assignment.assign_exactly(costs, start)
            assert total_cost(costs, found) == pytest.approx(min(everything))


def test_exact_assignment_equals_scipys_on_larger_costs():
    optimize = pytest.importorskip("scipy.optimize")
    costs = np.random.default_rng(0).standard_normal((120, 24))
    found = balanced_assignment.assign_exactly(costs, np.arange(120) % 24)
    rows, columns = optimize.linear_sum_assignment(np.repeat(costs, 5, axis=1))
    expected = columns[np.argsort(rows)] // 5
    assert total_cost(costs, found) == pytest.approx(total_cost(costs, expected))


@pytest.mark.parametrize("num_codes, num_clusters", [(6, 2), (6, 3), (8, 4)])
def test_certificate_of_the_assignment_agrees_with_brute_force(num_codes, num_clusters):
    costs = np.random.default_rng(3).standard_normal((num_codes, num_clusters))
    assignments = list(balanced_assignments(num_codes, num_clusters))
    least = min(total_cost(costs, assignment) for assignment in assignments)
    best = balanced_assignment.assign_exactly(costs, assignments[0])
    for assignment in [*assignments[:: max(1, len(assignments) // 90)], best]:
        is_least = total_cost(costs, assignment) < least + 1e-9
        assert balanced_assignment.assignment_is_optimal(costs, assignment) == is_least


def improving_swaps(codes, assignment, num_clusters):
    """Yields the SSE change of every swap that lowers it, by computing the SSE anew."""
    before = clustering.balanced_sse(codes, assignment, num_clusters)
    for i, j in itertools.combinations(range(len(codes)), 2):
        swapped = assignment.copy()
        swapped[[i, j]] = assignment[[j, i]]
        change = clustering.balanced_sse(codes, swapped, num_clusters) - before
        if change < -1e-9:
            yield change


def test_certificate_of_swaps_agrees_with_brute_force():
    claims = []
    for seed in range(8):
        codes = random_codes(12, seed=seed)
        greedy = clustering.cluster_greedy(codes, np.arange(3)).assignment
        optimal = clustering.cluster_optimal(codes, np.arange(3)).assignment
        for assignment in (np.arange(12) % 3, greedy, optimal):
            claims.append(clustering.certify(codes, assignment, 3)["no_swap_improves"])
            assert claims[-1] == (not list(improving_swaps(codes, assignment, 3)))
    assert set(claims) == {True, False}


def test_change_of_a_swap_equals_the_difference_of_the_sse():
    codes = random_codes(10, dimensions=4).astype(np.float64)
    assignment = np.arange(10) // 5
    before = clustering.balanced_sse(codes, assignment, 2)
    changes = balanced_assignment.swap_changes(codes[:5], codes[5:])
    for i, j in itertools.product(range(5), range(5)):
        swapped = assignment.copy()
        swapped[[i, 5 + j]] = 1, 0
        expected = clustering.balanced_sse(codes, swapped, 2) - before
        assert changes[i, j] == pytest.approx(expected, abs=1e-12)


def test_pairs_of_left_overs_are_divided_where_no_swap_helps():
    # Two clusters of two halves each, and two that are whole; 3 of 6 codes have to move at once.
    groups = np.repeat(np.eye(4), 6, axis=0)
    codes = groups + 0.01 * np.random.default_rng(0).standard_normal(groups.shape)
    mixed = np.array([0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1] + [2] * 6 + [3] * 6)
    divided, num_divided = balanced_assignment.divide_pairs(codes, mixed, 4)
    assert num_divided == 1
    assert len(set(zip(divided.tolist(), groups.argmax(axis=1).tolist(), strict=True))) == 4
    before = clustering.balanced_sse(codes, mixed, 4)
    assert clustering.balanced_sse(codes, divided, 4) < 0.01 * before
    again, num_divided = balanced_assignment.divide_pairs(codes, divided, 4)
    assert num_divided == 0
    assert np.array_equal(again, divided)


def test_an_unbalanced_assignment_gets_no_certificate():
    codes = random_codes(6)
    assert not clustering.certify(codes, np.array([0, 0, 0, 0, 1, 1]), 2)["balanced"]


def test_random_clusters_are_dealt_from_the_permutation_of_the_seed_whatever_the_codes_are():
    generator = torch.Generator().manual_seed(0)
    codes = clustering.normalize_codes(torch.randn(60, 4, generator=generator))
    found = clustering.cluster_random(codes, 12, seed=3)
    permutation = torch.randperm(60, generator=torch.Generator().manual_seed(3)).numpy()
    assert np.array_equal(found.assignment[permutation], np.arange(60) // 5)
    other_codes = clustering.cluster_random(codes[::-1], 12, seed=3)
    assert np.array_equal(other_codes.assignment, found.assignment)
    assert found.sse > 2 * clustering.cluster_optimal(codes, np.arange(12)).sse
    other_seed = clustering.cluster_random(codes, 12, seed=4)
    assert not np.array_equal(other_seed.assignment, found.assignment)


# ------------------------------------------------------------------------------------------ quality

@pytest.mark.parametrize("make_codes", [random_codes, clumped_codes])
def test_optimal_is_never_worse_than_greedy(make_codes):
    for seed in range(6):
        codes = make_codes(90, seed=seed)
        start = clustering.start_codes(90, 6, seed)
        greedy = clustering.cluster_greedy(codes, start, keep_best=True)
        assert clustering.cluster_optimal(codes, start).sse <= greedy.sse + 1e-9


def test_optimal_finds_the_least_sse_of_small_codebooks():
    found = []
    for seed in range(5):
        codes = random_codes(8, seed=seed)
        least = min(clustering.balanced_sse(codes, assignment, 2)
                    for assignment in balanced_assignments(8, 2))
        best = min(clustering.cluster_optimal(codes, clustering.start_codes(8, 2, start)).sse
                   for start in range(3))
        found.append(best == pytest.approx(least))
    assert sum(found) >= 4


def test_separate_groups_are_found_whole():
    random = np.random.default_rng(0)
    groups = np.repeat(np.eye(5), 7, axis=0)[random.permutation(35)]
    codes = (groups + 0.01 * random.standard_normal(groups.shape)).astype(np.float32)
    found = clustering.cluster_optimal(codes, np.arange(5))
    pairs = set(zip(groups.argmax(1).tolist(), found.assignment.tolist(), strict=True))
    assert len(pairs) == 5


def test_sse_falls_with_every_exact_round_and_swap():
    codes = clumped_codes(240)
    trace = clustering.cluster_optimal(codes, clustering.start_codes(240, 8, 0)).sse_trace
    assert len(trace) > 1
    assert (np.diff(trace) < 1e-9).all()


def test_annealing_is_a_better_start_than_random_codes(monkeypatch):
    codes = random_codes(360, dimensions=4)
    starts = [clustering.start_codes(360, 12, seed) for seed in range(5)]
    annealed = [clustering.cluster_optimal(codes, start).sse for start in starts]

    def start_at_codes(codes, start, _):
        return codes[start].astype(float), np.zeros(12)

    monkeypatch.setattr(clustering, "anneal", start_at_codes)
    plain = [clustering.cluster_optimal(codes, start).sse for start in starts]
    assert np.median(annealed) < np.median(plain)


def test_lumpy_codebooks_satisfy_the_certificate_and_end_annealing_early(monkeypatch):
    codes = lumpy_codes(768, num_groups=10)
    start = clustering.start_codes(768, 24, seed=0)
    found = clustering.cluster_optimal(codes, start)
    assert all(clustering.certify(codes, found.assignment, 24).values())
    rounds = []
    annealing.anneal(codes, start, lambda: rounds.append("ends early"))
    monkeypatch.setattr(annealing, "MAX_UNBALANCED", np.inf)
    annealing.anneal(codes, start, lambda: rounds.append("goes on"))
    assert rounds.count("ends early") < 0.8 * rounds.count("goes on")


def test_prices_move_alike_whichever_way_the_equations_are_solved(monkeypatch):
    random = np.random.default_rng(0)
    memberships = random.dirichlet(np.full(6, 0.3), size=50).astype(np.float32)     # (R, K)
    soft_sizes = 4 * memberships.sum(axis=0, dtype=np.float64)
    direct = annealing._price_step(memberships, soft_sizes, 200 / 6)
    monkeypatch.setattr(annealing, "FEW_CLUSTERS", 0)
    monkeypatch.setattr(annealing, "STEP_ERROR", 1e-6)
    iterative = annealing._price_step(memberships, soft_sizes, 200 / 6)
    np.testing.assert_allclose(iterative, direct, rtol=1e-4)
    assert np.abs(direct).max() < annealing.MAX_PRICE_STEP                  # neither is clipped


def test_critical_temperature_is_twice_the_largest_variance():
    codes = np.float32([[3, 0], [-3, 0], [0, 1], [0, -1]])
    assert critical_temperature(codes) == pytest.approx(2 * 4.5)
    assert critical_temperature(np.ones((5, 2), np.float32) * np.float32(0.1)) == 0


def test_inputs_are_left_as_they_were():
    codes = random_codes(40)
    kept = codes.copy()
    clustering.cluster_optimal(codes, clustering.start_codes(40, 4, 0))
    assert np.array_equal(codes, kept)


# ------------------------------------------------------------------------------- order in a cluster

def slow_chain(points):
    """The rule of the order: from the middle, two ends that take turns, the left one first."""
    unplaced = list(range(len(points)))
    middle = (len(points) - 1) // 2

    def take(target):
        def distance(index):
            return round(float(((points[index] - target) ** 2).sum()), 12)

        chosen = min(unplaced, key=lambda index: (distance(index), index))
        unplaced.remove(chosen)
        return chosen

    line = {middle: take(points.mean(axis=0))}
    if unplaced:
        line[middle + 1] = take(points[line[middle]])
    left, right, turn = middle, min(middle + 1, len(points) - 1), "left"
    while unplaced:
        if turn == "left" and left > 0 or right == len(points) - 1:
            left -= 1
            line[left] = take(points[line[left + 1]])
            turn = "right"
        else:
            right += 1
            line[right] = take(points[line[right - 1]])
            turn = "left"
    return [line[position] for position in range(len(points))]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 13])
def test_order_in_a_cluster_follows_the_rule(size):
    codes = random_codes(3 * size, dimensions=4, seed=size)
    assignment = np.random.default_rng(size).permutation(np.repeat(np.arange(3), size))
    order = clustering.order_clusters(codes, assignment, 3)
    for cluster in range(3):
        members = np.flatnonzero(assignment == cluster)
        expected = members[slow_chain(codes[members].astype(np.float64))]
        assert order[cluster * size:(cluster + 1) * size].tolist() == expected.tolist()
