"""The log for TensorBoard: no step twice after a kill, rank 0 alone, nothing unless asked for."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.runtime.checkpoint import list_checkpoints
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.event_files import EventFiles
from autoregressive.runtime.files import write_json
from autoregressive.runtime.identity import RunFolder
from autoregressive.runtime.run_log import RunLog
from processes import run_here
from small_runs import TRAIN, metrics, train, write_data

TENSORBOARD = ("--log-to", "tensorboard")
SETTINGS = {"lr": 0.5, "name": "a run"}


def read_events(folder):
    """Returns what TensorBoard shows of a run: points of every scalar, pictures, the settings."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    scalars = {}
    for name in tags["scalars"]:
        scalars[name] = [(point.step, point.value) for point in events.Scalars(name)]
    pictures = []
    if tags["images"]:
        pictures = [(each.step, each.width, each.height) for each in events.Images("pictures")]
    texts = [each.tensor_proto.string_val[0].decode()
             for each in events.Tensors("settings/text_summary")]
    return SimpleNamespace(scalars=scalars, pictures=pictures, texts=texts)


def test_what_a_killed_start_left_of_later_steps_is_not_shown(tmp_path):
    write_json(tmp_path / "config.json", SETTINGS)
    Image.fromarray(np.zeros((3, 5, 3), np.uint8)).save(tmp_path / "x.png")
    killed = EventFiles(tmp_path, 0)
    for steps in range(1, 7):
        killed.write(steps, {"loss": 10 * steps})
        killed.add_pictures(steps, tmp_path / "x.png")
    killed.flush()                                  # then it is killed
    again = EventFiles(tmp_path, 4)
    for steps in range(5, 9):
        again.write(steps, {"loss": steps, "lr": 0.5})
    again.close()
    shown = read_events(tmp_path)
    assert shown.scalars == {"loss": [(1, 10), (2, 20), (3, 30), (4, 40),
                                      (5, 5), (6, 6), (7, 7), (8, 8)],
                             "lr": [(5, 0.5), (6, 0.5), (7, 0.5), (8, 0.5)]}
    assert shown.pictures == [(steps, 5, 3) for steps in range(1, 5)]
    text, = shown.texts
    assert json.loads(text.strip("`")) == SETTINGS
    killed.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("events")
    write_data(folder)
    return folder


def test_a_resumed_training_shows_every_line_of_its_metrics_and_every_picture_once(
        folder, tmp_path):
    more = (*TENSORBOARD, "--validation_step", 2)
    train(folder, tmp_path, *more, "--max-steps", 5)
    run, = tmp_path.iterdir()
    list_checkpoints(run / "checkpoints")[-1].unlink()          # as if killed after step 5
    (run / "finished.json").unlink()
    train(folder, tmp_path, *more, "--max-steps", 6)
    train(folder, tmp_path, "--max-steps", 7)                   # the log is no part of the identity
    assert len(list(run.glob("events.out.tfevents.*"))) == 2
    shown = read_events(run)
    expected = [(row["step"], pytest.approx(row["token_loss"])) for row in metrics(tmp_path)[:6]]
    assert shown.scalars["token_loss"] == expected and len(expected) == 6
    assert [steps for steps, _, _ in shown.pictures] == [2, 4, 6]
    text, = shown.texts
    assert json.loads(text.strip("`"))["max_steps"] == 5


def test_rank_0_alone_writes_event_files(tmp_path):
    write_json(tmp_path / "config.json", SETTINGS)
    for rank, count in ((1, 0), (0, 1)):
        session = Session(rank, 2, torch.device("cpu"))
        log = RunLog(RunFolder(tmp_path), session, ("loss",), steps=0, num_steps=3, batch_size=2,
                     log="tensorboard")
        log.write(1, {"loss": 2.0})
        log.add_pictures(1, tmp_path / "none.png")              # of a run that saves none
        log.close()
        assert len(list(tmp_path.glob("events.*"))) == count


@pytest.fixture
def no_tensorboard(monkeypatch):
    """Makes every import of the package fail."""
    for name in ("torch.utils.tensorboard", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("script, words", [
    (TRAIN, ("--code-path", "codes")),
    ("tokenizer/tokenizer_image/vq_train.py", ("--dataset", "digits", "--data-path", "val",
                                               "--image-size", 16))])
def test_tensorboard_that_is_missing_is_one_line_before_any_work(
        tmp_path, no_tensorboard, capsys, script, words):
    assert run_here(script, *words, "--results-dir", tmp_path / "results", *TENSORBOARD) == 2
    printed = capsys.readouterr()
    line = "--log-to tensorboard: expected the package tensorboard, found none"
    assert line in printed.err and len(printed.err.splitlines()) == 1 and not printed.out
    assert "pip install tensorboard" in printed.err and not list(tmp_path.iterdir())


def test_a_training_that_does_not_ask_for_tensorboard_needs_none(folder, tmp_path, no_tensorboard):
    train(folder, tmp_path, "--max-steps", 1)
    assert not list(tmp_path.rglob("events.*"))
