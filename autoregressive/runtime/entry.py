"""How every entry script starts: its parser, its session, and errors of the user as one line and exit code 2.

    parser = Parser("what the script does")
    parser.add_argument(...)

    def main(args, session):
        with checks(session):           # whatever the user can get wrong, before any work
            ...
        ...                             # the work: from here on an exception keeps its traceback

    if __name__ == "__main__":
        run(main, parser)
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path

import torch

from autoregressive.runtime.distributed import add_runtime_args, launched_rank, open_session

OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 6)


class Parser(argparse.ArgumentParser):
    """An argument parser with the shared runtime flags, whose errors are one line, printed by rank 0 alone."""

    def __init__(self, description, draws=True):
        """`draws` says whether the script draws anything at random, and so has a --global-seed."""
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        add_runtime_args(self, draws)

    def error(self, message):
        exit_with(message)


def exit_with(message):
    """Ends the process with exit code 2 after rank 0 has printed `message` as one line."""
    if launched_rank() == 0:
        line = " ".join(str(message).split())
        print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr, flush=True)
    raise SystemExit(2)


@contextlib.contextmanager
def checks(session):
    """Turns what a user got wrong inside the block into one line and exit code 2, on all processes together.

    A block may raise on one rank alone, so it must not contain collectives; at its end the ranks compare notes.
    """
    mistake = None
    try:
        yield
    except (ValueError, OSError) as error:
        if session.debug:
            raise
        mistake = describe(error)
    mistakes = [text for text in session.gather(mistake) if text]
    if mistakes:
        exit_with(mistakes[0])


def require_one_process(session):
    """Raises ValueError under several processes, for work that is not divided among them."""
    if session.world_size > 1:
        raise ValueError(f"expected one process, got {session.world_size}; start with python instead of torchrun")


def describe(error):
    """Returns the text of an exception for a user: `path: reason` for those of the operating system."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def run(main, parser):
    """Parses the command line, opens the session and calls main(args, session)."""
    require_versions()
    args = parser.parse_args()
    code = 0
    with contextlib.ExitStack() as stack:
        try:
            session = stack.enter_context(open_session(args.device, args.debug))
        except ValueError as error:
            exit_with(error)
        try:
            main(args, session)
        except SystemExit as stop:
            code = stop.code or 0
    if session.world_size > 1:
        leave(code)
    if code:
        raise SystemExit(code)


def leave(code):
    """Ends the process without finalising the interpreter.

    gloo's worker thread lets go of the last collective's tensors some time after it is done. If the interpreter is
    being finalised by then, Python ends that thread inside a C++ destructor, and the process dies by SIGABRT (seen in
    one of eight runs).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def require_versions():
    """Exits when Python or torch is older than what the code is written for."""
    found_torch = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if sys.version_info < OLDEST_PYTHON:
        exit_with(f"expected Python {'.'.join(map(str, OLDEST_PYTHON))} or newer, found {sys.version.split()[0]}")
    if found_torch < OLDEST_TORCH:
        exit_with(f"expected torch {'.'.join(map(str, OLDEST_TORCH))} or newer, found {torch.__version__}; "
                  "run pip install -r requirements.txt")
