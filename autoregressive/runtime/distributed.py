"""Process group, device and seed: the only file, with parallel.py, that knows what a rank is.

A plain `python script.py` is world size 1; `torchrun` sets the environment for more. Collectives of the CPU run on
gloo, those of a GPU on nccl.
"""

import contextlib
import datetime
import os
import random
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from autoregressive.runtime.lock import hold

PARENT = os.getppid()                               # torchrun, if it started this process
PARENT_POLL_SECONDS, PARENT_PATIENCE_SECONDS = 1, 60
COLLECTIVE_TIMEOUT = datetime.timedelta(hours=2)    # a rank that reads a slow disk must not end the others


@dataclass(frozen=True)
class Session:
    """What a script knows of the processes it belongs to.

    Attributes:
        rank: number of this process, 0 .. world_size - 1.
        world_size: number of processes.
        device: where this process computes.
        debug: whether errors of the user keep their traceback.
        held: what is let go when the session ends.
    """

    rank: int
    world_size: int
    device: torch.device
    debug: bool = False
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, compare=False, repr=False)

    def hold(self, target: str | Path, *others: str | Path) -> None:
        """Keeps other starts from writing to `target` until this one ends; rank 0 does it for all.

        Leftovers of killed starts, of `target` and of `others`, are removed.

        Raises:
            ValueError: another start writes there.
        """
        if self.is_main:
            self.held.enter_context(hold(target, *others))

    @property
    def is_main(self):
        return self.rank == 0

    def barrier(self):
        """Waits for all processes."""
        if self.world_size > 1:
            self.gather(None)                       # of objects, over gloo: it does not synchronize the GPU

    def sum(self, tensor):
        """Adds `tensor` over all processes in place and returns it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, item):
        """Returns the list of every process's `item` (any picklable object), in order of rank."""
        if self.world_size == 1:
            return [item]
        items = [None] * self.world_size
        dist.all_gather_object(items, item)
        return items

    def share_of(self, count):
        """Returns the range of 0 .. count - 1 that belongs to this process: contiguous, sizes differ by at most one."""
        return range(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)


def launched_rank():
    """Returns the rank that the launcher gave to this process, before any process group exists; else 0."""
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() and "WORLD_SIZE" in os.environ else 0


def launched_world_size():
    """Returns the number of processes that the launcher started.

    Raises:
        ValueError: the environment is only half of a launcher's.
    """
    given = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    if not given:
        return 1
    if len(given) < 2 or not all(value.isdecimal() for value in given.values()):
        raise ValueError("expected numbers in both RANK and WORLD_SIZE of the environment, or neither of them, found "
                         f"{', '.join(f'{name}={value}' for name, value in given.items())}; start with torchrun, or "
                         "unset them")
    return int(given["WORLD_SIZE"])


def cores_per_process():
    """Returns how many cores a process may keep busy when those of its machine are shared evenly, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


@contextlib.contextmanager
def open_session(device="auto", debug=False):
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
        raise ValueError(f"--debug: expected one process, got {world_size}; start with python instead of torchrun")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: expected a CUDA GPU, found none; use --device cpu")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        device = f"cuda:{torch.cuda.current_device()}"
    if "TORCHELASTIC_RUN_ID" in os.environ:         # before the processes wait for each other
        threading.Thread(target=_leave_with_parent, daemon=True).start()
    if world_size > 1:
        # Each restart of a group by torchrun has keys of its own: those of the one before name ports that are closed.
        store, rank, _ = next(dist.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend_of(torch.device(device)), store=store, rank=rank, world_size=world_size,
                                timeout=COLLECTIVE_TIMEOUT)
    with contextlib.ExitStack() as held:
        try:
            yield Session(launched_rank(), world_size, torch.device(device), debug, held)
        finally:
            held.close()
            if dist.is_initialized():
                dist.destroy_process_group()


def backend_of(device: torch.device) -> str:
    """Returns the backend of collectives between processes that compute on a kind of device."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _leave_with_parent() -> None:
    """Ends this process, which torchrun started, once torchrun is gone: nobody else would."""
    while os.getppid() == PARENT:
        time.sleep(PARENT_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)            # training saves and leaves
    time.sleep(PARENT_PATIENCE_SECONDS)
    os._exit(128 + signal.SIGTERM)


def keyed_random(seed, epoch, stream):
    """Returns the numpy Generator of one kind of choice in one epoch, whatever was drawn before.

    Args:
        seed: the run's seed.
        epoch: number of the epoch.
        stream: tells kinds of choices, or rows, of an epoch apart.
    """
    # Philox counts in four words: the first runs within a stream, the second tells the streams apart.
    return np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=[0, stream, 0, 0]))


def seed_everything(seed, rank=0):
    """Seeds Python, NumPy and torch (all devices) from (seed, rank)."""
    state = np.random.SeedSequence([seed, rank]).generate_state(3)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))
    torch.manual_seed(int(state[2]))
