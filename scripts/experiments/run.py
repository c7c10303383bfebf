"""Runs what is missing of an experiment, every arm with every seed, and prints its table.

    python scripts/experiments/run.py scripts/experiments/cifar10/experiment.json \
        --data /path/to/cifar10

Everything runs with nice 15, one thread each, from a clone of a commit, so that edits in the tree
do not reach running jobs. Stop it anywhere: the same command goes on. `--status` and `--table` look
at it; `--pause` and `--go-on` hold its processes still while something is timed.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])      # the root, not this folder

import os
import subprocess
from typing import Any

from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import (
    Flags,
    Parser,
    at_least,
    check_one_process,
    checks,
    may_vary,
    run,
)
from autoregressive.runtime.files import check_writable_folder, read_json, write_json
from autoregressive.runtime.log import LOGGER, open_logger, read_metrics
from scripts.experiments.figures import draw_curves, draw_samples
from scripts.experiments.plan import ROOT, Experiment, Run
from scripts.experiments.processes import Jobs
from scripts.experiments.runner import Runner
from scripts.experiments.table import make_table
from scripts.experiments.works import Works, read_results


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Run what is missing of an experiment, and make its table.", has_seed=False)
    parser.set_defaults(device="cpu")               # this script computes nothing, its jobs do
    parser.add_argument("experiment", help="the experiment file")
    parser.add_argument("--data", help="what the experiment file calls {data}")
    parser.add_argument("--work", help="folder of everything that is not committed; default: "
                                       "results/experiments/NAME")
    parser.add_argument("--commit", help="the commit that new runs are made with; default: that of "
                                         "the first start")
    may_vary(parser.add_argument("--jobs", type=at_least(1), default=2,
                                 help="commands at a time; GPUs are dealt out to them in turn"))
    parser.add_argument("--baseline", help="the arm that differences are taken to; "
                                           "default: that of the experiment file")
    parser.add_argument("--figures", metavar="FOLDER",
                        help="also draw curves.png there and, of what the work folder holds, "
                             "samples.png")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--status", action="store_true",
                       help="say what is done, running and missing")
    group.add_argument("--table", action="store_true", help="print the table of what is done")
    group.add_argument("--pause", action="store_true", help="hold all processes still")
    group.add_argument("--go-on", action="store_true", help="let them go on")
    return parser


def choose_commit(record: Path, given: str | None) -> str:
    """Returns the whole name of the commit for new runs: the given one, or that of the record.

    Raises:
        ValueError: there is no such commit.
    """
    if given is None and record.exists():
        return read_json(record, {"commit": str})["commit"]
    name = given or "HEAD"
    words = ["git", "-C", ROOT, "rev-parse", "--verify", "-q", f"{name}^{{commit}}"]
    found = subprocess.run(words, capture_output=True, text=True)
    if found.returncode:
        raise ValueError(f"--commit: expected a commit of {ROOT}, got {name}")
    return found.stdout.strip()


def show_status(experiment: Experiment, jobs: Jobs) -> None:
    """Prints what is done, running and missing."""
    prepared = experiment.work / "prepared.json"
    made = read_json(prepared) if prepared.exists() else {}
    for step in experiment.steps():
        print(f"{step:60s} {'made' if step in made else jobs.alive(step) or 'missing'}")
    for each in experiment.runs:
        folder = experiment.folder(each)
        state = "missing"
        if script := jobs.alive(each.name):
            steps = [0]
            for path in folder.glob("*/metrics.jsonl"):
                steps += [values["step"] for values in read_metrics(path)]
            state = f"{script}, step {max(steps)}"
        elif experiment.result(each).exists():
            state = "done"
        elif any(jobs.alive(samples.name) for samples in experiment.guidance_samples(each)):
            state = "chooses its guidance"
        elif (folder / "begun.json").exists():
            state = "begun"
        print(f"{each.name:60s} {state}")
    if jobs.are_paused:
        print("paused; --go-on lets it go on")


def draw_figures(experiment: Experiment, results: list[dict[str, Any]], folder: Path) -> None:
    """Draws curves.png and samples.png into a folder, and says so."""
    draw_curves(experiment, [Run(result["arm"], result["seed"]) for result in results],
                folder / "curves.png")
    LOGGER.info("validation losses in %s", folder / "curves.png")
    if draw_samples(experiment, {result["arm"]: result["cfg_scale"] for result in results},
                    folder / "samples.png"):
        LOGGER.info("samples in %s", folder / "samples.png")
    else:
        LOGGER.info("no samples in %s: no samples.png", experiment.work)


def main(args: Flags, session: Session) -> None:
    """Runs what is missing of an experiment and prints its table, or does what a flag asks."""
    open_logger(session)
    with checks(session):
        check_one_process(session)
        work = Path(args.work).absolute() if args.work else None
        data = os.path.abspath(args.data) if args.data else None
        experiment = Experiment(args.experiment, work, data, args.baseline)
        jobs = Jobs(experiment.work)

        if args.figures and (args.status or args.pause or args.go_on):
            raise ValueError("--figures: expected --table or a run, whose results it draws")
        if data and not os.path.exists(data):
            raise ValueError(f"--data: expected a file or folder, found none at {data}")

        # What only looks at the experiment, or holds it still.
        if args.status:
            show_status(experiment, jobs)
            return
        if args.pause or args.go_on:
            count = jobs.pause() if args.pause else jobs.go_on()
            LOGGER.info("%d processes %s", count, "held still" if args.pause else "go on")
            return

        # What is there must be of this experiment; then the work folder is held.
        results = read_results(experiment)
        if not args.table:
            check_writable_folder(experiment.work)
            session.hold(experiment.work / "experiment")
            record = experiment.work / "commit.json"
            commit = choose_commit(record, args.commit)
            works = Works(experiment, commit)
            works.check()
            write_json(record, {"commit": commit})          # for the next start
        if args.figures:
            check_writable_folder(args.figures)

    # Everything that is missing.
    is_whole = args.table
    if not args.table:
        if jobs.are_paused:
            LOGGER.warning("paused: nothing begins before --go-on")
        jobs.wait()
        runner = Runner(works, args.jobs)
        is_whole = runner.prepare()
        with checks(session):
            if is_whole:
                works.check_inputs(results)
        is_whole = is_whole and runner.run()

    # The table of what is done.
    if results := read_results(experiment):
        floors = read_json(experiment.floors()) if experiment.floors().exists() else {}
        plan = experiment.plan
        seeds = {name: arm["seeds"] for name, arm in plan["arms"].items()}
        table = make_table(results, floors, baseline=plan["baseline"],
                           columns=plan["columns"], seeds=seeds)
        print(table, end="")
        if args.figures:
            draw_figures(experiment, results, Path(args.figures))
    if not is_whole:
        raise SystemExit(1)


if __name__ == "__main__":
    run(main, build_parser())
