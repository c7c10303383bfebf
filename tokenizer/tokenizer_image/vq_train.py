"""Trains a tokenizer: a VQ model that reconstructs images through a codebook.

    torchrun --nnodes=1 --nproc_per_node=8 tokenizer/tokenizer_image/vq_train.py --data-path imagenet/train \
        --val-path imagenet/val --vq-model VQ-16

On a CPU, in about a minute, on handwritten digits (25.0 dB on held-out ones):

    python tokenizer/tokenizer_image/vq_train.py --dataset digits --data-path train --val-path heldout --no-flip \
        --smallest-crop 1 --image-size 16 --vq-model VQ-4-small --codebook-size 512 --max-updates 350 \
        --global-batch-size 32 --lr 1.5e-3 --lr-schedule linear --warmup 30 --mixed-precision none --num-workers 0 \
        --perceptual-weight 0 --disc-weight 0
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])      # the repository root instead of this folder

import platform

import torch

from autoregressive.runtime.checkpoint import load_strictly, model_state, read_checkpoint, save_checkpoint
from autoregressive.runtime.distributed import seed_everything, wrap_for_training
from autoregressive.runtime.entry import Parser, checks, run
from autoregressive.runtime.files import require_writable_folder, write_json
from autoregressive.runtime.log import LOGGER, cut_log, find_run_folder, open_logger, progress, start_run_folder
from autoregressive.runtime.pictures import save_grid
from autoregressive.train.journal import Journal, SaveSchedule
from autoregressive.train.monitor import Speedometer
from autoregressive.train.optim import add_optim_args, build_optimizer, learning_rate
from autoregressive.train.state import resume, save_state
from autoregressive.train.step import MovingAverage
from tokenizer.tokenizer_image.crops import CenterCrops, TrainingCrops, UpdatePlan, load_crops, plan_updates
from tokenizer.tokenizer_image.discriminator import NORMS, PatchDiscriminator
from tokenizer.tokenizer_image.images import add_image_args, open_images, to_float, to_uint8
from tokenizer.tokenizer_image.lpips import DEFAULT_LINEAR, DEFAULT_VGG, load_lpips
from tokenizer.tokenizer_image.vq_loss import GAN_LOSSES
from tokenizer.tokenizer_image.vq_model import VQModel, add_vq_args, downsampling
from tokenizer.tokenizer_image.vq_step import (
    PRECISIONS,
    RECONSTRUCTION_LOSSES,
    LossSettings,
    Reconstruction,
    TokenizerTrainer,
)
from tokenizer.validation.metrics import codebook_usage, psnr

# What may change between two starts of one run.
FREE_TO_CHANGE = ("num_workers", "log_every", "ckpt_updates", "ckpt_minutes", "keep_checkpoints", "eval_every",
                  "gradient_accumulation_steps", "device", "debug", "results_dir", "new_run")
NUM_SHOWN = 16                                      # pictures in the picture of reconstructions
CURVES, GAN_CURVES = ("reconstruction", "codebook", "usage", "perplexity"), ("generator", "discriminator")
FINAL = ("reconstruction", "usage")                 # what the end of a run records


def build_parser():
    """Returns the parser of this script's command line."""
    parser = Parser("Train a VQ tokenizer on images.")
    add_image_args(parser)
    add_vq_args(parser)
    add_optim_args(parser)
    parser.set_defaults(weight_decay=0.0)           # the recipe is Adam's: AdamW without decay
    group = parser.add_argument_group("data")
    group.add_argument("--val-path", help="like --data-path: pictures to judge the tokenizer by, none by default")
    group.add_argument("--smallest-crop", type=float, default=0.8,
                       help="least share of the shorter side in a random crop; 1 shows all of it")
    group.add_argument("--no-flip", action="store_true", help="mirror no pictures (digits, text)")
    group.add_argument("--global-batch-size", type=int, default=128, help="images of an update, over all processes")
    group.add_argument("--gradient-accumulation-steps", type=int, default=1, help="micro-batches of an update")
    group.add_argument("--num-workers", type=int, default=24,
                       help="processes that read images, at most as many as there are cores; 0: none, for small sets")
    group = parser.add_argument_group("losses")
    group.add_argument("--reconstruction-loss", default="l2", choices=tuple(RECONSTRUCTION_LOSSES), help="of pixels")
    group.add_argument("--reconstruction-weight", type=float, default=1.0, help="weight of the pixels' loss")
    group.add_argument("--perceptual-weight", type=float, default=1.0, help="weight of LPIPS; 0 needs no VGG weights")
    group.add_argument("--vgg-path", default=DEFAULT_VGG, help="torchvision's VGG16, for LPIPS")
    group.add_argument("--lpips-path", default=DEFAULT_LINEAR, help="the linear layers of LPIPS")
    group.add_argument("--entropy-ratio", type=float, default=0.0, help="weight of the entropy loss")
    group.add_argument("--disc-weight", type=float, default=0.5, help="weight of the adversarial loss; 0: none")
    group.add_argument("--disc-start", type=int, default=20000, help="updates before the discriminator begins")
    group.add_argument("--disc-loss", default="hinge", choices=tuple(GAN_LOSSES), help="adversarial loss")
    group.add_argument("--disc-norm", default="group", choices=NORMS, help="of the discriminator; batch as published")
    group.add_argument("--disc-adaptive-weight", action="store_true",
                       help="scale the adversarial loss by the gradients at the decoder's last layer")
    group = parser.add_argument_group("run")
    group.add_argument("--epochs", type=int, default=40, help="length of the run")
    group.add_argument("--max-updates", type=int, default=0, help="length of the run in updates; 0: by --epochs")
    group.add_argument("--mixed-precision", default="bf16", choices=tuple(PRECISIONS), help="autocast of the models")
    group.add_argument("--ema", action="store_true", help="keep an exponential moving average of the weights")
    group.add_argument("--revive-every", type=int, default=0,
                       help="updates after which codes that nothing used move to present latents; 0: never")
    group.add_argument("--log-every", type=int, default=100, help="updates between two lines of the log")
    group.add_argument("--eval-every", type=int, default=0, help="updates between looks at --val-path; 0: at the end")
    group.add_argument("--ckpt-updates", type=int, default=5000, help="updates between two checkpoints")
    group.add_argument("--ckpt-minutes", type=float, default=0, help="minutes between two checkpoints; 0: off")
    group.add_argument("--keep-checkpoints", type=int, default=0, help="newest checkpoints to keep; 0 keeps all")
    group.add_argument("--results-dir", default="results", help="where run folders lie")
    group.add_argument("--output", help="the finished tokenizer; default: tokenizer.pt in the run folder")
    group.add_argument("--new-run", action="store_true", help="start anew even if the same run was finished")
    return parser


