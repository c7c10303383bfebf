"""Trains a tokenizer: a VQ model that reconstructs images through a codebook.

    torchrun --nnodes=1 --nproc_per_node=8 tokenizer/tokenizer_image/vq_train.py \
        --data-path imagenet/train --val-path imagenet/val --vq-model VQ-16

On a CPU, in about a minute, on handwritten digits (25.0 dB on those of the split val):

    python tokenizer/tokenizer_image/vq_train.py --dataset digits --data-path train --val-path val \
        --no-flip --smallest-crop 1 --image-size 16 --vq-model VQ-4-small --codebook-size 512 \
        --max-steps 350 --global-batch-size 32 --lr 1.5e-3 --lr-schedule linear --warmup 30 \
        --mixed-precision none --num-workers 0 --perceptual-weight 0 --disc-weight 0
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # the repository root, not this folder

import os
import platform
from typing import Any

import torch

from autoregressive.runtime.checkpoint import save_checkpoint
from autoregressive.runtime.distributed import Session, seed_everything
from autoregressive.runtime.entry import (
    Flags,
    Parser,
    at_least,
    checks,
    fraction_above_0,
    may_vary,
    run,
)
from autoregressive.runtime.failures import add_failure_args
from autoregressive.runtime.files import check_output, read_json, write_json
from autoregressive.runtime.loader import BatchOrder
from autoregressive.runtime.log import LOGGER, open_logger
from autoregressive.runtime.optim import OptimSettings, add_optim_args, check_optim
from autoregressive.runtime.run_settings import (
    RunRequest,
    RunSettings,
    add_training_args,
    check_batch,
    open_run_folder,
)
from autoregressive.runtime.speed import Speedometer
from autoregressive.runtime.training import TrainingRun
from tokenizer.tokenizer_image.crops import TrainingCrops
from tokenizer.tokenizer_image.discriminator import NORMS, SMALLEST_IMAGE, PatchDiscriminator
from tokenizer.tokenizer_image.images import add_image_args, dataset_sha256, open_dataset
from tokenizer.tokenizer_image.loading import open_vq
from tokenizer.tokenizer_image.lpips import LPIPS, add_lpips_args, load_lpips
from tokenizer.tokenizer_image.vq_loss import GAN_LOSSES
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel, add_vq_args, check_image_size
from tokenizer.tokenizer_image.vq_settings import Networks, TokenizerData, TokenizerSettings
from tokenizer.tokenizer_image.vq_trainer import RECONSTRUCTION_LOSSES, TokenizerTrainer
from tokenizer.validation.reconstruction import Validation

CURVES = ("reconstruction", "codebook", "usage", "perplexity")
GAN_CURVES = ("generator", "discriminator")
RESULT = ("reconstruction", "usage", "val_psnr", "val_codes_used", "val_usage", "val_perplexity")


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Train a VQ tokenizer on images.")
    add_image_args(parser)
    add_vq_args(parser)
    add_optim_args(parser)
    add_training_args(parser, results_dir="results", precisions=("none", "bf16"))
    parser.set_defaults(weight_decay=0.0, global_batch_size=128, epochs=40, ckpt_every=0,
                        ckpt_steps=5000)
    group = parser.add_argument_group("data")
    group.add_argument("--val-path", help="like --data-path: pictures to judge the tokenizer by, "
                                          "none by default")
    group.add_argument("--smallest-crop", type=fraction_above_0, default=0.8,
                       help="least fraction of the shorter side in a random crop; 1 shows all")
    group.add_argument("--no-flip", action="store_true", help="mirror no pictures (digits, text)")
    add_failure_args(group)
    add_loss_args(parser)
    may_vary(parser.add_argument("--output", help="the finished tokenizer; "
                                                  "default: tokenizer.pt in the run folder"))
    return parser


def add_loss_args(parser: Parser) -> None:
    """Declares the losses, their weights, and what happens to codes that nothing uses."""
    group = parser.add_argument_group("losses")
    group.add_argument("--reconstruction-loss", default="l2", choices=tuple(RECONSTRUCTION_LOSSES),
                       help="of pixels")
    group.add_argument("--reconstruction-weight", type=at_least(0.0), default=1.0,
                       help="weight of the pixels' loss")
    group.add_argument("--perceptual-weight", type=at_least(0.0), default=1.0,
                       help="weight of LPIPS; 0 needs no VGG weights")
    add_lpips_args(parser)
    group.add_argument("--entropy-ratio", type=at_least(0.0), default=0.0,
                       help="weight of the entropy loss")
    group.add_argument("--disc-weight", type=at_least(0.0), default=0.5,
                       help="weight of the adversarial loss; 0: none")
    group.add_argument("--disc-start", type=at_least(0), default=20000,
                       help="steps before the discriminator begins")
    group.add_argument("--disc-loss", default="hinge", choices=tuple(GAN_LOSSES),
                       help="adversarial loss")
    group.add_argument("--disc-norm", default="group", choices=NORMS,
                       help="of the discriminator; batch as published")
    group.add_argument("--disc-adaptive-weight", action="store_true",
                       help="scale the adversarial loss by the gradients at the decoder's last "
                            "layer")
    group.add_argument("--revive-every", type=at_least(0), default=0,
                       help="steps after which codes that nothing used move to present latents; "
                            "0: never")


def open_images(args: Flags, session: Session) -> TokenizerData:
    """Checks the flags that need no file, and opens what to train on and validate with.

    Raises:
        ValueError: a flag does not fit another, or there are too few pictures.
    """
    check_image_size(args.image_size, args.vq_model)
    check_batch(args.global_batch_size, args.gradient_accumulation_steps, session)
    check_optim(args.ema, args.ema_warmup)
    RunSettings(**args.pick(RunSettings)).check()
    if args.disc_weight and args.image_size < SMALLEST_IMAGE:
        raise ValueError(f"--image-size: expected at least {SMALLEST_IMAGE} pixels for the "
                         f"discriminator, got {args.image_size}; or give --disc-weight 0")
    dataset = open_dataset(args.dataset, args.data_path)
    validation = None
    if args.val_path:
        val_dataset = open_dataset(args.dataset, args.val_path, "--val-path")
        validation = Validation(val_dataset, args.image_size,
                                batch_size=args.global_batch_size // session.world_size,
                                num_workers=args.num_workers, max_failures=args.max_failures)
    if len(dataset) < args.global_batch_size:
        raise ValueError(f"{args.data_path}: expected at least one batch of "
                         f"{args.global_batch_size} images, found {len(dataset)}; "
                         "lower --global-batch-size")
    order = BatchOrder(len(dataset), args.global_batch_size, args.global_seed)
    crops = TrainingCrops(dataset, order, args.image_size, args.smallest_crop,
                          flip=not args.no_flip, max_failures=args.max_failures)
    return TokenizerData(crops, validation)


def build_networks(args: Flags, config: VQConfig, start: VQModel | None,
                   perceptual: LPIPS | None) -> Networks:
    """Builds the networks, alike on every process; the model has the weights of `start`, if any."""
    seed_everything(args.global_seed)
    model = VQModel(config)
    if start is not None:
        model.load_state_dict(start.state_dict())
    discriminator = PatchDiscriminator(args.disc_norm) if args.disc_weight else None
    return Networks(model, discriminator, perceptual)


def checkpoint_settings(args: Flags, data: TokenizerData) -> dict[str, Any]:
    """Returns what a reader of a checkpoint must know of it."""
    settings = args.pick(VQConfig)
    for name in ("image_size", "dataset", "global_seed", "global_batch_size"):
        settings[name] = getattr(args, name)
    return settings | {
        "num_classes": len(data.crops.dataset.class_names),
        "num_images": len(data.validation.dataset) if data.validation else 0,
        "python": platform.python_version(),
        "torch": str(torch.__version__)}


def check_owner(output: Path, folder: Path) -> None:
    """Raises ValueError if another run than that of `folder` wrote the tokenizer at `output`."""
    if not output.exists():
        return
    record = output.with_suffix(".json")            # written first
    owner = read_json(record, {"run_folder": str})["run_folder"] if record.is_file() else None
    if owner is None or (output.parent / owner).resolve() != folder.resolve():
        raise ValueError(f"{output}: expected the tokenizer of {folder}, found that of "
                         f"{owner or 'another run'}; name another --output, or remove it")


def save_tokenizer(output: Path, trainer: TokenizerTrainer, training: TrainingRun) -> None:
    """Saves the finished tokenizer, its numbers beside it, and a picture of reconstructions.

    Args:
        output: where the tokenizer goes; the numbers go beside it with .json.
        trainer: the tokenizer.
        training: the run, in whose folder the picture goes.
    """
    settings = training.checkpoint_settings | {"steps": training.num_steps}
    folder = training.folder.path
    model = trainer.best_model()
    validation = trainer.validation or Validation(
        training.batches.dataset, settings["image_size"], batch_size=1, num_workers=0)
    validation.save_pictures(folder / "reconstructions.png", model, training.session.device)
    numbers = {name.removeprefix("val_"): value for name, value in training.read_result().items()}
    owner = {"run_folder": os.path.relpath(folder, output.parent)}
    write_json(output.with_suffix(".json"), settings | numbers | owner)
    save_checkpoint(output, {"model": model.state_dict(), "settings": settings})


def main(args: Flags, session: Session) -> None:
    """Trains a tokenizer, or continues to, and saves it."""
    open_logger(session)

    # Open and check all that the run needs; what its result depends on is its identity.
    with checks(session):
        start = None
        start_hashes = {}
        if args.vq_ckpt:                            # fine-tuning
            start, start_hashes = open_vq(args, args.vq_ckpt)
        config = VQConfig(**args.pick(VQConfig))
        data = open_images(args, session)
        perceptual = load_lpips(args.vgg_path, args.lpips_path) if args.perceptual_weight else None
        images_sha256 = dataset_sha256(data.crops.dataset)
        identity = args.identity() | start_hashes | {"images_sha256": images_sha256}
        settings = RunSettings(**args.pick(RunSettings))
        num_steps = settings.num_steps(data.crops.per_epoch)
        if args.output:
            check_output(args.output)

    # Find the run folder: a new one, or that of the run which this command continues.
    request = RunRequest(args.results_dir, args.vq_model, identity, config=args.plain() | identity,
                         defaults=args.defaults(), new_run=args.new_run)
    folder = open_run_folder(session, request, num_steps)
    output = Path(args.output or folder.path / "tokenizer.pt")
    with checks(session):
        if args.output:
            session.hold(output, output.with_suffix(".json"))
            check_owner(output, folder.path)
    if folder.is_finished(num_steps) and output.is_file():
        LOGGER.info("%s is finished: %s", output, folder.result)
        return

    # Build the networks and what trains them.
    networks = build_networks(args, config, start, perceptual)
    trainer = TokenizerTrainer(networks, TokenizerSettings(**args.pick(TokenizerSettings)),
                               OptimSettings(**args.pick(OptimSettings)), session,
                               num_steps=num_steps, data=data)
    training = TrainingRun(folder, trainer, data.crops, settings, session,
                           checkpoint_settings=checkpoint_settings(args, data),
                           speed=Speedometer(session.device, session.world_size),
                           curves=CURVES + (GAN_CURVES if args.disc_weight else ()), result=RESULT,
                           pictures_every=args.val_every)
    training.resume()
    num_parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    LOGGER.info("%s, %.1fM parameters; %d images, %d steps of %d", args.vq_model,
                num_parameters / 1e6, len(data.crops.dataset), num_steps, args.global_batch_size)

    # Train, then save the tokenizer on rank 0.
    try:
        training.train()
    except ValueError:                              # one picture too many is broken
        trainer.note_failures()
        trainer.failures.check()
        raise
    if session.is_main:
        save_tokenizer(output, trainer, training)
        training.finish()
    LOGGER.info("tokenizer in %s, pictures in %s", output, folder.path)


if __name__ == "__main__":
    run(main, build_parser())
