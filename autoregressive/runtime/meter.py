"""Means of what the steps of a training report, kept on the device until they are read."""

import torch
from torch import Tensor

from autoregressive.runtime.distributed import Session


class Meter:
    """Means over the steps since the last reading, and the first step that was not finite.

    Attributes:
        names: of the values.
        device: where they are kept.
        sums: (len(names),) float32, of this process since the last reading.
        count: steps since then.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        """`names` are those of the values that every step adds; `device` is where they are."""
        self.names = names
        self.device = device
        self.sums = torch.zeros(len(names), device=device)
        self.count = 0
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    def load(self, sums: Tensor, count: int) -> None:
        """Goes on from the `sums` and the `count` of a meter; from 0 if it had other values."""
        if len(sums) == len(self.names):
            self.sums = sums.to(self.device)
            self.count = count

    def add(self, step: int, values: Tensor, is_bad: Tensor) -> None:
        """Adds what one step measured; does not wait for the device.

        Args:
            step: its number, from 0.
            values: (len(names),).
            is_bad: bool scalar, whether something in the step was not finite.
        """
        self.sums += values
        self.count += 1
        self._first_bad = torch.where(is_bad & (self._first_bad < 0), step, self._first_bad)

    def read(self, session: Session) -> dict[str, float]:
        """Returns the means since the last reading and starts anew.

        They are over all processes, which all call this, and wait for their devices.
        """
        means = session.sum(self.sums / self.count) / session.world_size
        self.sums = torch.zeros_like(self.sums)
        self.count = 0
        return dict(zip(self.names, means.tolist(), strict=True))

    def first_bad_step(self, session: Session) -> int:
        """Returns the first step that was not finite on any process, from 0; -1 if all were.

        All processes call this, and wait for their devices.
        """
        first_bad = session.gather_integers(int(self._first_bad))
        return min((step for (step,) in first_bad if step >= 0), default=-1)
