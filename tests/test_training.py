"""Training: exact resume, any number of processes, and what happens when something goes wrong."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from autoregressive.data.batches import TokenBatches, split_store
from autoregressive.data.mapping import read_mapping
from autoregressive.data.opening import open_codes
from autoregressive.data.training_data import DataSettings, open_data
from autoregressive.models.cluster_loss import fused_head_loss
from autoregressive.models.config import GPT_MODELS, GPTSize, gpt_config
from autoregressive.models.generate import generate
from autoregressive.models.gpt import GPT
from autoregressive.models.loading import build_gpt, move_rows_to_tokens, name_moments, read_gpt
from autoregressive.models.random_numbers import random_numbers
from autoregressive.models.sampler import Sampler
from autoregressive.runtime import training
from autoregressive.runtime.checkpoint import (
    list_checkpoints,
    newest_whole_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.loader import read_ahead
from autoregressive.runtime.log import cut_log
from autoregressive.runtime.optim import EMA_DECAY, ModelOptimizer, MovingAverage, OptimSettings
from autoregressive.train.objective import GPTTrainer, Objective
from conftest import FIXTURES, ROOT
from processes import ENVIRONMENT, command, run_here, start, start_and_kill
from small_runs import (
    EVERYTHING,
    NO_DROPOUT,
    TRAIN,
    assert_same_end,
    flags,
    last_checkpoint,
    metrics,
    public_checkpoint,
    steps_done,
    train,
    write_data,
    write_store,
)

CPU = torch.device("cpu")
FAIL_WHILE_READING = """
import sys
sys.path.insert(0, sys.argv[1])
from autoregressive.runtime.loader import read_ahead
def rows():
    yield from read_ahead(list(range(1000)), range(1000), num_workers=2)
def write(chunks):
    # The traceback of write keeps the reader, and with it the workers, to the very end.
    for _ in chunks:
        raise OSError("disk full")
write(rows())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    write_data(folder)
    return folder


@pytest.mark.parametrize("processes, kills, more", [
    (2, 2, EVERYTHING),
    pytest.param(0, 20, EVERYTHING, marks=pytest.mark.long),
    pytest.param(2, 20, (), marks=pytest.mark.long)])
def test_killed_and_resumed_run_ends_bit_for_bit_like_a_straight_one(
        folder, tmp_path, processes, kills, more):
    choose = random.Random(kills)
    killed = tmp_path / "killed"
    straight = start(TRAIN, *flags(folder, tmp_path / "straight", *more), processes=processes)
    assert straight.returncode == 0, straight.stderr
    goals = sorted(choose.choices(range(1, 19), k=kills))
    for goal in goals:
        status = start_and_kill(TRAIN, *flags(folder, killed, *more), processes=processes,
                                when=lambda goal=goal: steps_done(killed) >= goal)
        assert status == -signal.SIGKILL
    resumed = start(TRAIN, *flags(folder, killed, *more), processes=processes)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_end(tmp_path / "straight", killed)
    assert len(list(killed.iterdir())) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_before_the_run_leaves(folder, tmp_path, number):
    rarely = ("--ckpt-steps", 0, "--max-steps", 3000, "--log-every", 10)
    status = start_and_kill(TRAIN, *flags(folder, tmp_path, *rarely), stop=number,
                            when=lambda: steps_done(tmp_path) >= 2)
    assert status == 128 + number
    saved = last_checkpoint(tmp_path)["steps"]
    assert 20 <= saved < 3000
    log, = tmp_path.glob("*/log.txt")
    assert f"signal {number} after step {saved}" in log.read_text()


@pytest.fixture(scope="module")
def baseline(folder, tmp_path_factory):
    results = tmp_path_factory.mktemp("baseline")
    train(folder, results, *NO_DROPOUT, "--no-fused-loss")
    return metrics(results)


