"""Time and memory of head and losses, and of whole training steps: the published way and ours.

    OMP_NUM_THREADS=1 python scripts/benchmarks/train_step.py                   # CPU: head and losses of GPT-B
    python scripts/benchmarks/train_step.py --part step --gpt-models GPT-B GPT-L GPT-XL --grids 16 24 --batch-size 32

The published way: float32 logits, logsumexp over a (B * T, K, S) view, two cross-entropies, three .item() a step. Every
measurement has a process of its own, the ways take turns, medians are printed. On a GPU both are compiled.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])      # the repository root instead of this folder

import functools
import itertools
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.nn.functional as F

from autoregressive.models.cluster_loss import fused_head_loss, reference_losses
from autoregressive.models.gpt import GPT, GPT_MODELS, gpt_config
from autoregressive.runtime.entry import run
from autoregressive.runtime.optim import ModelOptimizer, OptimSettings
from autoregressive.runtime.speed import Speedometer
from autoregressive.train.objective import GPTTrainer, Objective
from scripts.benchmarks.turns import add_size_args, benchmark_parser, clock, compare, resident_bytes, timed

VOCAB_SIZE, CLUSTER_SIZE, NUM_CLASSES = 16384, 128, 1000
CHUNK_ROWS = {"cpu": 256, "cuda": 8192}             # of train_c2i.py's defaults: 16 and 512 MiB
WARM_UP, STEPS = 3, 10                              # steps of one measurement of whole steps


def build_parser():
    """Returns the parser of this script's command line."""
    parser = benchmark_parser("Compare ways to train: seconds and memory of head and losses, or of steps.", rounds=5)
    add_size_args(parser, GPT_MODELS)
    parser.add_argument("--part", default="head", choices=PARTS, help="head and losses alone, or whole steps")
    parser.add_argument("--batch-size", type=int, default=4, help="images of a step")
    return parser


def published_loss(features, head, targets):
    """Returns the loss of features (N, D) as published, from all logits at once, and its parts (3,)."""
    token_loss, cluster_loss = reference_losses(F.linear(features, head).float(), targets, CLUSTER_SIZE)
    loss = token_loss + cluster_loss
    return loss, torch.stack([token_loss, cluster_loss, loss]).detach()


def our_loss(features, head, targets):
    """Returns the loss of features (N, D) as train_c2i.py computes it, and its parts (3,)."""
    return fused_head_loss(features, head, targets, CLUSTER_SIZE, 1.0, CHUNK_ROWS[features.device.type])


def measure_head(name, grid, batch_size, session, loss_of):
    """Returns CPU (or GPU) seconds of head and losses, forward and backward, and their peak extra memory."""
    device = session.device
    width = GPT_MODELS[name][2]
    torch.manual_seed(0)
    features = torch.randn(batch_size * grid**2, width, device=device, requires_grad=True)
    head = torch.nn.Linear(width, VOCAB_SIZE, bias=False, device=device).weight
    targets = torch.randint(VOCAB_SIZE, features.shape[:1], device=device)

    def step():
        loss, parts = loss_of(features, head, targets)
        if loss_of is published_loss:
            for part in parts:
                part.item()
        loss.backward()
        features.grad = head.grad = None

    step()                                          # warms up
    start_memory = reset_peak(device)
    seconds = [timed(step, device if device.type == "cuda" else None)[1] for _ in range(3)]
    return {"seconds": statistics.median(seconds), "megabytes": (peak(device) - start_memory) / 1e6}


def measure_step(name, grid, batch_size, session, loss_of):
    """Returns rates, model FLOP utilisation and peak memory of whole steps."""
    device = session.device
    is_compiled = device.type == "cuda"
    config = gpt_config(name, grid=grid, vocab_size=VOCAB_SIZE, num_classes=NUM_CLASSES)
    torch.manual_seed(0)
    model = GPT(config).to(device)
    objective = Objective(model, loss_of)
    if is_compiled and loss_of is our_loss:
        objective.head_loss = torch.compile(our_loss)
        for layer in model.layers:
            layer.compile()
    elif is_compiled:
        objective = torch.compile(objective)
    optimizer = ModelOptimizer(model, OptimSettings(lr=1e-4, weight_decay=0.05), device)
    trainer = GPTTrainer(objective, optimizer, session, "bf16" if is_compiled else "none")
    batch = (torch.randint(VOCAB_SIZE, (batch_size, config.num_tokens)), torch.randint(NUM_CLASSES, (batch_size,)))
    if is_compiled:
        batch = tuple(tensor.pin_memory() for tensor in batch)
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            start_memory = reset_peak(device)
            clock(device)                           # waits for the warm-up
            speed = Speedometer(device, 1, config.num_tokens,
                                config.flops_per_token(sum(p.numel() for p in model.parameters())))
        trainer.step(step, batch, 1e-4)
        if loss_of is published_loss:
            for value in trainer.meter.sums[:3]:
                value.item()
        if step >= WARM_UP:
            speed.add(batch_size)
    clock(device)
    rates = speed.read()
    return {"seconds": batch_size / rates["images_per_second"], "megabytes": (peak(device) - start_memory) / 1e6,
            **rates}


PARTS = {"head": measure_head, "step": measure_step}


def reset_peak(device):
    """Forgets the peak of memory and returns the memory in use, in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")   # Linux: the peak becomes the present resident size
    return resident_bytes("VmRSS")


def peak(device):
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes("VmHWM")


def in_own_process(function, *arguments):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main(args, session):
    for name, grid in itertools.product(args.gpt_models, args.grids):
        compare(f"{name} {grid}x{grid}, batch {args.batch_size}, {args.part}",
                functools.partial(in_own_process, PARTS[args.part], name, grid, args.batch_size, session),
                {"published": published_loss, "ours": our_loss}, args.rounds)


if __name__ == "__main__":
    run(main, build_parser())
