"""Experiments: the table's numbers, a plan of arms and seeds, a harness killed anywhere."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from autoregressive.runtime.files import write_json
from conftest import ROOT
from processes import ENVIRONMENT, descendants, kill_and_wait, run_here, stat_of
from scripts.experiments import figures, runner
from scripts.experiments.plan import Experiment, Run
from scripts.experiments.processes import Job, JobFailed
from scripts.experiments.table import detectable, interval, make_table
from scripts.experiments.works import Command, Works

RUN = "scripts/experiments/run.py"
VQ = "--vq-model VQ-4-small --codebook-size 64"
GPT = "--gpt-model GPT-tiny --num-classes 10 --image-size 16 --downsample-size 4 --cluster-size 8"
DIGITS = "--dataset digits --image-size 16"
SUFFIX = "kmeans+nearest-cluster_size=8"
PLAN = {
    "prepare": [
        {
            "vq.pt":
                f"tokenizer/tokenizer_image/vq_train.py {VQ} {DIGITS} --data-path train "
                "--mixed-precision none --num-workers 0 --global-batch-size 16 "
                "--perceptual-weight 0 --disc-weight 0 --max-steps 4 "
                "--results-dir {work}/vq --output {work}/vq.pt",
            "classifier.pt":
                f"evaluations/c2i/train_classifier.py {DIGITS} --data-path train --val-path val "
                "--max-steps 30 --output {work}/classifier.pt",
        },
        {
            "codes":
                f"autoregressive/train/extract_codes_c2i.py {VQ} {DIGITS} --data-path train "
                "--vq-ckpt {work}/vq.pt --num-workers 0 --code-path {work}/codes",
            "reference.npz":
                f"evaluations/c2i/make_reference.py {DIGITS} --data-path val "
                "--output {work}/reference.npz",
        },
        {
            f"mapping-{SUFFIX}.pt":
                "balance_k_means.py --vq-ckpt {work}/vq.pt --cluster-size 8 --output-dir {work}",
            "val.npz":
                f"evaluations/c2i/make_reference.py {DIGITS} --data-path train "
                "--output {work}/val.npz",
        },
        {
            "floor.json":
                "evaluations/c2i/evaluator.py {work}/reference.npz {work}/val.npz "
                "--classifier {work}/classifier.pt --output {work}/floor.json",
        },
    ],
    "train": f"{GPT} {VQ} --vocab-size 64 --code-path {{work}}/codes "
             f"--mapping-path {{work}}/mapping-{SUFFIX}.pt "
             f"--vq-ckpt {{work}}/vq-reorder-{SUFFIX}.pt "
             "--mixed-precision none --max-steps 30 --log-every 10 --val-every 15 --val-share 0.1 "
             "--ckpt-steps 10 --global-batch-size 32 --num-workers 0",
    "sample": f"{GPT} {VQ} --vq-ckpt {{work}}/vq-reorder-{SUFFIX}.pt --image-size-eval 16 "
              "--precision none --per-proc-batch-size 20",
    "evaluate": "{work}/reference.npz {samples} --classifier {work}/classifier.pt",
    "arms": {
        "lambda0": {"train": "--lambda-cce 0", "sample": ""},
        "lambda1": {"train": "", "sample": ""},
    },
    "baseline": "lambda0", "seeds": [0, 1],
    "guidance": {"scales": [1.0, 2.0], "num_samples": 20, "seed": 1000},
    "num_samples": 40, "sampling_seed": 0,
    "columns": {"val_token_loss": "val token loss", "val_within_loss": "within",
                "FID": "FID", "Recall": "recall"},
    "floors": {"digits": "floor.json"},
}


def test_intervals_are_those_of_student():
    values = [1.0, 1.5, 0.5, 2.0]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert interval(values) == pytest.approx(((low + high) / 2, (high - low) / 2))
    assert interval([3.0])[0] == 3 and np.isnan(interval([3.0])[1])


def test_the_least_difference_that_shows_is_shown_by_eight_of_ten_experiments():
    random_numbers = np.random.default_rng(0)
    seen = [0.3, -0.1, 0.5, 0.2]
    least = detectable(seen, num_pairs=5)
    experiments = random_numbers.normal(least, np.std(seen, ddof=1), (20_000, 5))
    halves = stats.t.ppf(0.975, 4) * stats.sem(experiments, axis=1)
    assert np.mean(experiments.mean(axis=1) > halves) == pytest.approx(0.8, abs=0.01)


def test_differences_are_paired_by_seed():
    """Seeds differ by far more than arms do, so that only pairs show the difference."""
    def result(arm, seed, number):
        return {"arm": arm, "seed": seed, "numbers": {"x": number}, "cfg_scale": 1.5,
                "cpu_hours": 0.5, "device": "cpu", "commit": "a" * 40}

    results = [result("base", seed, 10.0 * seed) for seed in range(3)]
    results += [result("other", seed, 10.0 * seed + 1) for seed in (2, 1, 0)]
    results.append(result("other", 7, 99.0))
    seeds = {"base": [0, 1, 2, 7, 8], "other": [0, 1, 2, 7, 9]}
    table = make_table(results, {"floor": {"x": 0.25}}, "base", {"x": "number"}, seeds)
    assert "| base | 3 | 10.0000 ± 24.8414 | 1.5 | cpu | 0.50 | aaaaaaa |" in table
    assert "| floor |  | 0.2500 |  |  |  |  |" in table
    assert "| other | 3 | +1.0000 ± 0.0000 |" in table
    # Four pairs are planned.
    head = "| least difference that shows | pairs | number |\n|---|---|---|\n"
    assert head + "| other | 4 | 0.0000 |" in table
    results.append(result("base", 7, 90.0) | {"device": "cuda"})
    table = make_table(results, {}, "base", {"x": "number"}, seeds)
    assert "| other | 4, 1 of two devices | +3.0000 ± 6.3649 |" in table


@pytest.mark.parametrize("change, words", [
    ({"arms": []}, "expected arms as dict"),
    ({"baseline": "best"}, "expected a baseline among lambda0, lambda1"),
    ({"seeds": None}, "expected seeds as list"),
    ({"seeds": [1, 2, 1]}, "expected different whole numbers as seeds"),
    ({"arms": {"lambda0": {"train": ""}}}, "arm lambda0: expected sample as str, found none"),
    ({"arms": {"lambda0": {"train": "", "sample": "", "seeds": [3, 3]}}},
     "arm lambda0: expected different whole numbers as seeds, got [3, 3]"),
    ({"arms": {"lambda0": {"train": "", "sample": "", "seeds": 1}}},
     "arm lambda0: expected seeds as list"),
    ({"train": "--code-path {works}/codes"},
     "expected the names work, data, samples in {}, found 'works'"),
    ({"guidance": {"scales": [1]}}, "guidance: expected num_samples as int"),
    ({"prepare": [{"images": "make.py {data}"}]},
     "--data: expected what images is made of, got none")])
def test_a_wrong_plan_is_one_line(tmp_path, capsys, change, words):
    (tmp_path / "experiment.json").write_text(json.dumps(PLAN | change))
    assert run_here(RUN, tmp_path / "experiment.json", "--work", tmp_path / "work") == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1
    assert not (tmp_path / "work" / "commit.json").exists()          # it is for the next start


def test_data_that_is_missing_is_one_line_before_any_work(tmp_path, capsys):
    (tmp_path / "experiment.json").write_text(json.dumps(PLAN))
    words = ("--data", tmp_path / "none", "--work", tmp_path / "work")
    assert run_here(RUN, tmp_path / "experiment.json", *words) == 2
    error = capsys.readouterr().err
    assert "--data: expected a file or folder, found none" in error
    assert len(error.splitlines()) == 1 and not (tmp_path / "work").exists()


def test_figures_are_of_results(tmp_path, capsys):
    (tmp_path / "experiment.json").write_text(json.dumps(PLAN))
    assert run_here(RUN, tmp_path / "experiment.json", "--status", "--figures", tmp_path) == 2
    assert "--figures: expected --table or a run" in capsys.readouterr().err


def test_an_arm_may_have_seeds_of_its_own(tmp_path):
    arms = PLAN["arms"] | {"few": {"train": "", "sample": "", "seeds": [1]}}
    write_json(tmp_path / "experiment.json", PLAN | {"arms": arms})
    experiment = Experiment(tmp_path / "experiment.json", tmp_path / "work", None)
    assert experiment.runs == [Run("lambda0", 0), Run("lambda1", 0), Run("lambda0", 1),
                               Run("lambda1", 1), Run("few", 1)]
    assert experiment.first("few") == Run("few", 1)


def start_harness(folder):
    (folder / "experiment.json").write_text(json.dumps(PLAN))
    words = [sys.executable, ROOT / RUN, folder / "experiment.json", "--work", folder / "work"]
    return subprocess.Popen(words, env=ENVIRONMENT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(folder):
    """Runs the harness to its end; returns the table without what the machine's load decides."""
    harness = start_harness(folder)
    printed, error = harness.communicate()
    assert harness.returncode == 0, error + printed
    rows = [line.split("|") for line in printed.splitlines() if line.startswith("|")]
    return [row[:-3] if len(row) == 12 else row for row in rows]