@pytest.mark.parametrize("processes, tolerance, more", [
    (0, 1e-6, ("--gradient-accumulation-steps", 4)),
    (0, 1e-6, ("--checkpoint-activations",)),
    (0, 1e-6, ()),
    (0, 1e-6, ("--loss-mib", 1, "--num-workers", 0)),
    (0, 1e-5, ("--parallel", "fsdp")),
    (2, 1e-5, ()),
    (2, 1e-5, ("--parallel", "fsdp", "--ema")),
    pytest.param(2, 1e-5, ("--parallel", "fsdp", "--gradient-accumulation-steps", 2,
                           "--checkpoint-activations"), marks=pytest.mark.long)])
def test_every_way_to_compute_a_step_gives_the_same_losses_and_norms(
        folder, tmp_path, baseline, processes, tolerance, more):
    train(folder, tmp_path, *NO_DROPOUT, *more, processes=processes)
    found = metrics(tmp_path)
    assert len(found) == len(baseline) == 20
    for row, expected in zip(found, baseline, strict=True):
        for name in ("token_loss", "cluster_loss", "grad_norm"):
            assert row[name] == pytest.approx(expected[name], rel=tolerance), (row["step"], name)
    assert found[-1]["token_loss"] < found[0]["token_loss"]


@pytest.mark.parametrize("first, then", [
    ((2, "fsdp"), (0, "ddp")),
    pytest.param((2, "ddp"), (0, "ddp"), marks=pytest.mark.long),
    pytest.param((0, "ddp"), (2, "fsdp"), marks=pytest.mark.long)])
def test_another_number_of_processes_continues_by_sample_position(
        folder, tmp_path, baseline, first, then):
    train(folder, tmp_path, *NO_DROPOUT, "--ema", "--parallel", first[1], "--max-steps", 9,
          processes=first[0])
    train(folder, tmp_path, *NO_DROPOUT, "--ema", "--parallel", then[1],
          processes=then[0])
    for row, expected in zip(metrics(tmp_path), baseline, strict=True):
        assert row["token_loss"] == pytest.approx(expected["token_loss"], rel=1e-5)
    assert len(list(tmp_path.iterdir())) == 1


def test_damaged_newest_checkpoint_is_skipped_with_a_warning(folder, tmp_path):
    train(folder, tmp_path / "straight")
    shutil.copytree(tmp_path / "straight", tmp_path / "damaged")
    run, = (tmp_path / "damaged").iterdir()
    (run / "finished.json").unlink()
    (run / "checkpoints" / "0000020.pt").unlink()
    newest = run / "checkpoints" / "0000018.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    done = start(TRAIN, *flags(folder, tmp_path / "damaged"))
    assert done.returncode == 0
    for words in ("has changed since it was written", "continuing from", "0000015.pt"):
        assert words in done.stdout
    assert_same_end(tmp_path / "straight", tmp_path / "damaged")
    log = (run / "log.txt").read_text()
    assert "has changed since it was written" in log and "continuing from" in log


def test_only_whole_checkpoints_are_kept_after_a_damaged_one(folder, tmp_path):
    train(folder, tmp_path, "--max-steps", 12)
    run, = tmp_path.iterdir()
    (run / "checkpoints" / "0000012.pt").rename(run / "checkpoints" / "0000099.pt")
    truncate(run / "checkpoints" / "0000099.pt", 5000)
    train(folder, tmp_path, "--max-steps", 13, "--keep-checkpoints", 1)
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["0000013.pt"]
    assert (run / "checkpoints" / "0000099.damaged").exists()


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


def test_full_disk_during_a_checkpoint_leaves_the_one_before(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "0000003.pt", {"steps": 3})

    def no_room(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path / "0000006.pt", {"steps": 6})
    assert newest_whole_checkpoint(tmp_path, kinds={"steps": int}) == (tmp_path / "0000003.pt", [])
    assert [path.name for path in tmp_path.iterdir()] == ["0000003.pt"]


def test_only_the_newest_checkpoints_are_kept(folder, tmp_path):
    train(folder, tmp_path, "--keep-checkpoints", 2)
    checkpoints, = tmp_path.glob("*/checkpoints")
    assert [path.name for path in list_checkpoints(checkpoints)] == ["0000018.pt", "0000020.pt"]


