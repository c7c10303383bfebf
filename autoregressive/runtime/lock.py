"""One writer at a time: what results are written to is held by one start of one script.

The lock is a hidden file beside what it protects. It names its holder: machine, process and when
that process began. On one machine a dead holder is replaced at once. Of another machine nothing is
known but that its holder renews the file every few seconds; a lock that is not renewed for a minute
is stale.
"""

import contextlib
import datetime
import glob
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autoregressive.runtime.log import LOGGER

BEAT_SECONDS = 15               # between two renewals of a lock
PATIENCE_SECONDS = 60           # without a renewal, until the lock of another machine is stale
POLL_SECONDS = 1
WRITING_SECONDS = 5             # that a new lock may still be empty
HOLDER_KEYS = {"host", "machine", "pid", "started", "since"}


@contextlib.contextmanager
def hold(target: str | Path, *others: str | Path, patience: float = 0) -> Iterator[None]:
    """Holds `target` during the block, a file or folder that need not exist yet.

    One process of a session calls this. What a killed start has left of it and of `others`, files
    that are written under the same lock, is removed: `.{name}.*.tmp` beside them.

    Args:
        target: what the lock protects.
        others: further files.
        patience: seconds to wait for another holder.

    Raises:
        ValueError: somebody else holds it; the message says who, and since when.
    """
    path = lock_of(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now().isoformat(" ", "seconds")
    own = describe_process() | {"since": now}
    deadline = time.monotonic() + patience
    while not _create(path, own):
        holder = _read(path)
        if holder is None:                          # released meanwhile
            continue
        if not _is_alive(holder, path):
            _remove_stale(path, holder)
        elif time.monotonic() < deadline:
            time.sleep(0.05)
        else:
            raise ValueError(f"{target}: expected to be the only one who writes here, found "
                             f"process {holder['pid']} on {holder['host']}, since "
                             f"{holder['since']}; wait for it, or stop it")
    for file in (target, *others):
        file = Path(file)
        for unfinished in file.parent.glob(f".{glob.escape(file.name)}.*.tmp"):
            unfinished.unlink(missing_ok=True)
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, own, stop), daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        if _read(path) == own:
            path.unlink(missing_ok=True)


def lock_of(target: str | Path) -> Path:
    """Returns the lock file of a file or folder, whatever links lead to it."""
    target = Path(target).resolve()
    return target.with_name(f".{target.name}.lock")


def describe_process(pid: int | None = None) -> dict[str, Any]:
    """Returns what tells a process from every other one, also from a later one with its number.

    Args:
        pid: its number; None is this process.

    Returns:
        its host, machine, pid and when it started; None where the system does not tell.
    """
    pid = pid or os.getpid()
    return {"host": socket.gethostname(), "machine": _machine(), "pid": pid,
            "started": _start_of(pid)}


def _machine() -> str | None:
    """Returns what processes that can see each other have in common; None if that is not known.

    It is the start of the machine, and the container.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _start_of(pid: int) -> str | None:
    """Returns when a process began, in ticks since the machine started; None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()        # behind the name, which may hold anything
    is_zombie = fields[0] == "Z"
    return None if is_zombie else fields[19]


def _create(path: Path, own: dict[str, Any]) -> bool:
    """Makes the lock file unless there is one."""
    try:
        with open(path, "x") as file:
            file.write(json.dumps(own))
    except FileExistsError:
        return False
    return True


def _read(path: Path) -> dict[str, Any] | None:
    """Returns the holder that a lock names: None if there is no lock, empty if it is damaged."""
    deadline = time.monotonic() + WRITING_SECONDS
    while True:
        try:
            holder = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            holder = None
        if isinstance(holder, dict) and set(holder) >= HOLDER_KEYS:
            return holder
        if time.monotonic() > deadline:
            return {}
        time.sleep(0.05)


def _is_alive(holder: dict[str, Any], path: Path) -> bool:
    """Says whether the holder of a lock still works."""
    if not holder:
        return False
    if holder["machine"] is not None and holder["machine"] == _machine():
        return _start_of(holder["pid"]) == holder["started"]
    return _is_renewed(path, holder)


def _is_renewed(path: Path, holder: dict[str, Any]) -> bool:
    """Says whether the holder of a lock, on another machine, renews it within PATIENCE_SECONDS."""
    LOGGER.warning("%s: held by process %d on %s; waiting up to %d s for its heartbeat", path,
                   holder["pid"], holder["host"], PATIENCE_SECONDS)
    before = _renewed_at(path)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        now = _renewed_at(path)
        if now is None:
            return False                            # it was released
        if now != before:
            return True
    return False


def _renewed_at(path: Path) -> int | None:
    """Returns when a lock was last renewed, in nanoseconds; None if it is not there."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _remove_stale(path: Path, holder: dict[str, Any]) -> None:
    """Removes the lock of a dead holder; of several starts that found it, one does."""
    guard = path.with_name(f"{path.name.removesuffix('.lock')}.takeover.tmp")
    try:
        open(guard, "x").close()
    except FileExistsError:
        renewed = _renewed_at(guard)
        is_left_behind = renewed is not None and time.time() - renewed / 1e9 > PATIENCE_SECONDS
        if is_left_behind:                          # a start was killed in here
            guard.unlink(missing_ok=True)
        time.sleep(0.05)
        return
    if _read(path) == holder:                       # nobody was faster
        path.unlink(missing_ok=True)
    guard.unlink(missing_ok=True)


def _beat(path: Path, own: dict[str, Any], stop: threading.Event) -> None:
    """Renews a lock until `stop` is set; ends the process if another one has taken it over.

    That happens to a machine that stood still for a while.
    """
    while not stop.wait(BEAT_SECONDS):
        holder = _read(path)
        if holder and holder != own:
            LOGGER.error("%s: taken over by process %d on %s, since this one did not renew it for "
                         "%d s; leaving", path, holder["pid"], holder["host"], PATIENCE_SECONDS)
            os._exit(1)                             # without writing into the other's files
        with contextlib.suppress(OSError):          # a disk that hangs for a moment ends no work
            os.utime(path)
