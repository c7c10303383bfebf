"""What the training loop is given: what to train, its batches, perhaps a file to start from."""

from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from torch import Tensor

from autoregressive.runtime.meter import Meter

Batch = TypeVar("Batch", contravariant=True)        # tensors, as read_ahead hands them over


class Trainable(Protocol[Batch]):
    """What the loop trains.

    Attributes:
        meter: means of what the steps report.
    """

    meter: Meter

    def step(self, step: int, batch: Batch, lr: float) -> None:
        """Applies step number `step`, from 0, and adds what it measured to the meter.

        Args:
            step: its number.
            batch: this process's part of the batch, on the CPU.
            lr: learning rate.
        """

    def validate(self) -> dict[str, float]:
        """Returns numbers on the validation images, none without such (all processes call this)."""

    def save_pictures(self, path: Path) -> None:
        """Saves a picture of what the present weights can do (all processes call this)."""

    def state(self) -> dict[str, Any]:
        """Returns all that training continues from, as plain containers, on rank 0.

        All processes call this.
        """

    def load(self, state: dict[str, Any]) -> None:
        """Loads what `state` returned, read on every process."""


class Batches(Protocol):
    """What a Trainable is trained on; which rows come in which step follows from the seed alone.

    Attributes:
        per_epoch: steps of an epoch.
    """

    per_epoch: int

    def rows(self, step: int) -> np.ndarray:
        """Returns the rows (B,) of the data set in the batch of a step, from 0."""

    def __getitem__(self, key: tuple[int, range]) -> object:
        """Returns the part of the batch of a step, from 0, at a range of places of 0 .. B - 1."""


class ValBatches(Protocol):
    """What a GPT is validated on: data.batches.TokenBatches.

    Attributes:
        per_epoch: number of batches.
        batch_size: images of a batch, over all processes.
    """

    per_epoch: int
    batch_size: int

    def __getitem__(self, key: tuple[int, range]) -> tuple[Tensor, Tensor]:
        """Returns tokens (B, T) and labels (B,) at a range of places of a batch, on the CPU."""


class Start(Protocol):
    """A checkpoint file that a new run may start from.

    Attributes:
        path: the file.
        payload: all that was saved in it.
        continues: whether the run goes on with all of the payload, including the optimizer's state,
            and not with the weights alone.
    """

    path: Path
    payload: dict[str, Any]
    continues: bool
