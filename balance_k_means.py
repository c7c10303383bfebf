"""Main 1: rearranges the codebook of a VQ checkpoint: a cluster of similar codes becomes a run of neighbouring indices.

    python balance_k_means.py

reads pretrained_models/vq_ds16_c2i.pt and writes, beside it, the reordered checkpoint (for sampling), the mapping from
old codes to tokens (for training), a report and a picture. It needs nothing but a CPU and some seconds.
"""

import functools
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autoregressive.runtime.checkpoint import STATE_KEYS, model_state, read_checkpoint, save_checkpoint
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import Flags, Parser, at_least, check_one_process, checks, run
from autoregressive.runtime.files import (
    atomic_write,
    check_writable_folder,
    codebook_sha256,
    mapping_sha256,
    write_json,
)
from autoregressive.runtime.log import LOGGER, open_logger, progress
from tokenizer.clustering import (
    Clustering,
    balanced_sse,
    certify,
    check_cluster_size,
    cluster_greedy,
    cluster_optimal,
    mapping_of,
    normalize_codes,
    order_clusters,
    start_codes,
)

CODEBOOK = "quantize.embedding.weight"
WEIGHTS = (*STATE_KEYS, "ema")                          # parts of a checkpoint that may hold the codebook
LARGEST_PICTURE = 512                                   # codes a side; larger codebooks are thinned out


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Rearrange a codebook so that a cluster of similar codes is a run of neighbouring indices.",
                    draws=False)
    parser.add_argument("--vq-ckpt", default="pretrained_models/vq_ds16_c2i.pt", help="checkpoint with the codebook")
    parser.add_argument("--cluster-size", type=at_least(1), default=128, help="codes in every cluster")
    parser.add_argument("--method", default="optimal", choices=("optimal", "greedy"),
                        help="exact balanced k-means, or Algorithm 1 as published")
    parser.add_argument("--seed", type=at_least(0), default=42, help="of the starting codes")
    parser.add_argument("--restarts", type=at_least(0), default=0,
                        help="further starts, with the seeds that follow; best wins")
    parser.add_argument("--keep-best", action="store_true", help="greedy: return its best round, not its last")
    parser.add_argument("--output-dir", help="where the files go; default: the folder of the checkpoint")
    return parser


def read_codebook(args: Flags) -> tuple[dict, Tensor]:
    """Returns the whole checkpoint and its codebook (V, E). Raises ValueError for unusable input."""
    payload = read_checkpoint(args.vq_ckpt, "pretrained_models/README.md says where to get it, --vq-ckpt names another")
    state = model_state(payload, args.vq_ckpt)
    if CODEBOOK not in state:
        raise ValueError(f"{args.vq_ckpt}: expected a VQ checkpoint with {CODEBOOK}, found "
                         f"{', '.join(list(state)[:4])}; name the tokenizer's file with --vq-ckpt")
    codebook = state[CODEBOOK]
    if codebook.dim() != 2 or not codebook.numel() or not codebook.isfinite().all():
        raise ValueError(f"{args.vq_ckpt}: expected finite codes (V, E) in {CODEBOOK}, found shape "
                         f"{tuple(codebook.shape)}, {int((~codebook.isfinite()).sum())} values not finite; copy or "
                         "download the file again")
    check_cluster_size(len(codebook), args.cluster_size)
    if args.keep_best and args.method != "greedy":
        raise ValueError("--keep-best: expected --method greedy, got optimal, whose last round is its best")
    if args.seed >= 2**63 - args.restarts:
        raise ValueError(f"--seed: expected 0 to 2^63 - 1, got {args.seed}")
    return payload, codebook


def cluster(codes: np.ndarray, num_clusters: int, args: Flags, session: Session) -> tuple[Clustering, dict[int, float]]:
    """Clusters with every start; returns the best Clustering and the SSE of all, by seed."""
    method = functools.partial(cluster_greedy, keep_best=args.keep_best) if args.method == "greedy" else cluster_optimal
    found = {}
    with progress(session, None, "cluster the codebook", "round") as bar:
        for seed in range(args.seed, args.seed + args.restarts + 1):
            found[seed] = method(codes, start_codes(len(codes), num_clusters, seed), on_round=bar.update)
            best = min(found.values(), key=lambda clustering: clustering.sse)
            bar.set_postfix(start=len(found), best_sse=f"{best.sse:.1f}")
    return best, {seed: clustering.sse for seed, clustering in found.items()}


