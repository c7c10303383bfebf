"""What guidance-free training and next-patch stages cost, beside ordinary training and guidance.

    OMP_NUM_THREADS=1 python scripts/benchmarks/half_cost.py --part step
    OMP_NUM_THREADS=1 python scripts/benchmarks/half_cost.py --part sample --batch-sizes 16 64

Steps are whole ones, with both losses and AdamW; a run of two stages of equal length costs the mean
of a step on patches and of an ordinary one. Sampling is of the same weights: two passes for each
token with guidance, one pass at a fixed beta.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The repository root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import functools

import torch

from autoregressive.models.cluster_loss import fused_head_loss
from autoregressive.models.config import GPTConfig, gpt_config
from autoregressive.models.generate import generate
from autoregressive.models.gpt import GPT
from autoregressive.models.packed import can_pack, pack_linears
from autoregressive.models.sampler import Sampler
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import Flags, Parser, at_least, run
from autoregressive.runtime.optim import ModelOptimizer, OptimSettings
from autoregressive.train.objective import GPTTrainer, Objective
from scripts.benchmarks.turns import NUM_CLASSES, VOCAB_SIZE, benchmark_parser, compare, timed

CLUSTER_SIZE, CHUNK_ROWS = 128, 256
# Of training: whether it is guidance-free, and the side of its patches.
STEPS = {"ordinary": (False, 1), "guidance-free": (True, 1), "patches of 2 x 2": (False, 2),
         "both": (True, 2)}
SAMPLERS = {"guidance 2": Sampler(cfg_scale=2.0), "one pass": Sampler(cfg_scale=1.0)}


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = benchmark_parser("Compare what training steps and sampling cost: CPU seconds.",
                              rounds=3)
    parser.add_argument("--part", default="step", choices=PARTS, help="training or sampling")
    parser.add_argument("--gpt-model", default="GPT-B", help="size of the GPT")
    parser.add_argument("--grid", type=at_least(1), default=16,
                        help="side of the picture in tokens")
    parser.add_argument("--batch-sizes", nargs="+", type=at_least(1), default=[4],
                        help="images together")
    return parser


def new_config(args: Flags, **options: bool) -> GPTConfig:
    return gpt_config(args.gpt_model, grid=args.grid, vocab_size=VOCAB_SIZE,
                      num_classes=NUM_CLASSES, **options)


def compare_steps(args: Flags, batch_size: int, session: Session) -> None:
    """Prints CPU seconds and counted operations of a step of each kind."""
    head_loss = functools.partial(fused_head_loss, cluster_size=CLUSTER_SIZE, lambda_cce=1.0,
                                  rows_at_once=CHUNK_ROWS)
    tokens = torch.randint(VOCAB_SIZE, (batch_size, args.grid**2))
    labels = torch.randint(NUM_CLASSES, (batch_size,))

    def measure(way):
        guidance_free, patch = way
        torch.manual_seed(0)
        model = GPT(new_config(args, guidance_free=guidance_free))
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        flops = model.config.flops_per_image(num_parameters, patch) * batch_size
        objective = Objective(model, head_loss, patch_at=lambda step: patch)
        optimizer = ModelOptimizer(model, OptimSettings(lr=1e-4), session.device)
        trainer = GPTTrainer(objective, optimizer, session, "none")
        batch = (tokens, labels, torch.rand(batch_size)) if guidance_free else (tokens, labels)
        trainer.step(0, batch, 1e-4)                # warms up
        _, seconds = timed(lambda: trainer.step(1, batch, 1e-4))
        return {"CPU s": seconds, "GFLOP": flops / 1e9}

    medians = compare(f"step of {batch_size} images", measure, STEPS, args.rounds)
    print_ratios(medians, "ordinary", "CPU s")


def compare_sampling(args: Flags, batch_size: int, session: Session) -> None:
    """Prints tokens per CPU second with guidance and in one pass."""
    torch.manual_seed(0)
    model = GPT(new_config(args)).eval().requires_grad_(False)
    torch.nn.init.normal_(model.output.weight, std=0.02)
    if can_pack(session.device, torch.float32):
        pack_linears(model)
    labels = torch.randint(NUM_CLASSES, (batch_size,))
    uniforms = torch.rand(batch_size, args.grid**2, dtype=torch.float64)

    def measure(sampler):
        _, seconds = timed(lambda: generate(model, labels, uniforms, sampler))
        return {"tokens / CPU s": batch_size * args.grid**2 / seconds}

    medians = compare(f"sampling of {batch_size} images", measure, SAMPLERS, args.rounds)
    print_ratios(medians, "guidance 2", "tokens / CPU s")


def print_ratios(medians: dict[str, dict[str, float]], base: str, name: str) -> None:
    for way, values in medians.items():
        print(f"    {way} / {base}: {values[name] / medians[base][name]:.2f}")


PARTS = {"step": compare_steps, "sample": compare_sampling}


def main(args: Flags, session: Session) -> None:
    for batch_size in args.batch_sizes:
        PARTS[args.part](args, batch_size, session)


if __name__ == "__main__":
    run(main, build_parser())
