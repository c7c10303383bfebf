"""One writer at a time: what results are written to is held by one start of one script.

The lock is a hidden file beside what it protects. It names its holder: host, process and when that process began. On
one host a holder that is dead is replaced at once. Of another host nothing is known but that its holder touches the
file every few seconds; a file that nobody touches for a minute is nobody's.
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

BEAT_SECONDS = 15               # between two touches of a lock that is held
PATIENCE_SECONDS = 60           # without a touch, after which the lock of another host is nobody's
POLL_SECONDS = 1


@contextlib.contextmanager
def hold(target: str | Path) -> Iterator[None]:
    """Holds `target`, a file or folder that need not exist yet, during the block (one process of a session does).

    What a start that was killed has left of it, `.{name}.*.tmp` beside it, is removed.

    Raises:
        ValueError: somebody else holds it; the message says who, and since when.
    """
    path = lock_of(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    own = describe_process() | {"since": datetime.datetime.now().isoformat(" ", "seconds")}
    while not _create(path, own):
        _remove_if_dead(path, target)
    for unfinished in path.parent.glob(f".{glob.escape(Path(target).stem)}.*.tmp"):     # of a start that was killed
        unfinished.unlink(missing_ok=True)
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, stop), daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        if _read(path) == own:
            path.unlink(missing_ok=True)


def lock_of(target: str | Path) -> Path:
    """Returns the lock file of a file or folder."""
    target = Path(target).absolute()
    return target.with_name(f".{target.name}.lock")


def describe_process() -> dict[str, Any]:
    """Returns what tells this process from every other one, also from a later one of the same number."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _start_of(os.getpid())}


def _start_of(pid: int) -> str | None:
    """Returns when a process began, in ticks since the machine started; None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()        # behind the name, which may hold anything
    is_zombie = fields[0] == "Z"
    return None if is_zombie else fields[19]


def _create(path: Path, own: dict[str, Any]) -> bool:
    """Makes the lock file unless there is one; it appears with its content."""
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
    temporary.write_text(json.dumps(own))
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        return False
    finally:
        temporary.unlink()


def _beat(path: Path, stop: threading.Event) -> None:
    """Touches a lock that is held until `stop` is set."""
    while not stop.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):          # a disk that hangs for a moment does not end the work
            os.utime(path)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        holder = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    is_whole = isinstance(holder, dict) and {"host", "pid", "started", "since"} <= set(holder)
    return holder if is_whole else None


def _remove_if_dead(path: Path, target: str | Path) -> None:
    """Removes a lock whose holder is dead; raises ValueError if it lives."""
    holder = _read(path)
    if holder is None:                              # it went away meanwhile, or was damaged with its host
        path.unlink(missing_ok=True)
        return
    if holder["host"] == socket.gethostname():
        is_alive = _start_of(holder["pid"]) == holder["started"]
    else:
        is_alive = _is_touched(path, holder)
    if is_alive:
        raise ValueError(f"{target}: expected to be the only one who writes here, found process {holder['pid']} on "
                         f"{holder['host']}, since {holder['since']}; wait for it, or stop it")
    # Renaming decides between several starts that found the same dead holder: one of them gets the file.
    grave = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.dead")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, grave)
        if _read(grave) != holder:                  # somebody was faster, and this is the lock of the new holder
            os.link(grave, path)
        grave.unlink()


def _is_touched(path: Path, holder: dict[str, Any]) -> bool:
    """Says whether the holder of a lock, on another host, touches it within PATIENCE_SECONDS."""
    LOGGER.warning("%s: held by process %d on %s; waiting up to %d s for a sign of it", path, holder["pid"],
                   holder["host"], PATIENCE_SECONDS)
    before = _touched_at(path)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        now = _touched_at(path)
        if now is None:
            return False                            # it was released
        if now != before:
            return True
    return False


def _touched_at(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
