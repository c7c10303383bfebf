"""One writer at a time: who holds a folder, who takes over from the dead, and who waits for another host."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from autoregressive.runtime import lock
from autoregressive.runtime.lock import describe_process, hold, lock_of

HOLDER = """
import sys, time
sys.path.insert(0, sys.argv[2])
from autoregressive.runtime.lock import hold
with hold(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path / "run"."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "run", ROOT], text=True,
                               stdout=subprocess.PIPE)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_start_is_told_who_holds_the_folder(tmp_path, holder):
    with pytest.raises(ValueError, match=f"run: expected to be the only one .* found process {holder.pid} on "
                                         f"{socket.gethostname()}, since "), hold(tmp_path / "run"):
        pass
    assert lock_of(tmp_path / "run").exists()


def test_the_lock_of_a_dead_holder_is_taken_over_at_once(tmp_path, holder):
    holder.kill()
    holder.wait()
    started = time.monotonic()
    with hold(tmp_path / "run"):
        assert json.loads(lock_of(tmp_path / "run").read_text())["pid"] == os.getpid()
    assert time.monotonic() - started < 5 and not list(tmp_path.iterdir())


def test_whoever_holds_a_file_removes_what_a_kill_left_of_it(tmp_path):
    for name in ("samples-cfg-2.0.npz", "samples-cfg-2.0.png", "samples-cfg-2.5.npz"):
        (tmp_path / f".{name}.host.12.tmp").touch()
    with hold(tmp_path / "samples-cfg-2.0.npz"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".samples-cfg-2.5.npz.host.12.tmp"]


@pytest.mark.parametrize("content", ["", "[]", "{}", "\x00"])
def test_a_damaged_lock_is_nobodys(tmp_path, content):
    lock_of(tmp_path / "run").write_text(content)
    with hold(tmp_path / "run"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_process_of_the_same_number_that_began_later_is_not_the_holder(tmp_path):
    stale = describe_process() | {"started": "1", "since": "yesterday"}
    lock_of(tmp_path / "run").write_text(json.dumps(stale))
    with hold(tmp_path / "run"):
        pass


@pytest.mark.parametrize("is_touched", [False, True])
def test_the_lock_of_another_host_is_taken_over_only_if_nobody_touches_it(tmp_path, monkeypatch, is_touched):
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 2)
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.1)
    path = lock_of(tmp_path / "run")
    path.write_text(json.dumps(describe_process() | {"host": "elsewhere", "since": "today"}))
    if is_touched:
        code = "import os, sys, time; time.sleep(0.5); os.utime(sys.argv[1])"
        touching = subprocess.Popen([sys.executable, "-c", code, path])
        with pytest.raises(ValueError, match="on elsewhere, since today"), hold(tmp_path / "run"):
            pass
        touching.wait()
    else:
        with hold(tmp_path / "run"):
            pass


def test_a_holder_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    with hold(tmp_path / "run"):
        before = lock_of(tmp_path / "run").stat().st_mtime_ns
        time.sleep(0.3)
        assert lock_of(tmp_path / "run").stat().st_mtime_ns > before


LEAVES = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
from autoregressive.runtime.entry import Parser, run
def main(args, session):
    session.hold(sys.argv[0] + ".result")
    print("held", flush=True)
    time.sleep(60)
run(main, Parser("test"))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_script_that_is_asked_to_leave_releases_its_lock_without_a_traceback(tmp_path, number):
    script = tmp_path / "script.py"
    script.write_text(LEAVES)
    process = subprocess.Popen([sys.executable, script, ROOT], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    assert process.stdout.readline() == "held\n"
    process.send_signal(number)
    assert process.wait(timeout=20) == 128 + number and process.stderr.read() == ""
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]
