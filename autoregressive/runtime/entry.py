"""How every entry script starts: its flags, its session, and the user's errors as one line.

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
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch

from autoregressive.runtime.distributed import Session, launched_rank, open_session

OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = "2.9"

Number = TypeVar("Number", int, float)
Result = TypeVar("Result")


class Flags(argparse.Namespace):
    """The flags of a command line as attributes; it also knows where their values come from.

    Attributes that begin with an underscore are no flags; Parser sets them.
    """

    _given: set[str]                # those on the command line
    _varying: set[str]              # those declared by `may_vary`
    _defaults: dict[str, Any]       # of all flags

    def plain(self) -> dict[str, Any]:
        """Returns all flags as a plain dict."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def is_given(self, name: str) -> bool:
        """Returns whether a flag stands on the command line."""
        return name in self._given

    def identity(self) -> dict[str, Any]:
        """Returns the flags that tell runs apart: all that are not declared by `may_vary`."""
        return {name: value for name, value in self.plain().items() if name not in self._varying}

    def pick(self, fields_of: type) -> dict[str, Any]:
        """Returns the flags that are named as the fields of a dataclass, to build it from."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(fields_of)}

    def defaults(self) -> dict[str, Any]:
        """Returns the default of every flag."""
        return self._defaults

    def take(self, recorded: dict[str, Any], source: str | Path) -> None:
        """Sets the flags that were not given to what a file records; compares those that were.

        Args:
            recorded: values of flags; None is unknown.
            source: the file, named in the error.

        Raises:
            ValueError: a flag was given with another value.
        """
        for name, value in recorded.items():
            if value is None:
                continue
            if not self.is_given(name):
                setattr(self, name, value)
            elif getattr(self, name) != value:
                raise ValueError(f"{flag_of(name)}: expected {value} as in {source}, got "
                                 f"{getattr(self, name)}; leave the flag out")

    def resolve(self, recorded: dict[str, Any], source: str | Path, preset: dict[str, Any]) -> None:
        """Sets the flags that were not given to what a file records, or else to the preset.

        Flags that neither of them names keep their defaults.

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
                raise ValueError(f"--preset: expected {flag_of(name)} {value} as in {source}, got "
                                 f"{preset[name]}; choose the preset of this model")
            setattr(self, name, value)


class Parser(argparse.ArgumentParser):
    """An argument parser with the flags of every script; its errors are one line, from rank 0."""

    def __init__(self, description: str, has_seed: bool = True) -> None:
        """
        Args:
            description: what the script does.
            has_seed: whether it makes random choices, and so has a --global-seed.
        """
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        group = self.add_argument_group("runtime")
        may_vary(group.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"),
                                    help="where to compute; auto takes the GPU if there is one"))
        if has_seed:
            group.add_argument("--global-seed", type=seed_number, default=0,
                               help="the seed that every random choice derives from")
        may_vary(group.add_argument("--debug", action="store_true",
                                    help="one process only, errors keep their traceback"))

    def parse_args(self, words: list[str] | None = None) -> Flags:
        """Parses a command line, by default that of the process, which ends at a mistake."""
        flags = super().parse_args(words, Flags())
        # Once more, to see what was given: whatever is not on the command line stays None.
        unset = argparse.Namespace(**dict.fromkeys(flags.plain()))
        given = super().parse_args(words, unset)
        flags._given = {name for name, value in vars(given).items() if value is not None}
        flags._varying = {action.dest for action in self._actions
                          if getattr(action, "may_vary", False)}
        flags._defaults = {name: self.get_default(name) for name in flags.plain()}
        return flags

    def error(self, message: str) -> NoReturn:
        """Ends the process with exit code 2, without argparse's usage."""
        exit_with(message.removeprefix("argument "))


def may_vary(action: argparse.Action) -> None:
    """Declares a flag as one that may differ between two starts of the same run.

    It is no part of Flags.identity.
    """
    action.may_vary = True


def flag_of(name: str) -> str:
    """Returns the flag whose value is the attribute `name` of Flags."""
    return f"--{name}" if name == "validation_step" else f"--{name.replace('_', '-')}"


