"""Time and memory of head and losses, and of whole training steps: the published way and ours.

    OMP_NUM_THREADS=1 python scripts/benchmarks/train_step.py                   # CPU: head and losses of GPT-B
    python scripts/benchmarks/train_step.py --part step --gpt-models GPT-B GPT-L GPT-XL --grids 16 24 --batch-size 32

The published way: float32 logits, logsumexp over a (B, T, K, S) view, two cross-entropies, three .item() a step. Every
measurement has a process of its own, the ways take turns, medians are printed. On a GPU both are compiled.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])      # the repository root instead of this folder

import functools
import json
import statistics
import subprocess
import time

import torch
import torch.nn.functional as F
from torch import nn

from autoregressive.models.cluster_loss import fused_head_loss
from autoregressive.models.gpt import GPT, GPT_MODELS, gpt_config
from autoregressive.runtime.entry import Parser, run
from autoregressive.train.monitor import PEAK_TFLOPS, flops_per_token
from autoregressive.train.optim import build_optimizer
from autoregressive.train.step import Objective, Trainer

VOCAB_SIZE, CLUSTER_SIZE, NUM_CLASSES = 16384, 128, 1000
CHUNK_ROWS = {"cpu": 256, "cuda": 8192}             # of train_c2i.py's defaults: 16 and 512 MiB
WAYS, PARTS = ("published", "ours"), ("head", "step")
WARM_UP, STEPS = 3, 10                              # updates of one measurement of whole steps


def build_parser():
    """Returns the parser of this script's command line."""
    parser = Parser("Compare ways to train: seconds and memory of head and losses, or of whole steps.", draws=False)
    parser.add_argument("--part", default="head", choices=PARTS, help="head and losses alone, or whole updates")
    parser.add_argument("--gpt-models", nargs="+", default=["GPT-B"], choices=GPT_MODELS, help="sizes of the GPT")
    parser.add_argument("--grids", nargs="+", type=int, default=[16], help="sides of the picture in tokens")
    parser.add_argument("--batch-size", type=int, default=4, help="images of an update")
    parser.add_argument("--rounds", type=int, default=5, help="how often the ways take turns")
    parser.add_argument("--way", choices=WAYS, help="measure one of them and print JSON; used by the script itself")
    return parser


