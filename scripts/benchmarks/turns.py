"""What the benchmarks share: ways that take turns, medians, clocks, memory, and the report."""

import gc
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoregressive.runtime.checkpoint import save_checkpoint
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import Flags, Parser, above, at_least
from autoregressive.runtime.files import atomic_write, read_json, write_json

RESULTS, TABLE = "results.json", "results.md"   # of a report
VOCAB_SIZE, NUM_CLASSES = 16384, 1000           # of the published models
VQ, DOWNSAMPLING = "VQ-16", 16                  # their tokenizer, and pixels of a token's side
ROW_FAILED = 3                                  # exit code; the rows say what failed
SKIPPED_FOR_TIME = "skipped for time"
Values = dict[str, dict[str, float]]            # of a row: by way, then by name


class DoesNotFit(Exception):
    """What is to be measured needs more memory than there is; the message has the arithmetic."""


def benchmark_parser(description: str, rounds: int) -> Parser:
    """Returns a parser with the flag --rounds, whose default is `rounds`."""
    parser = Parser(description, has_seed=False)
    parser.add_argument("--rounds", type=at_least(1), default=rounds,
                        help="how often the ways take turns; medians are printed")
    return parser


def check_gpu(args: Flags, session: Session) -> None:
    """Raises ValueError if there is no GPU, unless --device cpu asks for none."""
    if session.device.type == "cpu" and args.device != "cpu":
        raise ValueError("--device: expected a GPU, found none; cpu tries the script, no GPU")


def add_report_args(parser: Parser) -> None:
    """Declares the flags of a Report."""
    parser.add_argument("--report",
                        help=f"folder of {RESULTS} and {TABLE}, to which every row is added")
    parser.add_argument("--minutes", type=above(0.0),
                        help="begin no row that is not expected to end in this time")


def add_size_args(parser: Parser, gpt_models: Iterable[str]) -> None:
    """Declares the flags of the measured GPTs: --gpt-models, some of `gpt_models`, and --grids."""
    parser.add_argument("--gpt-models", nargs="+", default=["GPT-B"], choices=gpt_models,
                        help="sizes of the GPT")
    parser.add_argument("--grids", nargs="+", type=at_least(1), default=[16],
                        help="sides of the picture in tokens")


def clock(device: torch.device | None) -> float:
    """Returns wall seconds, once `device` is done; for None, CPU seconds of this process."""
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


def compare(title: str, measure: Callable[[Any], dict[str, float]], ways: dict[str, Any],
            rounds: int, warm_up: int = 0) -> Values:
    """Measures all ways in turns; prints and returns their medians, and prints ours / published.

    Args:
        title: begins every line.
        measure: called with a way, returns measurements by name.
        ways: what `measure` takes, by name; "ours" is among them, and "published" unless it
            cannot be measured.
        rounds: how often each is measured.
        warm_up: rounds before these that do not count.
    """
    turns = []
    for _ in range(warm_up + rounds):
        turns.append({name: measure(way) for name, way in ways.items()})
    turns = turns[warm_up:]
    medians = {}
    for way in ways:
        medians[way] = {name: statistics.median(turn[way][name] for turn in turns)
                        for name in turns[0][way]}
    lines = dict(medians)
    if "published" in ways:
        lines["ours / published"] = {name: ratio(medians["ours"][name], value)
                                     for name, value in medians["published"].items()}
    for way, values in lines.items():
        numbers = ", ".join(f"{name} {value:,.3f}" for name, value in values.items())
        print(f"{title}, {way}: {numbers}", flush=True)
    return medians


def ratio(value: float, reference: float) -> float:
    """Returns value / reference; not a number where the reference is 0."""
    return value / reference if reference else float("nan")


