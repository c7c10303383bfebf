"""Trains the small classifier that stands in for Inception on data sets of which Inception knows nothing.

    python evaluations/c2i/train_classifier.py --dataset digits --data-path train --val-path heldout --image-size 16 \
        --output results/quickstart/classifier.pt

Any two image folders with the same classes will do: --data-path my/train --val-path my/val --image-size 32.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])      # the repository root instead of this folder

import numpy as np
import torch
import torch.nn.functional as F

from autoregressive.runtime.distributed import seed_everything
from autoregressive.runtime.entry import Parser, checks, require_one_process, run
from autoregressive.runtime.files import require_writable_folder
from autoregressive.runtime.log import open_logger, progress
from evaluations.c2i.classifier import SMALLEST_IMAGE, SmallClassifier, save_classifier
from tokenizer.tokenizer_image.images import add_image_args, center_crop, open_images

EVALUATION_BATCH = 256


def build_parser():
    """Returns the parser of this script's command line."""
    parser = Parser("Train a small classifier to score samples with.")
    add_image_args(parser)
    parser.add_argument("--val-path", required=True, help="like --data-path: the pictures that accuracy is measured on")
    parser.add_argument("--output", required=True, help="file of the classifier")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training pictures")
    parser.add_argument("--max-updates", type=int, default=0, help="length of the run in updates; 0: by --epochs")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures in an update")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate of the one-cycle schedule")
    return parser


def open_sets(args):
    """Returns the training and the held-out images of the flags."""
    for flag, value, least in (("--epochs", args.epochs, 1), ("--max-updates", args.max_updates, 0),
                               ("--batch-size", args.batch_size, 2), ("--image-size", args.image_size, SMALLEST_IMAGE)):
        if value < least:
            raise ValueError(f"{flag}: expected at least {least}, got {value}")
    if not args.lr > 0:
        raise ValueError(f"--lr: expected more than 0, got {args.lr}")
    if Path(args.output).is_dir():
        raise ValueError(f"--output: expected the name of a file, got the folder {args.output}")
    train, heldout = open_images(args.dataset, args.data_path), open_images(args.dataset, args.val_path)
    if train.class_names != heldout.class_names:
        raise ValueError(f"--val-path: expected the classes of --data-path, {len(train.class_names)} in all, got "
                         f"{len(heldout.class_names)} other ones")
    if len(train) < args.batch_size:
        raise ValueError(f"--batch-size: expected at most the {len(train)} training pictures, got {args.batch_size}")
    require_writable_folder(Path(args.output).parent)
    return train, heldout


def read_all(images, size, session, description):
    """Returns pictures (N, P, P, 3) uint8 and labels (N,) int64 on the session's device."""
    pictures = np.empty((len(images), size, size, 3), np.uint8)
    with progress(session, len(images), description, "image") as bar:
        for row in range(len(images)):
            pictures[row] = center_crop(images.read(row), size)
            bar.update()
    return torch.from_numpy(pictures).to(session.device), torch.from_numpy(images.labels).to(session.device)


def shift(pictures, reach):
    """Moves each picture (N, P, P, 3) by up to `reach` pixels in both directions; the border is repeated."""
    count, size = pictures.shape[:2]
    offsets = torch.randint(-reach, reach + 1, (2, count, 1), device=pictures.device)
    rows, columns = (torch.arange(size, device=pictures.device) + offsets).clamp(0, size - 1)      # (N, P) each
    return pictures[torch.arange(count, device=pictures.device)[:, None, None], rows[:, :, None], columns[:, None, :]]


def train_classifier(model, pictures, labels, args, session):
    """Trains a model in place; the last incomplete batch of an epoch is dropped."""
    updates_per_epoch = len(pictures) // args.batch_size
    num_updates = args.max_updates or args.epochs * updates_per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=num_updates)
    model.train()
    with progress(session, num_updates * args.batch_size, "train the classifier", "image") as bar:
        for update in range(num_updates):
            if update % updates_per_epoch == 0:
                order = torch.randperm(len(pictures)).to(session.device)
            rows = order[update % updates_per_epoch * args.batch_size:][:args.batch_size]
            logits = model(shift(pictures[rows], reach=max(1, args.image_size // 8)))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update(args.batch_size)


@torch.inference_mode()
def measure_accuracy(model, pictures, labels):
    """Returns the share of pictures that the model assigns to their label."""
    model.eval()
    hits = [(model(batch).argmax(dim=1) == truth).sum().item() for batch, truth in
            zip(pictures.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True)]
    return sum(hits) / len(labels)


def main(args, session):
    logger = open_logger(session)
    with checks(session):
        require_one_process(session)
        train, heldout = open_sets(args)
    seed_everything(args.global_seed)
    train_pictures, train_labels = read_all(train, args.image_size, session, "read training pictures")
    pictures, labels = read_all(heldout, args.image_size, session, "read held-out pictures")
    model = SmallClassifier(len(train.class_names)).to(session.device)
    train_classifier(model, train_pictures, train_labels, args, session)
    accuracy = measure_accuracy(model, pictures, labels)
    save_classifier(args.output, model, {
        "class_names": train.class_names, "image_size": args.image_size, "accuracy": accuracy,
        "num_heldout": len(heldout), "dataset": args.dataset, "seed": args.global_seed})
    logger.info("%.2f %% of %d held-out pictures are right; saved in %s", 100 * accuracy, len(heldout), args.output)


if __name__ == "__main__":
    run(main, build_parser())
