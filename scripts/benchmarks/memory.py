"""Peak memory of a GPU: training as train_c2i.py does it, and sampling.

    python scripts/benchmarks/memory.py                             # GPT-B to XXL, on an 80 GB GPU

Counted is what torch allocates. What CUDA itself and its libraries hold, half a GB or more, is not.
Every training is a process of its own.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The repository root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import functools
import json
import subprocess
import tempfile

import numpy as np
import torch

from autoregressive.models.captured import CapturedSteps, compile_decoding
from autoregressive.models.config import GPT_MODELS, gpt_config
from autoregressive.models.gpt import GPT
from autoregressive.models.sampler import Sampler
from autoregressive.pipeline import Pipeline
from autoregressive.runtime.compute import set_up_compiler
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import Flags, Parser, at_least, checks, run
from scripts.benchmarks.turns import (
    DOWNSAMPLING,
    NUM_CLASSES,
    VOCAB_SIZE,
    VQ,
    Report,
    Values,
    add_report_args,
    add_size_args,
    benchmark_parser,
    write_random_codes,
)
from tokenizer.tokenizer_image.decoding import decoder_batch_size, place_decoder
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel

TRAIN = Path(__file__).resolve().parents[2] / "autoregressive" / "train" / "train_c2i.py"
STEPS = 2                       # the second one has moments, but no more memory than that


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = benchmark_parser("Measure the peak memory of training and sampling.", rounds=1)
    add_report_args(parser)
    add_size_args(parser, GPT_MODELS)
    parser.set_defaults(gpt_models=["GPT-B", "GPT-L", "GPT-XL", "GPT-XXL"], grids=[16, 24])
    parser.add_argument("--train-images", type=at_least(1), default=32, help="images of a step")
    parser.add_argument("--sample-images", type=at_least(1), default=128,
                        help="pictures sampled together, with guidance")
    return parser


def training_memory(name: str, grid: int, num_images: int, flags: list[str]) -> Values:
    """Returns the peak of a short training with more flags.

    Raises:
        RuntimeError: it failed.
        OutOfMemoryError: it failed for lack of memory.
    """
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        data = write_random_codes(folder, num_images * STEPS, grid, VOCAB_SIZE, NUM_CLASSES)
        command = [sys.executable, TRAIN, *data, *flags,
                   "--gpt-model", name, "--global-batch-size", str(num_images),
                   "--max-steps", str(STEPS), "--log-every", "1", "--num-workers", "0",
                   "--no-local-save", "--device", "cuda", "--results-dir", folder / "runs"]
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            is_memory = "OutOfMemoryError" in done.stdout
            last = done.stdout.strip().splitlines()[-1] if is_memory else done.stdout[-3000:]
            raise (torch.OutOfMemoryError if is_memory else RuntimeError)(last)
        metrics = next((folder / "runs").glob("*/metrics.jsonl")).read_text().splitlines()
    return {"ours": {"peak GiB": max(json.loads(line)["memory_mib"] for line in metrics) / 2**10}}


def sampling_memory(name: str, grid: int, num_images: int, device: torch.device) -> Values:
    """Returns the peak of sampling pictures in bf16, compiled and captured."""
    dtype = torch.bfloat16
    with device:                                    # a large one takes long to fill on a CPU
        model = GPT(gpt_config(name, grid=grid, vocab_size=VOCAB_SIZE, num_classes=NUM_CLASSES))
    model = model.to(device).eval().requires_grad_(False).cast(dtype)
    steps = CapturedSteps(compile_decoding(model))
    vq = VQModel(VQConfig(VQ)).eval().requires_grad_(False)
    place_decoder(vq, dtype, device, compiled=True)
    image_size = grid * DOWNSAMPLING
    num_decoded = decoder_batch_size(VQ, image_size, dtype, device)
    pipeline = Pipeline(model, vq, Sampler(cfg_scale=2.0), image_size, num_decoded, steps=steps)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    pipeline.sample(np.zeros(num_images, np.int64), np.zeros((num_images, grid * grid)))
    return {"ours": {"peak GiB": torch.cuda.max_memory_allocated(device) / 2**30}}


def main(args: Flags, session: Session) -> None:
    with checks(session):
        if session.device.type != "cuda":
            raise ValueError(f"--device: expected a GPU, whose memory is measured, "
                             f"got {session.device.type}")
    set_up_compiler(session.device, "raise")
    report = Report("memory", args.report, args.minutes)
    work = {}
    for name in args.gpt_models:
        for grid in args.grids:
            size = f"{name}, {grid * grid} tokens"
            for flags in ([], ["--checkpoint-activations"]):
                title = " ".join([f"{size}, training {args.train_images} images", *flags])
                work[title] = functools.partial(
                    training_memory, name, grid, args.train_images, flags)
            title = f"{size}, sampling {args.sample_images} guided images"
            work[title] = functools.partial(
                sampling_memory, name, grid, args.sample_images, session.device)
    for title, measure in work.items():
        report.measure(title, measure)
    report.finish()


if __name__ == "__main__":
    run(main, build_parser())
