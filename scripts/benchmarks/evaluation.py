"""CPU seconds of FID by the matrix square root and by eigenvalues, in turns; seconds and memory of precision/recall.

    OMP_NUM_THREADS=1 python scripts/benchmarks/evaluation.py --part fid
    python scripts/benchmarks/evaluation.py --part precision-recall             # all cores

The features are synthetic: N x 2048, correlated, non-negative like Inception's pool features.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])      # the repository root instead of this folder

import statistics
import time

import numpy as np
import scipy.linalg
import torch

from autoregressive.runtime.entry import Parser, run
from evaluations.c2i.metrics import feature_statistics, frechet_distance, precision_recall

WIDTH = 2048


def build_parser():
    """Returns the parser of this script's command line."""
    parser = Parser("Compare ways to compute FID; measure precision and recall.", draws=False)
    parser.add_argument("--part", default="fid", choices=("fid", "precision-recall"), help="what to measure")
    parser.add_argument("--num-images", type=int, default=10000, help="features of each set")
    parser.add_argument("--rounds", type=int, default=3, help="how often both ways of FID take turns")
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


def compare_fid(args):
    moments = [feature_statistics(make_features(args.num_images, seed))[:2] for seed in (1, 2)]
    arguments = (*moments[0], *moments[1])
    ways = {"published": frechet_by_square_root, "ours": frechet_distance}
    seconds, values = {way: [] for way in ways}, {}
    for _ in range(args.rounds):
        for way, compute in ways.items():
            started = time.process_time()
            values[way] = compute(*arguments)
            seconds[way].append(time.process_time() - started)
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    for way, value in values.items():
        print(f"FID {way}: {value:.9f} in {medians[way]:.2f} CPU s")
    print(f"FID published / ours: {medians['published'] / medians['ours']:.1f}; relative difference of the values "
          f"{abs(values['ours'] / values['published'] - 1):.1e}")


def resident(name):
    """Returns a line of /proc/self/status in bytes (Linux)."""
    line, = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measure_precision_recall(args, device):
    sets = [torch.from_numpy(make_features(args.num_images, seed)).to(device) for seed in (1, 2)]
    started = time.perf_counter()
    precision, recall = precision_recall(*sets)
    seconds = time.perf_counter() - started
    print(f"precision {precision:.4f}, recall {recall:.4f} of {args.num_images} x {args.num_images} x {WIDTH}: "
          f"{seconds:.1f} s, {torch.get_num_threads()} threads, process peak {resident('VmHWM') / 2**30:.2f} GiB")


def main(args, session):
    if args.part == "fid":
        compare_fid(args)
    else:
        measure_precision_recall(args, session.device)


if __name__ == "__main__":
    run(main, build_parser())
