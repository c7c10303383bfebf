"""Main 1: rearranges a VQ codebook, so that similar codes have neighbouring indices.

    python balance_k_means.py

reads pretrained_models/vq_ds16_c2i.pt and writes, beside it, the reordered checkpoint (for
sampling), the mapping from old codes to tokens (for training), a report and a picture. It needs
nothing but a CPU and some seconds.

    python balance_k_means.py \
        --mapping "pretrained_models/mapping-kmeans+nearest-cluster_size=128.pt"

takes a mapping that is there, as IAR ships one, and writes the reordered checkpoint that belongs to
it, nothing else. Letters: V codes, E code dimension.
"""

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoregressive.data.mapping import Mapping, read_mapping
from autoregressive.models.cluster_loss import check_cluster_size
from autoregressive.runtime.checkpoint import model_state, read_checkpoint, save_checkpoint
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import (
    Flags,
    Parser,
    at_least,
    check_one_process,
    checks,
    may_vary,
    run,
)
from autoregressive.runtime.files import check_output, codebook_sha256, write_json
from autoregressive.runtime.identity import find_difference
from autoregressive.runtime.log import LOGGER, open_logger, progress
from tokenizer.clustering import (
    Clustering,
    balanced_sse,
    certify,
    cluster_greedy,
    cluster_optimal,
    cluster_random,
    mapping_of,
    normalize_codes,
    order_clusters,
    start_codes,
)
from tokenizer.codebook_picture import plot_codebooks
from tokenizer.reordering import (
    DEFAULT_METHOD,
    build_record,
    check_mapping_file,
    check_reordered_file,
    name_outputs,
    order_of,
    permute_codebooks,
)
from tokenizer.tokenizer_image.loading import CODEBOOK

METHODS = ("optimal", "greedy", "random")
OF_CLUSTERING = ("method", "seed", "restarts", "keep_best")     # flags of no use beside --mapping


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Rearrange a codebook so that a cluster of similar codes is a run of "
                    "neighbouring indices.", has_seed=False)
    parser.add_argument("--vq-ckpt", default="pretrained_models/vq_ds16_c2i.pt",
                        help="checkpoint with the codebook")
    parser.add_argument("--cluster-size", type=at_least(1), default=128,
                        help="codes in every cluster")
    parser.add_argument("--method", default=DEFAULT_METHOD, choices=METHODS,
                        help="optimal: exact balanced k-means, ours, of tighter clusters; greedy: "
                             "the paper's Algorithm 1; random: clusters of any codes, as a control")
    parser.add_argument("--seed", type=at_least(0), default=42, help="of the starting codes")
    parser.add_argument("--restarts", type=at_least(0), default=0,
                        help="further starts, with the seeds that follow; best wins")
    parser.add_argument("--keep-best", action="store_true",
                        help="greedy: return its best round, not its last")
    parser.add_argument("--mapping",
                        help="take this mapping, such as the one that IAR ships, and write the "
                             "reordered checkpoint only")
    parser.add_argument("--output-dir",
                        help="where the files go; default: the folder of the checkpoint")
    may_vary(parser.add_argument("--overwrite", action="store_true",
                                 help="replace files of another tokenizer, method or seed"))
    return parser


def read_codebook(args: Flags) -> tuple[dict[str, Any], Tensor]:
    """Returns the whole checkpoint and its codebook (V, E).

    Raises:
        ValueError: there is no usable codebook in it, or flags do not fit it or each other.
    """
    payload = read_checkpoint(args.vq_ckpt, "pretrained_models/README.md says where to get it, "
                                            "--vq-ckpt names another")
    state = model_state(payload, args.vq_ckpt)
    if CODEBOOK not in state:
        raise ValueError(f"{args.vq_ckpt}: expected a VQ checkpoint with {CODEBOOK}, found "
                         f"{', '.join(list(state)[:4])}; name the tokenizer's file with --vq-ckpt")
    codebook = state[CODEBOOK]
    is_matrix = codebook.dim() == 2 and codebook.numel() > 0 and codebook.is_floating_point()
    if not is_matrix or not codebook.isfinite().all():
        raise ValueError(f"{args.vq_ckpt}: expected finite codes (V, E) in {CODEBOOK}, found shape "
                         f"{tuple(codebook.shape)}, {int((~codebook.isfinite()).sum())} values not "
                         "finite; copy or download the file again")
    check_cluster_size(len(codebook), args.cluster_size)
    if args.keep_best and args.method != "greedy":
        raise ValueError(f"--keep-best: expected --method greedy, got {args.method}")
    if args.restarts and args.method == "random":
        raise ValueError("--restarts: expected 0 with --method random, whose clusters are not to "
                         f"be the best of many, got {args.restarts}")
    if args.seed >= 2**63 - args.restarts:
        raise ValueError(f"--seed: expected 0 to 2^63 - 1, got {args.seed}")
    return payload, codebook