def kinds_of_times(folder):
    return {path: path.stat().st_mtime_ns for path in (folder / "results").glob("*.json")}


@pytest.mark.long
def test_a_harness_killed_five_times_ends_with_the_same_table_and_does_no_run_twice(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    killed.mkdir()
    started = time.monotonic()
    expected = finish(straight)
    seconds = time.monotonic() - started
    # Three heads of two lines, two arms, a floor, a difference and what shows.
    assert len(expected) == 11
    choose, written = random.Random(0), {}
    for number in range(5):
        harness = start_harness(killed)
        time.sleep(choose.uniform(0.05, 0.15) * seconds)
        assert harness.poll() is None
        children = descendants(harness.pid)
        harness.kill()
        if number % 2:  # of some, whoever was at work is killed, too
            for pid in children:
                kill_and_wait(pid)
        harness.wait()
        now = kinds_of_times(killed)
        assert all(now[path] == when for path, when in written.items())
        written = now
    assert finish(killed) == expected
    assert finish(killed) == expected
    now = kinds_of_times(killed)
    assert all(now[path] == when for path, when in written.items())


def write_result(folder, arm, seed, **more):
    """Writes a result of the plan in `folder` as the harness does."""
    (folder / "experiment.json").write_text(json.dumps(PLAN))
    experiment = Experiment(folder / "experiment.json", folder / "work", None)
    run = Run(arm, seed)
    result = {"arm": arm, "seed": seed, **experiment.identity(run), "commit": "a" * 40,
              "inputs": {"codes": "1" * 64}, "cfg_scale": 1.5, "cpu_hours": 0.5,
              "device": "cpu",
              "numbers": {"val_token_loss": 3.0 + seed, "FID": 0.5}}
    write_json(experiment.result(run), result | more)


def test_a_table_is_made_of_results_alone_and_lacks_what_they_lack(tmp_path, capsys):
    write_result(tmp_path, "lambda0", 0)
    write_result(tmp_path, "lambda1", 0)
    assert run_here(RUN, tmp_path / "experiment.json", "--table") == 0
    table = capsys.readouterr().out
    assert "| lambda1 | 1 | 3.0000 | nan | 0.5000 | nan | 1.5 | cpu | 0.50 | aaaaaaa |" in table
    assert "| minus lambda0 |" in table
    table_to = (RUN, tmp_path / "experiment.json", "--table", "--baseline")
    assert run_here(*table_to, "lambda1") == 0
    assert "| minus lambda1 |" in capsys.readouterr().out
    assert run_here(*table_to, "none") == 2
    assert "expected a baseline among lambda0, lambda1, got none" in capsys.readouterr().err


def test_curves_are_means_and_differences_paired_by_seed(tmp_path, monkeypatch):
    (tmp_path / "experiment.json").write_text(json.dumps(PLAN))
    experiment = Experiment(tmp_path / "experiment.json", tmp_path / "work", None)
    (tmp_path / "results").mkdir()
    for arm, seed, loss in (("lambda0", 0, 3.0), ("lambda0", 1, 5.0), ("lambda1", 1, 5.25)):
        lines = [{"step": 10, "token_loss": 9.0}, {"step": 15, "val_token_loss": loss}]
        experiment.metrics(Run(arm, seed)).write_text("\n".join(map(json.dumps, lines)) + "\n")
    shown = []
    monkeypatch.setattr(figures, "plot_panels", lambda path, panels, columns: shown.extend(panels))
    finished = [Run("lambda0", 0), Run("lambda0", 1), Run("lambda1", 1)]
    figures.draw_curves(experiment, finished, tmp_path / "curves.png")
    whole, minus = shown
    assert whole.curves == {"lambda0": [(15, 4.0)], "lambda1": [(15, 5.25)]}
    assert whole.halves == {"lambda0": [pytest.approx(stats.t.ppf(0.975, 1))]}
    assert minus.curves == {"lambda1": [(15, 0.25)], "lambda0": [(15, 0.0)]}
    assert minus.ylabel == "loss, lambda1 minus lambda0" and minus.halves == {}
    # Only finished runs; without stages of patches; where all have a loss.
    lines = [{"step": 5, "patch": 2}, {"step": 15, "val_token_loss": 7.0}, {"step": 20, "patch": 1},
             {"step": 30, "val_token_loss": 2.0}]
    experiment.metrics(Run("lambda1", 0)).write_text("\n".join(map(json.dumps, lines)) + "\n")
    figures.draw_curves(experiment, finished[:1] + [Run("lambda1", 0)], tmp_path / "curves.png")
    whole, minus = shown[2:]
    assert whole.curves == {"lambda0": [(15, 3.0)], "lambda1": [(30, 2.0)]}
    assert minus.curves == {"lambda1": [], "lambda0": []}
    # To another arm.
    other = Experiment(tmp_path / "experiment.json", tmp_path / "work", None, "lambda1")
    figures.draw_curves(other, finished, tmp_path / "curves.png")
    assert shown[-1].curves == {"lambda0": [(15, -0.25)], "lambda1": [(15, 0.0)]}


def test_samples_of_arms_stand_below_each_other_class_by_class(tmp_path, monkeypatch):
    (tmp_path / "experiment.json").write_text(json.dumps(PLAN))
    experiment = Experiment(tmp_path / "experiment.json", tmp_path / "work", None)
    labels = np.array([1, 0, 1, 0, 0, 1])
    for number, arm in enumerate(PLAN["arms"]):
        folder = experiment.samples_folder(experiment.scored_samples(Run(arm, 0), 1.5))
        folder.mkdir(parents=True)
        images = np.full((6, 2, 2, 3), 100 * number, np.uint8)
        images[:, 0, 0, 0] = np.arange(6)
        np.savez(folder / "samples.npz", arr_0=images, labels=labels)
    shown = []
    monkeypatch.setattr(figures, "save_grid", lambda *args, **more: shown.append((args, more)))
    scales = {"lambda0": 1.5, "lambda1": 1.5, "unfinished": 2.0}
    arms = PLAN["arms"] | {"unfinished": {"train": "", "sample": ""}}
    write_json(tmp_path / "experiment.json", PLAN | {"arms": arms})
    experiment = Experiment(tmp_path / "experiment.json", tmp_path / "work", None)
    assert figures.draw_samples(experiment, scales, tmp_path / "samples.png")
    (_, pictures), more = shown[0]
    assert pictures[:, 0, 0, 0].tolist() == 2 * [1, 3, 0, 2]        # two of each class
    assert pictures[:, 1, 1, 0].tolist() == 4 * [0] + 4 * [100]
    assert more == {"columns": 4, "row_titles": ["lambda0, guidance 1.5", "lambda1, guidance 1.5"]}


def test_a_stop_counts_what_had_just_ended_and_what_it_ends(tmp_path, monkeypatch):
    class FakeJobs:
        """Its first job ends by itself while a signal comes, the second when it is asked to."""
        are_paused = False

        def __init__(self, work):
            pass

        def start(self, name, words, slot):
            return Job(name, None, slot)

        def poll(self, job):
            if job.name == "first":
                os.kill(os.getpid(), signal.SIGTERM)
            return 3.0 if job.name == "first" else None

        def stop(self, jobs):
            assert [job.name for job in jobs] == ["second"]
            return [4.0]

    def work(name):
        try:
            yield Command(name, ["script.py"], "a" * 40)
        except JobFailed as error:
            seconds[name] = error.seconds
            raise

    seconds = {}
    monkeypatch.setattr(runner, "Jobs", FakeJobs)
    monkeypatch.setattr(runner, "make_clone", lambda work, commit: tmp_path)
    works = SimpleNamespace(experiment=SimpleNamespace(work=tmp_path), failed=set(),
                            runs=lambda: {name: work(name) for name in ("first", "second")})
    with pytest.raises(SystemExit):
        runner.Runner(works, 2).run()
    assert seconds == {"first": 3.0, "second": 4.0}


@pytest.mark.parametrize("change, words", [
    ({"train": "--lambda-cce 3"}, "lambda1-guidance.json: expected one with train"),
    ({"inputs": {"codes": "2" * 64}}, "lambda1-guidance.json: expected one with classifier.pt")])
def test_a_choice_of_guidance_of_other_flags_or_files_is_refused(tmp_path, change, words):
    (tmp_path / "experiment.json").write_text(json.dumps(PLAN))
    experiment = Experiment(tmp_path / "experiment.json", tmp_path / "work", None)
    for path in ("codes", "reference.npz", "classifier.pt", f"mapping-{SUFFIX}.pt",
                 f"vq-reorder-{SUFFIX}.pt"):
        write_json(tmp_path / "work" / path, {})
    first = experiment.first("lambda1")
    choice = {"cfg_scale": 2.0, "inputs": experiment.inputs(first), **experiment.identity(first)}
    write_json(experiment.guidance("lambda1"), choice)
    works = Works(experiment, "a" * 40)
    works.check()
    works.check_inputs([])
    write_json(experiment.guidance("lambda1"), choice | change)
    with pytest.raises(ValueError, match=words):
        works.check()
        works.check_inputs([])


def test_a_run_whose_choice_of_guidance_has_vanished_does_not_wait_for_ever(tmp_path):
    (tmp_path / "experiment.json").write_text(json.dumps(PLAN))
    experiment = Experiment(tmp_path / "experiment.json", tmp_path / "work", None)
    chosen = experiment.guidance("lambda0")
    write_json(chosen, {"cfg_scale": 2.0, "inputs": {}})
    work = Works(experiment, "a" * 40).runs()["lambda0-seed0"]
    next(work)
    chosen.unlink()
    with pytest.raises(JobFailed, match="needs lambda0-seed0-samples-20-seed1000-cfg-1"):
        work.send(1.0)


def test_what_a_stopped_command_used_counts(tmp_path):
    (tmp_path / "experiment.json").write_text(json.dumps(PLAN))
    experiment = Experiment(tmp_path / "experiment.json", tmp_path / "work", None)
    for seconds in (7.0, 5.0):
        work = Works(experiment, "a" * 40).runs()["lambda0-seed0"]
        assert next(work).words == experiment.train_words(Run("lambda0", 0))
        with pytest.raises(JobFailed):
            work.throw(JobFailed("asked to leave", seconds))
    begun = json.loads((experiment.folder(Run("lambda0", 0)) / "begun.json").read_text())
    assert begun["cpu_seconds"] == 12.0


@pytest.mark.parametrize("more, words", [
    ({"train": "--lambda-cce 3"}, "expected one with train"),
    ({"num_samples": 7}, "expected one with num_samples 40"),
    ({"inputs": {"codes": "2" * 64}}, "expected one with codes '111"),
    ({"cfg_scale": "big"}, "cfg_scale as float")])
def test_results_of_other_flags_or_files_do_not_mix(tmp_path, capsys, more, words):
    write_result(tmp_path, "lambda0", 0)
    write_result(tmp_path, "lambda1", 0, **more)
    assert run_here(RUN, tmp_path / "experiment.json", "--table") == 2
    error = capsys.readouterr().err
    assert "lambda1-seed0.json: expected" in error and words in error


def test_a_harness_that_is_asked_to_leave_takes_its_jobs_along(tmp_path):
    harness = start_harness(tmp_path)
    records = tmp_path / "work/processes"
    while not list(records.glob("*.json")):
        time.sleep(0.1)
    pid = json.loads(next(records.glob("*.json")).read_text())["pid"]
    assert os.getpriority(os.PRIO_PROCESS, pid) >= 15
    autogroup = Path(f"/proc/{pid}/autogroup")
    assert not autogroup.exists() or autogroup.read_text().endswith("nice 15\n")
    children = descendants(harness.pid)
    harness.terminate()
    assert harness.wait(timeout=60) == 128 + signal.SIGTERM
    assert children
    deadline = time.monotonic() + 20
    # One of them may not have been known yet.
    while any(stat_of(Path(f"/proc/{pid}/stat"))[0] for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not list(records.iterdir()) and not list((tmp_path / "work").glob(".*.lock"))


@pytest.mark.long
def test_a_harness_is_held_still_and_goes_on_and_says_where_it_stands(tmp_path, capfd):
    harness = start_harness(tmp_path)
    where = (tmp_path / "experiment.json", "--work", tmp_path / "work")
    while not list((tmp_path / "work").glob("processes/*.json")):
        time.sleep(0.1)
    assert run_here(RUN, *where, "--pause") == 0
    processes = [json.loads(path.read_text())["pid"]
                 for path in (tmp_path / "work/processes").glob("*.json")]
    time.sleep(1)
    assert processes and {stat_of(Path(f"/proc/{pid}/stat"))[0] for pid in processes} == {"T"}
    assert run_here(RUN, *where, "--status") == 0
    assert "paused" in capfd.readouterr().out
    assert run_here(RUN, *where) == 2 and "expected to be the only one" in capfd.readouterr().err
    assert run_here(RUN, *where, "--go-on") == 0
    _, error = harness.communicate()
    assert harness.returncode == 0, error
    assert run_here(RUN, *where, "--status") == 0
    assert capfd.readouterr().out.count(" done\n") == 4
