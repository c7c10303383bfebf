"""Trains a tokenizer: a VQ model that reconstructs images through a codebook.

    torchrun --nnodes=1 --nproc_per_node=8 tokenizer/tokenizer_image/vq_train.py --data-path imagenet/train \
        --val-path imagenet/val --vq-model VQ-16

On a CPU, in about a minute, on handwritten digits (25.0 dB on held-out ones):

    python tokenizer/tokenizer_image/vq_train.py --dataset digits --data-path train --val-path heldout --no-flip \
        --smallest-crop 1 --image-size 16 --vq-model VQ-4-small --codebook-size 512 --max-updates 350 \
        --global-batch-size 32 --lr 1.5e-3 --lr-schedule linear --warmup 30 --mixed-precision none --num-workers 0
"""

import platform
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])      # the repository root instead of this folder

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from autoregressive.runtime.checkpoint import save_checkpoint
from autoregressive.runtime.distributed import seed_everything, wrap_for_training
from autoregressive.runtime.entry import Parser, checks, run
from autoregressive.runtime.files import require_writable_folder, write_json
from autoregressive.runtime.log import (
    MetricsFile,
    draw_metrics,
    find_run_folder,
    open_logger,
    progress,
    start_run_folder,
)
from autoregressive.runtime.pictures import save_grid
from autoregressive.train.optim import add_optim_args, build_optimizer, learning_rate
from tokenizer.tokenizer_image.crops import CenterCrops, TrainingCrops, load_crops, plan_updates
from tokenizer.tokenizer_image.images import add_image_args, open_images, to_float, to_uint8
from tokenizer.tokenizer_image.vq_model import VQModel, add_vq_size_args, downsampling
from tokenizer.validation.metrics import codebook_usage, psnr

PRECISIONS = {"none": None, "bf16": torch.bfloat16}
FREE_TO_CHANGE = ("num_workers", "log_every", "device", "debug", "results_dir", "new_run")      # within one run
NUM_SHOWN = 16                                      # held-out pictures in the picture of reconstructions
LOSSES = ("reconstruction", "codebook", "commitment", "entropy")


def build_parser():
    """Returns the parser of this script's command line."""
    parser = Parser("Train a VQ tokenizer on images.")
    add_image_args(parser)
    add_vq_size_args(parser)
    add_optim_args(parser)
    parser.set_defaults(weight_decay=0.0)           # the recipe is Adam's: AdamW without decay
    parser.add_argument("--val-path", help="like --data-path: pictures to judge the tokenizer by, none by default")
    parser.add_argument("--smallest-crop", type=float, default=0.8,
                        help="least share of the shorter side in a random crop; 1 shows all of it")
    parser.add_argument("--no-flip", action="store_true", help="mirror no pictures (digits, text)")
    parser.add_argument("--entropy-ratio", type=float, default=0.0, help="weight of the entropy loss")
    parser.add_argument("--epochs", type=int, default=40, help="length of the run")
    parser.add_argument("--max-updates", type=int, default=0, help="length of the run in updates; 0: by --epochs")
    parser.add_argument("--global-batch-size", type=int, default=128, help="images of an update, over all processes")
    parser.add_argument("--mixed-precision", default="bf16", choices=tuple(PRECISIONS), help="autocast of the model")
    parser.add_argument("--log-every", type=int, default=100, help="updates between two lines of the log")
    parser.add_argument("--results-dir", default="results", help="where run folders lie")
    parser.add_argument("--output", help="the finished checkpoint; default: in the run folder")
    parser.add_argument("--new-run", action="store_true", help="start anew even if the same run was finished")
    parser.add_argument("--num-workers", type=int, default=24, help="workers that read images; 0: none, for small sets")
    return parser


