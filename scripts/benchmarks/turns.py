"""What the benchmarks share: ways that take turns in one run, their medians and ratios, clocks and memory."""

import re
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from autoregressive.runtime.entry import Parser, at_least


def benchmark_parser(description: str, rounds: int) -> Parser:
    """Returns a parser with the flag --rounds, whose default is `rounds`."""
    parser = Parser(description, draws=False)
    parser.add_argument("--rounds", type=at_least(1), default=rounds,
                        help="how often the ways take turns; medians are printed")
    return parser


def add_size_args(parser: Parser, gpt_models: Iterable[str]) -> None:
    """Declares the flags of the GPTs that are measured: --gpt-models, some of `gpt_models`, and --grids."""
    parser.add_argument("--gpt-models", nargs="+", default=["GPT-B"], choices=gpt_models, help="sizes of the GPT")
    parser.add_argument("--grids", nargs="+", type=int, default=[16], help="sides of the picture in tokens")


def clock(device: torch.device | None) -> float:
    """Returns wall seconds, once `device` has done all its work; without a device CPU seconds of this process."""
    if device is None:
        return time.process_time()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(work: Callable[[], Any], device: torch.device | None = None) -> tuple[Any, float]:
    """Returns what work() returns and the seconds of clock(device) that it takes."""
    started = clock(device)
    result = work()
    return result, clock(device) - started


def compare(title: str, measure: Callable[[Any], dict[str, float]], ways: dict[str, Any], rounds: int,
            warm_up: int = 0) -> dict[str, dict[str, float]]:
    """Measures all ways in turns; prints and returns their medians, and prints ours / published.

    Args:
        title: begins every line.
        measure: called with a way, returns measurements by name.
        ways: what `measure` takes, by name; "published" and "ours" are among them.
        rounds: how often each is measured.
        warm_up: rounds before these that do not count.
    """
    turns = [{name: measure(way) for name, way in ways.items()} for _ in range(warm_up + rounds)][warm_up:]
    medians = {}
    for way in ways:
        medians[way] = {name: statistics.median(turn[way][name] for turn in turns) for name in turns[0][way]}
    ratios = {name: medians["ours"][name] / value for name, value in medians["published"].items()}
    for way, values in (medians | {"ours / published": ratios}).items():
        print(f"{title}, {way}: " + ", ".join(f"{name} {value:,.3f}" for name, value in values.items()), flush=True)
    return medians


def resident_bytes(field: str) -> int:
    """Returns a field of /proc/self/status (Linux): VmRSS is memory in use, VmHWM its peak, RssAnon without files."""
    return 1024 * int(re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M).group(1))
