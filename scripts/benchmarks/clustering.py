"""SSE and CPU seconds of the balanced clusterings of synthetic codebooks, in four parts.

    OMP_NUM_THREADS=1 python scripts/benchmarks/clustering.py --seeds 5 --parts methods lumpy

methods: all of them side by side on codebooks of V = 16384 codes of E = 8 dimensions, K = 128
clusters of 128. A: codes uniform on the sphere. B: 200 groups of uneven weight. scikit-learn's
KMeans has no balance to keep: its SSE is a yardstick, out of reach for balanced ones.
lumpy: the optimal method on few tight groups of uneven weight, as it finds them and with noise of
1e-4 added five times to the codes. small: on A in clusters of 32 and 16. growth: on codes as in
A, from 4,096 to 65,536 of them, in clusters of 128.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The repository root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from autoregressive.runtime.entry import Parser, at_least, run
from scripts.benchmarks.turns import timed
from tokenizer.clustering import (
    Clustering,
    balanced_sse,
    cluster_greedy,
    cluster_optimal,
    start_codes,
)

NUM_CODES, DIMENSIONS, NUM_CLUSTERS = 16384, 8, 128
PUBLISHED_SEED = 42
LUMPY = {"20 groups": (20, 0.02), "40 groups": (40, 0.03), "60 groups": (60, 0.05)}  # and spreads
NOISE = 1e-4


def build_parser():
    """Returns the parser of this script's command line."""
    parser = Parser("Compare balanced clusterings: SSE and CPU seconds.", has_seed=False)
    parser.add_argument("--seeds", type=at_least(1), default=5,
                        help="starts of the optimal method, from seed 0")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS,
                        help="what to measure")
    return parser


def codebook_a(num_codes=NUM_CODES):
    """Returns codes uniform on the sphere, (V, E) float32."""
    return normalized(np.random.default_rng(0).standard_normal((num_codes, DIMENSIONS)))


def grouped_codebook(num_groups, spread):
    """Returns codes in groups of uneven weight (V, E) float32; `spread` is in every direction."""
    random = np.random.default_rng(0)
    centers = normalized(random.standard_normal((num_groups, DIMENSIONS)))
    weights = random.dirichlet(np.ones(num_groups))
    chosen = random.choice(num_groups, size=NUM_CODES, p=weights)
    return normalized(centers[chosen] + spread * random.standard_normal((NUM_CODES, DIMENSIONS)))


def codebook_b():
    """Returns codes in 200 groups of uneven weight, (V, E) float32."""
    return grouped_codebook(200, 0.1)


def normalized(codes):
    return (codes / np.linalg.norm(codes, axis=1, keepdims=True)).astype(np.float32)


def cluster_unbalanced(codes):
    with threadpool_limits(1):
        found = KMeans(NUM_CLUSTERS, n_init=1, random_state=0).fit(codes)
    return Clustering(found.labels_, found.inertia_)


def cluster_as_published(codes, start):
    """Runs Algorithm 1 as it is written: code by code, through the clusters by distance."""
    points = torch.from_numpy(codes)
    centers, size = points[start], NUM_CODES // NUM_CLUSTERS
    for _ in range(100):
        distances = torch.cdist(points, centers)
        assignment, counts = torch.zeros(NUM_CODES, dtype=torch.int64), [0] * NUM_CLUSTERS
        for code in torch.argsort(distances.min(dim=1).values, stable=True).tolist():
            for cluster in torch.argsort(distances[code], stable=True):
                if counts[cluster] < size:
                    assignment[code] = cluster
                    counts[cluster] += 1
                    break
        old_centers = centers
        means = [points[assignment == cluster].mean(dim=0) for cluster in range(NUM_CLUSTERS)]
        centers = torch.stack(means)
        if torch.allclose(centers, old_centers):
            break
    return Clustering(assignment.numpy(), balanced_sse(codes, assignment.numpy(), NUM_CLUSTERS))


def measure(title, method, *arguments):
    """Prints and returns the SSE of the Clustering that a method finds, and its CPU seconds."""
    found, seconds = timed(lambda: method(*arguments))
    print(f"{title}: SSE {found.sse:8.1f}  {seconds:6.1f} CPU s", flush=True)
    return found.sse, seconds


def measure_seeds(name, codes, cluster_size, num_seeds):
    """Measures the optimal method from several starts; prints and returns the median seconds."""
    num_clusters = len(codes) // cluster_size
    found = []
    for seed in range(num_seeds):
        start = start_codes(len(codes), num_clusters, seed)
        found.append(measure(f"{name}  optimal, seed {seed}", cluster_optimal, codes, start))
    sses, seconds = np.transpose(found)
    print(f"{name}  optimal, median: SSE {np.median(sses):8.1f}  {np.median(seconds):6.1f} CPU s; "
          f"best {sses.min():.1f} in {seconds.sum():.1f} CPU s together", flush=True)
    return np.median(seconds)


def measure_methods(num_seeds):
    for name, codes in (("A", codebook_a()), ("B", codebook_b())):
        optimal = measure_seeds(name, codes, NUM_CODES // NUM_CLUSTERS, num_seeds)
        measure(f"{name}  scikit-learn KMeans, unbalanced", cluster_unbalanced, codes)
        start = start_codes(NUM_CODES, NUM_CLUSTERS, PUBLISHED_SEED)
        measure(f"{name}  greedy, ours", cluster_greedy, codes, start)
        _, published = measure(f"{name}  greedy, as published", cluster_as_published, codes, start)
        print(f"{name}  optimal takes 1/{published / optimal:.0f} of it", flush=True)


def measure_lumpy(num_seeds):
    start = start_codes(NUM_CODES, NUM_CLUSTERS, 0)
    for name, (num_groups, spread) in LUMPY.items():
        codes = grouped_codebook(num_groups, spread)
        measure_seeds(name, codes, NUM_CODES // NUM_CLUSTERS, num_seeds)
        sses = []
        for draw in range(5):
            noise = NOISE * np.random.default_rng(draw).standard_normal(codes.shape)
            near = normalized(codes + noise)
            sse, _ = measure(f"{name}  with noise, draw {draw}", cluster_optimal, near, start)
            sses.append(sse)
        spread_percent = 100 * (max(sses) - min(sses)) / np.median(sses)
        print(f"{name}  with noise: the SSEs lie within {spread_percent:.1f} %", flush=True)


def measure_small(num_seeds):
    for size in (32, 16):
        measure_seeds(f"A, clusters of {size}", codebook_a(), size, num_seeds)


def measure_growth(num_seeds):
    for num_codes in (4096, 16384, 65536):
        codes = codebook_a(num_codes)
        measure_seeds(f"{num_codes} codes", codes, NUM_CODES // NUM_CLUSTERS, num_seeds)


PARTS = {"methods": measure_methods, "lumpy": measure_lumpy, "small": measure_small,
         "growth": measure_growth}


def main(args, session):
    for part in args.parts:
        PARTS[part](args.seeds)


if __name__ == "__main__":
    run(main, build_parser())
