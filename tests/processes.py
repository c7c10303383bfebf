"""Runs entry scripts as users do, in processes of their own, and kills them as clusters do."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from autoregressive.runtime.checkpoint import read_checkpoint
from autoregressive.runtime.entry import run
from conftest import ROOT

# Shell scripts call `python`: it is the one that runs the tests.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1",
                            "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])}
# A sitecustomize.py: a Python process that finds it stops for good at the moment that PAUSE_AT names, and says so by
# making a file. Audit events come before what they announce: at os.rename the temporary file is there.
PAUSE = """
import fnmatch, json, os, sys, time
event, pattern, count, mark = json.loads(os.environ["PAUSE_AT"])
def pause(name, arguments):
    global count
    if name != event or not count:
        return
    paths = [os.fsdecode(item) for item in arguments if isinstance(item, (str, bytes, os.PathLike))]
    if any(fnmatch.fnmatch(os.path.basename(path), pattern) for path in paths):
        count -= 1
        if not count:
            os.close(os.open(mark, os.O_CREAT))
            time.sleep(600)
sys.addaudithook(pause)
"""


def command(script, *flags, processes=0):
    """Returns the command line of an entry script: by python, or by torchrun if processes are given."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, ROOT / script, *map(str, flags)]


def start(script, *flags, processes=0, cwd=None):
    """Runs an entry script to its end and returns the finished process."""
    return subprocess.run(command(script, *flags, processes=processes), env=ENVIRONMENT, cwd=cwd, capture_output=True,
                          text=True)


def start_and_kill(script, *flags, processes=0, when, stop=signal.SIGKILL, cwd=None, environment=ENVIRONMENT):
    """Starts an entry script and sends a signal to all its processes once `when()` is true.

    Returns:
        exit status; 0 if the script came to its end first.
    """
    running = subprocess.Popen(command(script, *flags, processes=processes), env=environment, cwd=cwd,
                               start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while running.poll() is None:
        if when():
            workers = descendants(running.pid) if stop == signal.SIGKILL else []    # sessions of their own
            os.killpg(running.pid, stop)
            for pid in workers:
                kill_and_wait(pid)
            break
        time.sleep(0.002)
    return running.wait()


def descendants(pid: int) -> list[int]:
    """Returns the processes that a process started, and those that these started, and so on."""
    parents = {int(path.parent.name): stat_of(path)[1] for path in Path("/proc").glob("[0-9]*/stat")}
    found = [pid]
    for parent in found:                                        # it grows on the way
        found += [child for child, its_parent in parents.items() if its_parent == str(parent)]
    return found[1:]


def stat_of(path: Path) -> list[str]:
    """Returns state and parent of a process, from its /proc/<pid>/stat; a dead one's are empty."""
    try:
        return path.read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return ["", ""]


def kill_and_wait(pid: int) -> None:
    """Kills a process that is not our child, and waits until it is gone."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    while stat_of(Path(f"/proc/{pid}/stat"))[0] not in ("", "Z"):
        time.sleep(0.002)


def pausing(folder: Path, event: str, pattern: str, count: int) -> tuple[dict[str, str], Callable[[], bool]]:
    """Prepares an environment in which a script stops for good at an event of its files.

    Args:
        folder: an existing folder for what this needs.
        event: an audit event of Python that names files, such as os.rename, os.remove, open.
        pattern: of the name of the file.
        count: which of the events it is, from 1.

    Returns:
        the environment, and a function that says whether the script has stopped there.
    """
    mark = folder / "paused"
    mark.unlink(missing_ok=True)
    (folder / "sitecustomize.py").write_text(PAUSE)
    environment = ENVIRONMENT | {"PYTHONPATH": str(folder),
                                 "PAUSE_AT": json.dumps([event, pattern, count, str(mark)])}
    return environment, mark.exists


def run_here(script: str, *flags: object) -> int:
    """Runs an entry script in this process, which spares seconds of imports; returns its exit code."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    before = sys.argv
    sys.argv = [script, *map(str, flags)]
    try:
        run(module.main, module.build_parser())
    except SystemExit as stop:
        return stop.code or 0
    finally:
        sys.argv = before
    return 0


def contents(folder: Path) -> dict[str, Any]:
    """Returns all files below a folder by their paths: bytes, or what does not depend on the time of the run."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[name] = "a folder"
        elif path.name == "log.txt":                            # it says when, and whence it continued
            found[name] = "a log"
        elif path.name == "metrics.jsonl":
            found[name] = [without_time(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.name.startswith("report-"):
            report = json.loads(path.read_text())
            found[name] = {key: value for key, value in report.items() if key not in ("seconds", "cpu_seconds")}
        elif path.suffix == ".pt":
            found[name] = plain(read_checkpoint(path))
        else:
            found[name] = path.read_bytes()
    return found


def plain(saved: Any) -> Any:
    """Returns what a checkpoint holds, with bytes in place of tensors, and lists in place of tuples."""
    if isinstance(saved, torch.Tensor):
        return [str(saved.dtype), list(saved.shape), saved.numpy().tobytes()]
    if isinstance(saved, dict):
        return {key: plain(value) for key, value in saved.items()}
    return [plain(item) for item in saved] if isinstance(saved, (list, tuple)) else saved


def without_time(row):
    """Returns a row of metrics.jsonl without what depends on the machine and its load."""
    return {name: value for name, value in row.items()
            if name not in ("images_per_second", "tokens_per_second", "memory_mib", "mfu")}
