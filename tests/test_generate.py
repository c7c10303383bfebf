"""Filters against the fixture, draws against exact probabilities, guidance, any batch size."""

import copy
import dataclasses
import gc
import io
import logging
import re
import weakref

import numpy as np
import pytest
import torch

from autoregressive.models import captured
from autoregressive.models.cache import DecodePosition
from autoregressive.models.captured import CapturedSteps, compile_decoding
from autoregressive.models.config import GPTConfig
from autoregressive.models.generate import generate
from autoregressive.models.gpt import GPT
from autoregressive.models.guidance import guide, guide_split
from autoregressive.models.packed import can_pack, pack_linears
from autoregressive.models.random_numbers import random_numbers
from autoregressive.models.sampler import (
    Sampler,
    add_sampler_args,
    filter_logits,
    invert_cdf,
    probabilities,
)
from autoregressive.runtime.entry import Parser
from autoregressive.sample.labels import labels_in_turn

CLUSTER_SIZE = 5
# Settings of samplers of every kind.
KINDS = {
    "unguided": {"cfg_scale": 1.0},
    "unguided, interval 0": {"cfg_scale": 1.0, "cfg_interval": 0},
    "unguided, interval 4": {"cfg_scale": 1.0, "cfg_interval": 4},
    "constant": {"cfg_scale": 2.0},
    "constant, interval 0": {"cfg_scale": 2.0, "cfg_interval": 0},
    "constant, interval 3": {"cfg_scale": 2.0, "cfg_interval": 3},
    "constant, interval 4": {"cfg_scale": 2.0, "cfg_interval": 4},
    "linear": {"cfg_scale": 4.0, "cfg_schedule": "linear"},
    "linear from below": {"cfg_scale": 2.0, "cfg_schedule": "linear", "cfg_start": 0.5},
    "linear, interval 3": {"cfg_scale": 4.0, "cfg_schedule": "linear", "cfg_interval": 3},
    "power-cosine": {"cfg_scale": 6.0, "cfg_schedule": "power-cosine", "cfg_power": 1.5},
    "split": {"cfg_scale": 3.0, "cfg_scale_within": 1.2},
    "split, linear": {"cfg_scale": 3.0, "cfg_scale_within": 0.5, "cfg_schedule": "linear"},
    "inside alone": {"cfg_scale": 1.0, "cfg_scale_within": 2.0, "cfg_interval": 4},
}


def make_sampler(kind):
    return Sampler(temperature=0.9, top_k=15, top_p=0.95, cluster_size=CLUSTER_SIZE, **KINDS[kind])


def guided_logits(model, tokens, labels, sampler):
    """Returns guided logits (B, V) of the token after tokens (B, t), by full forward passes."""
    scale, scale_within = sampler.scales(9)[tokens.shape[1]]
    cond, uncond = (model(tokens, each)[:, -1] for each in (labels, torch.full_like(labels, 4)))
    if scale == scale_within == 1:
        return cond
    if sampler.cfg_scale_within is None:
        return guide(torch.cat([cond, uncond]), scale)
    return guide_split(torch.cat([cond, uncond]), scale, scale_within, CLUSTER_SIZE)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    model = GPT(GPTConfig("small", 2, 2, 16, grid=3, vocab_size=20, num_classes=4)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def numbers_for(seed, count):
    """Returns labels (count,) and uniforms (count, 9) for the model."""
    labels, uniforms = random_numbers(seed, range(count), 4, 9)
    return torch.from_numpy(labels), torch.from_numpy(uniforms)


@pytest.mark.parametrize("top_k", [0, 1, 10, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
def test_filters_equal_the_fixture(fixture, top_k, top_p):
    numbers = fixture("sampling_filter")
    found = filter_logits(numbers["logits"], top_k, top_p)
    assert torch.equal(found, numbers[f"k{top_k}_p{top_p}"])


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("top_k", [0, 5])
def test_probabilities_equal_the_fixture(fixture, temperature, top_k):
    numbers = fixture("sampling_filter")
    found = probabilities(numbers["logits"], Sampler(temperature=temperature, top_k=top_k))
    assert torch.allclose(found, numbers[f"probs_T{temperature}_k{top_k}"], rtol=1e-6, atol=0)


def test_ties_at_the_kth_logit_stay():
    kept = filter_logits(torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]]), top_k=2).isfinite()
    assert kept.tolist() == [[False, True, True, True, False]]


