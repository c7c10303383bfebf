"""Means of what the steps of a training report, kept on the device until they are read."""

import torch
from torch import Tensor

from autoregressive.runtime.distributed import Session


class Meter:
    """Means over the steps since the last reading, and the first step that was not finite; all kept on the device."""

    def __init__(self, names: tuple[str, ...], device: torch.device):
        """`names` are those of the values that every step adds."""
        self.names = names
        self.device = device
        self.sums = torch.zeros(len(names), device=device)
        self.count = 0
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    def add(self, step: int, values: Tensor, is_bad: Tensor) -> None:
        """Adds the values (len(names),) of a step, and whether something in it was not finite, a bool scalar."""
        self.sums += values
        self.count += 1
        self._first_bad = torch.where(is_bad & (self._first_bad < 0), step, self._first_bad)

    def read(self, session: Session) -> dict[str, float]:
        """Returns the means since the last reading over all processes, and starts anew."""
        means = session.sum(self.sums / self.count) / session.world_size
        self.sums = torch.zeros_like(self.sums)
        self.count = 0
        return dict(zip(self.names, means.tolist(), strict=True))

    def first_bad_step(self, session: Session) -> int:
        """Returns the first step that was not finite on any process, from 0; -1 if all were. Waits for the device."""
        found = [step for step in session.gather(int(self._first_bad)) if step >= 0]
        return min(found, default=-1)