def build_identity(args: Flags, codebook: Tensor) -> dict[str, Any]:
    """Returns what the files depend on, as far as it is known before the work."""
    identity = {"original_codebook_sha256": codebook_sha256(codebook),
                "cluster_size": args.cluster_size,
                "num_clusters": len(codebook) // args.cluster_size,
                "method": args.method,
                "seed": args.seed}
    # Older files do not know these, so defaults are not recorded.
    for name in ("restarts", "keep_best"):
        if getattr(args, name) != args.defaults()[name]:
            identity[name] = getattr(args, name)
    return identity


def read_given_mapping(args: Flags, codebook: Tensor) -> Mapping:
    """Returns the mapping of --mapping.

    Raises:
        ValueError: it is another codebook's, or a flag beside it has no use.
    """
    for name in OF_CLUSTERING:
        if getattr(args, name) != args.defaults()[name]:
            raise ValueError(f"--{name.replace('_', '-')}: expected none beside --mapping, "
                             f"which takes a finished mapping; leave one of them out")
    mapping = read_mapping(args.mapping, len(codebook))
    known = {"original_codebook_sha256": codebook_sha256(codebook),
             "cluster_size": args.cluster_size}
    for key, value in known.items():
        if mapping.hashes.get(key, value) != value:
            raise ValueError(f"{args.mapping}: expected a mapping with "
                             f"{find_difference(known, mapping.hashes, [key])}; name the "
                             "checkpoint and the --cluster-size that it was made with")
    if mapping.hashes.get("method", DEFAULT_METHOD) not in METHODS:
        raise ValueError(f"{args.mapping}.json: expected method {' or '.join(METHODS)}, found "
                         f"{mapping.hashes['method']}; run balance_k_means.py again")
    if "original_codebook_sha256" not in mapping.hashes:
        LOGGER.warning("%s: carries no hash of its codebook, so it cannot be checked", args.mapping)
    return mapping


def cluster(codes: np.ndarray, num_clusters: int, args: Flags,
            session: Session) -> tuple[Clustering, dict[int, float]]:
    """Clusters codes (V, E) with every start; returns the best Clustering, and the SSE by seed."""
    found = {}
    with progress(session, None, "cluster the codebook", "round") as bar:
        for seed in range(args.seed, args.seed + args.restarts + 1):
            if args.method == "random":
                found[seed] = cluster_random(codes, num_clusters, seed)
            elif args.method == "greedy":
                start = start_codes(len(codes), num_clusters, seed)
                found[seed] = cluster_greedy(codes, start, args.keep_best, on_round=bar.update)
            else:
                start = start_codes(len(codes), num_clusters, seed)
                found[seed] = cluster_optimal(codes, start, on_round=bar.update)
            best = min(found.values(), key=lambda clustering: clustering.sse)
            bar.set_postfix(start=len(found), best_sse=f"{best.sse:.1f}")
    return best, {seed: clustering.sse for seed, clustering in found.items()}


