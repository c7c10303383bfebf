"""Seconds of FID by the matrix square root and by eigenvalues, of precision/recall, of the network.

    OMP_NUM_THREADS=1 python scripts/benchmarks/evaluation.py --part fid
    python scripts/benchmarks/evaluation.py --part precision-recall             # all cores
    python scripts/benchmarks/evaluation.py --part network --num-images 4096    # GPU

The features are synthetic: N x 2048, correlated, non-negative like Inception's pool features. The
network is a stand-in of random weights with the operations and shapes of ADM's Inception; its time
for 50,000 pictures is extrapolated.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The repository root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import functools
import tempfile

import numpy as np
import scipy.linalg
import torch

from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import Flags, Parser, at_least, run
from autoregressive.runtime.speed import peak_memory_mib
from evaluations.c2i.inception_torch import TorchInception
from evaluations.c2i.metrics import feature_statistics, frechet_distance, precision_recall
from scripts.benchmarks.inception_stand_in import build_inception
from scripts.benchmarks.turns import (
    Report,
    Values,
    add_report_args,
    benchmark_parser,
    compare,
    timed,
)

WIDTH = 2048
PIXELS = 256                                        # of a picture that the network is given
PROTOCOL = 50000                                    # pictures of the published protocol


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    description = "Compare ways to compute FID; measure precision and recall."
    parser = benchmark_parser(description, rounds=3)
    add_report_args(parser)
    parser.add_argument("--part", default="fid", choices=PARTS, help="what to measure")
    parser.add_argument("--num-images", type=at_least(1), default=10000,
                        help="features of each set, or pictures of the network")
    parser.add_argument("--batch-size", type=at_least(1), default=64,
                        help="pictures that the network takes together")
    return parser


def make_features(count: int, seed: int) -> np.ndarray:
    """Returns correlated non-negative features (count, 2048) float32."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).standard_normal((WIDTH, WIDTH))
    mixing *= np.linspace(0.02, 0.2, WIDTH)[:, None]
    mixed = random.standard_normal((count, WIDTH)) @ mixing + 0.1 * seed
    return np.maximum(mixed, 0).astype(np.float32) / 10


def frechet_by_square_root(mu1, sigma1, mu2, sigma2):
    """Computes FID as published: the trace of the square root of a product of covariances."""
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    distance = np.square(mu1 - mu2).sum()
    return float(distance + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root))


def compare_fid(args: Flags, device: torch.device) -> Values:
    """Measures both ways to the distance of two Gaussians, in CPU seconds."""
    features = [make_features(args.num_images, seed) for seed in (1, 2)]
    moments = [array for each in features for array in feature_statistics(each)[:2]]

    def measure(distance):
        value, seconds = timed(lambda: distance(*moments))
        return {"CPU seconds": seconds, "FID": value}

    ways = {"published": frechet_by_square_root, "ours": frechet_distance}
    medians = compare("FID", measure, ways, args.rounds)
    difference = abs(medians["ours"]["FID"] / medians["published"]["FID"] - 1)
    print(f"relative difference of the values {difference:.1e}")
    return medians


def measure_precision_recall(args: Flags, device: torch.device) -> Values:
    """Measures precision and recall of two sets of features."""
    sets = [torch.from_numpy(make_features(args.num_images, seed)).to(device) for seed in (1, 2)]
    (precision, recall), seconds = timed(lambda: precision_recall(*sets), device)
    print(f"precision {precision:.4f}, recall {recall:.4f} of twice {len(sets[0])} x {WIDTH}: "
          f"{seconds:.1f} s, {torch.get_num_threads()} threads, "
          f"peak {peak_memory_mib(device) / 1024:.2f} GiB")
    return {"ours": {"seconds": seconds}}


def measure_network(args: Flags, device: torch.device) -> Values:
    """Measures the network on pictures in memory, the copies to and from the device included."""
    with tempfile.NamedTemporaryFile(suffix=".pb") as file:
        file.write(build_inception().SerializeToString())
        file.flush()
        network = TorchInception(file.name, device)
    shape = (args.batch_size, PIXELS, PIXELS, 3)
    batch = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    num_batches = -(-args.num_images // args.batch_size)

    def measure(_):
        _, seconds = timed(lambda: [network.features(batch) for _ in range(num_batches)], device)
        rate = num_batches * args.batch_size / seconds
        return {"images/s": rate, f"seconds of {PROTOCOL:,} (extrapolated)": PROTOCOL / rate}

    is_gpu = device.type == "cuda"
    return compare("network", measure, {"ours": None}, args.rounds, warm_up=int(is_gpu))


PARTS = {"fid": compare_fid, "precision-recall": measure_precision_recall,
         "network": measure_network}
TITLES = {"fid": "distance of Gaussians", "precision-recall": "precision and recall",
          "network": "Inception's shapes (stand-in)"}


def main(args: Flags, session: Session) -> None:
    report = Report("evaluation", args.report, args.minutes)
    report.measure(f"{TITLES[args.part]}, {args.num_images:,} images",
                   functools.partial(PARTS[args.part], args, session.device))
    report.finish()


if __name__ == "__main__":
    run(main, build_parser())
