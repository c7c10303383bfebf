"""Main 1: rearranges the codebook of a VQ checkpoint: a cluster of similar codes becomes a run of neighbouring indices.

    python balance_k_means.py

reads pretrained_models/vq_ds16_c2i.pt and writes, beside it, the reordered checkpoint (for sampling), the mapping from
old codes to tokens (for training), a report and a picture. It needs nothing but a CPU and some seconds.
"""

import time
from pathlib import Path

import numpy as np
import torch

from autoregressive.runtime.checkpoint import model_state, read_checkpoint, save_checkpoint
from autoregressive.runtime.entry import Parser, checks, require_one_process, run
from autoregressive.runtime.files import (
    atomic_write,
    codebook_sha256,
    mapping_sha256,
    require_writable_folder,
    write_json,
)
from autoregressive.runtime.log import open_logger, progress
from tokenizer.clustering import (
    balanced_sse,
    certify,
    cluster_greedy,
    cluster_optimal,
    mapping_of,
    normalize_codes,
    order_clusters,
    require_cluster_size,
    start_codes,
)

CODEBOOK = "quantize.embedding.weight"
WEIGHTS = ("model", "ema", "module", "state_dict")      # parts of a checkpoint that may hold the codebook
LARGEST_PICTURE = 512                                   # codes a side; larger codebooks are thinned out


def build_parser():
    """Returns the parser of this script's command line."""
    parser = Parser("Rearrange a codebook so that a cluster of similar codes is a run of neighbouring indices.",
                    draws=False)
    parser.add_argument("--vq-ckpt", default="pretrained_models/vq_ds16_c2i.pt", help="checkpoint with the codebook")
    parser.add_argument("--cluster-size", type=int, default=128, help="codes in every cluster")
    parser.add_argument("--method", default="optimal", choices=("optimal", "greedy"),
                        help="exact balanced k-means, or Algorithm 1 as published")
    parser.add_argument("--seed", type=int, default=42, help="of the starting codes")
    parser.add_argument("--restarts", type=int, default=0, help="further starts, with the seeds that follow; best wins")
    parser.add_argument("--keep-best", action="store_true", help="greedy: return its best round, not its last")
    parser.add_argument("--output-dir", help="where the files go; default: the folder of the checkpoint")
    return parser


def codebook_keys(state):
    """Returns the keys of a state dict that name the codebook, wrapper prefixes included."""
    return [key for key in state if isinstance(key, str) and (key == CODEBOOK or key.endswith("." + CODEBOOK))]


def read_codebook(args):
    """Returns the whole checkpoint and its codebook (V, E). Raises ValueError for unusable input."""
    payload = read_checkpoint(args.vq_ckpt, "pretrained_models/README.md says where to get it, --vq-ckpt names another")
    state = model_state(payload, args.vq_ckpt)
    if CODEBOOK not in state:
        raise ValueError(f"{args.vq_ckpt}: expected a VQ checkpoint with {CODEBOOK}, found "
                         f"{', '.join(list(state)[:4])}; name the tokenizer's file with --vq-ckpt")
    codebook = state[CODEBOOK]
    if codebook.dim() != 2 or not len(codebook) or not codebook.isfinite().all():
        raise ValueError(f"{args.vq_ckpt}: expected finite codes (V, E) in {CODEBOOK}, found shape "
                         f"{tuple(codebook.shape)}, {int((~codebook.isfinite()).sum())} values not finite")
    require_cluster_size(len(codebook), args.cluster_size)
    if args.keep_best and args.method != "greedy":
        raise ValueError("--keep-best: expected --method greedy, got optimal, whose last round is its best")
    if args.restarts < 0:
        raise ValueError(f"--restarts: expected at least 0, got {args.restarts}")
    if not 0 <= args.seed < 2**63 - args.restarts:
        raise ValueError(f"--seed: expected 0 to 2^63 - 1, got {args.seed}")
    return payload, codebook


def cluster(codes, args, session):
    """Clusters with every start; returns the best Clustering and the SSE of all, by seed."""
    num_clusters = len(codes) // args.cluster_size
    best, tried = None, {}
    with progress(session, None, "cluster the codebook", "round") as bar:
        for seed in range(args.seed, args.seed + args.restarts + 1):
            start = start_codes(len(codes), num_clusters, seed)
            if args.method == "greedy":
                found = cluster_greedy(codes, start, args.keep_best, bar.update)
            else:
                found = cluster_optimal(codes, start, bar.update)
            tried[seed] = found.sse
            if best is None or found.sse < best.sse:
                best = found
            bar.set_postfix(start=len(tried), best_sse=f"{best.sse:.1f}")
    return best, tried


