"""Tokens and images per second of sampling: the published way and ours, in turns.

    OMP_NUM_THREADS=1 python scripts/benchmarks/sampling.py                     # CPU: GPT-B, batches of 2 and 16
    python scripts/benchmarks/sampling.py --gpt-models GPT-B GPT-L GPT-XL --grids 16 24 --batch-sizes 32 128 512 \
        --precision bf16 --compile                                              # GPU

Random weights, guidance 2. The published way: math attention over the full length of the cache by a mask, keys and
values through repeat_interleave, torch.multinomial. Beside the rates stands the roofline: weights, keys and values that
a step reads, over the measured copy bandwidth. On a GPU both ways are compiled.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])      # the repository root instead of this folder

import copy
import functools
import itertools
import statistics

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoregressive.models.generate import generate
from autoregressive.models.gpt import GPT, GPT_MODELS, gpt_config
from autoregressive.models.packed import can_pack, pack_linears
from autoregressive.models.recorded import RecordedSteps, compile_decoding
from autoregressive.models.sampler import Sampler, guide
from autoregressive.runtime.compute import PRECISIONS
from autoregressive.runtime.entry import run
from scripts.benchmarks.turns import add_size_args, benchmark_parser, compare, timed
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel

NUM_CLASSES = 1000
SCALE = 2.0
TILE = 32                                           # pictures that the VQ decoder takes together on a GPU


def build_parser():
    """Returns the parser of this script's command line."""
    parser = benchmark_parser("Compare ways to sample: tokens and images per second.", rounds=3)
    add_size_args(parser, GPT_MODELS)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[2, 16], help="pictures drawn together")
    parser.add_argument("--precision", default="none", choices=tuple(PRECISIONS), help="of weights and cache")
    parser.add_argument("--compile", action="store_true", help="compile both ways")
    parser.add_argument("--decode", action="store_true", help="decode the tokens of ours to pictures, too")
    return parser


class PublishedWay:
    """Decoding as in the published code."""

    def __init__(self, model, compiled):
        self.model = model
        self.caches = {}
        self.positions = torch.arange(model.config.num_tokens, device=model.norm.weight.device)
        self.step = torch.compile(self._step, mode="reduce-overhead") if compiled else self._step

    @torch.inference_mode()
    def generate(self, labels):
        condition = torch.cat([labels, torch.full_like(labels, NUM_CLASSES)])
        cache = self._cache(len(condition))
        num_tokens = self.model.config.num_tokens
        mask = torch.ones(num_tokens, num_tokens, device=labels.device).tril().bool()
        x, tokens = self.model.cls_embedding(condition), []
        for position in range(num_tokens):
            index = self.positions[position:position + 1]
            logits = guide(self.step(x, index, cache, mask).clone(), SCALE)
            tokens.append(torch.multinomial(logits.softmax(-1), num_samples=1))                 # (B, 1)
            x = self.model.tok_embeddings(tokens[-1].repeat(2, 1))
        return torch.cat(tokens, dim=1)

    def _cache(self, num_rows):
        if num_rows not in self.caches:
            cache = self.caches[num_rows] = self.model.new_cache(num_rows)
            for tensor in (*cache.keys, *cache.values):             # else a graph would copy what it writes into
                torch._dynamo.mark_static_address(tensor)
        return self.caches[num_rows]

    def _step(self, x, index, cache, mask):
        table = self.model.rotary[index]
        for layer, keys, values in zip(self.model.layers, cache.keys, cache.values, strict=True):
            x = x + self._attend(layer.attention, layer.attention_norm(x), table, index, keys, values, mask)
            x = x + layer.feed_forward(layer.ffn_norm(x))
        return self.model.output(self.model.norm(x))[:, 0].float()

    def _attend(self, attention, x, table, index, keys, values, mask):
        q, k, v = attention.project(x, table)
        keys[:, :, index], values[:, :, index] = k, v
        groups = attention.num_heads // attention.kv_heads
        all_keys, all_values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
        with sdpa_kernel(SDPBackend.MATH):                                          # as published
            y = F.scaled_dot_product_attention(q, all_keys, all_values, attn_mask=mask[index][None, None])
        return attention.wo(y.transpose(1, 2).flatten(2))


def copy_bandwidth(device):
    """Returns the bytes per second that a copy of a large array reads and writes."""
    source = torch.ones((2**31 if device.type == "cuda" else 2**28) // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(timed(lambda: target.copy_(source), device)[1] for _ in range(5))


def step_bytes(model, batch_size):
    """Returns the bytes that a step reads on average: weights, and the filled keys and values of all rows."""
    weights = sum(p.nbytes for p in model.parameters()) - model.tok_embeddings.weight.nbytes
    config = model.config
    a_position = 2 * config.num_layers * config.kv_heads * config.head_dim * model.norm.weight.element_size()
    return weights + 2 * batch_size * a_position * config.num_tokens / 2


def compare_ways(args, name, grid, batch_size, bandwidth, device):
    """Measures both ways for one size and prints their rates."""
    torch.manual_seed(0)
    config = gpt_config(name, grid=grid, num_classes=NUM_CLASSES)
    model = GPT(config).eval().requires_grad_(False)
    torch.nn.init.normal_(model.output.weight, std=0.02)
    dtype = PRECISIONS[args.precision]
    model = model.to(device).cast(dtype)
    bound = bandwidth / step_bytes(model, batch_size) * batch_size
    ours = copy.deepcopy(model)
    steps = None
    if args.compile:
        steps = RecordedSteps(compile_decoding(ours)) if device.type == "cuda" else None
    elif can_pack(device, dtype):
        pack_linears(ours)
    labels = torch.randint(NUM_CLASSES, (batch_size,), device=device)
    uniforms = torch.rand(batch_size, config.num_tokens, dtype=torch.float64, device=device)
    ways = {"published": functools.partial(PublishedWay(model, args.compile).generate, labels),
            "ours": functools.partial(generate, ours, labels, uniforms, Sampler(cfg_scale=SCALE), steps)}
    if args.decode:
        vq = VQModel(VQConfig("VQ-16")).eval().requires_grad_(False).to(device)
        vq.decoder.to(dtype), vq.post_quant_conv.to(dtype)

        @torch.inference_mode()
        def draw_and_decode():
            for tile in ways["ours"]().split(TILE):
                vq.decode_codes(tile, grid)

        ways["ours, decoded"] = draw_and_decode

    def measure(work):
        rate = batch_size / timed(work, device)[1]
        return {"tokens/s": rate * config.num_tokens, "images/s": rate}

    title = f"{name} {grid}x{grid} batch {batch_size}"
    medians = compare(title, measure, ways, args.rounds, warm_up=int(device.type == "cuda"))
    print(f"{title}: roofline {bound:.1f} tokens/s, of which ours is {100 * medians['ours']['tokens/s'] / bound:.0f} %",
          flush=True)


def main(args, session):
    bandwidth = copy_bandwidth(session.device)
    print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s")
    for name, grid, batch_size in itertools.product(args.gpt_models, args.grids, args.batch_sizes):
        compare_ways(args, name, grid, batch_size, bandwidth, session.device)


if __name__ == "__main__":
    run(main, build_parser())
