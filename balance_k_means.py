"""Main 1: rearranges the codebook of a VQ checkpoint: a cluster of similar codes becomes a run of neighbouring indices.

    python balance_k_means.py

reads pretrained_models/vq_ds16_c2i.pt and writes, beside it, the reordered checkpoint (for sampling), the mapping from
old codes to tokens (for training), a report and a picture. It needs nothing but a CPU and some seconds.

    python balance_k_means.py --mapping "pretrained_models/mapping-kmeans+nearest-cluster_size=128.pt"

takes a mapping that is there, as IAR ships one, and writes the reordered checkpoint that belongs to it, nothing else.
"""

import functools
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autoregressive.data.mapping import Mapping, read_mapping
from autoregressive.runtime.checkpoint import model_state, read_checkpoint, save_checkpoint
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import Flags, Parser, at_least, check_one_process, checks, free, run
from autoregressive.runtime.files import atomic_write, check_output, codebook_sha256, write_json
from autoregressive.runtime.identity import find_difference
from autoregressive.runtime.log import LOGGER, open_logger, progress
from tokenizer.clustering import (
    Clustering,
    balanced_sse,
    certify,
    check_cluster_size,
    cluster_greedy,
    cluster_optimal,
    cluster_random,
    mapping_of,
    normalize_codes,
    order_clusters,
    start_codes,
)
from tokenizer.reordering import (
    CODEBOOK,
    PUBLISHED_METHOD,
    check_mapping_file,
    check_reordered_file,
    describe,
    name_outputs,
    order_of,
    permute_codebooks,
)

LARGEST_PICTURE = 512                                   # codes a side; larger codebooks are thinned out
METHODS = ("optimal", "greedy", "random")
OF_CLUSTERING = ("method", "seed", "restarts", "keep_best")                    # flags that --mapping leaves no use for


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Rearrange a codebook so that a cluster of similar codes is a run of neighbouring indices.",
                    draws=False)
    parser.add_argument("--vq-ckpt", default="pretrained_models/vq_ds16_c2i.pt", help="checkpoint with the codebook")
    parser.add_argument("--cluster-size", type=at_least(1), default=128, help="codes in every cluster")
    parser.add_argument("--method", default=PUBLISHED_METHOD, choices=METHODS,
                        help="exact balanced k-means; Algorithm 1 as published; or no structure at all, as a control")
    parser.add_argument("--seed", type=at_least(0), default=42, help="of the starting codes")
    parser.add_argument("--restarts", type=at_least(0), default=0,
                        help="further starts, with the seeds that follow; best wins")
    parser.add_argument("--keep-best", action="store_true", help="greedy: return its best round, not its last")
    parser.add_argument("--mapping", help="take this mapping, and write the reordered checkpoint only")
    parser.add_argument("--output-dir", help="where the files go; default: the folder of the checkpoint")
    free(parser.add_argument("--overwrite", action="store_true",
                             help="replace files of another tokenizer, method or seed"))
    return parser


def read_codebook(args: Flags) -> tuple[dict, Tensor]:
    """Returns the whole checkpoint and its codebook (V, E). Raises ValueError for unusable input."""
    payload = read_checkpoint(args.vq_ckpt, "pretrained_models/README.md says where to get it, --vq-ckpt names another")
    state = model_state(payload, args.vq_ckpt)
    if CODEBOOK not in state:
        raise ValueError(f"{args.vq_ckpt}: expected a VQ checkpoint with {CODEBOOK}, found "
                         f"{', '.join(list(state)[:4])}; name the tokenizer's file with --vq-ckpt")
    codebook = state[CODEBOOK]
    is_matrix = codebook.dim() == 2 and codebook.numel() > 0 and codebook.is_floating_point()
    if not is_matrix or not codebook.isfinite().all():
        raise ValueError(f"{args.vq_ckpt}: expected finite codes (V, E) in {CODEBOOK}, found shape "
                         f"{tuple(codebook.shape)}, {int((~codebook.isfinite()).sum())} values not finite; copy or "
                         "download the file again")
    check_cluster_size(len(codebook), args.cluster_size)
    if args.keep_best and args.method != "greedy":
        raise ValueError(f"--keep-best: expected --method greedy, got {args.method}")
    if args.restarts and args.method == "random":
        raise ValueError(f"--restarts: expected 0 with --method random, whose clusters are not to be the best of many, "
                         f"got {args.restarts}")
    if args.seed >= 2**63 - args.restarts:
        raise ValueError(f"--seed: expected 0 to 2^63 - 1, got {args.seed}")
    return payload, codebook


