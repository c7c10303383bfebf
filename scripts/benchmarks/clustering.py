"""SSE and CPU seconds of the balanced clusterings, side by side on two synthetic codebooks.

    OMP_NUM_THREADS=1 python scripts/benchmarks/clustering.py --seeds 5

Codebooks of V = 16384 codes of E = 8 dimensions, K = 128 clusters of 128. A: codes uniform on the
sphere. B: 200 clumps of uneven weight. scikit-learn's KMeans has no balance to keep: its SSE is a
yardstick, out of reach for balanced ones.
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

from autoregressive.runtime.entry import Parser, run
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


def build_parser():
    """Returns the parser of this script's command line."""
    parser = Parser("Compare balanced clusterings: SSE and CPU seconds.", has_seed=False)
    parser.add_argument("--seeds", type=int, default=5,
                        help="starts of the optimal method, from seed 0")
    return parser


def codebook_a():
    """Returns codes uniform on the sphere, (V, E) float32."""
    return normalized(np.random.default_rng(0).standard_normal((NUM_CODES, DIMENSIONS)))


def codebook_b():
    """Returns codes in 200 clumps of uneven weight, (V, E) float32."""
    random = np.random.default_rng(0)
    centers = normalized(random.standard_normal((200, DIMENSIONS)))
    weights = random.dirichlet(np.ones(200))
    chosen = random.choice(200, size=NUM_CODES, p=weights)
    return normalized(centers[chosen] + 0.1 * random.standard_normal((NUM_CODES, DIMENSIONS)))


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


def main(args, session):
    for name, codes in (("A", codebook_a()), ("B", codebook_b())):
        ours = [measure(f"{name}  optimal, seed {seed}", cluster_optimal, codes,
                        start_codes(NUM_CODES, NUM_CLUSTERS, seed)) for seed in range(args.seeds)]
        sses, seconds = np.transpose(ours)
        print(f"{name}  optimal, median: SSE {np.median(sses):8.1f}  "
              f"{np.median(seconds):6.1f} CPU s; "
              f"best {sses.min():.1f} in {seconds.sum():.1f} CPU s together")
        measure(f"{name}  scikit-learn KMeans, unbalanced", cluster_unbalanced, codes)
        start = start_codes(NUM_CODES, NUM_CLUSTERS, PUBLISHED_SEED)
        measure(f"{name}  greedy, ours", cluster_greedy, codes, start)
        _, published = measure(f"{name}  greedy, as published", cluster_as_published, codes, start)
        print(f"{name}  optimal takes 1/{published / np.median(seconds):.0f} of it", flush=True)


if __name__ == "__main__":
    run(main, build_parser())