def test_a_run_leaves_curves_validation_losses_and_sample_pictures(folder, tmp_path):
    train(folder, tmp_path, *EVERYTHING, "--validation_step", 10)
    run, = tmp_path.iterdir()
    pictures = sorted(path.name for path in (run / "pictures").iterdir())
    assert pictures == ["0000010.png", "0000020.png"]
    assert (run / "curves.png").stat().st_size > 10000
    val = [row for row in metrics(tmp_path) if "val_token_loss" in row]
    assert [row["step"] for row in val] == [7, 14, 20]
    assert 0 < val[-1]["val_token_loss"] < 5 and 0 <= val[-1]["val_cluster_accuracy"] <= 1
    text = (run / "log.txt").read_text()
    for words in ("ln V = 4.16", "peak memory after step 1",
                  "step 20: token loss", "images per second"):
        assert words in text


def test_sample_pictures_do_not_change_the_run(folder, tmp_path):
    train(folder, tmp_path / "without")
    train(folder, tmp_path / "with", "--validation_step", 5)
    assert_same_end(tmp_path / "without", tmp_path / "with")


def test_training_starts_from_given_weights_and_continues_from_a_given_checkpoint(folder, tmp_path):
    train(folder, tmp_path / "straight", *NO_DROPOUT)
    checkpoints, = (tmp_path / "straight").glob("*/checkpoints")
    train(folder, tmp_path / "continued", *NO_DROPOUT, "--gpt-ckpt", checkpoints / "0000012.pt")
    assert metrics(tmp_path / "continued") == metrics(tmp_path / "straight")[12:]
    weights = last_checkpoint(tmp_path / "straight")["model"]
    save_checkpoint(tmp_path / "weights.pt", {"model": weights})
    train(folder, tmp_path / "started", *NO_DROPOUT, "--gpt-ckpt", tmp_path / "weights.pt")
    first_straight = metrics(tmp_path / "straight")[0]
    first_started = metrics(tmp_path / "started")[0]
    assert first_started["step"] == 1
    assert first_started["token_loss"] < first_straight["token_loss"] - 0.01


@pytest.fixture
def older(monkeypatch, tmp_path):
    """What commit fa9bbd5 left of a small GPT after 2 steps.

    Returns:
        Its path, its payload, and the numbers that the code of that commit went on to.
    """
    monkeypatch.setitem(GPT_MODELS, "GPT-mini", GPTSize(2, 2, 16))
    mapping = torch.from_numpy(np.random.default_rng(0).permutation(64))
    save_checkpoint(tmp_path / "older_mapping.pt", mapping)
    path = FIXTURES / "older_gpt_checkpoint.pt"
    return path, read_checkpoint(path), json.loads(path.with_suffix(".json").read_text())


def train_mini(folder, tmp_path, *more):
    train(folder, tmp_path / "results", "--gpt-model", "GPT-mini",
          "--mapping-path", tmp_path / "older_mapping.pt", *NO_DROPOUT, "--lr", 0.01, *more)


def assert_rows(found, expected):
    for row, other in zip(found, expected, strict=True):
        assert {name: row[name] for name in other} == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_an_older_checkpoint_samples_what_the_older_code_drew(older, weights):
    path, payload, numbers = older
    file = read_gpt(path, weights)
    assert file.flags() == {"gpt_model": "GPT-mini", "image_size": 16, "num_classes": 3,
                            "cluster_size": 8, "codebook_size": 64, "downsample_size": 4}
    gpt = build_gpt(file, gpt_config("GPT-mini", grid=4, vocab_size=64, num_classes=3))
    saved = payload["ema" if weights == "ema" else "model"]
    assert torch.equal(gpt.output.weight, saved["output.weight"])
    labels, uniforms = random_numbers(0, range(6), 3, 16)
    tokens = generate(gpt, torch.from_numpy(labels), torch.from_numpy(uniforms),
                      Sampler(cfg_scale=2.0))
    assert tokens.tolist() == numbers["tokens"][weights]
    assert numbers["tokens"]["raw"] != numbers["tokens"]["ema"]