def check_flags(args, session):
    """Raises ValueError for flags out of range."""
    least = {"codebook_size": 1, "codebook_embed_dim": 1, "epochs": 1, "max_updates": 0, "log_every": 1, "warmup": 0,
             "num_workers": 0, "lr": 0, "entropy_ratio": 0, "max_grad_norm": 0, "weight_decay": 0, "eval_every": 0,
             "reconstruction_weight": 0, "perceptual_weight": 0, "disc_weight": 0, "disc_start": 0, "revive_every": 0,
             "ckpt_updates": 1, "ckpt_minutes": 0, "keep_checkpoints": 0, "gradient_accumulation_steps": 1}
    for name, bound in least.items():
        if not getattr(args, name) >= bound:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least {bound}, got {getattr(args, name)}")
    if not 0 < args.smallest_crop <= 1:
        raise ValueError(f"--smallest-crop: expected a share above 0, at most 1, got {args.smallest_crop}")
    step = downsampling(args.vq_model)
    if args.image_size < step or args.image_size % step:
        raise ValueError(f"--image-size: expected a multiple of the {step} pixels of a token of {args.vq_model}, "
                         f"got {args.image_size}")
    parts = session.world_size * args.gradient_accumulation_steps
    if args.global_batch_size < 1 or args.global_batch_size % parts:
        raise ValueError(f"--global-batch-size: expected a multiple of {parts} ({session.world_size} processes x "
                         f"{args.gradient_accumulation_steps} micro-batches), got {args.global_batch_size}")
    if args.disc_weight and args.image_size < 24:
        raise ValueError(f"--image-size: expected at least 24 pixels for the discriminator, got {args.image_size}; "
                         "or give --disc-weight 0")


