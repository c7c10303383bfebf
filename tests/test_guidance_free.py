"""Guidance-free training: its loss and gradients, the embedding of beta, what is sampled."""

import dataclasses
import functools
import json
import math
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from autoregressive.data.batches import TokenBatches
from autoregressive.data.opening import open_codes
from autoregressive.models.config import gpt_config
from autoregressive.models.generate import generate
from autoregressive.models.gpt import GPT
from autoregressive.models.guidance_free import BetaEmbedding, fold_beta
from autoregressive.models.sampler import Sampler
from autoregressive.runtime.checkpoint import list_checkpoints, save_checkpoint
from autoregressive.train.objective import Objective
from processes import run_here, start, start_and_kill
from small_runs import (
    EVERYTHING,
    LOSSES,
    SAMPLE,
    SIZE,
    TRAIN,
    assert_same_end,
    flags,
    last_checkpoint,
    metrics,
    sample_flags,
    steps_done,
    train,
    validation_losses,
    write_data,
)

FREE = ("--guidance-free",)


def new_model(guidance_free=True, dropout=0.0):
    torch.manual_seed(0)
    config = gpt_config("GPT-tiny", grid=4, vocab_size=24, num_classes=5, dropout=dropout,
                        token_dropout=dropout, guidance_free=guidance_free)
    model = GPT(config)
    torch.manual_seed(0)                            # the embedding of beta has drawn numbers, too
    torch.nn.init.normal_(model.output.weight, std=0.3)
    return model


def trained_model(**options):
    """A model whose embedding of beta is no longer zero."""
    model = new_model(**options)
    for parameter in model.t_embedder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch(dtype=torch.float32):
    torch.manual_seed(1)
    return (torch.randint(24, (4, 16)), torch.tensor([0, 5, 2, 4]),
            torch.tensor([0.3, 0.6, 0.0, 0.9], dtype=dtype))