class Report:
    """The rows of a benchmark: printed, and kept in a folder, each before the next is measured.

    Attributes:
        num_failed: rows that ended with an error other than lack of memory.
    """

    def __init__(self, section: str, folder: str | None = None, minutes: float | None = None):
        """
        Args:
            section: what stands before the rows of this benchmark.
            folder: where the rows are kept; other benchmarks may have written some there.
            minutes: time for all rows; None is any.
        """
        self.num_failed = 0
        self._section = section
        self._folder = Path(folder) if folder else None
        self._end = time.monotonic() + 60 * minutes if minutes else float("inf")
        self._longest = 0.0                         # seconds of a row

    def measure(self, title: str, work: Callable[[], Values]) -> None:
        """Adds the row of what work() returns, or of the reason why it returned nothing."""
        started = time.monotonic()
        if started + self._longest > self._end:
            self.add(title, note=SKIPPED_FOR_TIME)
            return
        try:
            self.add(title, work())
        except DoesNotFit as error:
            self.add(title, note=f"does not fit: {error}")
        except torch.OutOfMemoryError as error:
            self.add(title, note=f"out of memory: {str(error).split('. ')[0]}")
        except Exception as error:
            # Said at once, and again by `finish`; the other rows do not suffer.
            traceback.print_exc()
            self.num_failed += 1
            self.add(title, note=f"failed: {first_line(error)}")
        self._longest = max(self._longest, time.monotonic() - started)
        free_memory()

    def add(self, title: str, values: Values | None = None, note: str = "") -> None:
        """Adds a row and writes the files anew."""
        if note:
            print(f"{title}: {note}", flush=True)
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / RESULTS
        results = read_json(path) if path.exists() else {"machine": {}, "rows": []}
        row = {"section": self._section, "row": title, "values": values or {}, "note": note}
        results["rows"].append(row)
        write_json(path, results)
        with atomic_write(self._folder / TABLE) as file:
            file.write(as_table(results).encode())

    def finish(self) -> None:
        """Leaves with exit code ROW_FAILED if a row failed."""
        if self.num_failed:
            raise SystemExit(ROW_FAILED)


def first_line(error: BaseException) -> str:
    """Returns the kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def as_table(results: dict[str, Any]) -> str:
    """Returns a line about the machine and a markdown table, a line for each number of a row."""
    lines = [", ".join(f"{name} {value}" for name, value in results["machine"].items()), "",
             "| section | row | number | published | ours | ours / published | beside it |",
             "|---|---|---|---|---|---|---|"]
    for row in results["rows"]:
        ways = row["values"]
        names = list(dict.fromkeys(name for values in ways.values() for name in values))
        for name in names or ["-"]:
            published, ours = (ways.get(way, {}).get(name) for way in ("published", "ours"))
            both = None not in (published, ours)
            beside = [f"{way} {as_text(values[name])}" for way, values in ways.items()
                      if way not in ("published", "ours") and name in values]
            cells = [row["section"], row["row"], name,
                     as_text(published), as_text(ours),
                     as_text(ratio(ours, published) if both else None),
                     "; ".join([*beside, row["note"]]).strip("; ")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def as_text(number: float | None) -> str:
    """Returns a number in as many digits as say something, and nothing for None."""
    if number is None:
        return ""
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def free_memory() -> None:
    """Forgets compiled code and graphs, and gives back what they and finished work held."""
    # Otherwise nothing was compiled, and importing it takes seconds.
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def resident_bytes(field: str) -> int:
    """Returns a field of /proc/self/status (Linux), in bytes.

    VmRSS is memory in use, VmHWM its peak, RssAnon without files.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{field}:\s*(\d+) kB", status, re.M).group(1))


def write_random_codes(folder: Path, count: int, grid: int, vocab_size: int,
                       num_classes: int) -> list[str]:
    """Writes codes of `count` images, in the layout of a file each, and a mapping.

    Returns train_c2i.py's flags for them.
    """
    random = np.random.default_rng(0)
    codes_folder = folder / "codes" / "random_codes"
    labels_folder = folder / "codes" / "random_labels"
    codes_folder.mkdir(parents=True)
    labels_folder.mkdir()
    for row in range(count):
        np.save(codes_folder / f"{row}.npy", random.integers(vocab_size, size=(1, 1, grid * grid)))
        np.save(labels_folder / f"{row}.npy", random.integers(num_classes, size=1))
    mapping_path = folder / "mapping.pt"
    save_checkpoint(mapping_path, torch.from_numpy(random.permutation(vocab_size)))
    flags = {"--code-path": folder / "codes", "--mapping-path": mapping_path,
             "--vocab-size": vocab_size, "--codebook-size": vocab_size,
             "--num-classes": num_classes, "--image-size": 16 * grid}
    return [str(word) for pair in flags.items() for word in pair]
