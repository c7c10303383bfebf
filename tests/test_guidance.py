"""Guidance: its strength by position, and split guidance. In the decode loop: test_generate.py."""

import math

import numpy as np
import pytest
import torch

from autoregressive.models.guidance import guide, guide_split, strengths
from autoregressive.models.sampler import Sampler

NUM_TOKENS = 9


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


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("interval", [-1, 0, 4])
def test_constant_guidance_is_its_scale_inside_the_interval(scale, interval):
    expected = []
    for position in range(NUM_TOKENS):
        is_guided = scale > 1 and (interval < 0 or position <= interval + 1)
        expected.append([scale if is_guided else 1.0] * 2)
    assert Sampler(scale, interval).scales(NUM_TOKENS).tolist() == expected