def explicit_loss(model, tokens, labels, betas, weight):
    """Computes the loss from mixed logits; label 5 is the null label."""
    fed = betas.clone()
    fed[labels == 5] = 1
    cond = model.output(model.features(tokens[:, :-1], labels, fed))
    uncond = model.output(model.features(tokens[:, :-1], torch.full_like(labels, 5),
                                         torch.ones_like(betas)))
    share = betas[:, None, None]
    logits = (share * cond + (1 - share) * uncond.detach()).flatten(0, 1)
    clusters = logits.unflatten(-1, (-1, SIZE)).logsumexp(-1)
    targets = tokens.flatten()
    return F.cross_entropy(logits, targets) + weight * F.cross_entropy(clusters, targets // SIZE)


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("name, dtype, tolerance", [
    ("plain", torch.float64, 1e-10), ("plain", torch.float32, 2e-6),
    ("fused", torch.float32, 2e-6)])
def test_loss_and_gradients_are_those_of_explicit_mixed_logits(name, dtype, tolerance, weight):
    model = trained_model().to(dtype)
    expected = explicit_loss(model, *batch(dtype), weight)
    parameters = list(model.parameters())
    expected_gradients = torch.autograd.grad(expected, parameters)
    objective = Objective(model, functools.partial(LOSSES[name], lambda_cce=weight))
    loss, statistics = objective(*batch(dtype))
    assert abs(loss - expected) <= min(tolerance, 1e-6) * expected
    assert statistics[0] + weight * statistics[1] == pytest.approx(loss.item(), rel=1e-6)
    gradients = torch.autograd.grad(loss, parameters)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert (found - wanted).norm() <= tolerance * wanted.norm()


def test_the_head_has_no_gradient_from_the_pass_without_label():
    features, fixed, head = torch.randn(7, 16), torch.randn(7, 16), torch.randn(24, 16)
    targets = torch.randint(24, (7,))
    for head_loss in LOSSES.values():
        weight = head.clone().requires_grad_()
        loss, _ = head_loss(0 * features, weight, targets, lambda_cce=1.0, fixed=fixed)
        loss.backward()
        assert not weight.grad.any()
        moved = (features + fixed).requires_grad_()         # the same logits, but with a gradient
        together, _ = head_loss(moved, weight, targets, lambda_cce=1.0)
        apart, _ = head_loss(features, weight, targets, lambda_cce=1.0, fixed=fixed)
        torch.testing.assert_close(apart, together)


def test_the_pass_without_label_has_no_dropout_and_draws_nothing():
    losses = []
    for free in (True, False):
        model = trained_model(dropout=0.5) if free else new_model(free, dropout=0.5)
        torch.manual_seed(3)
        tokens, labels, betas = batch()
        objective = Objective(model, functools.partial(LOSSES["fused"], lambda_cce=1.0))
        objective(tokens, labels, *((torch.ones_like(betas),) if free else ()))
        losses.append(torch.rand(1))                        # what the generator gives next
        assert objective.training and model.training
    assert losses[0] == losses[1]


def test_a_new_model_is_an_ordinary_one_bit_for_bit():
    free, ordinary = new_model(), new_model(guidance_free=False)
    names = list(free.state_dict())
    assert names[:-4] == list(ordinary.state_dict())
    assert names[-4:] == [f"t_embedder.mlp.{layer}.{kind}" for layer in (0, 2)
                          for kind in ("weight", "bias")]
    for name, tensor in ordinary.state_dict().items():
        assert torch.equal(tensor, free.state_dict()[name])
    assert free.t_embedder.mlp[0].weight.detach().std() == pytest.approx(0.02, rel=0.05)
    tokens, labels, betas = batch()
    expected = ordinary.features(tokens[:, :-1], labels)
    assert torch.equal(free.features(tokens[:, :-1], labels, betas), expected)


def test_beta_is_described_by_waves():
    embedding = BetaEmbedding(8)
    described = []
    embedding.mlp.register_forward_pre_hook(lambda _, inputs: described.append(inputs[0]))
    embedding(torch.tensor([0.3, 1.0]))
    for row, beta in zip(described[0], (0.3, 1.0), strict=True):
        for number in (0, 1, 64, 127):
            frequency = 10000 ** (-number / 128)
            assert row[number] == pytest.approx(math.cos(1000 * beta * frequency), abs=2e-4)
            assert row[128 + number] == pytest.approx(math.sin(1000 * beta * frequency), abs=2e-4)
    assert [tuple(tensor.shape) for tensor in embedding.state_dict().values()] == [
        (8, 256), (8,), (8, 8), (8,)]


@torch.no_grad()
@pytest.mark.parametrize("beta", [0.4, 1.0])
def test_a_folded_model_gives_the_logits_of_its_beta(beta):
    model = trained_model().eval()
    tokens, labels, betas = batch()
    expected = model.output(model.features(tokens[:, :-1], labels, torch.full_like(betas, beta)))
    folded = GPT(dataclasses.replace(model.config, guidance_free=False)).eval()
    folded.load_state_dict(fold_beta(model.state_dict(), beta))
    found = folded(tokens[:, :-1], labels)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    # And samples them: the greedy tokens are those of whole passes of the unfolded model.
    uniforms = torch.zeros(4, 16, dtype=torch.float64)
    sampled = generate(folded, labels, uniforms, Sampler(cfg_scale=1.0, greedy=True))
    so_far = torch.empty(4, 0, dtype=torch.int64)
    for _ in range(16):
        rows = model.features(so_far, labels, torch.full_like(betas, beta))[:, -1]
        so_far = torch.cat([so_far, model.output(rows).argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(sampled, so_far)
    with pytest.raises(ValueError, match="expected an ordinary GPT, got one whose input is beta"):
        generate(model, labels, uniforms, Sampler())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("free")
    write_data(folder)
    return folder


def test_betas_follow_from_seed_epoch_and_image_alone(folder):
    def batches(draws_betas, seed=0):
        return TokenBatches(open_codes(folder / "codes"), np.arange(64), 10, seed, 3, 0.1,
                            draws_betas=draws_betas)

    by_image = {}
    for step in range(10):                          # two epochs of 50 images
        tokens, labels, betas = batches(True)[step, range(10)]
        ordinary = batches(False)[step, range(10)]
        assert torch.equal(tokens, ordinary[0]) and torch.equal(labels, ordinary[1])
        assert torch.equal(batches(True)[step, range(4, 7)][2], betas[4:7])
        for row, beta in zip(batches(True).rows(step), betas.tolist(), strict=True):
            by_image.setdefault(row, []).append(beta)
    drawn = np.array(list(by_image.values()))
    assert drawn.shape == (50, 2) and len(np.unique(drawn)) == 100
    assert 0 <= drawn.min() < 0.1 and 0.9 < drawn.max() < 1 and abs(drawn.mean() - 0.5) < 0.1
    assert not torch.equal(batches(True, seed=1)[0, range(10)][2], batches(True)[0, range(10)][2])


@pytest.fixture(scope="module")
def free_run(folder, tmp_path_factory):
    """The results of a guidance-free run with a validation and pictures."""
    results = tmp_path_factory.mktemp("free_run")
    train(folder, results, *FREE, *EVERYTHING, "--validation_step", 10)
    return results


def test_a_run_learns_validates_at_beta_1_and_leaves_pictures(folder, free_run):
    run, = free_run.iterdir()
    assert run.name == "000-GPT-tiny-lambda=1-guidance-free-cluster_size=8"
    rows = [row for row in metrics(free_run) if "token_loss" in row]
    assert rows[-1]["token_loss"] < rows[0]["token_loss"]
    assert len(list((run / "pictures").iterdir())) == 2
    saved = last_checkpoint(free_run)
    assert saved["settings"]["guidance_free"] and saved["ema"].keys() == saved["model"].keys()
    assert saved["model"]["t_embedder.mlp.2.weight"].abs().max() > 0
    # The validation loss is that of the ordinary model at beta 1.
    val = [row for row in metrics(free_run) if "val_token_loss" in row][-1]
    expected = validation_losses(folder, fold_beta(saved["model"], 1.0), share=0.1, batch_size=4)
    assert val["val_token_loss"] == pytest.approx(expected[0], rel=1e-5)


@pytest.mark.parametrize("processes, more", [
    (0, EVERYTHING),
    pytest.param(2, ("--parallel", "fsdp", "--patch-level", 2), marks=pytest.mark.long),
    pytest.param(2, EVERYTHING, marks=pytest.mark.long)])
def test_a_run_killed_and_resumed_ends_like_a_straight_one(folder, tmp_path, processes, more):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    more = (*FREE, *more)
    assert start(TRAIN, *flags(folder, straight, *more), processes=processes).returncode == 0
    command = flags(folder, killed, *more)
    status = start_and_kill(TRAIN, *command, processes=processes,
                            when=lambda: steps_done(killed) >= 6)
    assert status == -signal.SIGKILL
    assert start(TRAIN, *command, processes=processes).returncode == 0
    assert_same_end(straight, killed)


@pytest.mark.parametrize("processes, more", [
    (0, ("--no-fused-loss", "--gradient-accumulation-steps", 2)), (2, ()),
    (2, ("--parallel", "fsdp"))])
def test_every_way_to_compute_a_step_gives_the_same(folder, tmp_path, processes, more):
    plain = (*FREE, "--dropout-p", 0, "--token-dropout-p", 0, "--max-steps", 5)
    train(folder, tmp_path / "one", *plain)
    train(folder, tmp_path / "other", *plain, *more, processes=processes)
    for row, other in zip(metrics(tmp_path / "other"), metrics(tmp_path / "one"), strict=True):
        for value in ("token_loss", "cluster_loss", "grad_norm"):
            assert row[value] == pytest.approx(other[value], rel=1e-5), value


def test_an_ordinary_gpt_is_trained_on_guidance_free(folder, tmp_path, capsys):
    train(folder, tmp_path / "a", "--max-steps", 6)
    checkpoint = next((tmp_path / "a").glob("*/checkpoints"))
    start_from = ("--gpt-ckpt", checkpoint)
    train(folder, tmp_path / "b", *FREE, *start_from, "--max-steps", 1, "--lr", 0)
    assert "an ordinary GPT, whose weights alone are trained guidance-free" in (
        capsys.readouterr().out)
    before, after = last_checkpoint(tmp_path / "a"), last_checkpoint(tmp_path / "b")
    for name, tensor in before["model"].items():
        assert torch.equal(after["model"][name], tensor)
    assert not after["model"]["t_embedder.mlp.2.weight"].any()
    # The other way round there is no meaning.
    free = next((tmp_path / "b").glob("*/checkpoints"))
    assert run_here(TRAIN, *flags(folder, tmp_path / "c", "--gpt-ckpt", free)) == 2
    assert "trained guidance-free" in capsys.readouterr().err


def arrays_of(out):
    path, = out.glob("*.npz")
    with np.load(path) as arrays:
        return path.name, {name: arrays[name] for name in arrays.files}


def test_a_guidance_free_checkpoint_is_sampled_in_one_pass_at_its_beta(
        folder, free_run, tmp_path, capsys):
    checkpoints, = free_run.glob("*/checkpoints")
    assert run_here(SAMPLE, *sample_flags(folder, checkpoints, tmp_path / "a", "--cfg-scale",
                                          2)) == 0
    assert "one pass at --beta 0.5, which stands for --cfg-scale 2" in capsys.readouterr().out
    assert run_here(SAMPLE, *sample_flags(folder, checkpoints, tmp_path / "b", "--beta", 0.5)) == 0
    name, arrays = arrays_of(tmp_path / "a")
    same_name, same = arrays_of(tmp_path / "b")
    assert name == same_name and "-cfg-2.0-" in name and name.endswith("-beta-0.5.npz")
    assert np.array_equal(arrays["tokens"], same["tokens"])
    assert json.loads(str(arrays["settings"]))["beta"] == 0.5
    # The folded weights, as an ordinary checkpoint, give the same.
    saved = last_checkpoint(free_run)
    save_checkpoint(tmp_path / "folded.pt", {"model": fold_beta(saved["model"], 0.5),
                                             "settings": saved["settings"]})
    # So does a published file, which is known by the names of its weights.
    save_checkpoint(tmp_path / "published.pt", {"model": saved["model"]})
    for name, scale in (("folded", 1), ("published", 2)):
        assert run_here(SAMPLE, *sample_flags(folder, tmp_path / f"{name}.pt", tmp_path / name,
                                              "--cfg-scale", scale)) == 0
        assert np.array_equal(arrays_of(tmp_path / name)[1]["tokens"], arrays["tokens"])


@pytest.mark.parametrize("more, words", [
    (("--cfg-schedule", "linear"), "--cfg-schedule: expected none for a GPT trained guidance-free"),
    (("--cfg-interval", 3), "--cfg-interval: expected none"),
    (("--cfg-scale-within", 2), "--cfg-scale-within: expected none"),
    (("--cfg-scale", 0.5), "--cfg-scale: expected at least 1"),
    (("--beta", 0.5, "--cfg-scale", 4), "--beta: expected no --cfg-scale beside it"),
    (("--preset", "strong-XL-256"), "--preset: expected none for a GPT trained guidance-free"),
    (("--beta", 0), "--beta: expected a fraction above 0"),
    (("--beta", 1.5), "--beta: expected a fraction above 0"),
])
def test_guidance_that_one_pass_cannot_follow_is_refused(
        folder, free_run, tmp_path, capsys, more, words):
    checkpoints, = free_run.glob("*/checkpoints")
    assert run_here(SAMPLE, *sample_flags(folder, checkpoints, tmp_path, *more)) == 2
    line = capsys.readouterr().err
    assert words in line and len(line.splitlines()) == 1


def test_a_guidance_free_file_that_lacks_a_weight_is_one_line(folder, free_run, tmp_path, capsys):
    weights = last_checkpoint(free_run)["model"]
    del weights["t_embedder.mlp.2.bias"]
    save_checkpoint(tmp_path / "damaged.pt", {"model": weights})
    assert run_here(SAMPLE, *sample_flags(folder, tmp_path / "damaged.pt", tmp_path / "a")) == 2
    line = capsys.readouterr().err
    assert "t_embedder.mlp.2.bias" in line and len(line.splitlines()) == 1


def test_a_scale_is_not_changed_by_standing_for_a_beta(folder, free_run, tmp_path):
    checkpoints, = free_run.glob("*/checkpoints")
    assert run_here(SAMPLE, *sample_flags(folder, checkpoints, tmp_path, "--cfg-scale", 1.9)) == 0
    assert "-cfg-1.9-" in arrays_of(tmp_path)[0]


def test_beta_of_an_ordinary_gpt_is_refused(folder, tmp_path, capsys):
    train(folder, tmp_path / "a", "--max-steps", 1)
    checkpoints = list_checkpoints(next((tmp_path / "a").glob("*/checkpoints")))
    capsys.readouterr()
    assert run_here(SAMPLE, *sample_flags(folder, checkpoints[0], tmp_path / "b", "--beta",
                                          0.5)) == 2
    assert "--beta: expected a GPT trained guidance-free, got an ordinary one" in (
        capsys.readouterr().err)
