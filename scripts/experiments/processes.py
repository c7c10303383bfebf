"""The processes of an experiment: in the background, ended with their parent, paused on demand."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from autoregressive.runtime.files import read_json, write_json
from autoregressive.runtime.lock import describe_process

NICENESS = 15
SET_DEATH_SIGNAL = 1            # PR_SET_PDEATHSIG of prctl(2)
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class JobFailed(Exception):
    """A command ended with an error, which its log tells, was asked to leave, or cannot begin.

    Attributes:
        seconds: CPU seconds that it used.
    """

    def __init__(self, message: str, seconds: float = 0.0) -> None:
        super().__init__(message)
        self.seconds = seconds


@dataclass
class Job:
    """A command that runs.

    Attributes:
        name: of its log and its record.
        process: its process.
        slot: GPU that it sees, or None.
    """

    name: str
    process: subprocess.Popen
    slot: str | None


class Jobs:
    """Commands of one work folder, where their logs and the records of living processes lie."""

    def __init__(self, work: Path) -> None:
        """`work` is the folder that commands run in."""
        self._work = work
        self._paused = work / "paused"              # there while nothing is to run
        self._records = work / "processes"

    def start(self, name: str, words: list[str], slot: str | None) -> Job:
        """Starts a script.

        Args:
            name: of the log and the record.
            words: path of the script, and its arguments.
            slot: what CUDA_VISIBLE_DEVICES names; None leaves it as it is.
        """
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        if slot:
            environment["CUDA_VISIBLE_DEVICES"] = slot
        log = self._log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            process = subprocess.Popen([sys.executable, *words], cwd=self._work, env=environment,
                                       stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                       start_new_session=True, preexec_fn=_go_into_the_background)
        record = describe_process(process.pid) | {"script": Path(words[0]).stem}
        write_json(self._record(name), record)
        if self.are_paused:                         # since a moment ago: `pause` missed this one
            process.send_signal(signal.SIGSTOP)
            if not self.are_paused:
                process.send_signal(signal.SIGCONT)
        return Job(name, process, slot)

    def poll(self, job: Job) -> float | JobFailed | None:
        """Returns None while a job runs, then the CPU seconds of it and its processes.

        If it ended with an error, that is returned.
        """
        pid, status, usage = os.wait4(job.process.pid, os.WNOHANG)
        if not pid:
            return None
        job.process.returncode = os.waitstatus_to_exitcode(status)
        self._record(job.name).unlink(missing_ok=True)
        seconds = usage.ru_utime + usage.ru_stime
        if job.process.returncode:
            return JobFailed(f"{job.name}: ended with {job.process.returncode}; "
                             f"{self._log(job.name)} says why", seconds)
        return seconds

    def wait(self) -> None:
        """Waits until no job of an earlier start runs; they were told to leave when it died."""
        while any(self.alive(path.stem) for path in self._records.glob("*.json")):
            time.sleep(0.5)

    def stop(self, jobs: list[Job]) -> list[float | JobFailed]:
        """Asks everything that runs to leave, and waits for it: a training saves first.

        Args:
            jobs: those that are known; one more may just have been started when a signal came.

        Returns:
            what `poll` says of each.
        """
        self._send(signal.SIGTERM)
        self._send(signal.SIGCONT)
        outcomes = []
        for job in jobs:
            while (outcome := self.poll(job)) is None:
                time.sleep(0.1)
            outcomes.append(outcome)
        self.wait()
        for path in self._records.glob("*.json"):
            path.unlink()
        return outcomes

    def alive(self, name: str) -> str | None:
        """Returns the script that runs under a name, perhaps since an earlier start, or None."""
        with contextlib.suppress(OSError, ValueError):
            record = read_json(self._record(name), {"pid": int, "started": str, "script": str})
            if describe_process(record["pid"]).items() <= record.items():
                return record["script"]
        return None

    def pause(self) -> int:
        """Holds all processes still, and lets no other start; returns how many."""
        self._paused.touch()
        return self._send(signal.SIGSTOP)

    def go_on(self) -> int:
        """Lets the processes go on; returns how many."""
        self._paused.unlink(missing_ok=True)
        return self._send(signal.SIGCONT)

    @property
    def are_paused(self) -> bool:
        """Whether `pause` holds the processes still."""
        return self._paused.exists()

    def _send(self, number: int) -> int:
        """Sends a signal to all living processes; returns how many there are."""
        count = 0
        for path in self._records.glob("*.json"):
            if self.alive(path.stem):
                with contextlib.suppress(OSError, ValueError):  # it has just ended
                    os.kill(read_json(path, {"pid": int})["pid"], number)
                    count += 1
        return count

    def _record(self, name: str) -> Path:
        return self._records / f"{name.replace('/', '_')}.json"

    def _log(self, name: str) -> Path:
        return self._work / "logs" / f"{name.replace('/', '_')}.log"


def _go_into_the_background() -> None:
    """Gives a process about to start a low priority and, on Linux, SIGTERM when its parent dies."""
    os.nice(NICENESS)
    # Linux shares the cores among sessions first, and each of these has a niceness, too.
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(NICENESS))
    if LIBC:
        LIBC.prctl(SET_DEATH_SIGNAL, signal.SIGTERM)