def test_training_goes_on_from_an_older_checkpoint_as_the_older_code_did(older, folder, tmp_path):
    path, payload, numbers = older
    train_mini(folder, tmp_path, "--ema", "--max-steps", 4, "--gpt-ckpt", path)
    assert_rows(metrics(tmp_path / "results"), numbers["continued"])
    assert payload["steps"] == 2
    assert [row["step"] for row in metrics(tmp_path / "results")] == [3, 4]
    end = last_checkpoint(tmp_path / "results")
    assert end["steps"] == 4 and end["images_seen"] == 64
    assert end["ema"].keys() == payload["ema"].keys()
    assert all(state["step"] == 4 for state in end["optimizer"]["state"].values())


def test_training_starts_from_the_weights_of_an_older_checkpoint_as_the_older_code_did(
        older, folder, tmp_path):
    _, payload, numbers = older
    save_checkpoint(tmp_path / "weights.pt", {"model": payload["model"]})
    train_mini(folder, tmp_path, "--max-steps", 2, "--gpt-ckpt", tmp_path / "weights.pt")
    assert_rows(metrics(tmp_path / "results"), numbers["started"])
    assert [row["step"] for row in metrics(tmp_path / "results")] == [1, 2]


def test_a_gpt_over_original_codes_is_started_from_even_if_its_file_is_a_whole_checkpoint(
        older, folder, tmp_path):
    payload = read_checkpoint(older[0])
    save_checkpoint(tmp_path / "original.pt", payload | {"settings": {}})
    train_mini(folder, tmp_path, "--max-steps", 1, "--gpt-ckpt", tmp_path / "original.pt",
               "--init-from-original")
    row, = metrics(tmp_path / "results")
    assert row["step"] == 1 and row["images_seen"] == 16


@pytest.mark.parametrize("rebuilt", ["mapping", "codes", "labels"])
def test_a_mapping_or_store_rebuilt_at_the_same_path_starts_a_new_run(folder, tmp_path, rebuilt):
    data, results = tmp_path / "data", tmp_path / "results"
    shutil.copytree(folder, data)
    train(data, results, "--max-steps", 2)
    if rebuilt == "mapping":
        save_checkpoint(data / "mapping.pt", read_checkpoint(folder / "mapping.pt").flip(0))
    else:
        shutil.rmtree(data / "codes")
        labels = np.arange(50) % 3
        if rebuilt == "labels":
            labels = labels[::-1]
        write_store(data / "codes", labels, seed=int(rebuilt == "codes"))
    train(data, results, "--max-steps", 3)
    runs = sorted(results.iterdir())
    assert len(runs) == 2
    logged = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
              for run in runs]
    assert [[row["step"] for row in rows] for rows in logged] == [[1, 2], [1, 2, 3]]
    for name in ("mapping.pt", "codes"):  # the first data once more: the first run goes on
        shutil.rmtree(data / name) if name == "codes" else (data / name).unlink()
    shutil.copytree(folder, data, dirs_exist_ok=True)
    train(data, results, "--max-steps", 3)
    assert sorted(results.iterdir()) == runs
    assert len((runs[0] / "metrics.jsonl").read_text().splitlines()) == 3


def launch(folder, results, *more):
    """Starts training under torchrun, which restarts its workers up to three times.

    Returns:
        The launcher's process.
    """
    words = command(TRAIN, *flags(folder, results, *more), processes=2)
    words.insert(words.index("--standalone"), "--max-restarts=3")
    return subprocess.Popen(words, env=ENVIRONMENT,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def workers_of(launcher):
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher.pid)],
                            capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.long
def test_a_run_whose_killed_worker_torchrun_restarts_ends_like_a_straight_one(folder, tmp_path):
    train(folder, tmp_path / "straight", processes=2)
    launcher = launch(folder, tmp_path / "killed")
    wait_until(lambda: steps_done(tmp_path / "killed") >= 5)
    os.kill(workers_of(launcher)[0], signal.SIGKILL)
    assert launcher.wait(timeout=120) == 0
    assert_same_end(tmp_path / "straight", tmp_path / "killed")


def test_workers_leave_when_torchrun_alone_is_killed(folder, tmp_path):
    launcher = launch(folder, tmp_path, "--max-steps", 100000, "--log-every", 10)
    wait_until(lambda: steps_done(tmp_path) >= 2)
    workers = workers_of(launcher)
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers))
    assert not list(tmp_path.glob(".*.lock")) and last_checkpoint(tmp_path)["steps"] >= 20