def published_losses(logits, tokens):
    """Returns the loss as published, and its parts as numbers."""
    logits = logits.float()                                                         # (B, T, V)
    token_loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    clusters = torch.logsumexp(logits.unflatten(-1, (-1, CLUSTER_SIZE)), dim=-1)    # (B, T, K) of (B, T, K, S)
    cluster_loss = F.cross_entropy(clusters.flatten(0, 1), tokens.flatten() // CLUSTER_SIZE)
    loss = token_loss + cluster_loss
    return loss, torch.stack([token_loss, cluster_loss, loss]).detach()


class PublishedObjective(nn.Module):
    """The loss of a GPT from all its logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, labels):
        return published_losses(self.model.output(self.model.features(tokens[:, :-1], labels)), tokens)


def our_loss(device):
    return functools.partial(fused_head_loss, cluster_size=CLUSTER_SIZE, lambda_cce=1.0,
                             rows_at_once=CHUNK_ROWS[device.type])


def measure_head(args, device):
    """Returns CPU (or GPU) seconds of head and losses, forward and backward, and their peak extra memory in MB."""
    width = GPT_MODELS[args.gpt_models[0]][2]
    torch.manual_seed(0)
    features = torch.randn(args.batch_size, args.grids[0] ** 2, width, device=device)
    head = nn.Linear(width, VOCAB_SIZE, bias=False, device=device)
    tokens = torch.randint(VOCAB_SIZE, features.shape[:2], device=device)
    seconds = []
    for attempt in range(4):
        features = features.detach().requires_grad_()
        head.weight.grad = None
        if attempt == 1:                            # the first one warmed up
            start_memory = reset_peak(device)
        started = clock(device)
        if args.way == "published":
            loss, numbers = published_losses(head(features), tokens)
            for number in numbers:
                number.item()
        else:
            loss, numbers = our_loss(device)(features.flatten(0, 1), head.weight, tokens.flatten())
        loss.backward()
        seconds.append(clock(device) - started)
    return {"seconds": statistics.median(seconds[1:]), "megabytes": (peak(device) - start_memory) / 1e6}


def measure_step(args, device):
    """Returns images per second, model FLOP utilisation and peak memory of whole updates."""
    config = gpt_config(args.gpt_models[0], grid=args.grids[0], vocab_size=VOCAB_SIZE, num_classes=NUM_CLASSES)
    torch.manual_seed(0)
    model = GPT(config).to(device)
    precision = "bf16" if device.type == "cuda" else "none"
    ours = args.way == "ours"
    loss = our_loss(device)
    objective = Objective(model, torch.compile(loss) if device.type == "cuda" else loss) if ours else \
        PublishedObjective(model)
    if device.type == "cuda":
        if ours:
            for layer in model.layers:
                layer.compile()
        else:
            objective = torch.compile(objective)
    trainer = Trainer(objective, objective, build_optimizer(model, 1e-4, (0.9, 0.95), 0.05), device, precision, 1.0)
    tokens = torch.randint(VOCAB_SIZE, (args.batch_size, config.num_tokens))
    labels = torch.randint(NUM_CLASSES, (args.batch_size,))
    for number in range(WARM_UP + STEPS):
        if number == WARM_UP:
            start_memory = reset_peak(device)
            started = wall(device)
        trainer.update(number, tokens, labels, 1e-4)
        if not ours:
            for value in trainer.sums[:3]:
                value.item()
    rate = STEPS * args.batch_size / (wall(device) - started)
    flops = flops_per_token(config, sum(p.numel() for p in model.parameters())) * config.num_tokens * rate
    names = [name for name in PEAK_TFLOPS if device.type == "cuda" and name in torch.cuda.get_device_name(device)]
    megabytes = peak(device) / 1e6 if device.type == "cuda" else (peak(device) - start_memory) / 1e6
    return {"seconds": args.batch_size / rate, "megabytes": megabytes, "images_per_second": rate,
            "mfu": flops / (PEAK_TFLOPS[names[0]] * 1e12) if names else None}


def wall(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def clock(device):
    """Returns seconds that only this process's work counts in: CPU time, or the GPU's wall time."""
    return wall(device) if device.type == "cuda" else time.process_time()


def reset_peak(device):
    """Forgets the peak of memory and returns the memory in use, in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")   # Linux: the peak becomes the present resident size
    return resident("VmRSS")


def peak(device):
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")


def resident(name):
    line, = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def compare(args, model, grid):
    """Runs both ways in turns, each in a process of its own, and prints their medians and ratios."""
    results = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way in WAYS:
            done = subprocess.run([sys.executable, __file__, "--way", way, "--part", args.part, "--gpt-models", model,
                                   "--grids", str(grid), "--batch-size", str(args.batch_size), "--device", args.device],
                                  capture_output=True, text=True, check=True)
            results[way].append(json.loads(done.stdout.splitlines()[-1]))
    names = [name for name, value in results["ours"][0].items() if value is not None]
    medians = {way: {name: statistics.median(row[name] for row in rows) for name in names}
               for way, rows in results.items()}
    for way, values in medians.items():
        print(f"{model} {grid}x{grid}, batch {args.batch_size}, {args.part}, {way}: "
              + ", ".join(f"{name} {value:.4g}" for name, value in values.items()), flush=True)
    print(f"{model} {grid}x{grid}: ours / published: " + ", ".join(
        f"{name} {medians['ours'][name] / value:.2f}" for name, value in medians["published"].items()), flush=True)


def main(args, session):
    if args.way:
        measure = measure_head if args.part == "head" else measure_step
        print(json.dumps(measure(args, session.device)))
        return
    for model in args.gpt_models:
        for grid in args.grids:
            compare(args, model, grid)


if __name__ == "__main__":
    run(main, build_parser())
