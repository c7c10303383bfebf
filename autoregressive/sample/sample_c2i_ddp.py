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

import argparse

import numpy as np
import torch

from autoregressive.assemble import check_same, default_vq_path, load_gpt, load_vq
from autoregressive.models.generate import add_sampler_args, generate, random_numbers, sampler_from
from autoregressive.models.gpt import add_gpt_args, check_gpt_args
from autoregressive.runtime.entry import Parser, checks, run
from autoregressive.runtime.files import require_writable_folder, weights_sha256
from autoregressive.runtime.log import open_logger, progress
from autoregressive.runtime.pictures import save_grid
from autoregressive.sample.shards import is_finished, merge_shards, open_shards, shard_path, write_shard
from tokenizer.tokenizer_image.images import to_uint8
from tokenizer.tokenizer_image.vq_model import add_vq_args

PRECISIONS = {"none": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NUM_SHOWN = 64                                      # pictures in the PNG beside the npz


def build_parser():
    """Returns the parser of this script's command line."""
    parser = Parser("Draw pictures for scoring and pack them into one npz.")
    add_gpt_args(parser)
    add_vq_args(parser)
    add_sampler_args(parser)
    parser.add_argument("--from-fsdp", action="store_true", help="the checkpoint is a bare state dict")
    parser.add_argument("--precision", default="bf16", choices=PRECISIONS, help="of the GPT's weights and cache")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                        help="compile the decode step")
    parser.add_argument("--image-size", type=int, default=384, help="pixels of a generated picture's side")
    parser.add_argument("--image-size-eval", type=int, default=256, help="pixels of a stored picture's side")
    parser.add_argument("--sample-dir", default="samples", help="folder of the npz")
    parser.add_argument("--per-proc-batch-size", type=int, default=32, help="pictures drawn together by a process")
    parser.add_argument("--num-fid-samples", type=int, default=50000, help="pictures in the npz")
    parser.refuse_for_now("--compile", "--from-fsdp")
    return parser


def check_flags(args):
    """Raises ValueError for flags without a meaning or that contradict each other."""
    check_gpt_args(args)
    sampler_from(args).check(args.codebook_size)
    for flag, value in (("--num-fid-samples", args.num_fid_samples), ("--image-size-eval", args.image_size_eval),
                        ("--per-proc-batch-size", args.per_proc_batch_size)):
        if value < 1:
            raise ValueError(f"{flag}: expected at least 1, got {value}")
    if args.gpt_ckpt is None:
        raise ValueError("--gpt-ckpt: expected a checkpoint of the GPT or its folder, got none")


def load_models(args):
    """Loads the GPT and the VQ model of the flags and compares them with the flags and with each other.

    Returns:
        (GPT, VQ model, path of the GPT's file, dict of hashes)
    """
    gpt, path, record = load_gpt(args.gpt_ckpt, args.gpt_model, grid=args.image_size // args.downsample_size,
                                 vocab_size=args.codebook_size, num_classes=args.num_classes)
    if record.get("cluster_size", args.cluster_size) != args.cluster_size:
        raise ValueError(f"--cluster-size: expected {record['cluster_size']} as in {path}, got {args.cluster_size}")
    vq_path = args.vq_ckpt or default_vq_path(args.cluster_size)
    vq, vq_hashes = load_vq(vq_path, args.vq_model, args.codebook_size, args.codebook_embed_dim)
    if vq.downsampling != args.downsample_size:
        raise ValueError(f"--downsample-size: expected {vq.downsampling} for {args.vq_model}, "
                         f"got {args.downsample_size}")
    check_same("codebook", record.get("codebook_sha256"), vq_hashes["codebook_sha256"], path, vq_path)
    return gpt, vq, path, {"codebook_sha256": vq_hashes["codebook_sha256"],
                           "gpt_sha256": weights_sha256(gpt.state_dict())}