def test_the_most_likely_token_stays_at_any_top_p():
    kept = filter_logits(torch.tensor([[0.0, 5.0, 1.0]]), top_p=1e-9).isfinite()
    assert kept.tolist() == [[False, True, False]]


def test_draws_invert_the_cumulative_distribution():
    distribution = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]).expand(6, -1)
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2 ** -53], dtype=torch.float64)
    assert invert_cdf(distribution, uniforms).tolist() == [1, 1, 3, 3, 4, 4]


def test_draws_never_hit_a_token_of_probability_zero():
    torch.manual_seed(0)
    distribution = torch.softmax(20 * torch.randn(300, 50), -1) * (torch.rand(300, 50) < 0.3)
    distribution[:, 7] += 1e-30  # a denormal chance is a chance
    uniforms = torch.rand(300, dtype=torch.float64)
    uniforms[:100], uniforms[100:200] = 0.0, 1 - 2 ** -53
    assert (distribution[torch.arange(300), invert_cdf(distribution, uniforms)] > 0).all()


def test_guidance_equals_the_equation():
    cond, uncond = torch.randn(3, 7), torch.randn(3, 7)
    assert torch.equal(guide(torch.cat([cond, uncond]), 2.5), uncond + (cond - uncond) * 2.5)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_generation_equals_generation_by_full_forward(model, kind):
    labels, uniforms = numbers_for(seed=5, count=3)
    sampler = make_sampler(kind)
    expected = torch.empty(3, 0, dtype=torch.int64)
    for position in range(9):
        with torch.no_grad():
            logits = guided_logits(model, expected, labels, sampler)
        chosen = invert_cdf(probabilities(logits, sampler), uniforms[:, position])
        expected = torch.cat([expected, chosen[:, None]], dim=1)
    assert torch.equal(generate(model, labels, uniforms, sampler), expected)


def test_random_numbers_depend_on_seed_and_index_alone():
    labels, uniforms = random_numbers(7, [0, 5, 9], 1000, 6)
    alone_label, alone = random_numbers(7, [5], 1000, 6)
    assert labels[1] == alone_label[0] and np.array_equal(uniforms[1], alone[0])
    assert not np.array_equal(uniforms[1], random_numbers(8, [5], 1000, 6)[1][0])
    assert uniforms.min() >= 0 and uniforms.max() < 1


def test_random_labels_cover_all_classes_evenly():
    counts = np.bincount(random_numbers(0, range(4000), 10, 1)[0], minlength=10)
    assert len(counts) == 10
    # Chi-square: 9 degrees, 0.1 %.
    assert ((counts - 400) ** 2 / 400).sum() < 27.9


@pytest.mark.parametrize("settings, message", [
    ({"temperature": 0.0}, "--temperature"), ({"top_k": 21}, "--top-k")])
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**settings).check(vocab_size=20)


@pytest.mark.parametrize("flag, value", [
    ("--temperature", -0.1), ("--top-k", -1), ("--top-p", 0.0), ("--top-p", 1.01),
    ("--cfg-interval", -2), ("--cfg-scale", "nan")])
def test_flags_without_a_meaning_are_refused(flag, value, capsys):
    parser = Parser("test")
    add_sampler_args(parser)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args([f"{flag}={value}"])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert f"error: {flag}: expected " in error and f", got {value}" in error


def test_balanced_labels_hold_every_class_evenly_in_any_stretch():
    for first in (0, 5000, 12345):
        labels = labels_in_turn(range(1000), range(first, first + 5000))
        counts = np.bincount(labels, minlength=1000)
        assert counts.min() == counts.max() == 5


