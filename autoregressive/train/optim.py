"""Optimizer and learning rate."""

import math

import torch

SCHEDULES = ("constant", "cosine", "linear")


def add_optim_args(parser):
    """Declares the flags of the optimizer and its learning rate."""
    group = parser.add_argument_group("optimizer")
    group.add_argument("--lr", type=float, default=1e-4, help="peak learning rate (1e-4 per 256 images of a batch)")
    group.add_argument("--lr-schedule", default="constant", choices=SCHEDULES, help="what follows the warm-up")
    group.add_argument("--warmup", type=int, default=0, help="updates of linear warm-up")
    group.add_argument("--weight-decay", type=float, default=0.05, help="on tensors of two or more dimensions only")
    group.add_argument("--beta1", type=float, default=0.9, help="first AdamW beta")
    group.add_argument("--beta2", type=float, default=0.95, help="second AdamW beta")
    group.add_argument("--max-grad-norm", type=float, default=1.0, help="clip the gradient's norm; 0 is off")


def build_optimizer(model, lr, betas, weight_decay):
    """Returns AdamW (eps 1e-8) with weight decay on tensors of two or more dimensions only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=True)


def learning_rate(update, num_updates, peak, warmup, schedule):
    """Returns the learning rate of an update: linear warm-up, then constant, or down to 0 by cosine or line.

    Args:
        update: 0 .. num_updates - 1.
        num_updates: length of the run.
        peak: the rate after the warm-up.
        warmup: number of updates of the warm-up.
        schedule: one of SCHEDULES.
    """
    if update < warmup:
        return peak * (update + 1) / warmup
    if schedule == "constant":
        return peak
    progress = (update - warmup) / max(num_updates - warmup, 1)
    return peak * (1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2)
