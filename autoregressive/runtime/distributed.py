"""Process group, device and seed. Only this file and its neighbours know of ranks.

A plain `python script.py` is world size 1; `torchrun` sets the environment for more. Collectives of
CPU tensors run over gloo, those of GPU tensors over nccl.
"""

import contextlib
import datetime
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from autoregressive.runtime.lock import hold

PARENT = os.getppid()                               # torchrun, if it started this process
PARENT_POLL_SECONDS = 1                             # between two looks whether it is still there
PARENT_PATIENCE_SECONDS = 60                        # for saving, once it is gone
COLLECTIVE_TIMEOUT = datetime.timedelta(hours=2)    # of a rank that reads a slow disk

Item = TypeVar("Item")


@dataclass(frozen=True)
class Session:
    """What a script knows of the processes it belongs to.

    Attributes:
        rank: number of this process, 0 .. world_size - 1.
        world_size: number of processes.
        device: where this process computes.
        debug: whether errors of the user keep their traceback.
        held: locks that are released when the session ends.
    """

    rank: int
    world_size: int
    device: torch.device
    debug: bool = False
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, compare=False,
                                       repr=False)

    def hold(self, target: str | Path, *others: str | Path) -> None:
        """Keeps other starts from writing to `target` until this one ends; rank 0 does it for all.

        Leftovers of killed starts, of `target` and of `others`, are removed.

        Raises:
            ValueError: another start writes there.
        """
        if self.is_main:
            self.held.enter_context(hold(target, *others))

    @property
    def is_main(self) -> bool:
        """Whether this process is rank 0."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for all processes."""
        self.gather_integers(0)                     # over gloo: it does not synchronise the GPU

    def sum(self, tensor: Tensor) -> Tensor:
        """Adds `tensor` over all processes in place and returns it (all processes call this)."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, item: Item) -> list[Item]:
        """Returns every process's `item`, any object that can be pickled, in order of rank.

        All processes call this. What is gathered at every step goes by gather_integers.
        """
        if self.world_size == 1:
            return [item]
        items: list[Item | None] = [None] * self.world_size
        dist.all_gather_object(items, item)
        return items

    def from_main(self, item: Item) -> Item:
        """Returns rank 0's `item` on every process (all processes call this)."""
        return self.gather(item)[0]

    def gather_integers(self, *own: int) -> list[tuple[int, ...]]:
        """Returns every process's integers, equally many of each, in order of rank.

        All processes call this. It runs over gloo, so it does not synchronise the GPU, and pickles
        nothing.
        """
        if self.world_size == 1:
            return [own]
        sent = torch.tensor(own, dtype=torch.int64)
        received = [torch.empty_like(sent) for _ in range(self.world_size)]
        dist.all_gather(received, sent)
        return [tuple(numbers.tolist()) for numbers in received]

    def part_of(self, count: int) -> range:
        """Returns the part of 0 .. count - 1 that belongs to this process.

        The parts are contiguous, and their sizes differ by at most one.
        """
        start = count * self.rank // self.world_size
        stop = count * (self.rank + 1) // self.world_size
        return range(start, stop)


def launched_rank() -> int:
    """Returns the rank that the launcher gave to this process, 0 without a launcher.

    It is known before any process group exists.
    """
    rank = os.environ.get("RANK", "")
    is_launched = rank.isdecimal() and "WORLD_SIZE" in os.environ
    return int(rank) if is_launched else 0


def launched_world_size() -> int:
    """Returns the number of processes that the launcher started, 1 without a launcher.

    Raises:
        ValueError: the environment is only half of a launcher's.
    """
    given = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    if not given:
        return 1
    if len(given) < 2 or not all(value.isdecimal() for value in given.values()):
        found = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ValueError("expected numbers in both RANK and WORLD_SIZE of the environment, or "
                         f"neither of them, found {found}; start with torchrun, or unset them")
    return int(given["WORLD_SIZE"])


def cores_per_process() -> int:
    """Returns how many cores a process may keep busy, at least 1.

    The processes of one machine share its cores evenly.
    """
    tells_affinity = hasattr(os, "sched_getaffinity")           # not on macOS
    cores = len(os.sched_getaffinity(0)) if tells_affinity else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


@contextlib.contextmanager
def open_session(device: str = "auto", debug: bool = False) -> Iterator[Session]:
    """Joins the process group of the launcher, if there is one, and leaves it at the end.

    Args:
        device: "auto", "cpu" or "cuda".
        debug: whether errors of the user keep their traceback; allowed with one process only.

    Yields:
        Session

    Raises:
        ValueError: cuda was asked for and there is none, or debug under several processes.
    """
    world_size = launched_world_size()
    if debug and world_size > 1:
        raise ValueError(f"--debug: expected one process, got {world_size}; start with python "
                         "instead of torchrun")
    own_device = _choose_device(device)
    if "TORCHELASTIC_RUN_ID" in os.environ:         # before the processes wait for each other
        threading.Thread(target=_leave_with_parent, daemon=True).start()
    if world_size > 1:
        store, rank, _ = next(dist.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
        # Each restart of a group by torchrun has keys of its own: those of the one before name
        # ports that are closed.
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        store = dist.PrefixStore(f"restart {restart}", store)
        dist.init_process_group(backend_of(own_device), store=store, rank=rank,
                                world_size=world_size, timeout=COLLECTIVE_TIMEOUT)
    with contextlib.ExitStack() as held:
        try:
            yield Session(launched_rank(), world_size, own_device, debug, held)
        finally:
            held.close()
            if dist.is_initialized():
                dist.destroy_process_group()


def _choose_device(name: str) -> torch.device:
    """Returns the device of this process: of its machine's GPUs the one with its local rank.

    Raises:
        ValueError: cuda was asked for and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: expected a CUDA GPU, found none; use --device cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", torch.cuda.current_device())


def backend_of(device: torch.device) -> str:
    """Returns the backends of collectives between processes that compute on a kind of device."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _leave_with_parent() -> None:
    """Ends this process, which torchrun started, once torchrun is gone: nothing else would."""
    while os.getppid() == PARENT:
        time.sleep(PARENT_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)            # training saves and leaves
    time.sleep(PARENT_PATIENCE_SECONDS)
    os._exit(128 + signal.SIGTERM)


def keyed_random(seed: int, epoch: int, stream: int) -> np.random.Generator:
    """Returns the random numbers of one kind of choice in one epoch, whatever was drawn before.

    Args:
        seed: the run's seed.
        epoch: number of the epoch.
        stream: tells kinds of choices, or rows, of an epoch apart.
    """
    key = np.array([seed, epoch], np.uint64)
    # Philox counts in four words: the first runs within a stream, the second tells streams apart.
    return np.random.Generator(np.random.Philox(key=key, counter=[0, stream, 0, 0]))


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seeds Python, NumPy and torch (all devices) from (seed, rank)."""
    state = np.random.SeedSequence([seed, rank]).generate_state(3)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))
    torch.manual_seed(int(state[2]))
