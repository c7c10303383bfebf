"""Main 3: samples pictures for scoring and packs them into one npz.

    torchrun --nnodes=1 --nproc_per_node=8 autoregressive/sample/sample_c2i_ddp.py \
        --gpt-model GPT-B --image-size 384 --image-size-eval 256 --cfg-scale 2.25 \
        --vq-ckpt "pretrained_models/vq_ds16_c2i-reorder-kmeans+nearest-cluster_size=128.pt" \
        --gpt-ckpt results/000-GPT-B-lambda=1-cluster_size=128/checkpoints \
        --num-fid-samples 50000 --sample-dir samples

On a CPU, after scripts/quickstart.sh:

    python autoregressive/sample/sample_c2i_ddp.py --precision none --num-fid-samples 100 \
        --gpt-ckpt results/quickstart/gpt-lambda1/000-GPT-tiny-lambda=1-cluster_size=16
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The repository root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from torch import Tensor

from autoregressive.data.codes import code_dtype
from autoregressive.models.loading import read_gpt
from autoregressive.models.random_numbers import random_numbers
from autoregressive.models.recipes import log_sampling
from autoregressive.models.sampler import Sampler
from autoregressive.pipeline import (
    Pipeline,
    PipelineSettings,
    add_pipeline_args,
    load_pipeline,
    settle_flags,
)
from autoregressive.runtime.checkpoint import find_checkpoint
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import (
    Flags,
    Parser,
    at_least,
    between,
    checks,
    may_vary,
    on_main,
    run,
)
from autoregressive.runtime.files import check_writable_folder, open_npz, read_npz_settings
from autoregressive.runtime.identity import find_difference
from autoregressive.runtime.log import LOGGER, open_logger, progress
from autoregressive.runtime.pictures import save_grid
from autoregressive.runtime.rows import BackgroundWriter, RowWriter
from autoregressive.sample.labels import labels_in_turn, parse_labels
from tokenizer.tokenizer_image.vq_model import VQConfig

NUM_SHOWN = 64                          # pictures in the PNG beside the npz
ROWS_AT_ONCE = 256                      # of the arrays that are packed, in memory together
RESIZES = {"bicubic": "bicubic without antialiasing", "antialias": "bicubic with antialiasing"}


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Sample pictures for scoring and pack them into one npz.")
    add_pipeline_args(parser)
    may_vary(parser.add_argument("--sample-dir", default="samples", help="folder of the npz"))
    parser.add_argument("--per-proc-batch-size", type=between(1, 2**16), default=32,
                        help="pictures sampled together by a process")
    parser.add_argument("--num-fid-samples", type=at_least(1), default=50000,
                        help="pictures in the npz")
    parser.add_argument("--labels", default="random",
                        help="random: drawn uniformly, the published protocol; balanced: all "
                             "classes in turn; or class indices like 207,360, in turn")
    parser.add_argument("--save-codes", action="store_true",
                        help="store the tokens, too, as array `tokens`")
    return parser


def run_name(args: Flags, gpt_path: Path) -> str:
    """Returns the published name of a run's npz, without suffix, plus flags it does not hold."""
    name = (f"{args.gpt_model}-{args.cluster_size}-{gpt_path.stem}-size-{args.image_size}"
            f"-size-{args.image_size_eval}-{args.vq_model}-topk-{args.top_k}-topp-{args.top_p}"
            f"-temperature-{args.temperature}-cfg-{args.cfg_scale}-seed-{args.global_seed}")
    for flag in ("weights", "labels", "resize", "cfg_interval", "greedy", "cfg_schedule",
                 "cfg_start", "cfg_power", "cfg_scale_within", "beta"):
        value = getattr(args, flag)
        if value != args.defaults()[flag]:
            name += f"-{flag.replace('_', '-')}-{value}"
    return name


def build_identity(args: Flags, pipeline: Pipeline, device: torch.device) -> dict[str, object]:
    """Returns the identity of the samples, which travels in the npz."""
    flags = args.identity()
    for name in ("gpt_ckpt", "vq_ckpt", "from_fsdp"):   # the hashes say which weights these are
        del flags[name]
    return flags | pipeline.hashes | {
        "kind": "samples", "device": device.type, "resize": RESIZES[args.resize],
        "uint8": "clamp(127.5 x + 128, 0, 255), truncated", "class_names": pipeline.class_names,
        "torch": torch.__version__.split("+")[0]}


def open_rows(path: Path, identity: dict[str, object], args: Flags,
              pipeline: Pipeline) -> RowWriter:
    """Returns the rows that the npz `path` is made of, not yet laid out."""
    side = pipeline.image_size
    arrays = {"arr_0": (np.uint8, (side, side, 3)), "labels": (np.int64, ())}
    if args.save_codes:
        num_tokens = pipeline.gpt.config.num_tokens
        arrays["tokens"] = (code_dtype(args.codebook_size), (num_tokens,))
    return RowWriter(path.with_suffix(".rows"), identity, args.num_fid_samples, arrays)


