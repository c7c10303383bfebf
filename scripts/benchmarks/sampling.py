"""Tokens and images per second of sampling: the published way and ours, in turns.

    # On a CPU, GPT-B, batches of 2 and 16:
    OMP_NUM_THREADS=1 python scripts/benchmarks/sampling.py
    # On a GPU:
    python scripts/benchmarks/sampling.py --gpt-models GPT-B GPT-L GPT-XL --grids 16 24 \
        --batch-sizes 128 32 512 --precision bf16 --compile --decode

Random weights, guidance 2. The published way: math attention over the full length of the cache by a
mask, keys and values through repeat_interleave, torch.multinomial. Beside the rates stands the
roofline: weights, keys and values that a step reads, over the measured copy bandwidth. With
--compile both ways have their blocks compiled and, on a GPU, their steps captured as CUDA graphs
(the published code compiles its whole model instead, which takes minutes for every size); they
share one cache there. What does not fit into a GPU's memory is skipped with the arithmetic.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The repository root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import copy
import functools
import itertools
import math
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoregressive.models.cache import KVCache
from autoregressive.models.captured import CapturedSteps, CUDACapture, compile_decoding
from autoregressive.models.config import GPT_MODELS, GPTConfig, gpt_config
from autoregressive.models.generate import generate
from autoregressive.models.gpt import GPT
from autoregressive.models.guidance import guide
from autoregressive.models.packed import can_pack, pack_linears
from autoregressive.models.sampler import Sampler
from autoregressive.pipeline import Pipeline
from autoregressive.runtime.compute import PRECISIONS, set_up_compiler
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import Flags, Parser, at_least, run
from scripts.benchmarks.turns import (
    DOWNSAMPLING,
    NUM_CLASSES,
    VQ,
    DoesNotFit,
    Report,
    Values,
    add_report_args,
    add_size_args,
    benchmark_parser,
    compare,
    timed,
)
from tokenizer.tokenizer_image.decoding import decoder_batch_size, place_decoder
from tokenizer.tokenizer_image.vq_model import VQ_MODELS, VQConfig, VQModel

SAMPLER = Sampler(cfg_scale=2.0)
LIVE_MAPS = 8                   # of the VQ decoder's widest feature maps, at once


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = benchmark_parser("Compare ways to sample: tokens and images per second.", rounds=3)
    add_report_args(parser)
    add_size_args(parser, GPT_MODELS)
    parser.add_argument("--batch-sizes", nargs="+", type=at_least(1), default=[2, 16],
                        help="pictures sampled together")
    parser.add_argument("--precision", default="none", choices=tuple(PRECISIONS),
                        help="of weights and cache")
    parser.add_argument("--compile", action="store_true",
                        help="compile both ways; on a GPU also capture their steps")
    parser.add_argument("--decode", action="store_true",
                        help="decode the tokens of ours to pictures, too")
    return parser


class PublishedWay:
    """Decoding as in the published code; compiled and captured as ours is."""

    def __init__(self, model: GPT, batch_size: int, compiled: bool, cache: KVCache | None = None):
        """
        Args:
            model: in evaluation mode.
            batch_size: B.
            compiled: whether to compile the blocks and, on a GPU, to capture the step.
            cache: of 2 B rows, to be used instead of one of its own.
        """
        device = model.norm.weight.device
        num_tokens = model.config.num_tokens
        self.model = model
        self.cache = cache or model.new_cache(2 * batch_size)
        self.block = torch.compile(self._block, dynamic=False) if compiled else self._block
        self.mask = torch.ones(num_tokens, num_tokens, device=device).tril().bool()
        self.positions = torch.arange(num_tokens, device=device)
        self.is_captured = compiled and device.type == "cuda"
        self.graph = None
        # What a captured step reads and writes stays in place.
        self.x = torch.empty(2 * batch_size, 1, model.config.width,
                             dtype=model.norm.weight.dtype, device=device)
        self.index = torch.zeros(1, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def generate(self, labels: Tensor) -> Tensor:
        """Returns the tokens (B, T) of labels (B,)."""
        x = self.model.cls_embedding(torch.cat([labels, torch.full_like(labels, NUM_CLASSES)]))
        tokens = []
        for position in range(self.model.config.num_tokens):
            self.x.copy_(x)
            self.index.copy_(self.positions[position:position + 1])
            self._run_step()
            logits = guide(self.logits, SAMPLER.cfg_scale)
            tokens.append(torch.multinomial(logits.softmax(-1), num_samples=1))        # (B, 1)
            x = self.model.tok_embeddings(tokens[-1].repeat(2, 1))
        return torch.cat(tokens, dim=1)

    def _run_step(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        self._step()
        if self.is_captured:
            self.graph = CUDACapture()(self._step)
            self.graph.replay()     # the capture computed nothing of what `_step` has just named

    def _step(self) -> None:
        x = self.x
        table = self.model.rotary[self.index]
        mask = self.mask[self.index][None, None]                           # (1, 1, 1, L)
        blocks = zip(self.model.layers, self.cache.keys, self.cache.values, strict=True)
        for layer, keys, values in blocks:
            x = self.block(layer, x, table, self.index, keys, values, mask)
        self.logits = self.model.output(self.model.norm(x))[:, 0].float()          # (2B, V)

    def _block(self, layer, x, table, index, keys, values, mask):
        normed = layer.attention_norm(x)
        x = x + self._attend(layer.attention, normed, table, index, keys, values, mask)
        return x + layer.feed_forward(layer.ffn_norm(x))

    def _attend(self, attention, x, table, index, keys, values, mask):
        q, k, v = attention.project(x, table)
        keys[:, :, index], values[:, :, index] = k, v
        groups = attention.num_heads // attention.kv_heads
        all_keys = keys.repeat_interleave(groups, dim=1)
        all_values = values.repeat_interleave(groups, dim=1)
        with sdpa_kernel(SDPBackend.MATH):                                          # as published
            y = F.scaled_dot_product_attention(q, all_keys, all_values, attn_mask=mask)
        return attention.wo(y.transpose(1, 2).flatten(2))


def copy_bandwidth(device: torch.device) -> float:
    """Returns the bytes per second that a copy of a large array reads and writes."""
    source = torch.ones((2**31 if device.type == "cuda" else 2**28) // 4, device=device)
    target = torch.empty_like(source)
    seconds = [timed(lambda: target.copy_(source), device)[1] for _ in range(5)]
    return 2 * source.nbytes / statistics.median(seconds)


def weight_bytes(model: GPT, dtype: torch.dtype) -> int:
    """Returns the bytes of a model's weights in a dtype."""
    return dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())


