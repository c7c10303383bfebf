"""What each process of a training adds to a checkpoint: random numbers, its part of the means."""

from pathlib import Path
from typing import Any

import torch

from autoregressive.runtime.distributed import Session
from autoregressive.runtime.log import LOGGER
from autoregressive.runtime.meter import Meter


def process_state(meter: Meter, device: torch.device) -> dict[str, Any]:
    """Returns the state of torch's random numbers and of a meter on this process, as plain data."""
    is_cuda = device.type == "cuda"
    return {"cpu": torch.get_rng_state(), "sums": meter.sums.cpu(), "count": meter.count,
            "cuda": torch.cuda.get_rng_state() if is_cuda else None}


def load_process_states(states: list[dict[str, Any]] | None, meter: Meter, session: Session,
                        path: Path) -> None:
    """Sets torch's random numbers and a meter to what process_state returned on each process.

    Where another number of processes wrote the checkpoint, the means go on from the mean of theirs,
    and dropout draws other numbers. Where another run did, which measured other values, the means
    begin anew.

    Args:
        states: by rank; None if the checkpoint holds none, as public ones do.
        meter: of the training.
        session: Session.
        path: the checkpoint, named in the log.
    """
    if states is None:
        LOGGER.warning("%s: holds no random numbers and no means of the log: the data go on "
                       "where they were, dropout draws other numbers", path)
        return
    if len(states) != session.world_size:
        LOGGER.warning("%s: written by %d processes, continued by %d: the data go on "
                       "where they were, dropout draws other numbers", path, len(states),
                       session.world_size)
        meter.load(sum(state["sums"] for state in states) / len(states), states[0]["count"])
        return
    own = states[session.rank]
    meter.load(own["sums"], own["count"])
    torch.set_rng_state(own["cpu"])
    if own["cuda"] is not None and session.device.type == "cuda":
        torch.cuda.set_rng_state(own["cuda"])
