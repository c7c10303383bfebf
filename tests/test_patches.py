"""Training on patches first: the loss of several targets a row, the rows of patches, the stages."""

import functools
import signal

import pytest
import torch
import torch.nn.functional as F

from autoregressive.models.config import gpt_config
from autoregressive.models.gpt import GPT
from autoregressive.models.patches import StageSettings, patch_at, patch_table, split_patches
from autoregressive.models.rope import rotary_table
from autoregressive.runtime.checkpoint import list_checkpoints
from autoregressive.runtime.schedules import LearningRate, StagedRate
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

STAGES = ("--patch-level", 2, "--epoch-rate", 0.4)
# Rows of 4 targets: all different, two equal, two of one cluster, all equal, all of one cluster.
TARGETS = torch.tensor([[0, 5, 10, 23], [7, 7, 0, 12], [8, 9, 20, 1], [3, 3, 3, 3],
                        [16, 17, 18, 19], [22, 1, 22, 2], [4, 4, 6, 6]])


def losses_and_gradients(head_loss, targets, repeats=1, dtype=torch.float32, weight=0.7):
    torch.manual_seed(0)
    features = torch.randn(7, 16, dtype=dtype, requires_grad=True)
    head = torch.randn(24, 16, dtype=dtype, requires_grad=True)
    rows = features.repeat_interleave(repeats, dim=0)
    loss, statistics = head_loss(rows, head, targets, lambda_cce=weight)
    (3 * loss).backward()
    return loss.detach(), statistics, features.grad, head.grad


@pytest.mark.parametrize("weight", [0.0, 1.0, 0.37])
@pytest.mark.parametrize("name, dtype, tolerance", [
    ("plain", torch.float64, 1e-12), ("plain", torch.float32, 1e-6),
    ("fused", torch.float32, 1e-6)])