def check_flags(args, session):
    """Raises ValueError for flags out of range."""
    least = {"codebook_size": 1, "codebook_embed_dim": 1, "epochs": 1, "max_updates": 0, "log_every": 1, "warmup": 0,
             "num_workers": 0, "lr": 0, "entropy_ratio": 0, "max_grad_norm": 0, "weight_decay": 0}
    for name, bound in least.items():
        if not getattr(args, name) >= bound:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least {bound}, got {getattr(args, name)}")
    if not 0 < args.smallest_crop <= 1:
        raise ValueError(f"--smallest-crop: expected a share above 0, at most 1, got {args.smallest_crop}")
    step = downsampling(args.vq_model)
    if args.image_size < step or args.image_size % step:
        raise ValueError(f"--image-size: expected a multiple of the {step} pixels of a token of {args.vq_model}, "
                         f"got {args.image_size}")
    if args.global_batch_size < 1 or args.global_batch_size % session.world_size:
        raise ValueError(f"--global-batch-size: expected a multiple of the {session.world_size} processes, "
                         f"got {args.global_batch_size}")


class Objective(nn.Module):
    """The losses of a VQ model as a module, so that DDP can wrap it; weights are saved from `.model`."""

    def __init__(self, model, entropy_ratio):
        super().__init__()
        self.model, self.entropy_ratio = model, entropy_ratio

    def forward(self, images):
        """Returns the loss of images (B, 3, P, P) in [-1, 1] and its terms, detached, in the order of LOSSES."""
        reconstruction, quantizer_losses, codes = self.model(images, self.entropy_ratio)
        self.model.quantize.record_usage(codes)
        losses = torch.stack([F.mse_loss(reconstruction.float(), images), *quantizer_losses])
        return losses.sum(), losses.detach()


def train(objective, batches, num_updates, args, folder, session):
    """Runs the updates, with log and curves."""
    model = objective.model
    optimizer = build_optimizer(model, args.lr, (args.beta1, args.beta2), args.weight_decay)
    wrapped = wrap_for_training(objective, session)
    dtype = PRECISIONS[args.mixed_precision]
    metrics = MetricsFile(folder.path / "metrics.jsonl") if session.is_main else None
    sums, count = 0, 0
    with progress(session, num_updates * args.global_batch_size, "train tokenizer", "image") as bar:
        for update, pictures in enumerate(batches):
            lr = learning_rate(update, num_updates, args.lr, args.warmup, args.lr_schedule)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with torch.autocast(session.device.type, dtype, enabled=dtype is not None):
                loss, losses = wrapped(to_float(pictures.to(session.device)))
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or float("inf"))
            if not torch.isfinite(norm):
                raise FloatingPointError(f"update {update + 1}: the gradient is not finite; lower --lr")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            sums, count = sums + torch.cat([losses, norm[None]]), count + 1
            bar.update(args.global_batch_size)
            if (update + 1) % args.log_every == 0 or update + 1 == num_updates:
                means = (session.sum(sums / count) / session.world_size).tolist()
                values = dict(zip((*LOSSES, "grad_norm"), means, strict=True), usage=model.quantize.usage())
                sums, count = 0, 0
                if session.is_main:
                    metrics.write(update + 1, **values, lr=lr)
                    bar.set_postfix(reconstruction=f"{values['reconstruction']:.4f}", usage=f"{values['usage']:.0%}",
                                    refresh=False)
    return values


@torch.inference_mode()
def evaluate(model, images, args, session):
    """Reconstructs a set of images with all processes.

    Returns:
        dict of plain numbers: PSNR as the mean over images, and what is used of the codebook.
    """
    rows, batch_size = session.share_of(len(images)), args.global_batch_size // session.world_size
    batches = [rows[start:start + batch_size] for start in range(0, len(rows), batch_size)]
    counts = torch.zeros(args.codebook_size, dtype=torch.float64, device=session.device)
    total = torch.zeros((), dtype=torch.float64, device=session.device)
    with progress(session, len(rows), "evaluate tokenizer", "image") as bar:
        for pictures in load_crops(CenterCrops(images, args.image_size), batches, args.num_workers):
            pictures = pictures.to(session.device)
            reconstructions, _, codes = model(to_float(pictures))
            total += psnr(pictures, to_uint8(reconstructions)).sum()
            counts += torch.bincount(codes.flatten(), minlength=args.codebook_size)
            bar.update(len(pictures))
    return {"psnr": (session.sum(total) / len(images)).item(), "num_images": len(images),
            "codebook_size": args.codebook_size, **codebook_usage(session.sum(counts))}


