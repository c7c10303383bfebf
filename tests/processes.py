"""Runs entry scripts as users do, in processes of their own, and kills them as clusters do."""

import importlib
import os
import signal
import subprocess
import sys
import time

from conftest import ROOT

from autoregressive.runtime.entry import run

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(script, *flags, processes=0):
    """Returns the command line of an entry script: by python, or by torchrun if processes are given."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, ROOT / script, *map(str, flags)]


def start(script, *flags, processes=0):
    """Runs an entry script to its end and returns the finished process."""
    return subprocess.run(command(script, *flags, processes=processes), env=ENVIRONMENT, capture_output=True, text=True)


def start_and_kill(script, *flags, processes=0, when, stop=signal.SIGKILL):
    """Starts an entry script and sends a signal to all its processes once `when()` is true.

    Returns:
        exit status; 0 if the script came to its end first.
    """
    running = subprocess.Popen(command(script, *flags, processes=processes), env=ENVIRONMENT, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while running.poll() is None:
        if when():
            os.killpg(running.pid, stop)
            break
        time.sleep(0.002)
    return running.wait()


def run_here(script, *flags, processes=0):
    """Runs an entry script in this process, which spares seconds of imports; returns its exit code."""
    assert not processes
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    sys.argv[:] = [script, *map(str, flags)]
    try:
        run(module.main, module.build_parser())
    except SystemExit as stop:
        return stop.code
    return 0


def without_time(row):
    """Returns a row of metrics.jsonl without what depends on the machine and its load."""
    return {name: value for name, value in row.items()
            if name not in ("images_per_second", "tokens_per_second", "memory_mib", "mfu")}