def test_several_targets_of_a_row_are_as_many_rows(name, dtype, tolerance, weight):
    options = {"dtype": dtype, "weight": weight}
    found = losses_and_gradients(LOSSES[name], TARGETS, **options)
    expected = losses_and_gradients(LOSSES["plain"], TARGETS.flatten(), repeats=4, **options)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_several_targets_is_the_equation(name):
    torch.manual_seed(1)
    logits = torch.randn(7, 24, requires_grad=True)
    loss, _ = LOSSES[name](logits, torch.eye(24), TARGETS, lambda_cce=0.7)
    gradient, = torch.autograd.grad(loss, logits)
    for row, targets in enumerate(TARGETS.tolist()):
        z = logits[row].detach()
        expected = 1.7 * z.softmax(0)
        for target in targets:
            inside = range(target // SIZE * SIZE, target // SIZE * SIZE + SIZE)
            s_c = z[list(inside)].logsumexp(0)
            expected[target] -= 1 / 4
            for code in inside:
                expected[code] -= 0.7 / 4 * (z[code] - s_c).exp()
        assert torch.allclose(7 * gradient[row], expected, atol=1e-6)


def test_accuracy_counts_pairs_of_rows_and_targets():
    logits = 5.0 * F.one_hot(torch.tensor([0, 12]), 24)
    targets = torch.tensor([[0, 3, 4, 20], [12, 13, 14, 14]])       # of clusters 0 0 1 5, 3 3 3 3
    for head_loss in LOSSES.values():
        _, statistics = head_loss(logits, torch.eye(24), targets, lambda_cce=1.0)
        assert statistics[2] == pytest.approx(6 / 8)


@pytest.mark.parametrize("grid, patch", [(4, 1), (4, 2), (6, 2), (6, 3), (4, 4)])
def test_patches_are_in_raster_order_and_so_are_their_tokens(grid, patch):
    tokens = torch.randint(100, (3, grid * grid))
    found = split_patches(tokens, grid, patch)
    side = grid // patch
    assert found.shape == (3, side * side, patch * patch)
    for row in range(grid):
        for column in range(grid):
            number = row // patch * side + column // patch
            place = row % patch * patch + column % patch
            assert torch.equal(found[:, number, place], tokens[:, row * grid + column])


@pytest.mark.parametrize("grid, patch", [(4, 2), (6, 3), (16, 2)])
def test_patches_turn_by_their_own_row_and_column(grid, patch):
    found = patch_table(rotary_table(grid, 16), grid, patch)
    assert torch.equal(found, rotary_table(grid // patch, 16))


def new_model(**options):
    torch.manual_seed(0)
    config = gpt_config("GPT-tiny", grid=4, vocab_size=24, num_classes=5, dropout=0,
                        token_dropout=0, **options)
    model = GPT(config)
    torch.nn.init.normal_(model.output.weight, std=0.3)
    return model


def batch():
    torch.manual_seed(1)
    return torch.randint(24, (3, 16)), torch.tensor([0, 5, 2])


def slow_loss(model, tokens, labels, weight):
    """Goes through images, patches and their tokens one by one; grid 4, patches of 2 x 2."""
    losses = []
    table = rotary_table(2, model.config.head_dim)[:4]
    for image, label in zip(tokens, labels, strict=True):
        cells = image.view(4, 4)
        patches = [cells[row:row + 2, column:column + 2].flatten()
                   for row in (0, 2) for column in (0, 2)]
        rows = [model.cls_embedding(label[None])[0, 0]]
        rows += [model.tok_embeddings(patch).mean(0) for patch in patches[:-1]]
        x = torch.stack(rows)[None]
        for layer in model.layers:
            x = layer(x, table)
        logits = model.output(model.norm(x))[0]
        for row, patch in zip(logits, patches, strict=True):
            clusters = row.view(-1, SIZE).logsumexp(-1)
            for target in patch:
                losses.append(F.cross_entropy(row, target)
                              + weight * F.cross_entropy(clusters, target // SIZE))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("name", LOSSES)
def test_a_step_on_patches_equals_a_loop_over_them(name, weight):
    model = new_model()
    expected = slow_loss(model, *batch(), weight)
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
    head_loss = functools.partial(LOSSES[name], lambda_cce=weight)
    objective = Objective(model, head_loss, patch_at=lambda step: 2)
    loss, statistics = objective(*batch())
    assert abs(loss - expected) < 1e-6 * expected
    assert statistics[0] + weight * statistics[1] == pytest.approx(loss.item())
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert (found - wanted).norm() <= 2e-6 * wanted.norm()


@pytest.mark.parametrize("name", LOSSES)
def test_patches_of_one_token_are_ordinary_training_bit_for_bit(name):
    results = []
    for patch_of in ({}, {"patch_at": lambda step: 1}):
        model = new_model()
        head_loss = functools.partial(LOSSES[name], lambda_cce=1.0)
        loss, _ = Objective(model, head_loss, **patch_of)(*batch())
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    tokens, labels = batch()
    model = new_model()
    features = model.features(tokens[:, :-1], labels).flatten(0, 1)
    loss, _ = head_loss(features, model.output.weight, tokens.flatten())
    results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for found in results[1:]:
        assert all(map(torch.equal, results[0], found))


def test_a_patch_does_not_see_those_after_it():
    model = new_model().eval()
    tokens, labels = batch()
    before = model.features(tokens, labels, patch=2)
    changed = tokens.clone()
    changed[:, 8:] = 23 - changed[:, 8:]            # the patches 2 and 3
    after = model.features(changed, labels, patch=2)
    assert torch.equal(before[:, :3], after[:, :3]) and not torch.equal(before[:, 3], after[:, 3])


def test_validation_is_always_of_single_tokens():
    model = new_model()
    head_loss = functools.partial(LOSSES["fused"], lambda_cce=1.0)
    on_patches = Objective(model, head_loss, patch_at=lambda step: 2).eval()
    ordinary = Objective(model, head_loss).eval()
    assert torch.equal(on_patches(*batch())[1], ordinary(*batch())[1])


@pytest.mark.parametrize("level, rate, epochs, max_steps, expected", [
    (1, 0.5, 300, 0, [3000]), (2, 0.5, 300, 0, [1500, 3000]), (3, 0.5, 300, 0, [750, 1500, 3000]),
    (2, 0.3, 9, 0, [20, 90]), (2, 0.5, 300, 7, [3, 7]), (3, 0.3, 1, 100, [9, 30, 100]),
    (2, 0.29, 100, 0, [290, 1000])])
def test_stages_end_where_the_paper_says(level, rate, epochs, max_steps, expected):
    ends = StageSettings(level, rate).ends(epochs, max_steps, steps_per_epoch=10)
    assert list(ends) == expected
    for step in range(expected[-1]):
        stage = [step < end for end in expected].index(True)
        assert patch_at(step, ends) == 2 ** (level - 1 - stage)


@pytest.mark.parametrize("level, rate, epochs, max_steps", [
    (2, 1.0, 3, 0), (2, 0.5, 1, 0), (3, 0.1, 1, 3), (2, 0.4, 9, 2)])
def test_stages_without_a_step_are_refused(level, rate, epochs, max_steps):
    with pytest.raises(ValueError, match="expected stages of at least one step"):
        StageSettings(level, rate).ends(epochs, max_steps, steps_per_epoch=10)


def test_a_lengthened_run_in_stages_is_another_run(folder, tmp_path):
    train(folder, tmp_path, *STAGES, "--max-steps", 5)
    train(folder, tmp_path, *STAGES, "--max-steps", 10)
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert names == [f"00{number}-GPT-tiny-lambda=1-patch_level=2-cluster_size=8"
                     for number in (0, 1)]


def test_the_learning_rate_begins_anew_with_each_stage():
    rates = tuple(LearningRate(1.0, "linear", length, warmup=2, decay_from=0.6, least=0.2)
                  for length in (5, 10))
    staged = StagedRate(rates, (5, 15))
    first = [0.5, 1, 1, 1, 0.6]                     # falls from step floor(.6 * 5) on
    second = [0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4]
    assert [staged.at(step) for step in range(15)] == pytest.approx(first + second)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patches")
    write_data(folder)
    return folder


def test_a_run_in_stages_follows_its_flags_and_validates_on_tokens(folder, tmp_path):
    train(folder, tmp_path, *STAGES, "--lr-schedule", "linear", "--lr-decay-from", 0.5, "--warmup",
          2, "--val-every", 8, "--val-share", 0.2, "--max-steps", 20, "--lr", 1e-3)
    run, = tmp_path.iterdir()
    log = (run / "log.txt").read_text()
    assert "stages: 2 x 2 tokens up to step 8, 1 x 1 tokens up to step 20" in log
    rates = [row["lr"] for row in metrics(tmp_path) if "lr" in row]
    shape = [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]      # of 8 steps
    assert rates[:8] == pytest.approx([1e-3 * part for part in shape])
    assert rates[8:11] == pytest.approx([0.5e-3, 1e-3, 1e-3])
    validated = [row for row in metrics(tmp_path) if "val_token_loss" in row]
    assert [row["step"] for row in validated] == [8, 16, 20]
    saved = last_checkpoint(tmp_path)
    assert saved["settings"]["patch_level"] == 2
    expected = validation_losses(folder, saved["model"], share=0.2, batch_size=8)
    assert [validated[-1]["val_token_loss"],
            validated[-1]["val_cluster_loss"]] == pytest.approx(expected, rel=1e-5)


def test_no_line_of_the_metrics_is_of_two_stages(folder, tmp_path):
    train(folder, tmp_path, *STAGES, "--log-every", 3)
    rows = [row for row in metrics(tmp_path) if "patch" in row]
    assert [row["step"] for row in rows] == [3, 6, 8, 9, 12, 15, 18, 20]
    assert [row["patch"] for row in rows] == [2, 2, 2, 1, 1, 1, 1, 1]
    log = next(tmp_path.glob("*/log.txt")).read_text()
    for step in (1, 9):
        assert f"peak memory after step {step}: " in log


def test_a_checkpoint_of_a_stage_of_patches_is_sampled_with_a_warning(folder, tmp_path, capsys):
    train(folder, tmp_path / "run", *STAGES)
    checkpoints = list_checkpoints(next((tmp_path / "run").glob("*/checkpoints")))
    warnings = []
    for path in (checkpoints[1], checkpoints[-1]):          # after 6 steps, and at the end
        assert run_here(SAMPLE, *sample_flags(folder, path, tmp_path / path.stem)) == 0
        warnings.append("trained on patches of 2 x 2 tokens so far" in capsys.readouterr().out)
    assert warnings == [True, False]


@pytest.mark.parametrize("warmup", [8, 12])
def test_a_warm_up_that_a_stage_cuts_short_is_refused(folder, tmp_path, capsys, warmup):
    assert run_here(TRAIN, *flags(folder, tmp_path, *STAGES, "--warmup", warmup)) == 2
    line = capsys.readouterr().err
    assert f"--warmup: expected fewer steps than each stage of the run has, got {warmup}" in line
    assert len(line.splitlines()) == 1


@pytest.mark.parametrize("processes, more", [
    (0, EVERYTHING),
    pytest.param(2, ("--parallel", "fsdp"), marks=pytest.mark.long)])
def test_a_run_stopped_beside_the_end_of_a_stage_ends_like_a_straight_one(
        folder, tmp_path, processes, more):
    more = (*STAGES, *more)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert start(TRAIN, *flags(folder, straight, *more), processes=processes).returncode == 0
    command = flags(folder, killed, *more, "--ckpt-steps", 1)
    for goal in (7, 9):                             # the first stage ends after step 8
        status = start_and_kill(TRAIN, *command, processes=processes,
                                when=lambda goal=goal: steps_done(killed) >= goal)
        assert status == -signal.SIGKILL
    assert start(TRAIN, *command, processes=processes).returncode == 0
    assert_same_end(straight, killed)


def test_patches_that_do_not_divide_the_grid_are_refused(folder, tmp_path, capsys):
    assert run_here(TRAIN, *flags(folder, tmp_path, "--patch-level", 4)) == 2
    line = capsys.readouterr().err
    assert "--patch-level: expected patches that divide a grid of 4 tokens, got 4" in line
    assert len(line.splitlines()) == 1