def permute_codebooks(payload: dict, order: np.ndarray) -> dict:
    """Returns the checkpoint with the rows of every codebook in it in the new order; a bare state dict gets `model`."""
    parts = {key: _permuted(payload[key], order) for key in WEIGHTS if isinstance(payload.get(key), dict)}
    return payload | parts if parts else {"model": _permuted(payload, order)}


def _permuted(state, order):
    return state | {key: value[order] for key, value in state.items()
                    if f".{key}".endswith(f".{CODEBOOK}")}          # it may have wrapper prefixes


def draw_codebooks(path: Path, codes: np.ndarray, order: np.ndarray) -> None:
    """Draws the distances between codes, before and after, and how they grow with the difference of the indices."""
    from matplotlib.figure import Figure  # here: it takes half a second

    figure = Figure(figsize=(14, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
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


def describe(args: Flags, codebook: Tensor, order: np.ndarray, mapping: Tensor) -> dict:
    """Returns what travels with both files, so that nobody combines those of different runs."""
    return {"codebook_sha256": codebook_sha256(codebook[order]), "original_codebook_sha256": codebook_sha256(codebook),
            "mapping_sha256": mapping_sha256(mapping), "cluster_size": args.cluster_size,
            "num_clusters": len(codebook) // args.cluster_size, "method": args.method, "seed": args.seed}


def judge(codes: np.ndarray, num_clusters: int, found: Clustering) -> dict:
    """Returns how good a clustering is: the numbers of the report."""
    as_they_were = np.repeat(np.arange(num_clusters), len(codes) // num_clusters)
    return {"sse_of_indices_as_they_were": balanced_sse(codes, as_they_were, num_clusters), "sse": found.sse,
            "sse_by_round": found.sse_trace, "num_swaps": found.num_swaps,
            "certificate": certify(codes, found.assignment, num_clusters)}


def main(args: Flags, session: Session) -> None:
    open_logger(session)
    with checks(session):
        check_one_process(session)
        payload, codebook = read_codebook(args)
        folder = Path(args.output_dir or Path(args.vq_ckpt).parent)
        check_writable_folder(folder)
    started, cpu_started = time.perf_counter(), time.process_time()
    codes, num_clusters = normalize_codes(codebook), len(codebook) // args.cluster_size
    found, sse_by_seed = cluster(codes, num_clusters, args, session)
    order = order_clusters(codes, found.assignment, num_clusters)
    mapping = torch.from_numpy(mapping_of(order))
    record = describe(args, codebook, order, mapping)
    report = record | {"vq_ckpt": args.vq_ckpt, "codebook": list(codebook.shape), "restarts": args.restarts,
                       "sse_by_seed": sse_by_seed} | judge(codes, num_clusters, found)
    report |= {"seconds": round(time.perf_counter() - started, 2),
               "cpu_seconds": round(time.process_time() - cpu_started, 2)}

    suffix = f"kmeans+nearest-cluster_size={args.cluster_size}"
    reordered_path = folder / f"{Path(args.vq_ckpt).stem}-reorder-{suffix}.pt"
    mapping_path = folder / f"mapping-{suffix}.pt"
    save_checkpoint(mapping_path, mapping)
    write_json(f"{mapping_path}.json", record)
    draw_codebooks(folder / f"codebook-{suffix}.png", codes, order)
    write_json(folder / f"report-{suffix}.json", report)
    save_checkpoint(reordered_path, permute_codebooks(payload, order) | {"reordering": record})
    LOGGER.info("codebook %s -> %s; SSE %.2f -> %.2f in %.1f s", record["original_codebook_sha256"][:12],
                record["codebook_sha256"][:12], report["sse_of_indices_as_they_were"], found.sse, report["seconds"])
    LOGGER.info("reordered checkpoint %s, mapping %s", reordered_path, mapping_path)


if __name__ == "__main__":
    run(main, build_parser())