def at_least(bound: Number) -> Callable[[str], Number]:
    """Returns an argparse type: finite numbers of `bound` or more, of the type of `bound`."""
    return _number(type(bound), lambda number: number >= bound, f"at least {bound:g}")


def above(bound: float) -> Callable[[str], float]:
    """Returns an argparse type: finite numbers above `bound`."""
    return _number(float, lambda number: number > bound, f"more than {bound:g}")


def between(least: Number, most: Number) -> Callable[[str], Number]:
    """Returns an argparse type: numbers from `least` to `most`, of their type."""
    return _number(type(least), lambda number: least <= number <= most, f"{least} to {most}")


def _number(kind: type[Number], accepts: Callable[[Number], bool],
            expected: str) -> Callable[[str], Number]:
    """Returns an argparse type: finite numbers of `kind` that `accepts` is true of."""
    def read(text: str) -> Number:
        number = kind(text)
        if not (accepts(number) and abs(number) < math.inf):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
        return number

    read.__name__ = kind.__name__                   # argparse names it when `text` is no number
    return read


pixels = between(1, 2**16)                                      # of a picture's side
finite = _number(float, lambda number: True, "a finite number")
fraction = _number(float, lambda number: 0 <= number < 1, "a fraction, 0 to below 1")
fraction_above_0 = _number(float, lambda number: 0 < number <= 1, "a fraction above 0, at most 1")
fraction_up_to_1 = _number(float, lambda number: 0 <= number <= 1, "a fraction, 0 to 1")
seed_number = _number(int, lambda number: 0 <= number < 2**64, "a seed, 0 to 2^64 - 1")


def exit_with(message: object) -> NoReturn:
    """Ends the process with exit code 2 after rank 0 has printed `message` as one line."""
    if launched_rank() == 0:
        line = " ".join(str(message).split())
        print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr, flush=True)
    raise SystemExit(2)


@contextlib.contextmanager
def checks(session: Session) -> Iterator[None]:
    """Ends all processes with one line and exit code 2 if the block raises what a user got wrong.

    That is ValueError and OSError. A block may raise on one rank alone, so it must not contain
    collectives; at its end every rank learns of the others' errors.
    """
    mistake = None
    try:
        yield
    except (ValueError, OSError) as error:
        if session.debug:
            raise
        mistake = message_of(error)
    mistakes = [text for text in session.gather(mistake) if text]
    if mistakes:
        exit_with(mistakes[0])


def on_main(session: Session, work: Callable[..., Result], *arguments: object) -> Result:
    """Returns on all processes what `work` returns on rank 0, the only one to call it.

    It runs inside `checks`, so it must not contain collectives.
    """
    result = None
    with checks(session):
        if session.is_main:
            result = work(*arguments)
    return session.from_main(result)


def check_one_process(session: Session) -> None:
    """Raises ValueError under several processes, for work that is not divided among them."""
    if session.world_size > 1:
        raise ValueError(f"expected one process, got {session.world_size}; start with python "
                         "instead of torchrun")


def message_of(error: Exception) -> str:
    """Returns an exception's text for a user: `path: reason` for the operating system's."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def run(main: Callable[[Flags, Session], None], parser: Parser) -> None:
    """Runs an entry script: parses the command line, opens the session, calls `main` with both."""
    check_versions()
    args = parser.parse_args()
    code = 0
    # So that locks are released and no half file is left.
    signal.signal(signal.SIGTERM, _leave_at_once)
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


def _leave_at_once(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def leave(code: int) -> NoReturn:
    """Ends the process without finalising the interpreter.

    gloo's worker thread lets go of the last collective's tensors some time after it is done. If the
    interpreter is being finalised by then, Python ends that thread inside a C++ destructor, and the
    process dies by SIGABRT (seen in one of eight runs).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def check_versions() -> None:
    """Exits when Python or torch is older than what the code is written for."""
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        exit_with(f"expected Python {oldest} or newer, found {sys.version.split()[0]}")
    if torch.__version__ < OLDEST_TORCH:                        # compares as versions, not as text
        exit_with(f"expected torch {OLDEST_TORCH} or newer, found {torch.__version__}; "
                  "run pip install -r requirements.txt")