def cache_bytes(config: GPTConfig, batch_size: int, dtype: torch.dtype) -> int:
    """Returns the bytes of the keys and values of `batch_size` guided pictures."""
    values = batch_size * config.num_layers * config.kv_heads * config.num_tokens * config.head_dim
    return 2 * 2 * values * dtype.itemsize


def step_bytes(model: GPT, batch_size: int, dtype: torch.dtype) -> float:
    """Returns the bytes that a step reads on average: weights, and all filled keys and values."""
    looked_up = dtype.itemsize * model.tok_embeddings.weight.numel()
    return weight_bytes(model, dtype) - looked_up + cache_bytes(model.config, batch_size, dtype) / 2


def temporary_bytes(config: GPTConfig, batch_size: int, dtype: torch.dtype) -> dict[str, int]:
    """Returns the bytes that a compiled step of each way holds beside weights and cache, about."""
    # Logits of 2 B rows in `dtype` and float32; of B rows guided, scaled, their softmax and its
    # cumulative sums. All of it twice: of the first step, run as it is, and of the captured ones.
    logits = 2 * batch_size * config.vocab_size * (2 * (dtype.itemsize + 4) + 3 * 4 + 3 * 8)
    repeated = cache_bytes(config, batch_size, dtype) // config.num_layers      # of one layer
    return {"published": logits + repeated, "ours": logits}


def decoder_bytes(grid: int, batch_size: int, dtype: torch.dtype) -> int:
    """Returns the bytes of the VQ decoder's activations, about."""
    num_pixels = batch_size * (grid * DOWNSAMPLING)**2
    return LIVE_MAPS * num_pixels * VQ_MODELS[VQ].channels * dtype.itemsize


def check_fits(free: float, **parts: float) -> None:
    """Raises DoesNotFit, with the arithmetic, if the parts need more than is free; in bytes."""
    needed = sum(parts.values())
    if needed > free:
        terms = " + ".join(f"{name} {size / 2**30:.1f}" for name, size in parts.items())
        raise DoesNotFit(f"{terms} = {needed / 2**30:.1f} GiB, free are {free / 2**30:.1f} GiB")


