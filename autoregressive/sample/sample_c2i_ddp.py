"""Main 3: draws pictures for scoring and packs them into one npz.

    torchrun --nnodes=1 --nproc_per_node=8 autoregressive/sample/sample_c2i_ddp.py --gpt-model GPT-B \
        --vq-ckpt "pretrained_models/vq_ds16_c2i-reorder-kmeans+nearest-cluster_size=128.pt" \
        --gpt-ckpt results/000-GPT-B-lambda=1-cluster_size=128/checkpoints --image-size 384 --image-size-eval 256 \
        --cfg-scale 2.25 --num-fid-samples 50000 --sample-dir samples

On a CPU, after scripts/quickstart.sh:

    python autoregressive/sample/sample_c2i_ddp.py --gpt-model GPT-tiny --num-classes 10 --image-size 16 \
        --image-size-eval 16 --downsample-size 4 --codebook-size 512 --cluster-size 16 --vq-model VQ-4-small \
        --vq-ckpt "results/quickstart/vq-reorder-kmeans+nearest-cluster_size=16.pt" --precision none \
        --gpt-ckpt results/quickstart/gpt/000-GPT-tiny-lambda=1-cluster_size=16 --num-fid-samples 100
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])      # the repository root instead of this folder

import numpy as np
import torch

from autoregressive.assemble import add_painter_args, load_painter
from autoregressive.models.generate import balanced_labels, random_numbers
from autoregressive.runtime.entry import Parser, checks, run
from autoregressive.runtime.files import require_writable_folder
from autoregressive.runtime.log import open_logger, progress
from autoregressive.runtime.pictures import save_grid
from autoregressive.sample.shards import (
    is_finished,
    merge_shards,
    open_shards,
    shard_path,
    wait_for_shards,
    write_shard,
)

NUM_SHOWN = 64                                      # pictures in the PNG beside the npz


def build_parser():
    """Returns the parser of this script's command line."""
    parser = Parser("Draw pictures for scoring and pack them into one npz.")
    add_painter_args(parser)
    parser.add_argument("--sample-dir", default="samples", help="folder of the npz")
    parser.add_argument("--per-proc-batch-size", type=int, default=32, help="pictures drawn together by a process")
    parser.add_argument("--num-fid-samples", type=int, default=50000, help="pictures in the npz")
    parser.add_argument("--labels", default="random", help="random: drawn uniformly, the published protocol; balanced: "
                        "all classes in turn; or class indices like 207,360, in turn")
    parser.add_argument("--save-codes", action="store_true", help="store the tokens, too, as array `tokens`")
    return parser


def check_flags(args):
    """Raises ValueError for flags of this script that are out of range; returns the labels that --labels lists."""
    for name in ("num_fid_samples", "per_proc_batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    if args.labels in ("random", "balanced"):
        return None
    try:
        listed = [int(label) for label in args.labels.split(",")]
    except ValueError:
        raise ValueError("--labels: expected random, balanced or class indices like 207,360, "
                         f"got {args.labels}") from None
    if not 0 <= min(listed) <= max(listed) < args.num_classes:
        raise ValueError(f"--labels: expected indices in 0 .. {args.num_classes - 1}, got {args.labels}")
    return listed


def run_name(args, gpt_path):
    """Returns the published name of a run's npz, without the ending, plus what is not the published way."""
    more = "".join(f"-{flag.replace('_', '-')}-{value}" for flag, value, published in (
        ("weights", args.weights, "raw"), ("labels", args.labels, "random"), ("resize", args.resize, "bicubic"),
        ("cfg_interval", args.cfg_interval, -1), ("greedy", args.greedy, False)) if value != published)
    return (f"{args.gpt_model}-{args.cluster_size}-{gpt_path.stem}-size-{args.image_size}-size-{args.image_size_eval}"
            f"-{args.vq_model}-topk-{args.top_k}-topp-{args.top_p}-temperature-{args.temperature}"
            f"-cfg-{args.cfg_scale}-seed-{args.global_seed}{more}")


def describe_samples(args, record, hashes):
    """Returns the plain dict of everything that the samples depend on; it travels in the npz."""
    names = ("gpt_model", "vq_model", "image_size", "image_size_eval", "num_fid_samples", "cfg_scale", "cfg_interval",
             "temperature", "top_k", "top_p", "greedy", "global_seed", "precision", "vq_precision", "weights", "labels",
             "save_codes")
    resize = "bicubic with antialiasing" if args.resize == "antialias" else "bicubic without antialiasing"
    return {name: getattr(args, name) for name in names} | hashes | {
        "kind": "samples", "resize": resize, "uint8": "clamp(127.5 x + 128, 0, 255), truncated",
        "class_names": record.get("class_names"), "torch": torch.__version__.split("+")[0]}


def draw_batch(first, args, painter, listed):
    """Draws the full batch that begins with sample `first`.

    Returns:
        dict of arr_0 (B, P, P, 3) uint8, labels (B,) int64 and, if wanted, tokens (B, T).
    """
    indices = np.arange(first, first + args.per_proc_batch_size)
    labels, uniforms = random_numbers(args.global_seed, indices, args.num_classes, painter.gpt.config.num_tokens)
    if args.labels == "balanced":
        labels = balanced_labels(indices, args.num_classes)
    elif listed:
        labels = np.array(listed)[balanced_labels(indices, len(listed))]
    tokens = painter.tokens(labels, uniforms)
    arrays = {"arr_0": painter.pictures(tokens).cpu().numpy(), "labels": labels}
    if args.save_codes:
        arrays["tokens"] = tokens.cpu().numpy().astype(np.uint16 if args.codebook_size <= 65536 else np.int32)
    return arrays


def main(args, session):
    logger = open_logger(session)
    with checks(session):
        listed = check_flags(args)
        painter, gpt_path, record, hashes = load_painter(args, session.device)
        path = Path(args.sample_dir) / f"{run_name(args, gpt_path)}.npz"
        settings, folder = describe_samples(args, record, hashes), path.with_name(f"{path.stem}.shards")
        finished = is_finished(path, settings)
        require_writable_folder(args.sample_dir)
        if session.is_main and not finished:
            open_shards(folder, settings | {"per_proc_batch_size": args.per_proc_batch_size})
    if finished:
        logger.info("%s is finished", path)
        return
    starts = range(0, args.num_fid_samples, args.per_proc_batch_size)
    with progress(session, args.num_fid_samples, "sample", "image") as bar:
        for first in starts[session.rank::session.world_size]:
            if not shard_path(folder, first).exists():
                write_shard(shard_path(folder, first), **draw_batch(first, args, painter, listed))
            bar.update(min(args.per_proc_batch_size * session.world_size, args.num_fid_samples - bar.n))
    if session.is_main:
        wait_for_shards(folder, starts)
        save_first(path.with_name(f"{path.stem}.png"), folder, args, record.get("class_names"))
        merge_shards(folder, args.per_proc_batch_size, args.num_fid_samples, path, settings)
        logger.info("%d samples in %s", args.num_fid_samples, path)


def save_first(path, folder, args, class_names):
    """Saves the first pictures as one PNG."""
    count = min(NUM_SHOWN, args.num_fid_samples)
    images, labels = [], []
    for first in range(0, count, args.per_proc_batch_size):
        with np.load(shard_path(folder, first), allow_pickle=False) as shard:
            images.append(shard["arr_0"])
            labels.append(shard["labels"])
    labels = np.concatenate(labels)[:count]
    save_grid(path, np.concatenate(images)[:count], columns=8,
              captions=[class_names[label] if class_names else label for label in labels])


if __name__ == "__main__":
    run(main, build_parser())