@pytest.mark.parametrize("more, words", [
    ((), "--mapping-path: expected"),
    (("--init-from-original",), "which was trained on tokens; leave the flag out")])
def test_a_checkpoint_over_other_tokens_is_refused(folder, tmp_path, capsys, more, words):
    train(folder, tmp_path / "first", "--max-steps", 1)
    other = tmp_path / "other.pt"
    save_checkpoint(other, read_checkpoint(folder / "mapping.pt").flip(0))
    more = (*more, "--mapping-path", other, "--gpt-ckpt", next((tmp_path / "first").iterdir()))
    assert run_here(TRAIN, *flags(folder, tmp_path / "second"), *more) == 2
    assert words in capsys.readouterr().err and not list((tmp_path / "second").glob("*"))


@pytest.mark.parametrize("seconds", [30, 0])
def test_a_flipped_code_is_found_before_the_first_step_or_beside_the_first_ones(
        folder, tmp_path, monkeypatch, capsys, seconds):
    monkeypatch.setattr(training, "VERIFY_SECONDS", seconds)
    shutil.copytree(folder, tmp_path / "data")
    codes = np.load(tmp_path / "data/codes/codes.npy")
    codes[7, 1, 3] ^= 1
    np.save(tmp_path / "data/codes/codes.npy", codes)
    for _ in range(2):  # the same command does not go on with them either
        assert run_here(TRAIN, *flags(tmp_path / "data", tmp_path / "results")) == 2
        assert "expected rows 0 to 49 as they were written, found others" in capsys.readouterr().err
    assert not list(tmp_path.glob("results/*/finished.json"))


def test_a_checkpoint_of_other_tokens_copied_into_a_run_is_refused(folder, tmp_path, capsys):
    train(folder, tmp_path / "results", "--max-steps", 3)
    (path,) = (tmp_path / "results").glob("*/checkpoints/0000003.pt")
    payload = read_checkpoint(path)
    settings = payload["settings"] | {"mapping_sha256": "0" * 64}
    save_checkpoint(path.with_name("0000006.pt"), payload | {"steps": 6, "settings": settings})
    assert run_here(TRAIN, *flags(folder, tmp_path / "results")) == 2
    words = "0000006.pt: expected a checkpoint of this run with mapping_sha256"
    assert words in capsys.readouterr().err


def test_a_run_that_went_on_from_another_does_so_again_whatever_became_of_it(folder, tmp_path):
    train(folder, tmp_path / "first", "--max-steps", 3)
    (first,) = (tmp_path / "first").iterdir()
    train(folder, tmp_path / "second", "--max-steps", 6, "--gpt-ckpt", first)
    train(folder, tmp_path / "first", "--max-steps", 12)
    train(folder, tmp_path / "second", "--max-steps", 6, "--gpt-ckpt", first)
    assert last_checkpoint(tmp_path / "second")["steps"] == 6


@pytest.mark.parametrize("guidance_free, count", [(False, 32), (True, 36)])
def test_moments_of_public_checkpoints_are_named_by_the_public_order_where_shapes_do_not_tell(
        guidance_free, count):
    config = gpt_config("GPT-tiny", grid=4, vocab_size=64, num_classes=63,
                        guidance_free=guidance_free)
    payload, moments = public_checkpoint(config)
    named = name_moments(payload["optimizer"], payload["model"], "a file")
    assert set(named["state"]) == set(moments)
    assert sum(len(group["params"]) for group in named["param_groups"]) == count
    assert all(torch.equal(named["state"][name]["exp_avg"], value)
               for name, value in moments.items())
    del payload["optimizer"]["state"][3]
    words = "expected moments 3 of layers.0.attention.wo.weight .*--weights-only"
    with pytest.raises(ValueError, match=words):
        name_moments(payload["optimizer"], payload["model"], "a file")