def build_trainer(args, session, perceptual, start):
    """Builds the networks and everything that updates them; returns the TokenizerTrainer."""
    device, betas = session.device, (args.beta1, args.beta2)
    seed_everything(args.global_seed)               # the same weights on every process
    model = VQModel(args.vq_model, args.codebook_size, args.codebook_embed_dim)
    if start:
        load_strictly(model, start, args.vq_ckpt)
    module = Reconstruction(model.to(device), args.entropy_ratio)
    optimizer = build_optimizer(model, args.lr, betas, args.weight_decay)
    discriminator = wrapped_discriminator = discriminator_optimizer = None
    if args.disc_weight:
        discriminator = PatchDiscriminator(args.disc_norm).to(device)
        wrapped_discriminator = wrap_for_training(discriminator, session)
        discriminator_optimizer = build_optimizer(discriminator, args.lr, betas, args.weight_decay)
    settings = LossSettings(args.reconstruction_loss, args.reconstruction_weight, args.perceptual_weight,
                            args.disc_weight, args.entropy_ratio, args.disc_loss, args.disc_start,
                            args.disc_adaptive_weight)
    return TokenizerTrainer(module, wrap_for_training(module, session), optimizer, discriminator, wrapped_discriminator,
                            discriminator_optimizer, perceptual and perceptual.to(device), settings, session,
                            args.mixed_precision, args.max_grad_norm, args.gradient_accumulation_steps,
                            MovingAverage(model) if args.ema else None)


def final_model(trainer, args, device):
    """Returns the model to judge and to save: with the averaged weights if there are any."""
    model = VQModel(args.vq_model, args.codebook_size, args.codebook_embed_dim)
    averaged = trainer.ema.weights if trainer.ema else {}
    load_strictly(model, {name: averaged.get(name, value).detach().cpu().clone()
                          for name, value in trainer.model.state_dict().items()}, "the weights in training")
    return model.to(device).eval().requires_grad_(False)


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
    originals = torch.stack([torch.from_numpy(crops[row]) for row in range(min(NUM_SHOWN, len(images)))])
    reconstructions = to_uint8(model(to_float(originals.to(session.device)))[0]).cpu()
    save_grid(path, torch.cat([originals, reconstructions]), columns=len(originals))


def describe(args, images, num_updates):
    """Returns what a reader of a checkpoint must know of it."""
    names = ("vq_model", "codebook_size", "codebook_embed_dim", "image_size", "dataset", "global_seed",
             "global_batch_size")
    return {name: getattr(args, name) for name in names} | {
        "num_classes": len(images.class_names), "updates": num_updates, "python": platform.python_version(),
        "torch": str(torch.__version__)}


