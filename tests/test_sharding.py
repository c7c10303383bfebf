"""Sharded training begins with, saves and continues from the weights of undivided training."""

import shutil

import pytest
import torch

from autoregressive.models.config import gpt_config
from autoregressive.models.gpt import GPT
from autoregressive.runtime.checkpoint import read_checkpoint, save_checkpoint
from autoregressive.runtime.distributed import Session, open_session, seed_everything
from autoregressive.runtime.entry import leave
from autoregressive.runtime.optim import ModelOptimizer, OptimSettings
from autoregressive.runtime.parallel import device_to_build_on, wrap_for_training
from processes import run_forked

CPU = torch.device("cpu")
# Weights whose numbers of rows, 65 and 5, are odd.
CONFIG = gpt_config("GPT-tiny", grid=3, vocab_size=65, num_classes=4, dropout=0, token_dropout=0)
SETTINGS = OptimSettings(lr=1e-2, weight_decay=0.1, ema=True, max_grad_norm=0.5)


def train_and_save(folder, parallel):
    """Trains a GPT for two steps, saves it and takes a third one, unless it finds such a file.

    Then takes a third step continuing from the file.
    """
    with open_session("cpu") as session:
        if not (folder / "2.pt").exists():
            module, optimizer = build(session, parallel)
            save(session, folder / "0.pt", optimizer.state())
            for step in range(2):
                take_step(module, optimizer, step, session)
            validate(module)
            save(session, folder / "2.pt", optimizer.state())
            take_step(module, optimizer, 2, session)
            save(session, folder / "3.pt", optimizer.state())
        module, optimizer = build(session, parallel, seed=1)
        optimizer.load(read_checkpoint(folder / "2.pt"))
        take_step(module, optimizer, 2, session)
        save(session, folder / "continued.pt", optimizer.state())
    leave(0)


def save(session, path, state):
    if session.is_main:
        save_checkpoint(path, state)
    else:
        assert not state["model"] and not state["ema"], state
        assert not any(state["optimizer"]["state"].values()), state
    session.barrier()


def build(session, parallel, seed=0):
    """Returns a GPT as it is trained, and its optimizer."""
    seed_everything(seed)
    place = device_to_build_on(session, parallel)
    with place:
        model = GPT(CONFIG)
    expected = "meta" if parallel == "fsdp" and session.rank else "cpu"
    assert {weight.device.type for weight in model.parameters()} == {expected}
    module = wrap_for_training(model, session, parallel, model.layers)
    if parallel == "fsdp":
        held = sum(weight.to_local().numel() for weight in model.parameters())
        whole = sum(weight.numel() for weight in model.parameters())
        assert held < whole or session.world_size == 1
    return module, ModelOptimizer(model, SETTINGS, CPU)


def take_step(module, optimizer, step, session):
    """Takes a step with a batch of 12: 1, 2 or 3 processes have equal parts of it."""
    torch.manual_seed(100 + step)
    tokens = torch.randint(65, (12, 9))
    labels = torch.randint(5, (12,))
    part = list(session.part_of(12))
    logits = module(tokens[part, :-1], labels[part])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[part].flatten())
    optimizer.backward(loss)
    optimizer.step(step, 1e-2, loss.detach())


def validate(module):
    """Runs forward alone, after which FSDP2 leaves some weights whole."""
    with torch.inference_mode():
        module(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))


def train(folder, parallel, processes):
    folder.mkdir(exist_ok=True)
    done = run_forked(train_and_save, folder, parallel, processes=processes)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def undivided(tmp_path_factory):
    """The folder of a run by one process that holds all weights."""
    return train(tmp_path_factory.mktemp("sharding") / "ddp", "ddp", 0)


@pytest.fixture(scope="module", params=[1, 2, pytest.param(3, marks=pytest.mark.long)])
def sharded(request, tmp_path_factory):
    """The folder of a run whose processes hold shards."""
    folder = tmp_path_factory.mktemp("sharding") / f"fsdp{request.param}"
    return train(folder, "fsdp", request.param)