def run_name(args, gpt_path):
    """Returns the published name of a run's npz, without the ending."""
    return (f"{args.gpt_model}-{args.cluster_size}-{gpt_path.stem}-size-{args.image_size}-size-{args.image_size_eval}"
            f"-{args.vq_model}-topk-{args.top_k}-topp-{args.top_p}-temperature-{args.temperature}"
            f"-cfg-{args.cfg_scale}-seed-{args.global_seed}")


def describe_samples(args, hashes):
    """Returns the plain dict of everything that the samples depend on; it travels in the npz."""
    names = ("gpt_model", "vq_model", "image_size", "image_size_eval", "num_fid_samples", "cfg_scale", "cfg_interval",
             "temperature", "top_k", "top_p", "greedy", "global_seed", "per_proc_batch_size", "precision")
    return {name: getattr(args, name) for name in names} | hashes | {
        "kind": "samples", "labels": "random", "resize": "bicubic without antialiasing",
        "torch": torch.__version__.split("+")[0]}


@torch.inference_mode()
def draw_batch(first, args, gpt, vq, device):
    """Draws the full batch that begins with sample `first`; returns images (B, P, P, 3) uint8 and labels (B,) int64."""
    indices = range(first, first + args.per_proc_batch_size)
    labels, uniforms = random_numbers(args.global_seed, indices, args.num_classes, gpt.config.num_tokens)
    tokens = generate(gpt, torch.from_numpy(labels).to(device), torch.from_numpy(uniforms).to(device),
                      sampler_from(args))
    pixels = vq.decode_codes(tokens, gpt.config.grid)                               # (B, 3, P, P)
    return to_uint8(pixels, args.image_size_eval), labels


def main(args, session):
    logger = open_logger(session)
    with checks(session):
        check_flags(args)
        gpt, vq, gpt_path, hashes = load_models(args)
        path = Path(args.sample_dir) / f"{run_name(args, gpt_path)}.npz"
        settings, folder = describe_samples(args, hashes), path.with_name(f"{path.stem}.shards")
        finished = is_finished(path, settings)
        require_writable_folder(args.sample_dir)
        if session.is_main and not finished:
            open_shards(folder, settings)
    if finished:
        logger.info("%s is finished", path)
        return
    gpt.to(session.device).cast(PRECISIONS[args.precision])
    vq.to(session.device)
    draw_all(folder, args, gpt, vq, session)
    session.barrier()
    if session.is_main:
        save_first(path.with_name(f"{path.stem}.png"), folder, args)
        merge_shards(folder, args.per_proc_batch_size, args.num_fid_samples, path, settings)
    logger.info("%d samples in %s", args.num_fid_samples, path)


def draw_all(folder, args, gpt, vq, session):
    """Draws every batch that this process is in charge of and that is not on disk yet."""
    starts = range(0, args.num_fid_samples, args.per_proc_batch_size)
    with progress(session, args.num_fid_samples, "sample", "image") as bar:
        for first in starts[session.rank::session.world_size]:
            if not shard_path(folder, first).exists():
                images, labels = draw_batch(first, args, gpt, vq, session.device)
                write_shard(shard_path(folder, first), arr_0=images, labels=labels)
            bar.update(min(args.per_proc_batch_size * session.world_size, args.num_fid_samples - bar.n))


def save_first(path, folder, args):
    """Saves the first pictures as one PNG."""
    firsts = range(0, min(NUM_SHOWN, args.num_fid_samples), args.per_proc_batch_size)
    images, labels = [], []
    for first in firsts:
        with np.load(shard_path(folder, first), allow_pickle=False) as shard:
            images.append(shard["arr_0"])
            labels.append(shard["labels"])
    count = min(NUM_SHOWN, args.num_fid_samples)
    save_grid(path, np.concatenate(images)[:count], columns=8, captions=np.concatenate(labels)[:count])


if __name__ == "__main__":
    run(main, build_parser())