def judge(codes: np.ndarray, num_clusters: int, found: Clustering) -> dict[str, Any]:
    """Returns how good a clustering of codes (V, E) is: the numbers of the report."""
    as_they_were = np.repeat(np.arange(num_clusters), len(codes) // num_clusters)
    return {"sse_of_indices_as_they_were": balanced_sse(codes, as_they_were, num_clusters),
            "sse": found.sse,
            "sse_by_round": found.sse_trace,
            "num_swaps": found.num_swaps,
            "certificate": certify(codes, found.assignment, num_clusters)}


def reorder_by(given: Mapping, payload: dict[str, Any], state: dict[str, Tensor], args: Flags,
               session: Session) -> None:
    """Writes the checkpoint that belongs to a mapping which is there.

    Args:
        given: of read_given_mapping.
        payload: the whole checkpoint.
        state: its weights by name.
        args: flags of the command line.
        session: Session.
    """
    codebook = state[CODEBOOK]
    mapping = torch.from_numpy(given.tokens)
    identity = {"cluster_size": args.cluster_size,
                "num_clusters": len(codebook) // args.cluster_size,
                "method": None, "seed": None}                   # None: unknown
    identity |= {key: given.hashes[key] for key in OF_CLUSTERING if key in given.hashes}
    record = build_record(identity, codebook, mapping)
    outputs = name_outputs(args.vq_ckpt, args.output_dir, args.cluster_size, identity["method"])
    with checks(session):
        check_output(outputs.reordered)
        session.hold(outputs.mapping, outputs.reordered)        # as a clustering does
        if not args.overwrite:
            check_reordered_file(outputs.reordered, state, record)
    order = order_of(mapping)
    save_checkpoint(outputs.reordered, permute_codebooks(payload, order) | {"reordering": record})
    codes = normalize_codes(codebook)
    num_clusters = identity["num_clusters"]
    as_they_were = np.arange(len(codes)) // args.cluster_size
    sse_before = balanced_sse(codes, as_they_were, num_clusters)
    sse = balanced_sse(codes, given.tokens // args.cluster_size, num_clusters)
    LOGGER.info("reordered checkpoint %s by %s; SSE %.2f -> %.2f", outputs.reordered, given.path,
                sse_before, sse)
    if sse > sse_before:
        LOGGER.warning("%s: its clusters are no better than the order of the checkpoint; is it a "
                       "mapping of %s?", given.path, args.vq_ckpt)


def main(args: Flags, session: Session) -> None:
    """Reorders the codebook, by a mapping that is given or by a clustering."""
    open_logger(session)

    # Read the codebook; a mapping that is given is applied, and that is all.
    with checks(session):
        check_one_process(session)
        payload, codebook = read_codebook(args)
        state = model_state(payload, args.vq_ckpt)
        given = read_given_mapping(args, codebook) if args.mapping else None
    if given is not None:
        reorder_by(given, payload, state, args, session)
        return

    # Name the outputs, and check that files already there are this command's own.
    with checks(session):
        identity = build_identity(args, codebook)
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

    # Cluster the codes, order them, and describe the outcome.
    started = time.perf_counter()
    cpu_started = time.process_time()
    codes = normalize_codes(codebook)
    num_clusters = len(codebook) // args.cluster_size
    found, sse_by_seed = cluster(codes, num_clusters, args, session)
    order = order_clusters(codes, found.assignment, num_clusters)
    mapping = torch.from_numpy(mapping_of(order))
    record = build_record(identity, codebook, mapping)
    report = record | {"vq_ckpt": args.vq_ckpt, "codebook": list(codebook.shape),
                       "restarts": args.restarts, "sse_by_seed": sse_by_seed}
    report |= judge(codes, num_clusters, found)
    report["seconds"] = round(time.perf_counter() - started, 2)
    report["cpu_seconds"] = round(time.process_time() - cpu_started, 2)
    if not args.overwrite:
        with checks(session):                   # another version of torch may cluster otherwise
            check_mapping_file(outputs, record)

    # Write the files, the reordered checkpoint last.
    if args.overwrite:
        outputs.mapping.unlink(missing_ok=True)
    write_json(outputs.record, record)          # first: a mapping without it counts as others' own
    save_checkpoint(outputs.mapping, mapping)
    plot_codebooks(outputs.picture, codes, order)
    write_json(outputs.report, report)
    save_checkpoint(outputs.reordered, permute_codebooks(payload, order) | {"reordering": record})
    LOGGER.info("codebook %s -> %s; SSE %.2f -> %.2f in %.1f s",
                record["original_codebook_sha256"][:12], record["codebook_sha256"][:12],
                report["sse_of_indices_as_they_were"], found.sse, report["seconds"])
    LOGGER.info("reordered checkpoint %s, mapping %s", outputs.reordered, outputs.mapping)


if __name__ == "__main__":
    run(main, build_parser())