def tensors_of(folder, name):
    """Returns all tensors of a saved state by their paths of keys."""
    state = read_checkpoint(folder / name)
    found = {("model", key): tensor for key, tensor in state["model"].items()}
    found |= {("ema", key): tensor for key, tensor in state["ema"].items()}
    for key, moments in state["optimizer"]["state"].items():
        found |= {(key, kind): tensor for kind, tensor in moments.items()}
    return found


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


def assert_close(found, expected):
    """In norm: the first steps of AdamW make much of the rounding of almost zero gradients."""
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key] - tensor).norm() <= 1e-4 * tensor.norm(), key


def test_a_sharded_run_begins_with_the_weights_of_an_undivided_one(sharded, undivided):
    assert_equal(tensors_of(sharded, "0.pt"), tensors_of(undivided, "0.pt"))
    model = read_checkpoint(sharded / "0.pt")["model"]
    seed_everything(0)
    expected = GPT(CONFIG).state_dict()
    assert model.keys() == expected.keys()
    assert all(torch.equal(model[name], expected[name]) for name in expected)


def test_a_sharded_run_saves_what_an_undivided_one_saves(sharded, undivided):
    assert_close(tensors_of(sharded, "3.pt"), tensors_of(undivided, "3.pt"))
    groups = [read_checkpoint(folder / "3.pt")["optimizer"]["param_groups"]
              for folder in (sharded, undivided)]
    assert groups[0] == groups[1] and len(groups[0]) == 2


def test_a_run_continues_from_its_file_bit_for_bit(sharded, undivided):
    for folder in (sharded, undivided):
        assert_equal(tensors_of(folder, "continued.pt"), tensors_of(folder, "3.pt"))


def test_an_undivided_run_continues_from_the_file_of_a_sharded_one(sharded, undivided):
    module, optimizer = build(Session(0, 1, CPU), "ddp", seed=1)
    optimizer.load(read_checkpoint(sharded / "2.pt"))
    loaded = optimizer.state()
    expected = read_checkpoint(sharded / "2.pt")
    for name, tensor in expected["model"].items():
        assert torch.equal(loaded["model"][name], tensor)
        assert torch.equal(loaded["ema"][name], expected["ema"][name])
        for kind, moment in expected["optimizer"]["state"][name].items():
            assert torch.equal(loaded["optimizer"]["state"][name][kind], moment)
    take_step(module, optimizer, 2, Session(0, 1, CPU))
    assert_close(optimizer.state()["model"], read_checkpoint(undivided / "3.pt")["model"])


def test_a_sharded_run_continues_from_the_file_of_an_undivided_one(undivided, tmp_path):
    shutil.copy(undivided / "2.pt", tmp_path)
    train(tmp_path, "fsdp", 2)
    assert not (tmp_path / "3.pt").exists()
    assert_close(tensors_of(tmp_path, "continued.pt"), tensors_of(undivided, "3.pt"))


def test_saving_before_the_first_step_changes_no_step():
    ends = []
    for saves in (False, True):
        module, optimizer = build(Session(0, 1, CPU), "ddp")
        if saves:
            assert optimizer.state()["optimizer"]["state"] == {}
        take_step(module, optimizer, 0, Session(0, 1, CPU))
        ends.append(optimizer.state())
    for name, tensor in ends[1]["model"].items():
        assert torch.equal(ends[0]["model"][name], tensor)
    assert all(moments["step"] == 1 for moments in ends[1]["optimizer"]["state"].values())


@pytest.mark.parametrize("spoil, words", [
    (lambda state: state["model"].pop("norm.weight"),
     "weights of this model, found missing norm.weight"),
    (lambda state: state["optimizer"]["state"].pop("norm.weight"),
     "moments of this model, found missing norm.weight"),
    (lambda state: state["model"].update(more=torch.zeros(2)),
     "weights of this model, found unexpected more"),
    (lambda state: state["model"].update({"norm.weight": torch.zeros(1)}),
     r"shape \(96,\), found \(1,\)"),
])
def test_the_state_of_another_model_is_refused(undivided, spoil, words):
    state = read_checkpoint(undivided / "2.pt")
    spoil(state)
    _, optimizer = build(Session(0, 1, CPU), "ddp")
    with pytest.raises(ValueError, match=words):
        optimizer.load(state)