@pytest.mark.parametrize("kind", ["unguided", "constant", "split", "split, linear"])
def test_first_two_tokens_follow_the_exact_probabilities(model, kind):
    count = 20000
    sampler = dataclasses.replace(make_sampler(kind), top_k=0)
    _, uniforms = random_numbers(3, range(count), 4, 9)
    labels = torch.full((count,), 2)

    def probability_after(tokens):
        logits = guided_logits(model, tokens, labels[:len(tokens)], sampler)
        return probabilities(logits, sampler).double()

    with torch.no_grad():
        first = probability_after(torch.empty(1, 0, dtype=torch.int64))[0]      # (V,)
        both = first[:, None] * probability_after(torch.arange(20)[:, None])    # (V, V)
    drawn = torch.cat([generate(model, labels[:4000], torch.from_numpy(part), sampler)
                       for part in np.split(uniforms, 5)])
    pairs = 20 * drawn[:, 0] + drawn[:, 1]
    counts = torch.bincount(pairs, minlength=400).reshape(20, 20).double()
    expected = both / both.sum() * count
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    found = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    statistic = ((found - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    degrees = len(expected) - 1
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5  # chi-square: four standard deviations


def test_a_bucket_of_the_cache_gives_the_logits_of_its_filled_part(model):
    caches, labels = [model.new_cache(3) for _ in range(2)], torch.tensor([0, 1, 4])
    with torch.no_grad():
        for cache in caches:
            model.prefill(labels, cache)
        for position in range(1, 9):
            tokens, index = torch.randint(20, (3,)), torch.tensor([position])
            expected = model.decode_step(tokens, DecodePosition(index, position + 1), caches[0])
            at = DecodePosition.in_bucket(index, length=9 if position > 3 else 4)
            found = model.decode_step(tokens, at, caches[1])
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class ReplayedFunction:
    """Stands in for a CUDA graph.

    It runs the function again, on whatever tensors that one holds, and keeps count.
    """

    def __init__(self, function):
        self.function, self.count = function, 0

    def replay(self):
        self.count += 1
        self.function()


@pytest.mark.parametrize("kind", KINDS)
def test_captured_steps_sample_the_tokens_of_eager_ones(model, monkeypatch, kind):
    monkeypatch.setattr(captured, "BUCKET", 4)
    graphs = []

    def capture(function):
        graphs.append(ReplayedFunction(function))
        return graphs[-1]

    sampler = make_sampler(kind)
    steps = CapturedSteps(model, capture)
    for seed in range(4):  # later batches find the tensors as an earlier one left them
        labels, uniforms = numbers_for(seed, count=30)
        expected = generate(model, labels, uniforms, sampler)
        assert torch.equal(generate(model, labels, uniforms, sampler, steps), expected)
    # One a bucket, of which there are three, and one more where guidance ends inside a bucket.
    ends_inside_a_bucket = sampler.num_guided(9) in (2, 3, 5, 6, 7)
    assert len(graphs) == 3 + ends_inside_a_bucket


def test_a_step_is_captured_once_for_every_bucket_batch_size_and_way_of_sampling(
        model, monkeypatch):
    monkeypatch.setattr(captured, "BUCKET", 4)
    graphs = []

    def capture(function):
        graphs.append(ReplayedFunction(function))
        return graphs[-1]

    steps = CapturedSteps(model, capture)
    cases = [(3, Sampler(2.0, 3)), (3, Sampler(2.0, 3)), (2, Sampler(2.0, 3)), (3, Sampler(3.0))]
    kept = []
    for batch_size, sampler in cases:
        labels, uniforms = numbers_for(seed=0, count=batch_size)
        found = generate(model, labels, uniforms, sampler, steps)
        expected = generate(model, labels, uniforms, sampler)
        kept.append((found, expected))
    # Positions 1 to 3, 4 to 7, 8; an interval of 3 ends after position 4, within the second bucket.
    assert len(graphs) == 2 * 4 + 3
    # Of a batch's 8 steps the first of each graph runs while it is captured.
    assert sum(graph.count for graph in graphs) == 4 * 8 - len(graphs)
    # No later batch has overwritten what an earlier one returned.
    assert all(torch.equal(found, expected) for found, expected in kept)


def test_what_an_earlier_batch_left_in_the_cache_reaches_no_later_one(model):
    steps = CapturedSteps(model)
    labels, uniforms = numbers_for(seed=0, count=3)
    expected = generate(model, labels, uniforms, Sampler(2.0))
    for values in steps.state_for(3, Sampler(2.0)).cache.values:
        values.fill_(torch.nan)
    assert torch.equal(generate(model, labels, uniforms, Sampler(2.0), steps), expected)


def test_captured_steps_keep_the_tensors_of_one_batch_size(model):
    steps = CapturedSteps(model)
    states = weakref.WeakSet()
    for batch_size in (3, 2, 4):
        labels, uniforms = numbers_for(seed=0, count=batch_size)
        generate(model, labels, uniforms, Sampler(2.0), steps)
        states.add(steps.state_for(batch_size, Sampler(2.0)))
    gc.collect()
    assert len(states) == 1


@pytest.fixture
def compiled_graphs():
    """Collects the graphs that Inductor turns into kernels, as text."""
    import torch._inductor.config

    text = io.StringIO()
    torch._logging.set_logs(post_grad_graphs=True)
    logger = logging.getLogger("torch._inductor.compile_fx.__post_grad_graphs")
    handler = logging.StreamHandler(text)
    logger.addHandler(handler)
    # What comes from a cache is not logged.
    with torch._inductor.config.patch(force_disable_caches=True):
        yield text
    logger.removeHandler(handler)
    torch._logging.set_logs()


@pytest.mark.long
def test_compiled_blocks_give_the_logits_of_eager_ones_and_copy_no_cache(model, compiled_graphs):
    compiled, labels = compile_decoding(copy.deepcopy(model)), torch.tensor([0, 1, 4])
    caches = [model.new_cache(3) for _ in range(2)]
    with torch.inference_mode():
        for cache in caches:
            model.prefill(labels, cache)
        for position in range(1, 9):
            tokens = torch.randint(20, (3,))
            at = DecodePosition.in_bucket(torch.tensor([position]), length=9)
            expected = model.decode_step(tokens, at, caches[0])
            found = compiled.decode_step(tokens, at, caches[1])
            assert (found - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)
    text = compiled_graphs.getvalue()
    assert text.count("aten.index_put_.default") == 2  # keys and values, once for both layers
    assert not re.search(r"aten\.(copy_?|clone|select_scatter|slice_scatter)\.default", text)


@pytest.fixture(scope="module")
def packed(model):
    assert can_pack(torch.device("cpu"), torch.float32)
    return pack_linears(copy.deepcopy(model))


def test_packed_layers_give_the_same_logits(model, packed):
    tokens, labels = torch.randint(20, (3, 8)), torch.tensor([0, 1, 4])
    with torch.no_grad():
        found, expected = packed(tokens, labels), model(tokens, labels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.bfloat16),
                    reason="this processor knows no bfloat16")
def test_packed_layers_of_bfloat16_give_the_logits_of_float32_as_nearly_as_plain_ones(model):
    tokens, labels = torch.randint(20, (3, 8)), torch.tensor([0, 1, 4])
    plain = copy.deepcopy(model).cast(torch.bfloat16)
    packed = pack_linears(copy.deepcopy(plain))
    with torch.no_grad():
        expected = model(tokens, labels)
        errors = [(part(tokens, labels) - expected).abs().max() for part in (packed, plain)]
    assert errors[0] < 2 * errors[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 3, 7, 10])
def test_a_sample_does_not_depend_on_the_batch_it_is_drawn_in(packed, batch_size, kind):
    labels, uniforms = numbers_for(seed=1, count=20)
    sampler = make_sampler(kind)
    expected = generate(packed, labels, uniforms, sampler)
    batches = zip(labels.split(batch_size), uniforms.split(batch_size), strict=True)
    found = torch.cat([generate(packed, *batch, sampler) for batch in batches])
    assert torch.equal(found, expected)
