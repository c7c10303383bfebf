"""What a run starts from when its own checkpoints cannot be read."""

from types import SimpleNamespace

import pytest
import torch

from autoregressive.runtime.distributed import Session
from autoregressive.runtime.identity import RunFolder
from autoregressive.runtime.training import TrainingRun


@pytest.fixture
def run(tmp_path):
    """A run whose only checkpoint is damaged."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "0000003.pt").write_text("no checkpoint")
    trainable = SimpleNamespace(load=None)
    batches = SimpleNamespace(per_epoch=1)
    settings = SimpleNamespace(num_steps=lambda per_epoch: 5)
    session = Session(0, 1, torch.device("cpu"))
    return TrainingRun(RunFolder(tmp_path), trainable, batches, settings, session,
                       checkpoint_settings={}, speed=None, curves=(), result=())


def refuse():
    raise ValueError("start.pt: expected a checkpoint of fewer than the run's 5 steps")


def test_a_run_whose_checkpoints_are_damaged_checks_its_start_first(run, tmp_path, capsys):
    payload = {"optimizer": {}, "steps": 7}
    start = SimpleNamespace(path=tmp_path / "start.pt", payload=payload, continues=True)
    with pytest.raises(SystemExit) as stop:
        run.resume(start, refuse)
    assert stop.value.code == 2 and "expected a checkpoint of fewer" in capsys.readouterr().err
    assert run.steps == 0


def test_a_start_of_weights_alone_is_not_checked_again(run, tmp_path):
    run.resume(SimpleNamespace(path=tmp_path / "start.pt", payload={}, continues=False), refuse)
    assert run.steps == 0 and (run.folder.checkpoints / "0000003.damaged").exists()
