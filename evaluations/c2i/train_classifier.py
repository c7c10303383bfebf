"""Trains the small classifier that scores data sets on which Inception says nothing.

    python evaluations/c2i/train_classifier.py --dataset digits --data-path train --val-path val \
        --image-size 16 --output results/quickstart/classifier.pt

Any two image folders with the same classes will do: --data-path my/train --val-path my/val
--image-size 32. Letters: N pictures, P pixels.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # the repository root, not this folder

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive.runtime.distributed import Session, seed_everything
from autoregressive.runtime.entry import (
    Flags,
    Parser,
    above,
    at_least,
    between,
    check_one_process,
    checks,
    run,
)
from autoregressive.runtime.failures import Failures, add_failure_args
from autoregressive.runtime.files import check_output
from autoregressive.runtime.log import open_logger, progress
from evaluations.c2i.classifier import (
    DEFAULT_WIDTH,
    SMALLEST_IMAGE,
    SmallClassifier,
    save_classifier,
)
from tokenizer.tokenizer_image.crops import CenterCrops
from tokenizer.tokenizer_image.images import ImageSet, add_image_args, open_dataset

EVALUATION_BATCH = 256
READ_AT_ONCE = 64       # pictures between two reports of those that are broken


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Train a small classifier to score samples with.")
    add_image_args(parser)
    add_failure_args(parser)
    parser.add_argument("--val-path", required=True,
                        help="like --data-path: the pictures that accuracy is measured on")
    parser.add_argument("--output", required=True, help="file of the classifier")
    parser.add_argument("--width", type=between(8, 1024), default=DEFAULT_WIDTH,
                        help="channels of the first convolution; there are twice as many features")
    parser.add_argument("--flip", action="store_true",
                        help="mirror pictures at random (not digits, not text)")
    parser.add_argument("--epochs", type=at_least(1), default=20,
                        help="passes over the training pictures")
    parser.add_argument("--max-steps", type=at_least(0), default=0,
                        help="length of the run in steps; 0: by --epochs")
    parser.add_argument("--batch-size", type=at_least(2), default=64, help="pictures in a step")
    parser.add_argument("--lr", type=above(0), default=3e-3,
                        help="highest learning rate of the one-cycle schedule")
    return parser


def open_sets(args: Flags) -> tuple[ImageSet, ImageSet]:
    """Returns the datasets of the flags, to train and to validate with.

    Raises:
        ValueError: they do not belong together, are too small, or the output cannot be written.
    """
    if args.image_size < SMALLEST_IMAGE:
        raise ValueError(f"--image-size: expected at least {SMALLEST_IMAGE}, got {args.image_size}")
    train = open_dataset(args.dataset, args.data_path)
    val = open_dataset(args.dataset, args.val_path, "--val-path")
    if train.class_names != val.class_names:
        raise ValueError(f"--val-path: expected the classes of --data-path, "
                         f"{len(train.class_names)} in all, got {len(val.class_names)} other ones")
    if len(train) < args.batch_size:
        raise ValueError(f"--batch-size: expected at most the {len(train)} training pictures, "
                         f"got {args.batch_size}")
    check_output(args.output)
    return train, val


def read_all(dataset: ImageSet, args: Flags, session: Session,
             description: str) -> tuple[Tensor, Tensor]:
    """Reads the pictures of a dataset that are not broken.

    Returns:
        pictures (N, P, P, 3) uint8 and labels (N,) int64 on the session's device.

    Raises:
        SystemExit: more pictures are broken than may be; they are listed.
    """
    crops = CenterCrops(dataset, args.image_size)
    failures = Failures(len(dataset), args.max_failures)
    parts = []
    with progress(session, len(dataset), description, "image") as bar:
        for first in range(0, len(dataset), READ_AT_ONCE):
            batch = crops[range(first, min(first + READ_AT_ONCE, len(dataset)))]
            failures.add(batch.failures)
            parts.append(batch.whole())
            bar.update(len(batch.rows))
    failures.check()
    pictures = torch.from_numpy(np.concatenate(parts))
    labels = torch.from_numpy(np.delete(dataset.labels, list(failures.found)))
    return pictures.to(session.device), labels.to(session.device)


def shift(pictures: Tensor, reach: int) -> Tensor:
    """Moves each picture (N, P, P, 3) by up to `reach` pixels in both directions.

    The border is repeated.
    """
    count, size = pictures.shape[:2]
    device = pictures.device
    offsets = torch.randint(-reach, reach + 1, (2, count, 1), device=device)
    places = (torch.arange(size, device=device) + offsets).clamp(0, size - 1)   # (2, N, P)
    rows, columns = places                                                      # (N, P) each
    numbers = torch.arange(count, device=device)                                # (N,)
    return pictures[numbers[:, None, None], rows[:, :, None], columns[:, None, :]]


def flip(pictures: Tensor) -> Tensor:
    """Mirrors each picture (N, P, P, 3) with probability 1/2."""
    is_mirrored = torch.rand(len(pictures), device=pictures.device) < 0.5
    return torch.where(is_mirrored[:, None, None, None], pictures.flip(2), pictures)


def train_classifier(model: SmallClassifier, pictures: Tensor, labels: Tensor, args: Flags,
                     session: Session) -> None:
    """Trains a model in place; the last incomplete batch of an epoch is dropped.

    Args:
        model: on the session's device.
        pictures: (N, P, P, 3) uint8 on the session's device.
        labels: (N,) int64 there.
        args: flags of the command line.
        session: Session.

    Raises:
        ValueError: the training diverged.
    """
    steps_per_epoch = len(pictures) // args.batch_size
    num_steps = args.max_steps or args.epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=num_steps)
    model.train()
    with progress(session, num_steps * args.batch_size, "train the classifier", "image") as bar:
        for step in range(num_steps):
            if step % steps_per_epoch == 0:
                batches = torch.randperm(len(pictures)).to(session.device).split(args.batch_size)
            rows = batches[step % steps_per_epoch]
            batch = shift(pictures[rows], reach=max(1, args.image_size // 8))
            if args.flip:
                batch = flip(batch)
            logits = model(batch)
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            if not loss.isfinite():
                raise ValueError(f"expected a finite loss, got {loss.item()} in step {step + 1}: "
                                 "the training diverged; choose a smaller --lr")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update(args.batch_size)


@torch.inference_mode()
def measure_accuracy(model: SmallClassifier, pictures: Tensor, labels: Tensor) -> float:
    """Returns the fraction of pictures (N, P, P, 3) uint8 that the model assigns to their label."""
    model.eval()
    found = torch.cat([model(batch).argmax(dim=1) for batch in pictures.split(EVALUATION_BATCH)])
    return (found == labels).sum().item() / len(labels)


def main(args: Flags, session: Session) -> None:
    """Trains, measures and saves a classifier."""
    logger = open_logger(session)
    with checks(session):
        check_one_process(session)
        train, val = open_sets(args)
        session.hold(args.output)

    # All pictures are in memory at once: these data sets are small.
    seed_everything(args.global_seed)
    train_pictures, train_labels = read_all(train, args, session, "read training pictures")
    val_pictures, val_labels = read_all(val, args, session, "read val pictures")

    # Train, and measure how often it is right.
    model = SmallClassifier(len(train.class_names), args.width).to(session.device)
    with checks(session):                           # of what only the work shows
        if len(train_pictures) < args.batch_size:
            raise ValueError(f"--batch-size: expected at most the {len(train_pictures)} pictures "
                             f"that can be read, got {args.batch_size}")
        train_classifier(model, train_pictures, train_labels, args, session)
        accuracy = measure_accuracy(model, val_pictures, val_labels)
        save_classifier(args.output, model, {
            "class_names": train.class_names, "image_size": args.image_size, "accuracy": accuracy,
            "num_val": len(val_labels), "dataset": args.dataset, "seed": args.global_seed,
            "width": args.width})
    fraction_of_largest_class = val_labels.bincount().max().item() / len(val_labels)
    if accuracy <= fraction_of_largest_class:
        logger.warning("it is no better than naming the most frequent class always, and scores of "
                       "it say nothing; choose a smaller --lr, or train longer")
    logger.info("%.2f %% of %d val pictures are right; saved in %s", 100 * accuracy,
                len(val_labels), args.output)


if __name__ == "__main__":
    run(main, build_parser())
