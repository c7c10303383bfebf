"""One writer at a time: who holds a folder, who takes over from the dead, and who waits."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from autoregressive.runtime import lock
from autoregressive.runtime.lock import describe_process, hold, lock_of
from conftest import ROOT

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
    message = (f"run: expected to be the only one .* found process {holder.pid} "
               f"on {socket.gethostname()}, since ")
    with pytest.raises(ValueError, match=message), hold(tmp_path / "run"):
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
    with hold(tmp_path / "samples-cfg-2.0.npz", tmp_path / "samples-cfg-2.0.png"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".samples-cfg-2.5.npz.host.12.tmp"]


@pytest.mark.parametrize("content", ["", "[]", "{}", "\x00"])
def test_a_damaged_lock_is_nobodys(tmp_path, monkeypatch, content):
    monkeypatch.setattr(lock, "WRITING_SECONDS", 0.2)
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
def test_the_lock_of_another_host_is_taken_over_only_if_nobody_touches_it(
        tmp_path, monkeypatch, is_touched):
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 2)
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.1)
    path = lock_of(tmp_path / "run")
    other = {"host": "elsewhere", "machine": "another", "since": "today"}
    path.write_text(json.dumps(describe_process() | other))
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


def test_a_start_waits_for_a_holder_if_it_is_patient(tmp_path, holder):
    threading.Timer(0.5, holder.kill).start()
    with hold(tmp_path / "run", patience=10):
        pass


def test_a_link_to_what_is_held_is_held(tmp_path, holder):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    message = "link: expected to be the only one"
    with pytest.raises(ValueError, match=message), hold(tmp_path / "link"):
        pass


def test_of_many_starts_that_find_a_dead_holder_one_at_a_time_gets_the_lock(tmp_path, monkeypatch):
    """File operations are slow, as on a network's disk; each start asks whether it is alone."""
    stale = describe_process() | {"started": "1", "since": "yesterday"}
    code = """
import os, pathlib, random, sys, time
sys.path.insert(0, sys.argv[2])
from autoregressive.runtime import lock
def slow(work):
    def slowed(*arguments, **named):
        time.sleep(random.uniform(0, 0.003))
        return work(*arguments, **named)
    return slowed
slowed_ones = [(pathlib.Path, "read_text"), (pathlib.Path, "unlink"), (os, "link"), (os, "rename")]
for owner, name in slowed_ones:
    setattr(owner, name, slow(getattr(owner, name)))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(20):
    with lock.hold(sys.argv[1], patience=60):
        alone = sys.argv[1] + ".alone"
        os.close(os.open(alone, os.O_CREAT | os.O_EXCL))
        os.remove(alone)
        lock.lock_of(sys.argv[1]).write_text(sys.argv[3])       # as if this one had died
"""
    command = [sys.executable, "-c", code, tmp_path / "run", ROOT, json.dumps(stale)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    starts = [subprocess.Popen(command, text=True, **pipes) for _ in range(4)]
    for start in starts:
        assert start.stdout.readline() == "ready\n"
    for start in starts:
        start.stdin.write("go\n")
        start.stdin.flush()
    assert [start.communicate()[1] for start in starts] == [""] * 4


def test_a_stale_lock_is_removed_by_one_start_and_a_newer_one_by_none(tmp_path):
    path, guard = lock_of(tmp_path / "run"), tmp_path / ".run.takeover.tmp"
    stale, living = ({"pid": pid, "host": "x", "machine": "y", "started": "1", "since": "z"}
                     for pid in (1, 2))
    path.write_text(json.dumps(living))
    lock._remove_stale(path, stale)                 # somebody was faster
    assert path.exists()
    path.write_text(json.dumps(stale))
    guard.touch()
    lock._remove_stale(path, stale)                 # somebody is at it
    assert path.exists()
    os.utime(guard, (0, 0))
    lock._remove_stale(path, stale)                 # that one was killed
    lock._remove_stale(path, stale)
    assert not list(tmp_path.iterdir())


def test_a_holder_whose_lock_was_taken_over_ends_at_once(tmp_path):
    hasty = "from autoregressive.runtime import lock\nlock.BEAT_SECONDS = 0.05\n"
    code = HOLDER.replace("with hold", f"{hasty}with hold")
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "run", ROOT], text=True,
                               stdout=subprocess.PIPE)
    assert process.stdout.readline() == "held\n"
    lock_of(tmp_path / "run").write_text(json.dumps(describe_process() | {"since": "now"}))
    assert process.wait(timeout=20) == 1


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


def hear_interrupts() -> None:
    """Undoes what a shell does to commands in the background: they ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_script_that_is_asked_to_leave_releases_its_lock_without_a_traceback(tmp_path, number):
    script = tmp_path / "script.py"
    script.write_text(LEAVES)
    process = subprocess.Popen([sys.executable, script, ROOT], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, preexec_fn=hear_interrupts)
    assert process.stdout.readline() == "held\n"
    process.send_signal(number)
    assert process.wait(timeout=20) == 128 + number and process.stderr.read() == ""
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]