def make_rows(rows: range, pipeline: Pipeline, args: Flags,
              classes: list[int] | None) -> dict[str, Tensor]:
    """Samples the full batch that begins at rows.start; returns what belongs to the rows.

    Args:
        rows: indices of samples, at most a batch of them.
        pipeline: Pipeline.
        args: parsed flags.
        classes: that samples take in turn; None draws labels at random.

    Returns:
        arr_0 (B, P, P, 3) uint8, labels (B,) int64 and, if wanted, tokens (B, T) int64.
    """
    indices = np.arange(rows.start, rows.start + args.per_proc_batch_size)
    labels, uniforms = random_numbers(args.global_seed, indices, args.num_classes,
                                      pipeline.gpt.config.num_tokens)
    if classes is not None:
        labels = labels_in_turn(classes, indices)
    tokens = pipeline.sample_tokens(labels, uniforms)
    tensors = {"arr_0": pipeline.decode(tokens), "labels": torch.from_numpy(labels)}
    if args.save_codes:
        tensors["tokens"] = tokens
    return {name: tensor[:len(rows)] for name, tensor in tensors.items()}


def make_missing(rows: RowWriter, pipeline: Pipeline, args: Flags, classes: list[int] | None,
                 session: Session) -> None:
    """Samples this process's part of the rows that are not written yet."""
    # Batches are cut by absolute index, so any process may sample any of them.
    batches = rows.missing(args.per_proc_batch_size)
    num_done = rows.num_done            # before another process may remove the rows
    session.barrier()                   # all have seen the same rows missing
    mine = [batches[number] for number in session.part_of(len(batches))]
    with progress(session, rows.num_rows, "sample", "image", initial=num_done) as bar:
        with BackgroundWriter(rows) as writer:
            for batch in mine:
                writer.write(batch, **make_rows(batch, pipeline, args, classes))
                if session.is_main:
                    bar.update(rows.num_done - bar.n)       # of all processes
        if session.is_main:
            bar.update(rows.num_done - bar.n)


def pack(path: Path, rows: RowWriter, identity: dict[str, object], pipeline: Pipeline) -> None:
    """Saves the first pictures as one PNG and all rows as one npz, and removes the rows."""
    save_grid(path.with_suffix(".png"), rows.array("arr_0")[:NUM_SHOWN], columns=8,
              captions=pipeline.label_names(rows.array("labels")[:NUM_SHOWN]))
    with open_npz(path, identity) as npz:
        for name, (dtype, shape) in rows.arrays.items():
            npz.add_rows(name, dtype, (rows.num_rows, *shape), rows.read(name, ROWS_AT_ONCE))
    rows.remove()


def main(args: Flags, session: Session) -> None:
    """Makes the samples that are missing and packs all of them."""
    open_logger(session)
    gpt_path = on_main(session, find_checkpoint, args.gpt_ckpt) if args.gpt_ckpt else None
    with checks(session):
        # What the checkpoint and a preset say about flags that were not given.
        gpt_file = read_gpt(gpt_path, args.weights, args.from_fsdp)
        settle_flags(args, gpt_file, session.device)
        classes = parse_labels(args.labels, args.num_classes)

        # Load the parts, which must belong together.
        pipeline = load_pipeline(gpt_file, PipelineSettings(**args.pick(PipelineSettings)),
                                 Sampler(**args.pick(Sampler)), VQConfig(**args.pick(VQConfig)),
                                 session.device)

        # Reserve the place of the result; it, or rows of it, may be there from an earlier start.
        check_writable_folder(args.sample_dir)
        path = Path(args.sample_dir) / f"{run_name(args, gpt_file.path)}.npz"
        identity = build_identity(args, pipeline, session.device)
        rows = open_rows(path, identity, args, pipeline)
        session.hold(path, path.with_suffix(".png"))
        is_finished = path.exists()
        if is_finished:
            difference = find_difference(identity, read_npz_settings(path))
            if difference:
                raise ValueError(f"{path}: expected samples with {difference}; choose another "
                                 "--sample-dir or remove them")
        if session.is_main and is_finished:
            rows.remove()               # what a kill left behind
        elif session.is_main:
            rows.create()
    if is_finished:
        LOGGER.info("%s is finished", path)
        return
    log_sampling(args.preset, gpt_file.settings, args.plain())

    make_missing(rows, pipeline, args, classes, session)

    # One process puts together what all have sampled.
    if session.is_main:
        rows.wait_for_others()
        pack(path, rows, identity, pipeline)
        LOGGER.info("%d samples in %s", rows.num_rows, path)


if __name__ == "__main__":
    run(main, build_parser())
