"""Whether a device computes what the CPU does.

    python scripts/benchmarks/gpu_correctness.py
    # To test this script itself:
    python scripts/benchmarks/gpu_correctness.py --device cpu --gpt-model GPT-tiny --grid 4

Compared are logits, losses, gradients, tokens, filters, captured steps, and resuming. Each row is a
difference and the most that it may be. Weights are random; float32 is without TF32. Exit code 1 if
a difference is too large.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The repository root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import copy
import functools
import subprocess
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor

from autoregressive.models.captured import CalledAgain, CapturedSteps, compile_decoding
from autoregressive.models.cluster_loss import fused_head_loss, plain_head_loss
from autoregressive.models.config import GPT_MODELS, gpt_config
from autoregressive.models.generate import Steps, generate
from autoregressive.models.gpt import GPT
from autoregressive.models.sampler import Sampler, filter_logits, invert_cdf
from autoregressive.runtime.checkpoint import read_checkpoint
from autoregressive.runtime.compute import autocast, set_up_compiler
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import Flags, Parser, at_least, checks, run
from autoregressive.train.objective import Objective
from scripts.benchmarks.turns import (
    Report,
    Values,
    add_report_args,
    benchmark_parser,
    check_gpu,
    write_random_codes,
)

ROOT = Path(__file__).resolve().parents[2]
NUM_CLASSES = 10
CLUSTER_SIZE = 128
LAMBDA_CCE = 1.0
ROWS_AT_ONCE = 100          # of the fused loss: several chunks, the last of them not full
STEPS, RESUMED_AT = 6, 3
SAMPLER = Sampler(cfg_scale=2.0, top_k=500, top_p=0.95)
GREEDY = Sampler(cfg_scale=2.0, greedy=True)


class Differs(Exception):
    """A difference is larger than it may be."""


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = benchmark_parser("Compare what a device computes with what the CPU does.", rounds=1)
    add_report_args(parser)
    parser.add_argument("--gpt-model", default="GPT-B", choices=GPT_MODELS, help="size of the GPT")
    parser.add_argument("--grid", type=at_least(1), default=12,
                        help="side of the picture in tokens")
    parser.add_argument("--batch-size", type=at_least(1), default=4, help="pictures")
    return parser


def relative(found: Tensor, expected: Tensor) -> float:
    """Returns the norm of a difference over the norm of what is expected."""
    expected = expected.double().cpu()
    return ((found.double().cpu() - expected).norm() / expected.norm()).item()


def fraction_unequal(found: Tensor, expected: Tensor) -> float:
    """Returns the fraction of entries that differ."""
    return (found.cpu() != expected.cpu()).double().mean().item()


class Comparisons:
    """A model and its inputs on both devices, and what is compared on them."""

    def __init__(self, args: Flags, device: torch.device):
        torch.manual_seed(0)
        config = gpt_config(args.gpt_model, grid=args.grid, num_classes=NUM_CLASSES, dropout=0.0,
                            token_dropout=0.0)
        self.device = device
        self.on_cpu = GPT(config)
        torch.nn.init.normal_(self.on_cpu.output.weight, std=0.02)
        self.model = copy.deepcopy(self.on_cpu).to(device)
        self.tokens = torch.randint(config.vocab_size, (args.batch_size, config.num_tokens))
        self.labels = torch.randint(NUM_CLASSES, (args.batch_size,))
        self.uniforms = torch.rand(args.batch_size, config.num_tokens, dtype=torch.float64)

    def logits(self) -> float:
        with torch.inference_mode():
            expected = self.on_cpu(self.tokens[:, :-1], self.labels)
            found = self.model(self.tokens[:, :-1].to(self.device), self.labels.to(self.device))
        return relative(found, expected)

    def loss_and_gradients(self, fused: bool, compiled: bool, precision: str) -> float:
        """Returns the larger of the differences of the loss and of all gradients together."""
        expected_loss, expected = self._differentiate(self.on_cpu, plain_head_loss, "none")
        head_loss = plain_head_loss
        if fused:
            head_loss = functools.partial(fused_head_loss, rows_at_once=ROWS_AT_ONCE)
        model = copy.deepcopy(self.model)
        if compiled:
            head_loss = torch.compile(head_loss)
            for layer in model.layers:
                layer.compile()
        loss, found = self._differentiate(model, head_loss, precision)
        return max(relative(loss, expected_loss), relative(found, expected))

    def _differentiate(self, model: GPT, head_loss: Callable,
                       precision: str) -> tuple[Tensor, Tensor]:
        device = model.norm.weight.device
        head_loss = functools.partial(head_loss, cluster_size=CLUSTER_SIZE, lambda_cce=LAMBDA_CCE)
        with autocast(device, precision):
            loss, _ = Objective(model, head_loss)(self.tokens.to(device), self.labels.to(device))
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        flat = torch.cat([gradient.flatten().float().cpu() for gradient in gradients])
        return loss.detach(), flat

    def greedy_tokens(self) -> float:
        expected = generate(self.on_cpu.eval(), self.labels, self.uniforms, GREEDY)
        return fraction_unequal(self._sample(self.model.eval(), GREEDY), expected)

    def _sample(self, model: GPT, sampler: Sampler, steps: Steps | None = None,
                shift: int = 0) -> Tensor:
        labels = ((self.labels + shift) % NUM_CLASSES).to(self.device)
        return generate(model, labels, self.uniforms.to(self.device), sampler, steps)

    def filtered_and_sampled_tokens(self) -> float:
        logits = torch.randn(64, self.on_cpu.config.vocab_size).mul(2).round(decimals=3)  # ties
        uniforms = torch.rand(64, dtype=torch.float64)
        unequal = []
        for top_k, top_p in ((0, 1.0), (100, 1.0), (0, 0.9), (500, 0.5)):
            expected = filter_logits(logits.double(), top_k, top_p)
            found = filter_logits(logits.double().to(self.device), top_k, top_p)
            unequal.append(fraction_unequal(found, expected))
            expected_tokens = invert_cdf(expected.softmax(-1), uniforms)
            tokens = invert_cdf(found.softmax(-1), uniforms.to(self.device))
            unequal.append(fraction_unequal(tokens, expected_tokens))
        return max(unequal)

    def captured_and_eager_tokens(self) -> float:
        """Returns the fraction of tokens of two batches that differ; the second is all replayed."""
        expected = [self._sample(self.model.eval(), SAMPLER, shift=shift) for shift in (0, 1)]
        model = copy.deepcopy(self.model)
        steps = self._captured(model)
        found = [self._sample(model, SAMPLER, steps, shift) for shift in (0, 1)]
        return fraction_unequal(torch.cat(found), torch.cat(expected))

    def captured_and_called_tokens(self) -> float:
        """Returns the fraction of tokens that differ if the same steps are called, not captured."""
        model = copy.deepcopy(self.model).eval().cast(torch.bfloat16)
        steps = self._captured(model)
        called = CapturedSteps(model, CalledAgain)
        found = [self._sample(model, SAMPLER, steps, shift) for shift in (0, 1)]
        expected = [self._sample(model, SAMPLER, called, shift) for shift in (0, 1)]
        return fraction_unequal(torch.cat(found), torch.cat(expected))

    def _captured(self, model: GPT) -> CapturedSteps:
        model.requires_grad_(False)
        is_gpu = self.device.type == "cuda"
        return CapturedSteps(compile_decoding(model) if is_gpu else model)

    def resumed_training(self) -> float:
        """Returns how far resumed weights are from those of an uninterrupted run.

        The unit is the distance that the uninterrupted run went since the resumption.
        """
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            flags = write_random_codes(folder, count=32, grid=4, vocab_size=256,
                                       num_classes=NUM_CLASSES)
            flags += ("--gpt-model GPT-tiny --cluster-size 16 --mixed-precision none "
                      f"--global-batch-size 8 --max-steps {STEPS} --ckpt-steps {RESUMED_AT} "
                      f"--num-workers 0 --device {self.device.type}").split()
            train(flags, folder / "straight")
            checkpoints = next((folder / "straight").glob("*/checkpoints"))
            middle = checkpoints / f"{RESUMED_AT:07d}.pt"
            train([*flags, "--gpt-ckpt", str(middle)], folder / "resumed")
            last = f"{STEPS:07d}.pt"
            expected = flat_weights(checkpoints / last)
            found = flat_weights(next((folder / "resumed").glob("*/checkpoints")) / last)
            return ((found - expected).norm() / (expected - flat_weights(middle)).norm()).item()


def train(flags: list[str], results: Path) -> None:
    """Runs train_c2i.py. Raises RuntimeError, with the end of what it said, if it fails."""
    script = ROOT / "autoregressive" / "train" / "train_c2i.py"
    done = subprocess.run([sys.executable, script, *flags, "--results-dir", results], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"train_c2i.py: exit code {done.returncode}\n{done.stdout[-3000:]}")


def flat_weights(path: Path) -> Tensor:
    """Returns the weights of a checkpoint as one vector."""
    weights = read_checkpoint(path)["model"].values()
    return torch.cat([weight.flatten().double() for weight in weights])


def judge(difference: Callable[[], float], tolerance: float) -> Values:
    """Returns a row of a difference. Raises Differs if it is too large, or not a number."""
    found = difference()
    if not found <= tolerance:
        raise Differs(f"{found:.2g}, at most {tolerance:g} is right")
    return {"ours": {"difference": found}, "tolerance": {"difference": tolerance}}


def main(args: Flags, session: Session) -> None:
    with checks(session):
        check_gpu(args, session)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    is_gpu = session.device.type == "cuda"
    if is_gpu:
        set_up_compiler(session.device, "raise")
    comparisons = Comparisons(args, session.device)
    losses = comparisons.loss_and_gradients
    rows = [
        ("logits, float32", comparisons.logits, 1e-4),
        ("greedy tokens, float32", comparisons.greedy_tokens, 0.0),
        ("filters and draws, float64", comparisons.filtered_and_sampled_tokens, 0.0),
        ("captured steps and eager ones, float32", comparisons.captured_and_eager_tokens, 0.0),
        ("captured steps and the same called, bf16", comparisons.captured_and_called_tokens, 0.0),
        ("plain loss and gradients, float32", lambda: losses(False, False, "none"), 1e-3),
        ("fused loss and gradients, float32", lambda: losses(True, False, "none"), 1e-3),
        ("fused loss and gradients, float32, compiled", lambda: losses(True, is_gpu, "none"), 1e-3),
        ("fused loss and gradients, bf16, compiled", lambda: losses(True, is_gpu, "bf16"), 0.1),
        ("resumed training and an uninterrupted one", comparisons.resumed_training, 0.05),
    ]
    report = Report("correctness", args.report, args.minutes)
    for title, difference, tolerance in rows:
        report.measure(title, functools.partial(judge, difference, tolerance))
    print(f"{report.num_failed} of {len(rows)} comparisons failed")
    report.finish()


if __name__ == "__main__":
    run(main, build_parser())