def free_bytes(device: torch.device) -> float:
    """Returns the memory that is free; on a CPU it is not looked at."""
    if device.type == "cpu":
        return math.inf
    torch.cuda.empty_cache()                        # what torch keeps of finished work is free, too
    return torch.cuda.mem_get_info(device)[0]


def make_model(config: GPTConfig, dtype: torch.dtype, device: torch.device) -> GPT:
    """Returns a GPT of random weights that can only be run."""
    torch.manual_seed(0)
    with device:                                    # a large one takes long to fill on a CPU
        model = GPT(config).eval().requires_grad_(False)
    torch.nn.init.normal_(model.output.weight, std=0.02)
    return model.to(device).cast(dtype)


def compare_ways(args: Flags, config: GPTConfig, batch_size: int, bandwidth: float,
                 device: torch.device) -> Values:
    """Measures both ways for one size, prints their rates and returns them with the roofline's."""
    dtype = PRECISIONS[args.precision]
    is_gpu = device.type == "cuda"
    with torch.device("meta"):
        shape = GPT(config)
    temporaries = temporary_bytes(config, batch_size, dtype)
    needed = {"weights": weight_bytes(shape, dtype),
              "cache": cache_bytes(config, batch_size, dtype)}
    num_decoded = min(batch_size, decoder_batch_size(VQ, config.grid * DOWNSAMPLING, dtype, device))
    decoder = decoder_bytes(config.grid, num_decoded, dtype) if args.decode else 0
    free = free_bytes(device)
    check_fits(free, **needed, temporaries=max(temporaries["ours"], decoder))

    model = make_model(config, dtype, device)
    ours = model
    steps = cache = None
    if args.compile:
        compile_decoding(ours)
    elif can_pack(device, dtype):
        ours = pack_linears(copy.deepcopy(model))
    if args.compile:
        steps = CapturedSteps(ours)
        cache = steps.state_for(batch_size, SAMPLER).cache
    labels = torch.randint(NUM_CLASSES, (batch_size,), device=device)
    uniforms = torch.rand(batch_size, config.num_tokens, dtype=torch.float64, device=device)
    title = f"{config.name} {config.grid}x{config.grid} batch {batch_size}"
    ways: dict[str, Callable] = {}
    try:
        check_fits(free, **needed, temporaries=temporaries["published"])
        published = PublishedWay(model, batch_size, args.compile, cache)
        ways["published"] = functools.partial(published.generate, labels)
    except DoesNotFit as error:
        print(f"{title}, published does not fit: {error}")
    ways["ours"] = functools.partial(generate, ours, labels, uniforms, SAMPLER, steps)
    if args.decode:
        vq = VQModel(VQConfig(VQ)).eval().requires_grad_(False)
        place_decoder(vq, dtype, device, args.compile)
        pipeline = Pipeline(ours, vq, SAMPLER, image_size=config.grid * DOWNSAMPLING,
                            decode_batch_size=num_decoded, steps=steps)
        ways["ours, decoded"] = lambda: pipeline.decode(ways["ours"]()).cpu()

    def measure(work):
        rate = batch_size / timed(work, device)[1]
        return {"images/s": rate, "tokens/s": rate * config.num_tokens}

    medians = compare(title, measure, ways, args.rounds, warm_up=int(is_gpu))
    bound = bandwidth / step_bytes(shape, batch_size, dtype) * batch_size
    percent = 100 * medians["ours"]["tokens/s"] / bound
    print(f"{title}: roofline {bound:.1f} tokens/s, of which ours is {percent:.0f} %", flush=True)
    return medians | {"roofline": {"images/s": bound / config.num_tokens, "tokens/s": bound}}


def main(args: Flags, session: Session) -> None:
    if args.compile:
        set_up_compiler(session.device, "raise")
    report = Report("sampling", args.report, args.minutes)
    bandwidth = copy_bandwidth(session.device)
    print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s")
    for batch_size, grid, name in itertools.product(args.batch_sizes, args.grids, args.gpt_models):
        config = gpt_config(name, grid=grid, num_classes=NUM_CLASSES)
        work = functools.partial(
            compare_ways, args, config, batch_size, bandwidth, session.device)
        report.measure(f"{name} {grid}x{grid} batch {batch_size}", work)
    report.finish()


if __name__ == "__main__":
    run(main, build_parser())
