"""The guarded step and the moving average: each is its recurrence, none waits for the device."""

import numpy as np
import pytest
import torch
from torch import nn

from autoregressive.runtime.optim import (
    EMA_DECAY,
    EMA_GROUPS,
    ModelOptimizer,
    MovingAverage,
    OptimSettings,
)
from waits import NoWaits

CPU = torch.device("cpu")
SETTINGS = OptimSettings(lr=1e-2, weight_decay=0.1, ema=True)


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3, bias=False))


def copy_all(optimizer):
    moments = [value for state in optimizer.optimizer.state.values() for value in state.values()]
    tensors = [*optimizer.model.parameters(), *moments, *optimizer.ema.weights.values()]
    return [tensor.detach().clone() for tensor in tensors]


def take_step(optimizer, step, factor=1.0):
    torch.manual_seed(step)
    loss = optimizer.model(torch.randn(4, 5)).square().mean() * factor
    optimizer.backward(loss)
    return optimizer.step(step, 1e-2, loss.detach())


def test_a_scaler_changes_no_step_and_an_overflow_changes_nothing_but_the_scale():
    plain = ModelOptimizer(small_model(), SETTINGS, CPU)
    scaled = ModelOptimizer(small_model(), SETTINGS, CPU, uses_scaler=True)
    for step in range(3):
        norm, _ = take_step(plain, step)
        scaled_norm, is_bad = take_step(scaled, step)
        assert torch.equal(norm, scaled_norm) and not is_bad        # the scale is a power of two
    before = copy_all(scaled)
    assert all(torch.equal(one, other) for one, other in zip(copy_all(plain), before, strict=True))
    scale = scaled.scaler.get_scale()
    _, is_bad = take_step(scaled, 3, factor=1e35)   # a finite loss, whose scaled gradient is not
    assert not is_bad and scaled.scaler.get_scale() == scale / 2
    assert all(torch.equal(old, new) for old, new in zip(before, copy_all(scaled), strict=True))
    take_step(scaled, 4)
    assert not torch.equal(before[0], copy_all(scaled)[0])


@pytest.mark.parametrize("uses_scaler", [False, True])
def test_no_step_waits_for_the_device(uses_scaler):
    optimizer = ModelOptimizer(small_model(), SETTINGS, CPU, uses_scaler)
    with NoWaits():
        for step in range(2):
            take_step(optimizer, step)


@pytest.mark.parametrize("num_layers", [1, 2 * EMA_GROUPS + 3])
def test_the_average_of_many_weights_is_that_of_each_alone_bit_for_bit(num_layers):
    sizes = np.random.default_rng(0).integers(1, 40, size=(num_layers, 2)).tolist()
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(*size) for size in sizes)
    average = MovingAverage(model)
    expected = {name: weight.clone() for name, weight in average.weights.items()}
    for step in range(1, 4):
        is_skipped = step == 2
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.add_(torch.randn_like(weight))
                share_of_new = (1 - EMA_DECAY) * (1 - torch.tensor(float(is_skipped)))
                expected[name].add_((weight - expected[name]) * share_of_new)
        average.update(model, step, torch.tensor(float(is_skipped)))
    assert average.weights.keys() == expected.keys()
    assert all(torch.equal(average.weights[name], expected[name]) for name in expected)


def test_the_groups_of_an_average_are_few_and_even_and_hold_every_weight_once():
    model = nn.ModuleList(nn.Linear(30, 20 + layer % 3) for layer in range(50))
    groups = MovingAverage(model)._groups
    parameters = dict(model.named_parameters())
    assert [name for group in groups for name in group] == list(parameters)
    total = sum(weight.numel() for weight in parameters.values())
    sizes = [sum(parameters[name].numel() for name in group) for group in groups]
    assert len(groups) <= EMA_GROUPS + 2 and max(sizes) <= total / EMA_GROUPS
