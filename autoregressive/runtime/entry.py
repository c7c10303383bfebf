"""How every entry script starts: its flags, its session, and errors of the user as one line and exit code 2.

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
import dataclasses
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from autoregressive.runtime.distributed import Session, launched_rank, open_session

OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = "2.6"


class Flags(argparse.Namespace):
    """The flags of a command line as attributes; beside their values it knows where these come from.

    Attributes that begin with an underscore are no flags: `_given`, `_free` and `_defaults` are set by Parser.
    """

    def plain(self) -> dict[str, Any]:
        """Returns all flags as a plain dict."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def identity(self) -> dict[str, Any]:
        """Returns the flags that tell runs apart: all that are not declared by `free`."""
        return {name: value for name, value in self.plain().items() if name not in self._free}

    def pick(self, fields_of: type) -> dict[str, Any]:
        """Returns the flags that are called like the fields of a dataclass, to build it from."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(fields_of)}

    def defaults(self) -> dict[str, Any]:
        """Returns the default of every flag."""
        return self._defaults

    def resolve(self, recorded: dict[str, Any], source: str | Path, preset: dict[str, Any]) -> None:
        """Settles every flag: what was given, else what the files record, else the preset, else the default.

        Args:
            recorded: values of flags that a file records.
            source: that file, named in the error.
            preset: values of flags that a preset sets; may be empty.

        Raises:
            ValueError: the preset contradicts the file, and the flag was not given.
        """
        for name, value in (preset | recorded).items():
            if name in self._given:
                continue
            if preset.get(name, value) != value:
                raise ValueError(f"--preset: expected {flag_of(name)} {value} as in {source}, got {preset[name]}; "
                                 "choose the preset of this model")
            setattr(self, name, value)


class Parser(argparse.ArgumentParser):
    """An argument parser with the shared runtime flags, whose errors are one line, printed by rank 0 alone."""

    def __init__(self, description: str, draws: bool = True):
        """`draws` says whether the script draws anything at random, and so has a --global-seed."""
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        group = self.add_argument_group("runtime")
        free(group.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"),
                                help="where to compute; auto takes the GPU if there is one"))
        if draws:
            group.add_argument("--global-seed", type=seed_number, default=0,
                               help="the seed that every random choice derives from")
        free(group.add_argument("--debug", action="store_true", help="one process only, errors keep their traceback"))

    def parse_args(self, words: list[str] | None = None) -> Flags:
        """Parses a command line, by default that of the process."""
        flags = super().parse_args(words, Flags())
        unset = argparse.Namespace(**dict.fromkeys(flags.plain()))
        given = super().parse_args(words, unset)                # whatever is not on the command line stays None
        flags._given = {name for name, value in vars(given).items() if value is not None}
        flags._free = {action.dest for action in self._actions if getattr(action, "is_free", False)}
        flags._defaults = {name: self.get_default(name) for name in flags.plain()}
        return flags

    def error(self, message: str) -> None:
        exit_with(message.removeprefix("argument "))


def free(action: argparse.Action) -> None:
    """Declares a flag as one that may change between two starts of the same run."""
    action.is_free = True


def flag_of(name: str) -> str:
    """Returns the flag whose value is the attribute `name` of Flags."""
    return f"--{name}" if name == "validation_step" else f"--{name.replace('_', '-')}"


def at_least(bound: int | float) -> Callable[[str], int | float]:
    """Returns an argparse type: finite numbers of `bound` or more, of the type of `bound`."""
    return _number(type(bound), lambda number: number >= bound, f"at least {bound:g}")


def above(bound: float) -> Callable[[str], float]:
    """Returns an argparse type: finite numbers above `bound`."""
    return _number(float, lambda number: number > bound, f"more than {bound:g}")


def between(least: int | float, most: int | float) -> Callable[[str], int | float]:
    """Returns an argparse type: numbers from `least` to `most`, of their type."""
    return _number(type(least), lambda number: least <= number <= most, f"{least} to {most}")


def _number(kind: type, accepts: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    def read(text):
        number = kind(text)
        if not (accepts(number) and abs(number) < math.inf):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
        return number

    read.__name__ = kind.__name__                               # argparse names it when `text` is no number
    return read


pixels = between(1, 2**16)                                      # of a picture's side
finite = _number(float, lambda number: True, "a finite number")
share = _number(float, lambda number: 0 <= number < 1, "0 to below 1")
share_above_0 = _number(float, lambda number: 0 < number <= 1, "a share above 0, at most 1")
share_up_to_1 = _number(float, lambda number: 0 <= number <= 1, "a share, 0 to 1")
seed_number = _number(int, lambda number: 0 <= number < 2**64, "a seed, 0 to 2^64 - 1")


def exit_with(message: object) -> None:
    """Ends the process with exit code 2 after rank 0 has printed `message` as one line."""
    if launched_rank() == 0:
        line = " ".join(str(message).split())
        print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr, flush=True)
    raise SystemExit(2)


@contextlib.contextmanager
def checks(session: Session) -> Iterator[None]:
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


def on_main(session: Session, work: Callable[..., Any], *arguments: Any) -> Any:
    """Returns on all processes what `work` returns on rank 0, which alone does it; a user's mistake ends them all."""
    result = None
    with checks(session):
        if session.is_main:
            result = work(*arguments)
    return session.gather(result)[0]


def check_one_process(session: Session) -> None:
    """Raises ValueError under several processes, for work that is not divided among them."""
    if session.world_size > 1:
        raise ValueError(f"expected one process, got {session.world_size}; start with python instead of torchrun")


def describe(error: Exception) -> str:
    """Returns the text of an exception for a user: `path: reason` for those of the operating system."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def run(main: Callable[[Flags, Session], None], parser: Parser) -> None:
    """Parses the command line, opens the session and calls main(args, session)."""
    check_versions()
    args = parser.parse_args()
    code = 0
    signal.signal(signal.SIGTERM, _leave_at_once)   # so that locks are released and no half file is left
    with contextlib.ExitStack() as stack:
        try:
            session = stack.enter_context(open_session(args.device, args.debug))
        except ValueError as error:
            exit_with(error)
        try:
            main(args, session)
        except SystemExit as stop:
            code = stop.code or 0
        except KeyboardInterrupt:
            code = 128 + signal.SIGINT
    if session.world_size > 1:
        leave(code)
    if code:
        raise SystemExit(code)


def _leave_at_once(number: int, _frame: Any) -> None:
    raise SystemExit(128 + number)


def leave(code: int) -> None:
    """Ends the process without finalising the interpreter.

    gloo's worker thread lets go of the last collective's tensors some time after it is done. If the interpreter is
    being finalised by then, Python ends that thread inside a C++ destructor, and the process dies by SIGABRT (seen in
    one of eight runs).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def check_versions() -> None:
    """Exits when Python or torch is older than what the code is written for."""
    if sys.version_info < OLDEST_PYTHON:
        exit_with(f"expected Python {'.'.join(map(str, OLDEST_PYTHON))} or newer, found {sys.version.split()[0]}")
    if torch.__version__ < OLDEST_TORCH:                        # compares as versions, not as text
        exit_with(f"expected torch {OLDEST_TORCH} or newer, found {torch.__version__}; "
                  "run pip install -r requirements.txt")
