"""What one wants to know of a GPU, in ten minutes: first whether it is right, then how fast it is.

    python scripts/benchmarks/gpu.py --out results/gpu
    python scripts/benchmarks/gpu.py --out /tmp/gpu --device cpu --smoke        # tests this script

Runs the other benchmarks one after the other, each in a process of its own and in its part of the
time that is left. Rows are written into results.json and results.md in the folder as they come;
what no longer fits into the time, or into the memory, is listed with the reason. Exit code 1 if
anything failed.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The repository root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import datetime
import os
import signal
import subprocess
import time
from dataclasses import dataclass

import torch

from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import Flags, Parser, above, checks, run
from autoregressive.runtime.files import check_writable_folder, write_json
from scripts.benchmarks.turns import RESULTS, ROW_FAILED, TABLE, Report, check_gpu

FOLDER = Path(__file__).resolve().parent
GRACE_SECONDS = 20              # beyond its time that a section has for the row that it is in


@dataclass(frozen=True)
class Section:
    """One benchmark.

    Attributes:
        name: what stands before its rows.
        script: in this folder.
        percent: of the whole time.
        flags: on a GPU.
        smoke: flags in tiny sizes.
    """

    name: str
    script: str
    percent: int
    flags: str
    smoke: str


SECTIONS = [
    Section("correctness", "gpu_correctness.py", 20,
            "",
            "--gpt-model GPT-tiny --grid 4 --batch-size 2"),
    Section("training", "train_step.py", 27,
            "--part step --gpt-models GPT-B GPT-L GPT-XL --grids 16 24 --batch-size 32 --rounds 3",
            "--part step --gpt-models GPT-tiny --grids 4 --batch-size 2 --rounds 1"),
    Section("sampling", "sampling.py", 35,
            "--gpt-models GPT-B GPT-L GPT-XL --grids 16 24 --batch-sizes 128 32 512 "
            "--precision bf16 --compile --decode --rounds 2",
            "--gpt-models GPT-tiny --grids 2 --batch-sizes 2 --decode --rounds 1"),
    Section("extraction", "extraction.py", 10,
            "--num-images 128 --precision bf16 --rounds 2 --store-images 1000",
            "--num-images 1 --image-size 16 --store-images 0"),
    Section("evaluation", "evaluation.py", 8,
            "--part network --num-images 2048 --rounds 2",
            "--part network --num-images 1 --batch-size 1 --rounds 1"),
]


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Check and measure a GPU in a given time.", has_seed=False)
    parser.add_argument("--out", default="results/gpu", help=f"folder of {RESULTS} and {TABLE}")
    parser.add_argument("--minutes", type=above(0.0), default=10.0, help="time for everything")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    return parser


def describe_machine(device: torch.device) -> dict[str, str]:
    """Returns what the rows were measured with."""
    machine = {"date": datetime.date.today().isoformat(), "torch": torch.__version__}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {"GPU": properties.name, "GiB": f"{properties.total_memory / 2**30:.0f}",
                    "CUDA": str(torch.version.cuda)}
    return machine


def run_section(section: Section, args: Flags, device: torch.device, seconds: float) -> bool:
    """Runs a section in at most `seconds` and some grace; says whether it went well.

    A failure is a row, too.
    """
    print(f"== {section.name}, {seconds:.0f} s", flush=True)
    words = (section.smoke if args.smoke else section.flags).split()
    command = [sys.executable, FOLDER / section.script, "--device", device.type,
               "--report", args.out, "--minutes", str(seconds / 60), *words]
    # In a session of its own: it may have processes of its own.
    process = subprocess.Popen(command, start_new_session=True)
    note = ""
    try:
        code = process.wait(seconds + GRACE_SECONDS)
        if code not in (0, ROW_FAILED):
            note = f"{section.script} ended with exit code {code}"
    except subprocess.TimeoutExpired:
        code = 0
        note = f"stopped after {seconds + GRACE_SECONDS:.0f} s"
    finally:
        # Before a row is added: both read the file, change it and write it.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if note:
        Report(section.name, args.out).add("the rest", note=note)
    return code == 0


def main(args: Flags, session: Session) -> None:
    results = Path(args.out) / RESULTS
    with checks(session):
        check_gpu(args, session)
        check_writable_folder(args.out)
        if results.exists():
            raise ValueError(f"{results}: expected a folder without results, found these; "
                             "choose another --out")
    write_json(results, {"machine": describe_machine(session.device), "rows": []})
    end = time.monotonic() + 60 * args.minutes
    failed = []
    for number, section in enumerate(SECTIONS):
        percents = sum(later.percent for later in SECTIONS[number:])
        left = max(end - time.monotonic(), 0.0)
        seconds = max(left * section.percent / percents, 1.0)
        if not run_section(section, args, session.device, seconds):
            failed.append(section.name)
    print((Path(args.out) / TABLE).read_text())
    print(f"results in {args.out}" + (f"; FAILED: {', '.join(failed)}" if failed else ""))
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    run(main, build_parser())
