"""Training: exact resume, any number of processes, and what happens when something goes wrong."""

import json
import os
import random
import shutil
import signal

import numpy as np
import pytest
import torch
from processes import run_here, start, start_and_kill, without_time

from autoregressive.data.batches import TokenBatches, split_store
from autoregressive.data.code_writer import CodeWriter
from autoregressive.data.codes import open_codes
from autoregressive.models.cluster_loss import fused_head_loss
from autoregressive.models.gpt import GPT, gpt_config
from autoregressive.runtime.checkpoint import (
    list_checkpoints,
    newest_whole_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.log import cut_log
from autoregressive.train.monitor import flops_per_token
from autoregressive.train.optim import build_optimizer
from autoregressive.train.state import weights_to_start_from
from autoregressive.train.step import EMA_DECAY, MovingAverage, Objective, Trainer
from tokenizer.tokenizer_image.vq_model import VQModel

TRAIN = "autoregressive/train/train_c2i.py"
MANIFEST = {"dataset": "test", "num_images": 50, "num_crops": 2, "num_tokens": 16, "grid": 4, "codebook_size": 64,
            "crops": ["centre", "centre, mirrored"], "class_names": ["a", "b", "c"], "images_sha256": "1" * 64,
            "image_size": 16, "codebook_sha256": "2" * 64, "tokenizer_sha256": "3" * 64}
NO_DROPOUT = ("--dropout-p", 0, "--token-dropout-p", 0, "--global-batch-size", 16)
EVERYTHING = ("--ema", "--gradient-accumulation-steps", 2, "--eval-every", 7, "--eval-share", 0.1, "--lr-schedule",
              "cosine", "--warmup", 3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store of 50 images, a mapping, and a VQ model of random weights."""
    folder = tmp_path_factory.mktemp("training")
    writer = CodeWriter(folder / "codes", MANIFEST)
    writer.create(np.arange(50) % 3)
    writer.write(range(50), np.random.default_rng(0).integers(64, size=(50, 2, 16)), {})
    writer.finish(0)
    torch.manual_seed(0)
    save_checkpoint(folder / "mapping.pt", torch.randperm(64))
    save_checkpoint(folder / "vq.pt", {"model": VQModel("VQ-4-small", 64, 8).state_dict()})
    return folder


def flags(folder, results, *more):
    return ("--code-path", folder / "codes", "--mapping-path", folder / "mapping.pt", "--results-dir", results,
            "--gpt-model", "GPT-tiny", "--num-classes", 3, "--vocab-size", 64, "--codebook-size", 64,
            "--cluster-size", 8, "--image-size", 16, "--downsample-size", 4, "--vq-model", "VQ-4-small",
            "--vq-ckpt", folder / "vq.pt", "--mixed-precision", "none", "--global-batch-size", 8, "--max-updates", 20,
            "--log-every", 1, "--ckpt-updates", 3, *more)


def train(folder, results, *more, processes=0):
    if not processes:
        run_to_its_end(folder, results, *more)
        return
    done = start(TRAIN, *flags(folder, results, *more), processes=processes)
    assert done.returncode == 0, done.stderr


def run_to_its_end(folder, results, *more):
    assert run_here(TRAIN, *flags(folder, results, *more)) == 0


def metrics(results):
    path, = results.glob("*/metrics.jsonl")
    return [without_time(json.loads(line)) for line in path.read_text().splitlines()]


def last_checkpoint(results):
    checkpoints, = results.glob("*/checkpoints")
    return read_checkpoint(list_checkpoints(checkpoints)[-1])


def assert_same_end(results, others):
    assert metrics(results) == metrics(others)
    expected, found = last_checkpoint(results), last_checkpoint(others)
    for kind in ("model", "ema"):
        assert (kind in expected) == (kind in found)
        for name in expected.get(kind, ()):
            assert torch.equal(expected[kind][name], found[kind][name]), (kind, name)
    assert expected["steps"] == found["steps"] and expected["images_seen"] == found["images_seen"]


def updates_done(results):
    found = list(results.glob("*/metrics.jsonl"))
    return len(found[0].read_text().splitlines()) if found else 0


@pytest.mark.parametrize("processes, kills, more", [
    (2, 2, EVERYTHING), pytest.param(0, 20, EVERYTHING, marks=pytest.mark.long),
    pytest.param(2, 20, (), marks=pytest.mark.long)])
def test_killed_and_resumed_run_ends_bit_for_bit_like_a_straight_one(folder, tmp_path, processes, kills, more):
    choose = random.Random(kills)
    straight = start(TRAIN, *flags(folder, tmp_path / "straight", *more), processes=processes)
    assert straight.returncode == 0, straight.stderr
    goals = sorted(choose.choices(range(1, 19), k=kills))
    for goal in goals:
        status = start_and_kill(TRAIN, *flags(folder, tmp_path / "killed", *more), processes=processes,
                                when=lambda goal=goal: updates_done(tmp_path / "killed") >= goal)
        assert status == -signal.SIGKILL
    resumed = start(TRAIN, *flags(folder, tmp_path / "killed", *more), processes=processes)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_end(tmp_path / "straight", tmp_path / "killed")
    assert len(list((tmp_path / "killed").iterdir())) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_before_the_run_leaves(folder, tmp_path, number):
    rarely = ("--ckpt-updates", 0, "--max-updates", 3000, "--log-every", 10)
    status = start_and_kill(TRAIN, *flags(folder, tmp_path, *rarely), stop=number,
                            when=lambda: updates_done(tmp_path) >= 2)
    assert status == 128 + number
    saved = last_checkpoint(tmp_path)["steps"]
    assert 20 <= saved < 3000
    log, = tmp_path.glob("*/log.txt")
    assert f"signal {number} after update {saved}" in log.read_text()


@pytest.fixture(scope="module")
def baseline(folder, tmp_path_factory):
    results = tmp_path_factory.mktemp("baseline")
    train(folder, results, *NO_DROPOUT, "--no-fused-loss")
    return metrics(results)


@pytest.mark.parametrize("processes, tolerance, more", [
    (0, 1e-6, ("--gradient-accumulation-steps", 4)), (0, 1e-6, ("--checkpoint-activations",)), (0, 1e-6, ()),
    (0, 1e-6, ("--loss-mib", 1, "--num-workers", 0)), (2, 1e-5, ()), (2, 1e-5, ("--parallel", "fsdp", "--ema")),
    pytest.param(2, 1e-5, ("--parallel", "fsdp", "--gradient-accumulation-steps", 2, "--checkpoint-activations"),
                 marks=pytest.mark.long)])
def test_every_way_to_compute_an_update_gives_the_same_losses_and_norms(folder, tmp_path, baseline, processes,
                                                                        tolerance, more):
    train(folder, tmp_path, *NO_DROPOUT, *more, processes=processes)
    found = metrics(tmp_path)
    assert len(found) == len(baseline) == 20
    for row, expected in zip(found, baseline, strict=True):
        for name in ("token_loss", "cluster_loss", "grad_norm"):
            assert row[name] == pytest.approx(expected[name], rel=tolerance), (row["step"], name)
    assert found[-1]["token_loss"] < found[0]["token_loss"]


@pytest.mark.parametrize("first, then", [
    ((2, "fsdp"), (0, "ddp")), pytest.param((2, "ddp"), (0, "ddp"), marks=pytest.mark.long),
    pytest.param((0, "ddp"), (2, "fsdp"), marks=pytest.mark.long)])
def test_another_number_of_processes_continues_by_sample_position(folder, tmp_path, baseline, first, then):
    train(folder, tmp_path, *NO_DROPOUT, "--parallel", first[1], "--max-updates", 9, "--ema", processes=first[0])
    train(folder, tmp_path, *NO_DROPOUT, "--parallel", then[1], "--ema", processes=then[0])
    for row, expected in zip(metrics(tmp_path), baseline, strict=True):
        assert row["token_loss"] == pytest.approx(expected["token_loss"], rel=1e-5)
    assert len(list(tmp_path.iterdir())) == 1


def test_damaged_newest_checkpoint_is_passed_over_aloud(folder, tmp_path):
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
    assert done.returncode == 0 and "damaged part" in done.stdout and "continuing from" in done.stdout
    assert "0000015.pt" in done.stdout
    assert_same_end(tmp_path / "straight", tmp_path / "damaged")


def test_full_disk_during_a_checkpoint_leaves_the_one_before(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "0000003.pt", {"steps": 3})

    def no_room(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path / "0000006.pt", {"steps": 6})
    assert newest_whole_checkpoint(tmp_path) == (tmp_path / "0000003.pt", {"steps": 3})
    assert [path.name for path in tmp_path.iterdir()] == ["0000003.pt"]


def test_only_the_newest_checkpoints_are_kept(folder, tmp_path):
    train(folder, tmp_path, "--keep-checkpoints", 2)
    checkpoints, = tmp_path.glob("*/checkpoints")
    assert [path.name for path in list_checkpoints(checkpoints)] == ["0000018.pt", "0000020.pt"]


def test_a_run_leaves_curves_held_out_losses_and_sample_pictures(folder, tmp_path):
    train(folder, tmp_path, *EVERYTHING, "--validation_step", 10)
    run, = tmp_path.iterdir()
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["0000010.png", "0000020.png"]
    assert (run / "curves.png").stat().st_size > 10000
    held_out = [row for row in metrics(tmp_path) if "heldout_token_loss" in row]
    assert [row["step"] for row in held_out] == [7, 14, 20]
    assert 0 < held_out[-1]["heldout_token_loss"] < 5 and 0 <= held_out[-1]["heldout_cluster_accuracy"] <= 1
    text = (run / "log.txt").read_text()
    for words in ("ln V = 4.16", "peak memory of the first update", "update 20: token loss", "images per second"):
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
    save_checkpoint(tmp_path / "weights.pt", {"model": last_checkpoint(tmp_path / "straight")["model"]})
    train(folder, tmp_path / "started", *NO_DROPOUT, "--gpt-ckpt", tmp_path / "weights.pt")
    started = metrics(tmp_path / "started")
    assert started[0]["step"] == 1 and started[0]["token_loss"] < metrics(tmp_path / "straight")[0]["token_loss"] - 0.01


def test_weights_over_original_codes_give_the_same_logits_once_their_rows_are_moved():
    torch.manual_seed(0)
    config = gpt_config("GPT-tiny", grid=4, vocab_size=64, num_classes=3)
    original, moved = GPT(config).eval(), GPT(config).eval()
    torch.nn.init.normal_(original.output.weight)
    mapping = np.random.default_rng(0).permutation(64)
    moved.load_state_dict(weights_to_start_from("a file", {"model": original.state_dict()}, mapping))
    codes, labels = torch.randint(64, (2, 15)), torch.tensor([0, 3])
    tokens = torch.from_numpy(mapping)[codes]
    with torch.no_grad():
        torch.testing.assert_close(moved(tokens, labels)[..., mapping], original(codes, labels))


def small_trainer(head_loss, **settings):
    torch.manual_seed(0)
    model = GPT(gpt_config("GPT-tiny", grid=4, vocab_size=64, num_classes=3, dropout=0, token_dropout=0))
    objective, optimizer = Objective(model, head_loss), build_optimizer(model, 1e-2, (0.9, 0.95), 0.05)
    return Trainer(objective, objective, optimizer, CPU, "none", 1.0, ema=MovingAverage(model), **settings)


def test_an_update_that_is_not_finite_changes_nothing_and_is_remembered(folder):
    factor = torch.ones(())

    def head_loss(*arguments):
        loss, statistics = fused_head_loss(*arguments, 8, 1.0, 100)
        return loss * factor, statistics

    trainer = small_trainer(head_loss)
    batches = TokenBatches(open_codes(folder / "codes"), np.arange(64), 8, 0, 3, 0.1)
    session = Session(0, 1, CPU)
    trainer.update(0, *batches.batch(0, range(8)), 1e-2)
    state = [tensor.clone() for tensor in everything(trainer)]
    for number, value in ((1, torch.nan), (2, torch.inf)):
        factor.fill_(value)
        trainer.update(number, *batches.batch(number, range(8)), 1e-2)
    assert all(torch.equal(old, new) for old, new in zip(state, everything(trainer), strict=True))
    assert trainer.bad_update(session) == 1
    factor.fill_(1)
    trainer.update(3, *batches.batch(3, range(8)), 1e-2)
    assert not torch.equal(state[0], everything(trainer)[0])


def everything(trainer):
    moments = [value for group in trainer.optimizer.state.values() for value in group.values()]
    return [*(p.detach() for p in trainer.objective.model.parameters()), *moments, *trainer.ema.weights.values()]


def test_a_run_that_is_not_finite_stops_naming_update_and_rows(folder, tmp_path):
    model = GPT(gpt_config("GPT-tiny", grid=4, vocab_size=64, num_classes=3))
    state = model.state_dict()
    state["cls_embedding.embedding_table.weight"].fill_(torch.nan)
    save_checkpoint(tmp_path / "bad.pt", {"model": state})
    done = start(TRAIN, *flags(folder, tmp_path / "results", "--gpt-ckpt", tmp_path / "bad.pt"))
    assert done.returncode == 1
    assert "FloatingPointError: update 1: loss or gradient is not finite, in rows [" in done.stderr


def test_average_is_the_recurrence_with_a_warmed_up_decay():
    model = torch.nn.Linear(2, 1, bias=False)
    average, expected = MovingAverage(model), model.weight.detach().double().clone()
    for number in range(1, 30):
        with torch.no_grad():
            model.weight.add_(number)
        average.update(model, number, torch.zeros(()))
        decay = min(EMA_DECAY, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    assert torch.allclose(average.weights["weight"].double(), expected, rtol=1e-5)


def test_batches_read_ahead_are_those_read_one_by_one(folder):
    batches = TokenBatches(open_codes(folder / "codes"), np.arange(64), 8, 0, 3, 0.1)
    expected = [batches.batch(update, range(2, 7)) for update in range(4, 15)]
    for num_workers in (0, 1, 4):
        found = list(batches.ahead(range(4, 15), range(2, 7), num_workers))
        assert len(found) == 11 and all(torch.equal(a, b) for pair in zip(found, expected, strict=True)
                                        for a, b in zip(*pair, strict=True))


def test_held_out_images_are_never_trained_on(folder):
    training, held_out = split_store(open_codes(folder / "codes"), 0.1, seed=3)
    assert len(held_out.rows) == 5 and len(training.rows) == 45
    assert sorted([*training.rows, *held_out.rows]) == list(range(50))
    assert np.array_equal(split_store(open_codes(folder / "codes"), 0.1, seed=3)[1].rows, held_out.rows)


def test_log_is_cut_back_to_the_step_of_the_checkpoint(tmp_path):
    lines = [f"[2026-11-24 00:00:0{update}] update {update}: token loss 1\n" for update in range(1, 6)]
    (tmp_path / "log.txt").write_text("[2026-11-24 00:00:00] GPT-tiny\n" + "".join(lines))
    cut_log(tmp_path / "log.txt", 3)
    assert (tmp_path / "log.txt").read_text() == "[2026-11-24 00:00:00] GPT-tiny\n" + "".join(lines[:3])


def test_flops_are_six_a_weight_and_those_of_causal_attention():
    config = gpt_config("GPT-tiny", grid=4, vocab_size=64, num_classes=3)
    model = GPT(config)
    multiplied = sum(p.numel() for name, p in model.named_parameters() if "embedding" not in name)
    attention = config.num_layers * 3 * 2 * 2 * config.width * config.num_tokens / 2    # q k and p v, forward and back
    assert flops_per_token(config, sum(p.numel() for p in model.parameters())) == 6 * multiplied + attention


def unfinished(folder, tmp_path):
    shutil.copytree(folder / "codes", tmp_path / "codes")
    manifest = json.loads((tmp_path / "codes/manifest.json").read_text())
    (tmp_path / "codes/manifest.json").write_text(json.dumps(manifest | {"complete": False}))


@pytest.mark.parametrize("more, words", [
    (("--epochs", 0), "--epochs: expected at least 1, got 0"),
    (("--global-batch-size", 9, "--gradient-accumulation-steps", 2), "for example 8 or 10, got 9"),
    (("--num-classes", 2), "--num-classes: expected 3"),
    (("--mapping-path", "{0}/short.pt"), "expected a mapping of 64 codes"),
    (("--code-path", "{0}/codes"), "found an unfinished one"),
    (("--gpt-ckpt", "{0}/other.pt"), "the file holds GPT-tiny with 32 codes and 3 classes"),
    (("--gpt-ckpt", "{0}/short.pt"), "expected a state dict"),
    (("--init-from-original",), "expected --gpt-ckpt"),
    (("--results-dir", "/proc/results"), "expected a writable folder"),
    (("--dropout-p", 1), "--dropout-p: expected 0 to below 1"),
    (("--parallel", "fsdp", "--mixed-precision", "fp16"), "got fp16"),
    (("--eval-every", 5, "--eval-share", 0), "--eval-share: expected more than 0"),
])
def test_wrong_input_is_one_line_and_exit_code_2(folder, tmp_path, capsys, more, words):
    unfinished(folder, tmp_path)
    torch.save(torch.arange(63), tmp_path / "short.pt")
    other = GPT(gpt_config("GPT-tiny", grid=4, vocab_size=32, num_classes=3))
    save_checkpoint(tmp_path / "other.pt", {"model": other.state_dict()})
    more = [str(flag).format(tmp_path) for flag in more]
    arguments = list(flags(folder, tmp_path / "results"))
    if "--code-path" in more:                                    # it would add to the other one
        arguments = arguments[2:]
    assert run_here(TRAIN, *arguments, *more) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1, error
    assert not list(tmp_path.glob("results/*"))


def test_codes_out_of_range_name_their_rows(folder, tmp_path):
    shutil.copytree(folder / "codes", tmp_path / "codes")
    codes = np.load(tmp_path / "codes/codes.npy")
    codes[:, :, 5] = 64
    np.save(tmp_path / "codes/codes.npy", codes)
    batches = TokenBatches(open_codes(tmp_path / "codes"), np.arange(64), 8, 0, 3, 0.1)
    with pytest.raises(ValueError, match=r"expected codes 0 \.\. 63, found \d+ \.\. 64 in rows \["):
        batches.batch(0, range(8))
