"""The learning rate over time: its equations, its flags, and a run that follows them."""

import json
import math
from fractions import Fraction

import pytest

from autoregressive.runtime.run_settings import RunSettings
from autoregressive.runtime.schedules import LearningRate, whole_steps
from small_runs import last_checkpoint, metrics, train, write_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("schedules")
    write_data(folder)
    return folder


def rates_of(rate):
    return [rate.at(step) for step in range(rate.num_steps)]


def expected_rates(num_steps, warmup, decay_from, least, schedule, peak=2.0):
    """Goes through the steps: up to the peak, along it, down from it.

    Args:
        decay_from: a Fraction.
    """
    rates = []
    fall_begins = max(warmup, int(decay_from * num_steps))
    for number in range(num_steps):
        if len(rates) < warmup:
            rates.append(peak * (number + 1) / warmup)
        elif number < fall_begins or schedule == "constant":
            rates.append(peak)
        else:
            part = Fraction(number - fall_begins, num_steps - fall_begins)
            share = 1 - part if schedule == "linear" else math.cos(math.pi * part / 2) ** 2
            rates.append(least + (peak - least) * float(share))
    return rates


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("num_steps, warmup, decay_from, least", [
    (30, 0, Fraction(0), 0.0), (30, 10, Fraction(0), 0.0), (30, 10, Fraction(1, 5), 0.1),
    (31, 4, Fraction(1, 3), 0.1), (45, 5, Fraction(8, 9), 0.25), (100, 7, Fraction(29, 100), 2.0),
    (10, 10, Fraction(1, 2), 0.5), (10, 25, Fraction(0), 0.0), (1, 0, Fraction(0), 0.5),
    (7, 0, Fraction(999, 1000), 0.0)])
def test_learning_rate_is_that_of_the_equations(schedule, num_steps, warmup, decay_from, least):
    rate = LearningRate(2.0, schedule, num_steps, warmup, float(decay_from), least)
    expected = expected_rates(num_steps, warmup, decay_from, least, schedule)
    assert rates_of(rate) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_learning_rates_of_ten_steps_are_those_computed_by_hand():
    linear = LearningRate(1.0, "linear", 10, warmup=2, decay_from=0.6, least=0.2)
    assert rates_of(linear) == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4])
    cosine = LearningRate(1.0, "cosine", 10, warmup=2, decay_from=0.6, least=0.2)
    root = math.sqrt(0.5)
    falling = [1, 0.6 + 0.4 * root, 0.6, 0.6 - 0.4 * root]
    assert rates_of(cosine) == pytest.approx([0.5, 1, 1, 1, 1, 1, *falling])
    constant = LearningRate(1.0, "constant", 10, warmup=2, decay_from=0.6, least=0.2)
    assert rates_of(constant) == [0.5] + [1] * 9


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("num_steps, warmup", [(30, 10), (997, 0), (50, 49), (5, 9)])
def test_without_start_and_least_the_bits_are_those_of_the_older_formula(
        schedule, num_steps, warmup):
    expected = []
    for step in range(num_steps):
        progress = (step - warmup) / max(num_steps - warmup, 1)
        if step < warmup:
            expected.append(3e-4 * (step + 1) / warmup)
        elif schedule == "constant":
            expected.append(3e-4)
        elif schedule == "linear":
            expected.append(3e-4 * (1 - progress))
        else:
            expected.append(3e-4 * ((1 + math.cos(math.pi * progress)) / 2))
    assert rates_of(LearningRate(3e-4, schedule, num_steps, warmup)) == expected


def test_shares_of_a_run_are_the_fractions_that_are_meant():
    for times in range(1, 6000):
        assert whole_steps(400 / 450, 450 * times) == 400 * times
        assert whole_steps(0.29, 100 * times) == 29 * times         # below it in floats: 28.999...
        assert whole_steps(0.8888889, 450 * times) == 400 * times
        assert whole_steps(1 / 3, 3 * times) == times
    assert math.floor(0.29 * 100) == 28
    assert whole_steps(0.5, 7) == 3 and whole_steps(2.5, 3) == 7 and whole_steps(0.0, 9) == 0


def run_settings(**changed):
    settings = {
        "global_batch_size": 8, "lr": 1e-3, "lr_schedule": "cosine", "lr_decay_from": 0.0,
        "min_lr": 0.0, "warmup": 0, "warmup_epochs": 0.0, "epochs": 450, "max_steps": 0,
        "log_every": 1, "val_every": 0, "ckpt_every": 0, "ckpt_steps": 0, "ckpt_minutes": 0.0,
        "keep_checkpoints": 0, "no_local_save": False, "num_workers": 0}
    return RunSettings(**settings | changed)


def test_a_run_asks_for_its_learning_rate_by_flags():
    settings = run_settings(lr_decay_from=400 / 450, min_lr=1e-5, warmup_epochs=50.0)
    settings.check()
    rate = settings.learning_rate(steps_per_epoch=7)
    assert (rate.num_steps, rate.warmup, rate.start) == (3150, 350, 2800)
    assert rate.at(349) == rate.at(2800) == 1e-3 > rate.at(2801) > rate.at(3149) > 1e-5
    assert run_settings(warmup_epochs=0.29).learning_rate(100).warmup == 29
    assert run_settings(warmup_epochs=0.3).learning_rate(7).warmup == 2
    assert run_settings(warmup=5).learning_rate(7).warmup == 5


@pytest.mark.parametrize("changed, words", [
    ({"min_lr": 0.1}, "--min-lr: expected at most --lr 0.001, got 0.1"),
    ({"min_lr": 1e-5, "lr_schedule": "constant"}, "--min-lr: expected --lr-schedule cosine or"),
    ({"lr_decay_from": 0.5, "lr_schedule": "constant"}, "--lr-decay-from: expected --lr-schedule"),
    ({"warmup": 3, "warmup_epochs": 0.5}, "got 3 steps and 0.5 epochs")])
def test_flags_of_the_learning_rate_that_contradict_each_other_are_refused(changed, words):
    with pytest.raises(ValueError, match=words):
        run_settings(**changed).check()


def test_a_run_follows_the_flags_of_its_learning_rate(folder, tmp_path):
    more = ("--lr", 1e-3, "--lr-schedule", "linear", "--lr-decay-from", 0.5, "--min-lr", 1e-4,
            "--warmup-epochs", 0.6)                         # of 50 // 8 = 6 steps
    train(folder, tmp_path, *more)
    fall = [1e-3 - 9e-4 * part / 10 for part in range(10)]
    expected = [1e-3 / 3, 2e-3 / 3, *[1e-3] * 8, *fall]
    assert [row["lr"] for row in metrics(tmp_path)] == pytest.approx(expected)


def test_a_run_begun_before_the_flags_existed_is_continued(folder, tmp_path):
    train(folder, tmp_path, "--max-steps", 6)
    run, = tmp_path.iterdir()
    config = json.loads((run / "config.json").read_text())
    for name in ("lr_decay_from", "min_lr", "warmup_epochs"):
        del config[name]
    (run / "config.json").write_text(json.dumps(config))
    train(folder, tmp_path, "--max-steps", 9)
    assert list(tmp_path.iterdir()) == [run] and last_checkpoint(tmp_path)["steps"] == 9
    train(folder, tmp_path, "--max-steps", 9, "--lr-schedule", "linear", "--min-lr", 1e-5)
    assert len(list(tmp_path.iterdir())) == 2
