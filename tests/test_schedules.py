"""Learning rate and lambda over time: the equations, their flags, and runs that follow them."""

import json
import math
import signal
from fractions import Fraction

import pytest
import torch

from autoregressive.models.loss_settings import LossSettings, build_head_loss
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.optim import ModelOptimizer, OptimSettings
from autoregressive.runtime.run_settings import RunSettings
from autoregressive.runtime.schedules import LearningRate, whole_steps
from autoregressive.train.objective import GPTTrainer, Objective
from processes import start, start_and_kill
from small_runs import (
    EVERYTHING,
    NO_DROPOUT,
    TRAIN,
    assert_same_end,
    flags,
    last_checkpoint,
    metrics,
    steps_done,
    train,
    write_data,
)
from waits import NoWaits

CPU = torch.device("cpu")
FADES = ("--lambda-schedule", "linear")


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


def test_fractions_of_a_run_are_those_that_are_meant():
    for times in range(1, 6000):
        assert whole_steps(400 / 450, 450 * times) == 400 * times
        assert whole_steps(0.29, 100 * times) == 29 * times         # below it in floats: 28.999...
        assert whole_steps(0.8888889, 450 * times) == 400 * times
        assert whole_steps(1 / 3, 3 * times) == times
    assert math.floor(0.29 * 100) == 28
    assert whole_steps(0.5, 7) == 3 and whole_steps(2.5, 3) == 7 and whole_steps(0.0, 9) == 0


@pytest.fixture(scope="module")
def faded(folder, tmp_path_factory):
    """The results of a run whose lambda falls from 1 to 0."""
    results = tmp_path_factory.mktemp("faded")
    train(folder, results, *NO_DROPOUT, *FADES)
    return results


def run_settings(**changed):
    settings = {
        "global_batch_size": 8, "lr": 1e-3, "lr_schedule": "cosine", "lr_decay_from": 0.0,
        "min_lr": 0.0, "warmup": 0, "warmup_epochs": 0.0, "epochs": 450, "max_steps": 0,
        "log_every": 1, "log": "files", "val_every": 0, "ckpt_every": 0, "ckpt_steps": 0,
        "ckpt_minutes": 0.0, "keep_checkpoints": 0, "no_local_save": False, "num_workers": 0}
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


def loss_settings(schedule, **changed):
    settings = {"lambda_cce": 1.0, "lambda_schedule": schedule, "lambda_end": 0.0,
                "cluster_size": 4, "vocab_size": 24, "no_fused_loss": False, "loss_mib": 0}
    return LossSettings(**settings | changed)


def test_lambda_falls_or_rises_over_the_run_to_its_end():
    linear = loss_settings("linear", lambda_end=0.2).lambda_over(4)
    assert [linear(step) for step in range(4)] == pytest.approx([1, 0.8, 0.6, 0.4])
    rising = loss_settings("cosine", lambda_cce=0.0, lambda_end=1.0).lambda_over(3)
    assert [rising(step) for step in range(3)] == pytest.approx([0, 0.25, 0.75])
    assert loss_settings("constant").lambda_over(4) is None
    assert loss_settings("constant", lambda_cce=0.5).lambda_text == "0.5"
    assert loss_settings("cosine", lambda_end=0.25).lambda_text == "1-0.25"