def identity_of(args: Flags, codebook: Tensor) -> dict:
    """Returns what the files depend on, as far as it is known before the work."""
    identity = {"original_codebook_sha256": codebook_sha256(codebook), "cluster_size": args.cluster_size,
                "num_clusters": len(codebook) // args.cluster_size, "method": args.method, "seed": args.seed}
    for name in ("restarts", "keep_best"):      # older files do not know them: there where they are not the default
        if getattr(args, name) != args.defaults()[name]:
            identity[name] = getattr(args, name)
    return identity


def read_given_mapping(args: Flags, codebook: Tensor) -> Mapping:
    """Returns the mapping of --mapping. Raises ValueError if it is another codebook's, or a flag has no use."""
    for name in OF_CLUSTERING:
        if getattr(args, name) != args.defaults()[name]:
            raise ValueError(f"--{name.replace('_', '-')}: expected none beside --mapping, "
                             f"which takes a finished mapping; leave one of them out")
    mapping = read_mapping(args.mapping, len(codebook))
    known = {"original_codebook_sha256": codebook_sha256(codebook), "cluster_size": args.cluster_size}
    for key, value in known.items():
        if mapping.hashes.get(key, value) != value:
            raise ValueError(f"{args.mapping}: expected a mapping with "
                             f"{find_difference(known, mapping.hashes, [key])}; name the checkpoint and the "
                             "--cluster-size that it was made with")
    if mapping.hashes.get("method", PUBLISHED_METHOD) not in METHODS:
        raise ValueError(f"{args.mapping}.json: expected method {' or '.join(METHODS)}, found "
                         f"{mapping.hashes['method']}; run balance_k_means.py again")
    if "original_codebook_sha256" not in mapping.hashes:
        LOGGER.warning("%s: carries no hash of its codebook, so it cannot be checked", args.mapping)
    return mapping


def cluster(codes: np.ndarray, num_clusters: int, args: Flags, session: Session) -> tuple[Clustering, dict[int, float]]:
    """Clusters with every start; returns the best Clustering and the SSE of all, by seed."""
    method = functools.partial(cluster_greedy, keep_best=args.keep_best) if args.method == "greedy" else cluster_optimal
    found = {}
    with progress(session, None, "cluster the codebook", "round") as bar:
        for seed in range(args.seed, args.seed + args.restarts + 1):
            if args.method == "random":
                found[seed] = cluster_random(codes, num_clusters, seed)
            else:
                found[seed] = method(codes, start_codes(len(codes), num_clusters, seed), on_round=bar.update)
            best = min(found.values(), key=lambda clustering: clustering.sse)
            bar.set_postfix(start=len(found), best_sse=f"{best.sse:.1f}")
    return best, {seed: clustering.sse for seed, clustering in found.items()}


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
        gaps = np.unique(np.geomspace(1, max(1, len(codes) // 2), 40).astype(int))
        gaps = gaps[gaps < len(codes)]                          # a single code has no neighbour
        means = [np.linalg.norm(arranged[gap:] - arranged[:-gap], axis=1).mean() for gap in gaps]
        axes[2].semilogx(gaps, means, label=title)
    figure.colorbar(image, ax=axes[1])
    axes[2].set(title="mean distance of two codes", xlabel="difference of their indices", ylim=(0, None))
    axes[2].grid(alpha=0.3)
    axes[2].legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


def judge(codes: np.ndarray, num_clusters: int, found: Clustering) -> dict:
    """Returns how good a clustering is: the numbers of the report."""
    as_they_were = np.repeat(np.arange(num_clusters), len(codes) // num_clusters)
    return {"sse_of_indices_as_they_were": balanced_sse(codes, as_they_were, num_clusters), "sse": found.sse,
            "sse_by_round": found.sse_trace, "num_swaps": found.num_swaps,
            "certificate": certify(codes, found.assignment, num_clusters)}


def reorder_by(given: Mapping, payload: dict, state: dict[str, Tensor], args: Flags,
               session: Session) -> None:
    """Writes the checkpoint that belongs to a mapping which is there.

    Args:
        given: of read_given_mapping.
        payload: the whole checkpoint.
        state: its weights by name.
        args: flags of the command line.
        session: Session.
    """
    codebook, mapping = state[CODEBOOK], torch.from_numpy(given.tokens)
    identity = {"cluster_size": args.cluster_size,
                "num_clusters": len(codebook) // args.cluster_size,
                "method": None, "seed": None}                   # None: whoever made it did not say
    identity |= {key: given.hashes[key] for key in OF_CLUSTERING if key in given.hashes}
    record = describe(identity, codebook, mapping)
    outputs = name_outputs(args.vq_ckpt, args.output_dir, args.cluster_size, identity["method"])
    with checks(session):
        check_output(outputs.reordered)
        session.hold(outputs.mapping, outputs.reordered)        # as those do who cluster
        if not args.overwrite:
            check_reordered_file(outputs.reordered, state, record)
    order = order_of(mapping)
    save_checkpoint(outputs.reordered, permute_codebooks(payload, order) | {"reordering": record})
    codes, num_clusters = normalize_codes(codebook), identity["num_clusters"]
    sse_before, sse = (balanced_sse(codes, assignment, num_clusters) for assignment in (
        np.arange(len(codes)) // args.cluster_size, given.tokens // args.cluster_size))
    LOGGER.info("reordered checkpoint %s by %s; SSE %.2f -> %.2f", outputs.reordered, given.path, sse_before, sse)
    if sse > sse_before:
        LOGGER.warning("%s: its clusters are no better than the order of the checkpoint; is it a mapping of %s?",
                       given.path, args.vq_ckpt)


def main(args: Flags, session: Session) -> None:
    open_logger(session)
    with checks(session):
        check_one_process(session)
        payload, codebook = read_codebook(args)
        state = model_state(payload, args.vq_ckpt)
        given = read_given_mapping(args, codebook) if args.mapping else None
    if given is not None:
        reorder_by(given, payload, state, args, session)
        return
    with checks(session):
        identity = identity_of(args, codebook)
        outputs = name_outputs(args.vq_ckpt, args.output_dir, args.cluster_size, args.method)
        for path in outputs.all():
            check_output(path)
        session.hold(*outputs.all())
        if not args.overwrite:
            check_mapping_file(outputs, identity)
            check_reordered_file(outputs.reordered, state, identity)
    if all(path.exists() for path in outputs.all()) and not args.overwrite:
        LOGGER.info("%s is finished, mapping %s", outputs.reordered, outputs.mapping)
        return
    started, cpu_started = time.perf_counter(), time.process_time()
    codes, num_clusters = normalize_codes(codebook), len(codebook) // args.cluster_size
    found, sse_by_seed = cluster(codes, num_clusters, args, session)
    order = order_clusters(codes, found.assignment, num_clusters)
    mapping = torch.from_numpy(mapping_of(order))
    record = describe(identity, codebook, mapping)
    report = record | {"vq_ckpt": args.vq_ckpt, "codebook": list(codebook.shape),
                       "restarts": args.restarts, "sse_by_seed": sse_by_seed}
    report |= judge(codes, num_clusters, found)
    report |= {"seconds": round(time.perf_counter() - started, 2),
               "cpu_seconds": round(time.process_time() - cpu_started, 2)}
    if not args.overwrite:
        with checks(session):                   # another version of torch may cluster otherwise
            check_mapping_file(outputs, record)

    if args.overwrite:
        outputs.mapping.unlink(missing_ok=True)
    write_json(outputs.record, record)          # first: a mapping without it counts as one of others
    save_checkpoint(outputs.mapping, mapping)
    draw_codebooks(outputs.picture, codes, order)
    write_json(outputs.report, report)
    save_checkpoint(outputs.reordered, permute_codebooks(payload, order) | {"reordering": record})
    LOGGER.info("codebook %s -> %s; SSE %.2f -> %.2f in %.1f s", record["original_codebook_sha256"][:12],
                record["codebook_sha256"][:12], report["sse_of_indices_as_they_were"], found.sse, report["seconds"])
    LOGGER.info("reordered checkpoint %s, mapping %s", outputs.reordered, outputs.mapping)


if __name__ == "__main__":
    run(main, build_parser())