@pytest.mark.parametrize("more, first", [((), 5), (("--ema",), 5), (("--weights-only",), 1)])
def test_a_public_checkpoint_is_continued_or_started_from(folder, tmp_path, more, first):
    payload, _ = public_checkpoint(gpt_config("GPT-tiny", grid=4, vocab_size=64, num_classes=3))
    # The average's weights are named as DDP names them.
    payload["ema"] = {f"module.{name}": weight for name, weight in payload["model"].items()}
    save_checkpoint(tmp_path / "005.pt", payload)
    train(folder, tmp_path / "results", "--gpt-ckpt", tmp_path / "005.pt", "--max-steps", 6, *more)
    assert metrics(tmp_path / "results")[0]["step"] == first
    log, = (tmp_path / "results").glob("*/log.txt")
    assert ("holds no random numbers" in log.read_text()) == (first > 1)


def test_weights_over_original_codes_give_the_same_logits_once_their_rows_are_moved():
    torch.manual_seed(0)
    config = gpt_config("GPT-tiny", grid=4, vocab_size=64, num_classes=3)
    original, moved = GPT(config).eval(), GPT(config).eval()
    torch.nn.init.normal_(original.output.weight)
    mapping = np.random.default_rng(0).permutation(64)
    moved.load_state_dict(move_rows_to_tokens(original.state_dict(), mapping, "a file"))
    codes, labels = torch.randint(64, (2, 15)), torch.tensor([0, 3])
    tokens = torch.from_numpy(mapping)[codes]
    with torch.no_grad():
        torch.testing.assert_close(moved(tokens, labels)[..., mapping], original(codes, labels))


def small_trainer(head_loss, session):
    torch.manual_seed(0)
    config = gpt_config("GPT-tiny", grid=4, vocab_size=64, num_classes=3, dropout=0,
                        token_dropout=0)
    model = GPT(config)
    optimizer = ModelOptimizer(model, OptimSettings(lr=1e-2, weight_decay=0.05, ema=True), CPU)
    return GPTTrainer(Objective(model, head_loss), optimizer, session, "none")


def test_a_step_that_is_not_finite_changes_nothing_and_is_remembered(folder):
    factor = torch.ones(())

    def head_loss(*arguments):
        loss, statistics = fused_head_loss(*arguments, 8, 1.0, 100)
        return loss * factor, statistics

    session = Session(0, 1, CPU)
    trainer = small_trainer(head_loss, session)
    batches = TokenBatches(open_codes(folder / "codes"), np.arange(64), 8, 0, 3, 0.1)
    trainer.step(0, batches[0, range(8)], 1e-2)
    before = [tensor.clone() for tensor in everything(trainer.optimizer)]
    for step, value in ((1, torch.nan), (2, torch.inf)):
        factor.fill_(value)
        trainer.step(step, batches[step, range(8)], 1e-2)
    after = everything(trainer.optimizer)
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert trainer.meter.first_bad_step(session) == 1
    factor.fill_(1)
    trainer.step(3, batches[3, range(8)], 1e-2)
    assert not torch.equal(before[0], everything(trainer.optimizer)[0])


def everything(optimizer):
    moments = [value for group in optimizer.optimizer.state.values() for value in group.values()]
    return [*(p.detach() for p in optimizer.model.parameters()), *moments,
            *optimizer.ema.weights.values()]


def test_a_run_that_is_not_finite_stops_naming_step_and_rows(folder, tmp_path):
    done = start(TRAIN, *flags(folder, tmp_path / "results", "--lr", 1e30, "--max-grad-norm", 0))
    assert done.returncode == 1
    words = r"FloatingPointError: step \d+: loss or gradient is not finite, in rows \["
    assert re.search(words, done.stderr)


@pytest.mark.parametrize("warms_up", [False, True])
def test_average_is_the_recurrence_with_a_constant_or_a_warmed_up_decay(warms_up):
    model = torch.nn.Linear(2, 1, bias=False)
    average, expected = MovingAverage(model, warms_up), model.weight.detach().double().clone()
    for number in range(1, 30):
        with torch.no_grad():
            model.weight.add_(number)
        average.update(model, number, torch.zeros(()))
        decay = min(EMA_DECAY, (1 + number) / (10 + number)) if warms_up else EMA_DECAY
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    assert torch.allclose(average.weights["weight"].double(), expected, rtol=1e-5)


