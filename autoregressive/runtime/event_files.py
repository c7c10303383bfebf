"""A run as TensorBoard shows it: numbers, pictures and settings, in event files in its folder.

    tensorboard --logdir results
"""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from autoregressive.runtime.files import read_json

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FLUSH_SECONDS = 5               # a killed run loses what it logged in the last of them


def check_tensorboard() -> None:
    """Raises ValueError unless the package tensorboard is there."""
    try:
        _import_writer()
    except ImportError as error:
        raise ValueError("--log-to tensorboard: expected the package tensorboard, found none "
                         f"({error}); pip install tensorboard, or leave the flag out") from None


def _import_writer() -> type["SummaryWriter"]:
    # The name by which tensorboard is told to do without tensorflow. Where that is installed, it
    # would load it for nothing, which takes seconds and half a gigabyte.
    sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
    from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter


class EventFiles:
    """Writes the event files of a run that begins or goes on."""

    def __init__(self, folder: Path, steps: int) -> None:
        """
        Args:
            folder: of the run.
            steps: that were applied; what a killed start has left of later ones is hidden.
        """
        is_first = not any(folder.glob("events.out.tfevents.*"))
        self._writer = _import_writer()(folder, purge_step=steps + 1, flush_secs=FLUSH_SECONDS)
        if is_first:                                # at step 0, which no later start hides
            settings = json.dumps(read_json(folder / "config.json"), indent=2)
            self._writer.add_text("settings", f"```\n{settings}\n```", 0)
            self.flush()

    def write(self, steps: int, values: dict[str, float]) -> None:
        """Adds what was measured after `steps` steps."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, steps)

    def add_pictures(self, steps: int, path: Path) -> None:
        """Adds the PNG `path`, of what was learned after `steps` steps."""
        with Image.open(path) as image:
            self._writer.add_image("pictures", np.asarray(image), steps, dataformats="HWC")

    def flush(self) -> None:
        """Puts what was added on the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()
