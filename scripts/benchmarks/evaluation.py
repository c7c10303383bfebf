"""CPU seconds of FID by the matrix square root and by eigenvalues, in turns; seconds and memory of precision/recall.

    OMP_NUM_THREADS=1 python scripts/benchmarks/evaluation.py --part fid
    python scripts/benchmarks/evaluation.py --part precision-recall             # all cores

The features are synthetic: N x 2048, correlated, non-negative like Inception's pool features.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])      # the repository root instead of this folder

import numpy as np
import scipy.linalg
import torch

from autoregressive.runtime.entry import run
from autoregressive.runtime.speed import peak_memory_mib
from evaluations.c2i.metrics import feature_statistics, frechet_distance, precision_recall
from scripts.benchmarks.turns import benchmark_parser, compare, timed

WIDTH = 2048


def build_parser():
    """Returns the parser of this script's command line."""
    parser = benchmark_parser("Compare ways to compute FID; measure precision and recall.", rounds=3)
    parser.add_argument("--part", default="fid", choices=("fid", "precision-recall"), help="what to measure")
    parser.add_argument("--num-images", type=int, default=10000, help="features of each set")
    return parser


def make_features(count, seed):
    """Returns correlated non-negative features (count, 2048) float32."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)) * np.linspace(0.02, 0.2, WIDTH)[:, None]
    mixed = random.standard_normal((count, WIDTH)) @ mixing + 0.1 * seed
    return np.maximum(mixed, 0).astype(np.float32) / 10


def frechet_by_square_root(mu1, sigma1, mu2, sigma2):
    """Computes FID as published: the trace of the square root of a product of covariances."""
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root.real))


def compare_fid(features, rounds):
    moments = [array for each in features for array in feature_statistics(each)[:2]]

    def measure(distance):
        value, seconds = timed(lambda: distance(*moments))
        return {"CPU seconds": seconds, "FID": value}

    medians = compare("FID", measure, {"published": frechet_by_square_root, "ours": frechet_distance}, rounds)
    print(f"relative difference of the values {abs(medians['ours']['FID'] / medians['published']['FID'] - 1):.1e}")


def measure_precision_recall(features, device):
    sets = [torch.from_numpy(each).to(device) for each in features]
    (precision, recall), seconds = timed(lambda: precision_recall(*sets), device)
    print(f"precision {precision:.4f}, recall {recall:.4f} of twice {len(sets[0])} x {WIDTH}: {seconds:.1f} s, "
          f"{torch.get_num_threads()} threads, peak {peak_memory_mib(device) / 1024:.2f} GiB")


def main(args, session):
    features = [make_features(args.num_images, seed) for seed in (1, 2)]
    if args.part == "fid":
        compare_fid(features, args.rounds)
    else:
        measure_precision_recall(features, session.device)


if __name__ == "__main__":
    run(main, build_parser())
