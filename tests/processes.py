"""Runs entry scripts in processes of their own, and kills them as clusters do.

Python takes two seconds to import torch, and two more to import its compiler, which every optimizer
does. So processes are forked from one that has imported them (multiprocessing's fork server).
`command` is what users type: tests that are about the launching itself start that.
"""

import contextlib
import fnmatch
import importlib
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autoregressive.runtime.checkpoint import read_checkpoint
from autoregressive.runtime.entry import run
from conftest import ROOT

# Shell scripts call `python`: it is the one that runs the tests.
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]),
}
PORTS = range(20000, 32000)             # below those that systems give away
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "torchvision",
                              "matplotlib.pyplot", "sklearn.datasets", "processes"])


def command(script, *flags, processes=0):
    """Returns the command line of an entry script: by python, or by torchrun with `processes`."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, ROOT / script, *map(str, flags)]


@dataclass(frozen=True)
class Pause:
    """Stops a process for good at an event of its files, and says so by making a file.

    Audit events come before what they announce: at os.rename the temporary file is there.

    Attributes:
        event: an audit event of Python that names files, such as os.rename, os.remove, open.
        pattern: of the name of the file.
        count: which of the events it is, from 1.
        mark: the file that is made.
    """

    event: str
    pattern: str
    count: int
    mark: Path

    def arm(self):
        """Sets the trap in this process."""
        left = self.count

        def watch(name, arguments):
            nonlocal left
            if name != self.event or not left:
                return
            paths = [os.fsdecode(item) for item in arguments
                     if isinstance(item, (str, bytes, os.PathLike))]
            if any(fnmatch.fnmatch(os.path.basename(path), self.pattern) for path in paths):
                left -= 1
                if not left:
                    os.close(os.open(self.mark, os.O_CREAT))
                    time.sleep(600)

        sys.addaudithook(watch)


def run_forked(function, *arguments, processes=0, cwd=None, pause=None, when=None,
               stop=signal.SIGKILL):
    """Runs a function in new processes, until it ends or `when()` is true.

    Like torchrun it ends all processes when one has failed.

    Args:
        function: a function of a module, which the processes import; it returns an exit code.
        arguments: of the function.
        processes: number of ranks that find each other as under torchrun; 0 for a process without
            a rank.
        cwd: the folder in which they work.
        pause: where each of them stops for good.
        when: says whether the signal `stop` is to be sent to all of them, and their children.

    Returns:
        CompletedProcess: the code of the first that failed, or 0, and what all have printed.
    """
    with tempfile.TemporaryDirectory() as outputs:
        workers = []
        try:
            for environment in environments_of(processes):
                output = f"{outputs}/{len(workers)}"
                given = (function, arguments, environment, cwd or os.getcwd(), pause, output)
                worker = FORKS.Process(target=work, args=given)
                worker.start()
                workers.append(worker)
            code = None
            while code is None:
                time.sleep(0.002)
                codes = [worker.exitcode for worker in workers]
                code = next((each for each in codes if each), None if None in codes else 0)
                is_ready = len(list(Path(outputs).glob("*.err"))) == len(workers)
                if when and is_ready and code is None and when():
                    send(workers, stop)
                    when = None
            if code:
                send(workers, signal.SIGTERM)
            for worker in workers:
                worker.join(timeout=30)
        finally:
            send(workers, signal.SIGKILL)
            for worker in workers:
                worker.join()
        printed = ["".join(path.read_text() for path in sorted(Path(outputs).glob(f"*.{stream}")))
                   for stream in ("out", "err")]
    return subprocess.CompletedProcess(function, code, *printed)


def environments_of(processes):
    """Returns the environments of processes, as torchrun makes them; of one that is alone if 0."""
    if not processes:
        return [ENVIRONMENT]
    same = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port()}
    places = [same | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    return [ENVIRONMENT | {name: str(value) for name, value in place.items()} for place in places]


def free_port():
    """Returns a port by chance, so that test processes that look for one together find two."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as found:
            if found.connect_ex(("127.0.0.1", port)):
                return port


def send(workers, number):
    """Sends a signal to processes that work makes leaders of groups, and to their children."""
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, number)


def work(function, arguments, environment, cwd, pause, output):
    """Is what a new process does: makes its surroundings a command's, and calls the function."""
    os.setsid()                                     # a group, so that signals reach its children
    for number, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{ending}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    torch.set_num_threads(1)
    if pause:
        pause.arm()
    sys.exit(function(*arguments))


def start(script, *flags, **how):
    """Runs an entry script in forked processes: see run_forked, also for `how`."""
    return run_forked(run_here, script, *flags, **how)


def start_and_kill(script, *flags, **how):
    """As start; returns the exit code: 0 if the script came to its end before how["when"]."""
    return start(script, *flags, **how).returncode


def descendants(pid: int) -> list[int]:
    """Returns the processes that a process started, and those that these started, and so on."""
    parents = {int(path.parent.name): stat_of(path)[1]
               for path in Path("/proc").glob("[0-9]*/stat")}
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


def run_here(script, *flags):
    """Runs an entry script in this process, which spares imports; returns its exit code."""
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
    """Returns all files below a folder by their paths, without what depends on the run's time."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[name] = "a folder"
        elif path.name == "log.txt":                # it says when, and whence it continued
            found[name] = "a log"
        elif path.name == "metrics.jsonl":
            found[name] = [without_time(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.name.startswith("report-"):
            report = json.loads(path.read_text())
            found[name] = {key: value for key, value in report.items()
                           if key not in ("seconds", "cpu_seconds")}
        elif path.suffix == ".pt":
            found[name] = plain(read_checkpoint(path))
        else:
            found[name] = path.read_bytes()
    return found


def plain(saved: Any) -> Any:
    """Returns what a checkpoint holds: bytes in place of tensors, lists in place of tuples."""
    if isinstance(saved, torch.Tensor):
        return [str(saved.dtype), list(saved.shape), saved.numpy().tobytes()]
    if isinstance(saved, dict):
        return {key: plain(value) for key, value in saved.items()}
    return [plain(item) for item in saved] if isinstance(saved, (list, tuple)) else saved


def without_time(line):
    """Returns a line of metrics.jsonl without what depends on the machine and its load."""
    return {name: value for name, value in line.items()
            if name not in ("images_per_second", "tokens_per_second", "memory_mib", "mfu")}