@torch.inference_mode()
def save_reconstructions(path, model, images, args, session):
    """Saves the first pictures of a set above their reconstructions."""
    crops = CenterCrops(images, args.image_size)
    originals = torch.from_numpy(np.stack([crops[row] for row in range(min(NUM_SHOWN, len(images)))]))
    reconstructions = to_uint8(model(to_float(originals.to(session.device)))[0]).cpu()
    save_grid(path, torch.cat([originals, reconstructions]), columns=len(originals))


def save(path, model, num_updates, args, images):
    """Saves the weights and what a reader must know of them."""
    names = ("vq_model", "codebook_size", "codebook_embed_dim", "image_size", "dataset", "global_seed")
    settings = {name: getattr(args, name) for name in names} | {
        "num_classes": len(images.class_names), "updates": num_updates, "python": platform.python_version(),
        "torch": str(torch.__version__)}
    save_checkpoint(path, {"model": model.state_dict(), "settings": settings})


def main(args, session):
    logger = open_logger(session)
    with checks(session):
        check_flags(args, session)
        images = open_images(args.dataset, args.data_path)
        held_out = open_images(args.dataset, args.val_path) if args.val_path else None
        if len(images) < args.global_batch_size:
            raise ValueError(f"{args.data_path}: expected at least one batch of {args.global_batch_size} images, found "
                             f"{len(images)}; lower --global-batch-size")
        if args.output:
            require_writable_folder(Path(args.output).parent)
        folder = find_run_folder(args.results_dir, args.vq_model, vars(args), FREE_TO_CHANGE, args.new_run)
    num_updates = args.max_updates or args.epochs * (len(images) // args.global_batch_size)
    output = Path(args.output or folder.checkpoints / f"{num_updates:07d}.pt")
    if folder.result and output.is_file():
        logger.info("%s is finished: %s", output, folder.result)
        return
    if session.is_main:
        start_run_folder(folder, vars(args))
    session.barrier()
    logger = open_logger(session, folder.path / "log.txt")

    seed_everything(args.global_seed)               # the same weights on every process
    model = VQModel(args.vq_model, args.codebook_size, args.codebook_embed_dim).to(session.device)
    logger.info("%s, %.1fM parameters; %d images, %d updates of %d", args.vq_model,
                sum(p.numel() for p in model.parameters()) / 1e6, len(images), num_updates, args.global_batch_size)
    crops = TrainingCrops(images, args.image_size, args.global_seed, args.smallest_crop, not args.no_flip)
    plan = plan_updates(len(images), args.global_batch_size, args.global_seed, range(num_updates),
                        session.share_of(args.global_batch_size))
    start = time.perf_counter()
    last = train(Objective(model, args.entropy_ratio), load_crops(crops, plan, args.num_workers), num_updates, args,
                 folder, session)
    result = {"updates": num_updates, "seconds": time.perf_counter() - start, "training": last}
    if held_out:
        result |= evaluate(model, held_out, args, session)
        logger.info("held out: PSNR %.2f dB, %d of %d codes used", result["psnr"], result["codes_used"],
                    args.codebook_size)
    if session.is_main:
        draw_metrics(folder.path / "curves.png", {args.vq_model: folder.path / "metrics.jsonl"}, LOSSES[:3])
        save_reconstructions(folder.path / "reconstructions.png", model, held_out or images, args, session)
        save(output, model, num_updates, args, images)
        write_json(output.with_suffix(".json"), result | {"run_folder": str(folder.path)})
        folder.mark_finished(result)
    logger.info("tokenizer in %s, pictures in %s", output, folder.path)


if __name__ == "__main__":
    run(main, build_parser())
