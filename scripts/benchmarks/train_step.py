"""Time and memory of head and losses, or of whole training steps: the published way and ours.

    OMP_NUM_THREADS=1 python scripts/benchmarks/train_step.py       # CPU: head and losses of GPT-B
    python scripts/benchmarks/train_step.py --part step \
        --gpt-models GPT-B GPT-L GPT-XL --grids 16 24 --batch-size 32

The published way: float32 logits, logsumexp over a (B * T, K, S) view, two cross-entropies, three
.item() a step. On a GPU both have their blocks and their loss compiled (the published code compiles
its whole model, which takes minutes).
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The repository root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import functools
import itertools
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive.models.cluster_loss import fused_head_loss
from autoregressive.models.config import GPT_MODELS, GPTConfig, gpt_config
from autoregressive.models.gpt import GPT
from autoregressive.runtime.compute import set_up_compiler, set_up_gpu
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import Flags, Parser, at_least, run
from autoregressive.runtime.optim import ModelOptimizer, OptimSettings
from autoregressive.runtime.speed import Speedometer
from autoregressive.train.objective import GPTTrainer, Objective
from scripts.benchmarks.turns import (
    NUM_CLASSES,
    VOCAB_SIZE,
    Report,
    Values,
    add_report_args,
    add_size_args,
    benchmark_parser,
    clock,
    compare,
    resident_bytes,
    timed,
)

CLUSTER_SIZE = 128
CHUNK_ROWS = {"cpu": 256, "cuda": 2048}             # of train_c2i.py's defaults: 16 and 128 MiB
STEPS = {"cpu": 2, "cuda": 10}                      # of one measurement of whole steps


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    description = "Compare ways to train: seconds and memory of head and losses, or of steps."
    parser = benchmark_parser(description, rounds=5)
    add_report_args(parser)
    add_size_args(parser, GPT_MODELS)
    parser.add_argument("--part", default="head", choices=PARTS,
                        help="head and losses alone, or whole steps")
    parser.add_argument("--batch-size", type=at_least(1), default=4, help="images of a step")
    return parser


def published_loss(features: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the loss of features (N, D) as published, all logits at once, and its parts (3,)."""
    targets = targets.flatten()                     # (N,), of (N,) or (N, 1)
    logits = F.linear(features, head).float()                                       # (N, V)
    cluster_logits = logits.unflatten(-1, (-1, CLUSTER_SIZE)).logsumexp(-1)         # (N, K)
    token_loss = F.cross_entropy(logits, targets)
    cluster_loss = F.cross_entropy(cluster_logits, targets // CLUSTER_SIZE)
    loss = token_loss + cluster_loss
    return loss, torch.stack([token_loss, cluster_loss, loss]).detach()


def our_loss(features: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the loss of features (N, D) as train_c2i.py computes it, and its parts (3,)."""
    chunk_rows = CHUNK_ROWS[features.device.type]
    return fused_head_loss(features, head, targets, CLUSTER_SIZE, 1.0, chunk_rows)


LOSSES = {"published": published_loss, "ours": our_loss}


def compare_head(args: Flags, name: str, grid: int, session: Session, title: str) -> Values:
    """Measures seconds and peak extra memory of head and losses, forward and backward.

    On a CPU they are CPU seconds.
    """
    device = session.device
    width = GPT_MODELS[name].width
    torch.manual_seed(0)
    features = torch.randn(args.batch_size * grid**2, width, device=device, requires_grad=True)
    head = torch.nn.Linear(width, VOCAB_SIZE, bias=False, device=device).weight
    targets = torch.randint(VOCAB_SIZE, features.shape[:1], device=device)

    def step(loss_of):
        loss, parts = loss_of(features, head, targets)
        if loss_of is published_loss:
            for part in parts:
                part.item()
        loss.backward()
        features.grad = head.grad = None

    clock_device = device if device.type == "cuda" else None        # None: CPU seconds

    def measure(loss_of):
        step(loss_of)                               # warms up
        start_memory = reset_peak(device)
        seconds = [timed(lambda: step(loss_of), clock_device)[1] for _ in range(3)]
        megabytes = (peak(device) - start_memory) / 1e6
        return {"seconds": statistics.median(seconds), "megabytes": megabytes}

    return compare(title, measure, LOSSES, args.rounds)


def compare_steps(args: Flags, name: str, grid: int, session: Session, title: str) -> Values:
    """Measures whole steps: rates, MFU, and peak memory beyond weights and optimizer."""
    device = session.device
    is_gpu = device.type == "cuda"
    config = gpt_config(name, grid=grid, vocab_size=VOCAB_SIZE, num_classes=NUM_CLASSES)
    trainers = {loss_of: make_trainer(config, loss_of, session) for loss_of in LOSSES.values()}
    batch = (torch.randint(VOCAB_SIZE, (args.batch_size, config.num_tokens)),
             torch.randint(NUM_CLASSES, (args.batch_size,)))
    if is_gpu:
        batch = tuple(tensor.pin_memory() for tensor in batch)
    model = trainers[our_loss].optimizer.model
    num_parameters = sum(parameter.numel() for parameter in model.parameters())

    def measure(loss_of):
        start_memory = reset_peak(device)
        clock(device)                               # waits for what came before
        speed = Speedometer(device, 1, config.num_tokens,
                            lambda step: config.flops_per_image(num_parameters))
        for step in range(STEPS[device.type]):
            trainers[loss_of].step(step, batch, 1e-4)
            if loss_of is published_loss:
                for value in trainers[loss_of].meter.sums[:3]:
                    value.item()
            speed.add(args.batch_size, step)
        clock(device)
        rates = speed.read()
        del rates["memory_mib"]                     # of both trainers
        return rates | {"megabytes": (peak(device) - start_memory) / 1e6}

    return compare(title, measure, LOSSES, args.rounds, warm_up=1)


def make_trainer(config: GPTConfig, loss_of: Callable, session: Session) -> GPTTrainer:
    """Returns a trainer of random weights.

    On a GPU its blocks and its loss are compiled and it computes in bf16.
    """
    device = session.device
    torch.manual_seed(0)
    with device:
        model = GPT(config)
    objective = Objective(model.to(device), loss_of)
    precision = "none"
    if device.type == "cuda":
        precision = "bf16"
        objective.head_loss = torch.compile(loss_of)
        for layer in model.layers:
            layer.compile()
    optimizer = ModelOptimizer(model, OptimSettings(lr=1e-4, weight_decay=0.05), device)
    return GPTTrainer(objective, optimizer, session, precision)


PARTS = {"head": compare_head, "step": compare_steps}


def reset_peak(device: torch.device) -> int:
    """Forgets the peak of memory and returns the memory in use, in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    # Linux: the peak becomes the present resident size.
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes("VmRSS")


def peak(device: torch.device) -> int:
    """Returns the peak of memory since reset_peak, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_bytes("VmHWM")


def main(args: Flags, session: Session) -> None:
    if session.device.type == "cuda":
        set_up_compiler(session.device, "raise")
        set_up_gpu(tf32=True, cudnn_attention=False)            # as train_c2i.py by default
    section = "training" if args.part == "step" else "head and losses"
    report = Report(section, args.report, args.minutes)
    for grid, name in itertools.product(args.grids, args.gpt_models):
        title = f"{name} {grid}x{grid} batch {args.batch_size}"
        report.measure(title, functools.partial(PARTS[args.part], args, name, grid, session, title))
    report.finish()


if __name__ == "__main__":
    run(main, build_parser())