def test_batches_read_ahead_are_those_read_one_by_one(folder):
    batches = TokenBatches(open_codes(folder / "codes"), np.arange(64), 8, 0, 3, 0.1)
    keys = [(step, range(2, 7)) for step in range(4, 15)]
    expected = [batches[key] for key in keys]
    for num_workers in (0, 1, 4):
        found = list(read_ahead(batches, keys, num_workers))
        assert len(found) == 11
        for (tokens, labels), (its_tokens, its_labels) in zip(found, expected, strict=True):
            assert torch.equal(tokens, its_tokens) and torch.equal(labels, its_labels)


def test_an_error_while_workers_read_ahead_ends_the_process():
    done = subprocess.run([sys.executable, "-c", FAIL_WHILE_READING, ROOT],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.endswith("OSError: disk full\n") and "worker" not in done.stderr


def test_validation_images_are_never_trained_on(folder):
    training, val = split_store(open_codes(folder / "codes"), 0.1, seed=3)
    assert len(val.rows) == 5 and len(training.rows) == 45
    assert sorted([*training.rows, *val.rows]) == list(range(50))
    assert np.array_equal(split_store(open_codes(folder / "codes"), 0.1, seed=3)[1].rows, val.rows)


def test_log_is_cut_back_to_the_step_of_the_checkpoint(tmp_path):
    head = "[2026-11-24 00:00:00] GPT-tiny\n"
    lines = [f"[2026-11-24 00:00:0{step}] step {step}: token loss 1\n" for step in range(1, 6)]
    (tmp_path / "log.txt").write_text(head + "".join(lines))
    cut_log(tmp_path / "log.txt", 3)
    assert (tmp_path / "log.txt").read_text() == head + "".join(lines[:3])


def test_flops_are_six_a_weight_and_those_of_causal_attention():
    config = gpt_config("GPT-tiny", grid=4, vocab_size=64, num_classes=3)
    model = GPT(config)
    num_weights = sum(p.numel() for p in model.parameters())
    multiplied = sum(p.numel() for name, p in model.named_parameters() if "embedding" not in name)
    # Products of q with k and of p with v, forward and back.
    attention = config.num_layers * 3 * 2 * 2 * config.width * config.num_tokens / 2
    assert config.flops_per_image(num_weights) == 16 * (6 * multiplied + attention)
    # Of 4 patches, a quarter of the positions, each of which attends to a quarter as many.
    assert config.flops_per_image(num_weights, patch=2) == 4 * (6 * multiplied + attention / 4)
    free = dataclasses.replace(config, guidance_free=True)
    assert free.flops_per_image(num_weights) == 16 * (6 * multiplied + attention) * 4 // 3


@pytest.mark.parametrize("world_size, batch_size", [(1, 5), (2, 4), (3, 3), (6, None)])
def test_validation_gives_every_process_as_many_of_its_5_images(folder, world_size, batch_size):
    settings = DataSettings(num_classes=3, global_batch_size=24, gradient_accumulation_steps=2,
                            val_every=1, val_share=0.1, global_seed=0, guidance_free=False)
    parts = open_codes(folder / "codes"), read_mapping(folder / "mapping.pt", 64)
    if batch_size is None:
        words = "--val-share: expected at least one validation image for each of 6 "
        with pytest.raises(ValueError, match=words):
            open_data(settings, *parts, 4, world_size)
    else:
        assert open_data(settings, *parts, 4, world_size).val_batches.batch_size == batch_size


def test_codes_out_of_range_name_their_rows(folder, tmp_path):
    shutil.copytree(folder / "codes", tmp_path / "codes")
    codes = np.load(tmp_path / "codes/codes.npy")
    codes[:, :, 5] = 64
    np.save(tmp_path / "codes/codes.npy", codes)
    batches = TokenBatches(open_codes(tmp_path / "codes"), np.arange(64), 8, 0, 3, 0.1)
    with pytest.raises(ValueError, match=r"expected codes 0 \.\. 63, found \d+ \.\. 64 in rows \["):
        batches[0, range(8)]