class Features(torch.nn.Module):
    """A model of features that are its weights, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(2, 9, 16))
        self.output = torch.nn.Linear(16, 24, bias=False)

    def features(self, tokens, labels, patch):
        assert patch == 1
        return self.table

    def targets(self, tokens, patch):
        return tokens[..., None]


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(24, (2, 9), generator=generator), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize("no_fused_loss", [False, True])
def test_the_objective_has_the_lambda_of_the_step_and_saves_none(no_fused_loss):
    num_steps = 4
    loss = loss_settings("linear", lambda_end=0.5, no_fused_loss=no_fused_loss)
    objective = Objective(Features(), build_head_loss(loss, CPU), loss.lambda_over(num_steps))
    assert not [name for name in objective.state_dict() if "lambda" in name]
    buffer = objective.lambda_cce
    for step in range(num_steps):
        objective.set_step(step)
        total, (token, cluster, _) = objective(*batch())
        torch.testing.assert_close(total, token + (1 - step / 8) * cluster)
    assert objective.lambda_cce is buffer and buffer.dtype == torch.float32


def test_a_step_of_a_changing_lambda_does_not_wait_for_the_device():
    loss = loss_settings("cosine")
    objective = Objective(Features(), build_head_loss(loss, CPU), loss.lambda_over(5))
    optimizer = ModelOptimizer(objective.model, OptimSettings(lr=1e-3), CPU)
    trainer = GPTTrainer(objective, optimizer, Session(0, 1, CPU), "none")
    with NoWaits():
        trainer.step(0, batch(), 1e-3)
        trainer.step(1, batch(), 1e-3)
    assert trainer.meter.sums[-1] == pytest.approx(1 + math.cos(math.pi / 10) ** 2)


def test_a_run_logs_its_lambda_and_ends_near_the_plain_likelihood(
        folder, faded, tmp_path):
    run, = faded.iterdir()
    assert run.name == "000-GPT-tiny-lambda=1-0-cluster_size=8"
    assert "lambda 1-0; token loss begins at ln V = 4.16" in (run / "log.txt").read_text()
    rows = metrics(faded)
    expected = [1 - step / 20 for step in range(20)]
    assert [row["lambda_cce"] for row in rows] == pytest.approx(expected, rel=1e-6)
    train(folder, tmp_path, *NO_DROPOUT, "--lambda-cce", 0)
    plain = metrics(tmp_path)
    assert "lambda_cce" not in plain[0]
    # Not equal from the first step on, and not far at the end.
    assert rows[0]["token_loss"] == plain[0]["token_loss"]
    assert rows[0]["grad_norm"] > 1.1 * plain[0]["grad_norm"]
    assert rows[-1]["token_loss"] == pytest.approx(plain[-1]["token_loss"], rel=0.01)
    assert rows[-1]["token_loss"] != plain[-1]["token_loss"]


@pytest.mark.parametrize("processes, more", [
    (0, (*FADES, *EVERYTHING, "--log-every", 2)),
    pytest.param(2, (*FADES, "--parallel", "fsdp", "--no-fused-loss"), marks=pytest.mark.long),
    pytest.param(2, (*FADES, *EVERYTHING), marks=pytest.mark.long)])
def test_a_run_of_changing_lambda_stopped_half_way_ends_like_a_straight_one(
        folder, tmp_path, processes, more):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert start(TRAIN, *flags(folder, straight, *more), processes=processes).returncode == 0
    command = flags(folder, killed, *more)
    status = start_and_kill(TRAIN, *command, processes=processes,
                            when=lambda: steps_done(killed) >= 6)
    assert status == -signal.SIGKILL
    assert start(TRAIN, *command, processes=processes).returncode == 0
    assert_same_end(straight, killed)
    lambdas = [row["lambda_cce"] for row in metrics(killed) if "lambda_cce" in row]
    assert 0 < lambdas[-1] < 0.1


@pytest.mark.parametrize("processes, more", [
    (0, ("--no-fused-loss", "--gradient-accumulation-steps", 4)),
    (2, ()),
    (2, ("--parallel", "fsdp"))])
def test_every_way_to_compute_a_step_has_the_same_lambda(
        folder, faded, tmp_path, processes, more):
    train(folder, tmp_path, *NO_DROPOUT, *FADES, *more, processes=processes)
    for row, other in zip(metrics(tmp_path), metrics(faded), strict=True):
        for value in ("token_loss", "cluster_loss", "grad_norm", "lambda_cce"):
            assert row[value] == pytest.approx(other[value], rel=1e-5), value


def test_a_run_of_constant_lambda_is_gone_on_from_with_a_changing_one(folder, tmp_path):
    train(folder, tmp_path / "first", "--log-every", 4, "--max-steps", 6)
    first, = (tmp_path / "first").iterdir()
    more = ("--log-every", 4, "--max-steps", 12, "--gpt-ckpt", first, *FADES)
    train(folder, tmp_path / "second", *more)
    rows = metrics(tmp_path / "second")
    assert [row["step"] for row in rows] == [8, 12]
    # Means since step 6, where the means of a run of other values do not count, and since step 8.
    expected = [1 - 6.5 / 12, 1 - 9.5 / 12]
    assert [row["lambda_cce"] for row in rows] == pytest.approx(expected)


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
    for name in ("lr_decay_from", "min_lr", "warmup_epochs", "lambda_schedule", "lambda_end"):
        del config[name]
    (run / "config.json").write_text(json.dumps(config))
    train(folder, tmp_path, "--max-steps", 9)
    assert list(tmp_path.iterdir()) == [run] and last_checkpoint(tmp_path)["steps"] == 9
    train(folder, tmp_path, "--max-steps", 9, "--lr-schedule", "linear", "--min-lr", 1e-5)
    assert len(list(tmp_path.iterdir())) == 2