def permute_codebooks(payload, order):
    """Returns the checkpoint with the rows of every codebook in it in the new order; a bare state dict gets `model`."""
    holders = [key for key in WEIGHTS if isinstance(payload.get(key), dict)]
    parts = {key: _permuted(payload[key], order) for key in holders}
    return payload | parts if holders else {"model": _permuted(payload, order)}


def _permuted(state, order):
    return state | {key: state[key][order].clone() for key in codebook_keys(state)}


def draw_codebooks(path, codes, order):
    """Draws the distances between codes, before and after, and how they grow with the difference of the indices."""
    import matplotlib  # here: it takes half a second

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    step = max(1, len(codes) // LARGEST_PICTURE)
    for axis, title, arranged in ((axes[0], "before", codes), (axes[1], "after", codes[order])):
        block = torch.from_numpy(arranged[::step])
        distances = torch.cdist(block, block, compute_mode="donot_use_mm_for_euclid_dist")    # equal on any threads
        image = axis.imshow(distances.numpy(), cmap="viridis", vmin=0, vmax=2, extent=(0, len(codes), len(codes), 0))
        axis.set(title=f"distance of codes, {title}", xlabel="index", ylabel="index")
        gaps = np.unique(np.geomspace(1, len(codes) // 2, 40).astype(int))
        means = [np.linalg.norm(arranged[gap:] - arranged[:-gap], axis=1).mean() for gap in gaps]
        axes[2].semilogx(gaps, means, label=title)
    figure.colorbar(image, ax=axes[1])
    axes[2].set(title="mean distance of two codes", xlabel="difference of their indices", ylim=(0, None))
    axes[2].grid(alpha=0.3)
    axes[2].legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)


def main(args, session):
    logger = open_logger(session)
    with checks(session):
        require_one_process(session)
        payload, codebook = read_codebook(args)
        folder = Path(args.output_dir or Path(args.vq_ckpt).parent)
        require_writable_folder(folder)
    started, cpu_started = time.perf_counter(), time.process_time()
    codes = normalize_codes(codebook)
    num_clusters = len(codes) // args.cluster_size
    found, tried = cluster(codes, args, session)
    order = order_clusters(codes, found.assignment, num_clusters)
    mapping, order = torch.from_numpy(mapping_of(order)), torch.from_numpy(order)

    hashes = {"codebook_sha256": codebook_sha256(codebook[order]),
              "original_codebook_sha256": codebook_sha256(codebook), "mapping_sha256": mapping_sha256(mapping),
              "cluster_size": args.cluster_size, "num_clusters": num_clusters, "method": args.method,
              "seed": args.seed}
    suffix = f"kmeans+nearest-cluster_size={args.cluster_size}"
    reordered_path = folder / f"{Path(args.vq_ckpt).stem}-reorder-{suffix}.pt"
    mapping_path = folder / f"mapping-{suffix}.pt"
    unarranged = np.arange(len(codes)) // args.cluster_size
    report = hashes | {
        "vq_ckpt": str(args.vq_ckpt), "codebook": list(codebook.shape), "restarts": args.restarts,
        "sse_of_indices_as_they_were": balanced_sse(codes, unarranged, num_clusters),
        "sse": found.sse, "sse_by_seed": tried, "sse_by_round": found.sse_trace, "num_swaps": found.num_swaps,
        "certificate": certify(codes, found.assignment, num_clusters),
        "seconds": round(time.perf_counter() - started, 2), "cpu_seconds": round(time.process_time() - cpu_started, 2)}
    save_checkpoint(mapping_path, mapping)
    write_json(mapping_path.with_name(mapping_path.name + ".json"), hashes)
    draw_codebooks(folder / f"codebook-{suffix}.png", codes, order.numpy())
    write_json(folder / f"report-{suffix}.json", report)
    save_checkpoint(reordered_path, permute_codebooks(payload, order) | {"reordering": hashes})
    logger.info("codebook %s -> %s; SSE %.2f -> %.2f in %.1f s", hashes["original_codebook_sha256"][:12],
                hashes["codebook_sha256"][:12], report["sse_of_indices_as_they_were"], found.sse, report["seconds"])
    logger.info("reordered checkpoint %s, mapping %s", reordered_path, mapping_path)


if __name__ == "__main__":
    run(main, build_parser())