def main(args, session):
    open_logger(session)
    with checks(session):
        check_flags(args, session)
        images = open_images(args.dataset, args.data_path)
        held_out = open_images(args.dataset, args.val_path) if args.val_path else None
        if len(images) < args.global_batch_size:
            raise ValueError(f"{args.data_path}: expected at least one batch of {args.global_batch_size} images, found "
                             f"{len(images)}; lower --global-batch-size")
        perceptual = load_lpips(args.vgg_path, args.lpips_path) if args.perceptual_weight else None
        start = None
        if args.vq_ckpt:                            # fine-tuning
            start = model_state(read_checkpoint(args.vq_ckpt), args.vq_ckpt)
            with torch.device("meta"):
                load_strictly(VQModel(args.vq_model, args.codebook_size, args.codebook_embed_dim), start, args.vq_ckpt,
                              "check --vq-model, --codebook-size and --codebook-embed-dim")
        if args.output:
            require_writable_folder(Path(args.output).parent)
        folder = find_run_folder(args.results_dir, args.vq_model, vars(args), FREE_TO_CHANGE, args.new_run)
    plan = UpdatePlan(len(images), args.global_batch_size, args.global_seed)
    num_updates = args.max_updates or args.epochs * plan.per_epoch
    output = Path(args.output or folder.path / "tokenizer.pt")
    if folder.result and output.is_file():
        LOGGER.info("%s is finished: %s", output, folder.result)
        return
    if session.is_main:
        start_run_folder(folder, vars(args))
    session.barrier()
    trainer = build_trainer(args, session, perceptual, start)
    first = resume(folder.checkpoints, trainer, session)
    if session.is_main:
        cut_log(folder.path / "log.txt", first)
    open_logger(session, folder.path / "log.txt")
    LOGGER.info("%s, %.1fM parameters; %d images, %d updates of %d", args.vq_model,
                sum(p.numel() for p in trainer.model.parameters()) / 1e6, len(images), num_updates,
                args.global_batch_size)
    journal = train(trainer, images, held_out, plan, range(first, num_updates), args, folder, session)
    model = final_model(trainer, args, session.device)
    result = {}
    if held_out:
        result = evaluate(model, held_out, args, session)
        LOGGER.info("held out: PSNR %.2f dB, %d of %d codes used", result["psnr"], result["codes_used"],
                    args.codebook_size)
    if session.is_main:
        save_reconstructions(folder.path / "reconstructions.png", model, held_out or images, args, session)
        settings = describe(args, images, num_updates)
        save_checkpoint(output, {"model": model.state_dict(), "settings": settings})
        write_json(output.with_suffix(".json"), result | {"updates": num_updates, "run_folder": str(folder.path)})
        journal.close(**result)
    LOGGER.info("tokenizer in %s, pictures in %s", output, folder.path)


def train(trainer, images, held_out, plan, updates, args, folder, session):
    """Runs the updates, with log, curves, pictures and checkpoints; returns the Journal."""
    crops = TrainingCrops(images, args.image_size, args.global_seed, args.smallest_crop, not args.no_flip)
    keys = plan_updates(len(images), args.global_batch_size, args.global_seed, updates,
                        session.share_of(args.global_batch_size))
    journal = Journal(folder, trainer, plan, None, Speedometer(session.device, session.world_size), updates,
                      args.log_every, 0, session, CURVES + (GAN_CURVES if args.disc_weight else ()), FINAL)
    schedule = SaveSchedule((args.ckpt_updates,), args.ckpt_minutes, updates.stop, session)
    for update, pictures in zip(updates, load_crops(crops, keys, args.num_workers), strict=True):
        lr = learning_rate(update, updates.stop, args.lr, args.warmup, args.lr_schedule)
        trainer.update(update, pictures, lr)
        done = update + 1
        if args.revive_every and done % args.revive_every == 0 and done < updates.stop:
            LOGGER.info("update %d: %d unused codes moved", done, trainer.revive(done, pictures, args.global_seed))
        journal.after(done, lr)
        if held_out and args.eval_every and done % args.eval_every == 0 and done < updates.stop:
            model = final_model(trainer, args, session.device)
            journal.note(done, **{f"heldout_{name}": value for name, value in
                                  evaluate(model, held_out, args, session).items() if name in ("psnr", "usage")})
            if session.is_main:
                save_reconstructions(folder.path / "pictures" / f"{done:07d}.png", model, held_out, args, session)
        is_due, received = schedule.after(done)
        if is_due:
            save_state(folder.checkpoints, trainer, done, describe(args, images, done), args.keep_checkpoints, session)
        if received:
            LOGGER.info("signal %d after update %d: the same command continues", received, done)
            raise SystemExit(128 + received)
    return journal


if __name__ == "__main__":
    run(main, build_parser())
