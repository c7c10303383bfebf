"""Guidance: its strength by position, split guidance, and both in the decode loop."""

import math

import numpy as np
import pytest
import torch

from autoregressive.models import captured
from autoregressive.models.captured import CapturedSteps
from autoregressive.models.config import GPTConfig
from autoregressive.models.generate import generate
from autoregressive.models.gpt import GPT
from autoregressive.models.guidance import guide, guide_split, strengths
from autoregressive.models.random_numbers import random_numbers
from autoregressive.models.sampler import Sampler, invert_cdf, probabilities

NUM_TOKENS, NUM_CODES, CLUSTER_SIZE = 9, 20, 5
# Settings of samplers of every kind.
KINDS = {
    "constant": {"cfg_scale": 2.0},
    "linear": {"cfg_scale": 4.0, "cfg_schedule": "linear"},
    "linear from below": {"cfg_scale": 2.0, "cfg_schedule": "linear", "cfg_start": 0.5},
    "power-cosine": {"cfg_scale": 6.0, "cfg_schedule": "power-cosine", "cfg_power": 1.5},
    "interval": {"cfg_scale": 4.0, "cfg_schedule": "linear", "cfg_interval": 3},
    "split": {"cfg_scale": 3.0, "cfg_scale_within": 1.2},
    "split linear": {"cfg_scale": 3.0, "cfg_scale_within": 0.5, "cfg_schedule": "linear"},
    "inside alone": {"cfg_scale": 1.0, "cfg_scale_within": 2.0, "cfg_interval": 4},
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    config = GPTConfig("small", 2, 2, 16, grid=3, vocab_size=NUM_CODES, num_classes=4)
    model = GPT(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_sampler(kind, **settings):
    return Sampler(temperature=0.9, top_k=15, cluster_size=CLUSTER_SIZE, **KINDS[kind], **settings)


def numbers_for(seed, count):
    """Returns labels (count,) and uniforms (count, 9) for the model."""
    labels, uniforms = random_numbers(seed, range(count), 4, NUM_TOKENS)
    return torch.from_numpy(labels), torch.from_numpy(uniforms)


@pytest.mark.parametrize("schedule, start, end, power, expected", [
    ("constant", 1, 2.5, 1, [2.5, 2.5, 2.5]),
    ("linear", 1, 4, 1, [1, 2, 3]),
    ("linear", 2, 0.5, 1, [2, 1.5, 1]),
    ("power-cosine", 1, 3, 1, [1, 1.5, 2.5]),           # 1 + 2 (1 - cos 60 degrees) / 2, and 120
    ("power-cosine", 1, 3, 2, [1, 1.0603073792, 1.8263518223]),     # cos of 20 and 80 degrees
    ("power-cosine", 0, 3, 1, [0, 0.75, 2.25])])
def test_strengths_of_three_positions_are_those_computed_by_hand(
        schedule, start, end, power, expected):
    assert strengths(3, schedule, end, start, power) == pytest.approx(expected, rel=1e-9)


def test_split_guidance_is_its_definition_code_by_code():
    cond, uncond = torch.randn(2, 6, dtype=torch.float64)
    found = guide_split(torch.stack([cond, uncond]), 3.0, 0.7, cluster_size=2)[0]

    def mixed(of_label, of_null, scale):
        return of_null + (of_label - of_null) * scale

    for code in range(6):
        cluster = [2 * (code // 2), 2 * (code // 2) + 1]
        s_cond, s_uncond = (math.log(sum(math.exp(z[each]) for each in cluster))
                            for z in (cond, uncond))
        expected = mixed(s_cond, s_uncond, 3.0)
        expected += mixed(cond[code].item() - s_cond, uncond[code].item() - s_uncond, 0.7)
        assert found[code].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0, 7.5])
def test_at_equal_scales_split_guidance_is_plain_guidance(dtype, tolerance, scale):
    logits = 5 * torch.randn(8, 128, generator=torch.Generator().manual_seed(0), dtype=dtype)
    plain = guide(logits, scale)
    split = guide_split(logits, scale, scale, cluster_size=16)
    assert (split - plain).abs().max() <= tolerance * max(plain.abs().max(), logits.abs().max())


def test_at_a_scale_of_1_within_codes_of_a_cluster_keep_the_ratio_of_the_label():
    logits = torch.randn(6, 24, dtype=torch.float64)
    found = guide_split(logits, 4.0, 1.0, cluster_size=4).unflatten(-1, (-1, 4))
    cond = logits[:3].unflatten(-1, (-1, 4))
    torch.testing.assert_close(found - found[..., :1], cond - cond[..., :1])
    # So the masses of clusters are those of their own guided logits.
    expected = guide(logits.unflatten(-1, (-1, 4)).logsumexp(-1), 4.0)
    torch.testing.assert_close(found.logsumexp(-1), expected)


@pytest.mark.parametrize("settings, expected", [
    ({"cfg_scale": 1.0}, 0), ({"cfg_scale": 0.5}, 0), ({"cfg_scale": 2.0}, 9),
    ({"cfg_scale": 2.0, "cfg_interval": 0}, 2), ({"cfg_scale": 2.0, "cfg_interval": 7}, 9),
    ({"cfg_scale": 1.0, "cfg_scale_within": 1.0}, 0),
    ({"cfg_scale": 0.5, "cfg_scale_within": 1.0}, 9),
    ({"cfg_scale": 1.0, "cfg_scale_within": 2.0, "cfg_interval": 3}, 5),
    ({"cfg_scale": 3.0, "cfg_schedule": "linear"}, 9),              # its first strength is 1
    ({"cfg_scale": 1.0, "cfg_schedule": "linear"}, 0),
    ({"cfg_scale": 3.0, "cfg_schedule": "linear", "cfg_interval": 2}, 4)])
def test_two_passes_run_up_to_the_last_guided_token(settings, expected):
    assert Sampler(**settings).num_guided(NUM_TOKENS) == expected


def test_an_interval_cuts_a_schedule_and_does_not_stretch_it():
    whole = Sampler(5.0, cfg_schedule="linear", cfg_scale_within=2.0).scales(8)
    cut = Sampler(5.0, 3, cfg_schedule="linear", cfg_scale_within=2.0).scales(8)
    assert np.array_equal(cut[:5], whole[:5]) and (cut[5:] == 1).all()
    assert whole[4].tolist() == [3.0, 1.5]


@pytest.mark.parametrize("kind", KINDS)
def test_cached_generation_equals_generation_by_full_forward(model, kind):
    labels, uniforms = numbers_for(seed=5, count=3)
    sampler = make_sampler(kind)
    null = torch.full_like(labels, 4)
    expected = torch.empty(3, 0, dtype=torch.int64)
    for position, (scale, within) in enumerate(sampler.scales(NUM_TOKENS).tolist()):
        with torch.no_grad():
            logits = torch.cat([model(expected, label)[:, -1] for label in (labels, null)])
        if sampler.cfg_scale_within is None:
            logits = guide(logits, scale)
        else:
            logits = guide_split(logits, scale, within, CLUSTER_SIZE)
        chosen = invert_cdf(probabilities(logits, sampler), uniforms[:, position])
        expected = torch.cat([expected, chosen[:, None]], dim=1)
    assert torch.equal(generate(model, labels, uniforms, sampler), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_captured_steps_sample_the_tokens_of_eager_ones(model, monkeypatch, kind):
    monkeypatch.setattr(captured, "BUCKET", 4)
    graphs = []

    def capture(function):
        graphs.append(captured.CalledAgain(function))
        return graphs[-1]

    steps = CapturedSteps(model, capture)
    sampler = make_sampler(kind)
    for seed in range(2):               # the second batch replays
        labels, uniforms = numbers_for(seed, count=30)
        expected = generate(model, labels, uniforms, sampler)
        assert torch.equal(generate(model, labels, uniforms, sampler, steps), expected)
    # One a bucket, of which there are three, and one more where guidance ends inside a bucket.
    assert len(graphs) == (4 if sampler.num_guided(NUM_TOKENS) in (5, 6, 7) else 3)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_do_not_depend_on_the_batch(model, kind):
    labels, uniforms = numbers_for(seed=2, count=12)
    sampler = make_sampler(kind)
    whole = generate(model, labels, uniforms, sampler)
    parts = zip(labels.split(5), uniforms.split(5), strict=True)
    found = torch.cat([generate(model, *part, sampler) for part in parts])
    # Of another batch size a float32 product may round differently; no token is near a border here.
    assert torch.equal(found, whole)


@pytest.mark.parametrize("kind", ["split", "split linear"])
def test_tokens_follow_the_exact_probabilities_of_split_guidance(model, kind):
    count = 20000
    sampler = make_sampler(kind)
    labels = torch.full((count,), 2)
    uniforms = numbers_for(seed=3, count=count)[1]
    scales = sampler.scales(NUM_TOKENS)

    def probabilities_after(tokens):
        labels = [torch.full((len(tokens),), label) for label in (2, 4)]
        logits = torch.cat([model(tokens, label)[:, -1] for label in labels])
        guided = guide_split(logits, *scales[tokens.shape[1]], CLUSTER_SIZE)
        return probabilities(guided, sampler).double()

    with torch.no_grad():
        first = probabilities_after(torch.empty(1, 0, dtype=torch.int64))[0]            # (V,)
        both = first[:, None] * probabilities_after(torch.arange(NUM_CODES)[:, None])   # (V, V)
    parts = zip(labels.split(4000), uniforms.split(4000), strict=True)
    tokens = torch.cat([generate(model, *part, sampler) for part in parts])
    pairs = NUM_CODES * tokens[:, 0] + tokens[:, 1]
    counts = torch.bincount(pairs, minlength=NUM_CODES**2).double()
    expected = (both / both.sum() * count).flatten()
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    rest = (counts[~common].sum() - expected[~common].sum()) ** 2 / expected[~common].sum()
    statistic = ((counts - expected) ** 2 / expected)[common].sum() + rest.nan_to_num()
    degrees = int(common.sum())
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5       # chi-square: four deviations
