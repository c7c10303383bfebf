"""The shell scripts and the reports around them: the caller's paths, one line for every mistake."""

import itertools
import json
import os
import stat
import subprocess

import numpy as np
import pytest
import torch

from autoregressive.runtime.files import file_sha256
from conftest import ROOT
from processes import run_here
from scripts.experiments.scores import SETTINGS, Score
from scripts.experiments.sweep import columns_of, panels_of

SHELL = sorted(path.relative_to(ROOT) for path in (ROOT / "scripts").glob("**/*.sh"))
OF_SEVERAL_STEPS = {"sweep_cfg.sh", "guidance.sh"}
WRAPPERS = [path for path in SHELL
            if len(path.parts) == 3 and path.name not in OF_SEVERAL_STEPS]
STUB = """#!/bin/sh
echo "$(basename "$0") $PWD $*" >>"$CALLS"
case "$*" in *--best-of*) echo "$BEST" ;; *own_images_plan*) echo 32 512 16 700 300 600 80 ;; esac
case "$*" in *sys.prefix*) echo "$CALLS.prefix" ;; *--fail*) exit 2 ;; esac
for last; do :; done
case "$*" in *sample_c2i_ddp.py*--cfg-scale*) mkdir -p "$last" && touch "$last/x.npz" ;; esac
"""


@pytest.fixture
def caller(tmp_path, monkeypatch):
    """A folder to call scripts from.

    There python, python3 and torchrun only write down how they are called.
    """
    (tmp_path / "bin").mkdir()
    (tmp_path / "calls.prefix").mkdir()
    for name in ("python", "python3", "torchrun"):
        path = tmp_path / "bin" / name
        path.write_text(STUB)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path))
    monkeypatch.setenv("CDPATH", str(ROOT))                     # must not lead astray
    (tmp_path / "work" / "in" / "apple").mkdir(parents=True)
    (tmp_path / "work" / "ref.npz").touch()
    return tmp_path / "work"


def shell(caller, script, *words, **environment):
    """Runs a shell script.

    Returns:
        The finished process and what it called: program, its folder, arguments.
    """
    path = os.path.relpath(ROOT / script, caller)
    done = subprocess.run(["bash", path, *words], cwd=caller, env=os.environ | environment,
                          capture_output=True, text=True)
    calls = caller.parent / "calls"
    lines = calls.read_text().splitlines() if calls.exists() else []
    return done, [line.split(" ", 2) for line in lines]


@pytest.mark.parametrize("script", WRAPPERS, ids=str)
def test_paths_are_those_of_the_callers_folder(caller, script):
    done, calls = shell(caller, script, "--code-path", "a b", "--output", "./there")
    assert done.returncode == 0 and not done.stdout + done.stderr
    (_, folder, words), = calls
    entry, = [word for word in words.split() if word.endswith(".py")]
    assert folder == str(caller) and words.endswith(f"{entry} --code-path a b --output ./there")
    assert entry.startswith(f"{ROOT}/") and os.path.isfile(entry)


def test_own_images_hands_on_the_callers_paths(caller):
    (caller / "out" / "gpt" / "000-x").mkdir(parents=True)
    done, calls = shell(caller, "scripts/own_images.sh", "in", "./out", GPT_STEPS="7")
    assert done.returncode == 0, done.stderr
    out = f"{caller}/./out"
    plan, train, classifier, extract, balance, gpt, sample, reference, evaluate, look, page = [
        words for _, _, words in calls if ".py" in words]
    assert plan.endswith(f"{caller}/in {out} --tokenizer-steps 0 --gpt-steps 7")
    for words in (train, classifier):
        assert f"--data-path {out}/images/train --val-path {out}/images/val" in words
    assert "--codebook-size 512" in train and "--max-steps 700" in train
    assert f"--output {out}/vq.pt" in train and f"--vq-ckpt {out}/vq.pt" in extract
    assert f"--cluster-size 16 --output-dir {out}" in balance
    assert f"--code-path {out}/codes" in gpt and "--max-steps 600" in gpt
    assert "--max-steps 300" in classifier and "--num-fid-samples 80" in sample
    for words in (sample, look):
        assert f"--gpt-ckpt {out}/gpt/000-x" in words
    for words in (reference, evaluate):
        assert f"{out}/reference.npz" in words
    assert page.endswith(out)


def sweep(caller, *flags, **environment):
    """Runs a sweep whose best setting is cfg scale 7; returns what was called after the script."""
    (caller.parent / "calls").unlink(missing_ok=True)
    environment = {"REFERENCE": "ref.npz", "BEST": "--cfg-scale 7"} | environment
    done, calls = shell(caller, "scripts/autoregressive/sweep_cfg.sh", *flags, **environment)
    assert done.returncode == 0, done.stderr
    assert {folder for _, folder, _ in calls} == {str(caller)}
    return [words.partition(f"{ROOT}/")[2] for _, _, words in calls]


REPORT = "scripts/sweep_report.py sweep --reference ref.npz"


def test_a_sweep_searches_and_scores_the_best_with_more_samples(caller):
    for _ in range(2):                              # what is there is left to the called scripts
        words = sweep(caller, "--gpt-ckpt", "run", CFG_SCALES="1.0 2.50", EVALUATE="--metrics fid")
        assert words.pop() == "scripts/report.py sweep"
        assert words.pop() == REPORT
        assert words.pop(-4) == f"{REPORT} --best-of 10000 --seed 0"
        settings = [("10000", "--cfg-scale 1"), ("10000", "--cfg-scale 2.5"),
                    ("50000", "--cfg-scale 7")]
        for number, (count, flags) in enumerate(settings):
            draw, evaluate, report = words[3 * number:][:3]
            folder = f"sweep/{count}-samples/{flags[2:].replace(' ', '-')}"
            assert draw == (f"autoregressive/sample/sample_c2i_ddp.py --gpt-ckpt run {flags} "
                            f"--num-fid-samples {count} --sample-dir {folder}")
            assert evaluate == (f"evaluations/c2i/evaluator.py ref.npz {folder}/x.npz "
                                "--reuse --metrics fid")
            assert report == REPORT                 # so far
        assert len(words) == 9


@pytest.mark.parametrize("flags", [("--global-seed", 5), ("--top-k", 3, "--global-seed=5")])
def test_a_sweep_chooses_among_scores_of_its_own_seed(caller, flags):
    words = sweep(caller, *map(str, flags), CFG_SCALES="1")
    assert f"{REPORT} --best-of 10000 --seed 5" in words


def drawn_by(words):
    """Returns the flags of every call of the sampler, from the scale on."""
    return [line.partition(" ")[2] for line in words if "sample_c2i_ddp" in line]


def test_a_sweep_takes_every_combination_of_its_lists(caller):
    lists = {"CFG_SCALES": "2 4", "CFG_SCHEDULES": "linear constant", "TOP_PS": "0.9 1",
             "CFG_SCALES_WITHIN": "same 1 3"}
    words = sweep(caller, NUM_SAMPLES="20", NUM_FINAL_SAMPLES="0", **lists)
    drawn = drawn_by(words)
    expected = set()
    for scale, schedule, top_p, within in itertools.product(*map(str.split, lists.values())):
        flags = f"--cfg-scale {scale} --cfg-schedule {schedule} --top-p {top_p}"
        flags += "" if within == "same" else f" --cfg-scale-within {within}"
        expected.add(f"{flags} --num-fid-samples 20")
    assert {line.partition(" --sample-dir")[0] for line in drawn} == expected
    assert len({line.partition("--sample-dir ")[2] for line in drawn}) == len(drawn) == 24
    assert not any("--best-of" in line for line in words)


def test_start_and_power_are_given_to_the_schedules_that_have_them(caller):
    words = sweep(caller, NUM_FINAL_SAMPLES="0", CFG_SCALES="2", CFG_START="1.1", CFG_POWER="2",
                  CFG_SCHEDULES="constant linear power-cosine")
    assert [line.partition(" --num-fid")[0] for line in drawn_by(words)] == [
        "--cfg-scale 2 --cfg-schedule constant",
        "--cfg-scale 2 --cfg-schedule linear --cfg-start 1.1",
        "--cfg-scale 2 --cfg-schedule power-cosine --cfg-start 1.1 --cfg-power 2"]


def test_a_comparison_of_guidance_scores_each_way_at_its_best_with_unused_seeds(caller):
    script = "scripts/experiments/guidance.sh"
    done, calls = shell(caller, script, "--gpt-ckpt", "run", OUT="out", REFERENCE="ref.npz",
                        EVALUATE="--metrics fid", BEST="--cfg-scale 7")
    assert done.returncode == 0, done.stderr
    words = [words.partition(f"{ROOT}/")[2] for _, _, words in calls]
    drawn = [line for line in words if "sample_c2i_ddp" in line]
    searched = [line for line in drawn if "--num-fid-samples 2000 " in line]
    assert len(searched) == 5 + 5 + 4 + 4 + 4 * 4
    assert sum("--cfg-power 2" in line for line in searched) == 4
    assert all("--global-seed 1000" in line for line in searched)
    scored = [line.partition("--gpt-ckpt run ")[2] for line in drawn if line not in searched]
    assert scored == [
        f"--cfg-scale 7 --global-seed {seed} --num-fid-samples 10000 --sample-dir "
        f"out/{way}/10000-samples/seed-{seed}"
        for way in ("constant", "linear", "power-cosine", "split") for seed in (1, 2, 3)]
    assert words[-1] == "scripts/experiments/guidance_report.py out"


@pytest.mark.parametrize("script, words, environment, message", [
    ("scripts/own_images.sh", ("in",), {},
     "own_images.sh: error: expected IMAGES OUT, got 1 arguments"),
    ("scripts/own_images.sh", ("in", "in", "out"), {},
     "own_images.sh: error: expected IMAGES OUT, got 3 arguments"),
    ("scripts/autoregressive/sweep_cfg.sh", (), {},
     "sweep_cfg.sh: error: expected REFERENCE=<npz"),
    ("scripts/autoregressive/sweep_cfg.sh", (), {"REFERENCE": "none.npz"},
     "found no file 'none.npz'"),
    ("scripts/autoregressive/sweep_cfg.sh", ("--cfg-scale=2",), {"REFERENCE": "ref.npz"},
     "expected no --cfg-scale, but a variable for it"),
    ("scripts/autoregressive/sweep_cfg.sh", ("--top-k", "1", "--num-fid-samples", "9"),
     {"REFERENCE": "ref.npz"}, "expected no --num-fid-samples, but a variable for it"),
    *(("scripts/autoregressive/sweep_cfg.sh", (), {"REFERENCE": "ref.npz"} | wrong, message)
      for wrong, message in (
          ({"NUM_SAMPLES": "0"}, "expected NUM_SAMPLES above 0, got '0'"),
          ({"NUM_FINAL_SAMPLES": "abc"}, "expected NUM_FINAL_SAMPLES of 0 or more, got 'abc'"),
          ({"EVALUATE": "--metrics is,sfi"}, "expected fid among the --metrics"),
          ({"TOP_PS": "0.9 most"}, "expected numbers in TOP_PS, got 'most'"),
          ({"CFG_SCALES": "same"}, "expected numbers in CFG_SCALES, got 'same'"),
          ({"CFG_SCHEDULES": "linear steep"}, "in CFG_SCHEDULES, got 'steep'"))),
    ("scripts/experiments/guidance.sh", (), {"REFERENCE": "ref.npz"},
     "guidance.sh: error: expected OUT=<folder> and REFERENCE=<npz"),
    ("scripts/quickstart.sh", ("again",), {},
     "quickstart.sh: error: expected no arguments, got 1"),
])
def test_a_mistake_is_one_line_before_anything_runs(caller, script, words, environment, message):
    done, calls = shell(caller, script, *words, **environment)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not calls and not done.stdout


@pytest.mark.parametrize("script", WRAPPERS, ids=str)
def test_the_exit_code_is_that_of_the_program(caller, script):
    assert shell(caller, script, "--fail")[0].returncode == 2


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def score(scale=2.0, fid=3.5, reference="one", network="net", **settings):
    return {"numbers": {"FID": fid, "Validation accuracy of the classifier": 0.9},
            "samples": {"settings": {"cfg_scale": scale, "global_seed": 0,
                                     "num_fid_samples": 10} | settings},
            "reference": {"sha256": reference}, "feature_network": {"sha256": network}}


@pytest.mark.parametrize("other, message", [
    ([], "expected a JSON object"),
    ("", "expected JSON"),
    ({"numbers": {}}, "expected samples as dict"),
    (score() | {"samples": {"settings": {}}}, "that hold a number under cfg_scale"),
    (score(scale="2"), "that hold a number under cfg_scale"),
    (score(fid=None), "expected numbers of the evaluator"),
    (score() | {"numbers": {"Recall": 0.5}},
     "expected a score with metrics ['FID'], found one with ['Recall']"),
    (score(reference="two"), "expected a score with reference 'one', found one with 'two'"),
    (score(network="other"), "expected a score with feature_network 'net'"),
    (score(cfg_schedule=["x"]), "expected a number or a word as cfg_schedule, found ['x']"),
    (score(gpt_sha256="b"), "expected a score with gpt_sha256 'a', found one with 'b'"),
])
def test_a_sweep_of_records_that_do_not_belong_together_is_refused(
        tmp_path, capsys, other, message):
    write(tmp_path / "10-samples/a/a.json", score(1.0, gpt_sha256="a"))
    if isinstance(other, dict) and "samples" in other:
        other["samples"]["settings"].setdefault("gpt_sha256", "a")
    write(tmp_path / "10-samples/b/b.json", other)
    assert run_here("scripts/sweep_report.py", tmp_path) == 2
    line = capsys.readouterr().err
    assert "b/b.json: " in line and message in line and len(line.splitlines()) == 1
    assert not (tmp_path / "sweep.json").exists()


def test_a_sweep_leaves_out_scores_against_another_reference(tmp_path, capsys):
    np.savez(tmp_path / "ref.npz", arr_0=np.zeros(3))
    write(tmp_path / "10-samples/a/a.json", score(1.0, 2.0, reference="of another npz"))
    reference = file_sha256(tmp_path / "ref.npz")
    write(tmp_path / "10-samples/b/b.json", score(2.0, 4.0, reference=reference))
    assert run_here("scripts/sweep_report.py", tmp_path, "--reference", tmp_path / "ref.npz") == 0
    printed = capsys.readouterr().out
    assert "left out 1 scores against another reference, such as" in printed
    assert "lowest FID of 10 samples of seed 0: 4.0000" in printed
    row, = json.loads((tmp_path / "sweep.json").read_text())["scores"]
    assert (row["cfg_scale"], row["FID"]) == (2.0, 4.0)


def test_a_sweep_chooses_the_best_of_one_number_of_samples_and_one_seed(tmp_path, capsys):
    linear = {"cfg_schedule": "linear", "cfg_start": 1.1, "global_seed": 1}
    scores = [score(2.0, 9.0), score(4.0, 5.0, cfg_scale_within=2.5, **linear), score(6.0, 7.0),
              score(3.0, 4.0, num_fid_samples=50)]
    for number, content in enumerate(scores):
        write(tmp_path / "any-samples" / str(number) / "x.json", content)
    best = ("scripts/sweep_report.py", tmp_path, "--best-of", 10)
    assert run_here(*best) == 0
    assert capsys.readouterr().out == "--cfg-scale 6 --cfg-schedule constant --top-p 1\n"
    assert run_here(*best, "--seed", 1) == 0
    assert capsys.readouterr().out == ("--cfg-scale 4 --cfg-schedule linear --top-p 1 "
                                       "--cfg-scale-within 2.5 --cfg-start 1.1\n")
    assert not (tmp_path / "sweep.json").exists()
    assert run_here("scripts/sweep_report.py", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "FID of 10 samples of seed 0: 7.0000 at scale 6.0, constant" in printed
    assert "FID of 10 samples of seed 1: 5.0000 at scale 4.0, linear, within 2.5" in printed
    assert "FID of 50 samples of seed 0: 4.0000" in printed
    rows = json.loads((tmp_path / "sweep.json").read_text())["scores"]
    assert [row["global_seed"] for row in rows] == [0, 1, 0, 0]
    assert run_here(*best, "--seed", 2) == 2
    assert "expected an FID of 10 samples of seed 2" in capsys.readouterr().err


def test_a_sweep_plots_what_is_asked_for_and_joins_what_differs_in_the_scale_alone():
    def of(scale, **settings):
        numbers = {"FID": scale, "sFID": 1.0, "Inception Score": 2.0, "Precision": 0.5,
                   "Recall": scale / 10}
        known = dict.fromkeys(SETTINGS) | {"cfg_scale": scale, "num_fid_samples": 10}
        return Score(None, known | settings, numbers, {})

    scores = [of(1.0, cfg_schedule="linear"), of(2.0, cfg_schedule="linear"),
              of(1.5, cfg_schedule="constant"), of(2.0, cfg_schedule="linear", num_fid_samples=50)]
    panels = panels_of(scores, columns_of(scores))
    assert [(panel.xlabel, panel.ylabel) for panel in panels] == [
        ("scale", "FID"), ("scale", "Inception Score"), ("Precision", "Recall")]
    assert panels[0].curves == {"samples 10, linear": [(1.0, 1.0), (2.0, 2.0)],
                                "samples 10, constant": [(1.5, 1.5)],
                                "samples 50, linear": [(2.0, 2.0)]}
    assert panels[2].curves["samples 10, linear"] == [(0.5, 0.1), (0.5, 0.2)]


def test_ways_of_guidance_are_compared_seed_by_seed(tmp_path, capsys):
    def write_record(path, way, seed, fid, scale):
        numbers = {"FID": fid, "Precision": 0.5, "Recall": 0.25, "Label agreement": 0.75}
        settings = {"cfg_scale": scale, "cfg_schedule": "constant", "cfg_start": 1.0,
                    "cfg_power": 1.0, "cfg_scale_within": 3.0 if way == "split" else None,
                    "top_p": 1.0, "global_seed": seed, "num_fid_samples": 10}
        write(tmp_path / way / path / "x.json", {"numbers": numbers,
                                                 "samples": {"settings": settings}})

    report = "scripts/experiments/guidance_report.py"
    for gain, way in enumerate(("constant", "linear", "power-cosine", "split")):
        assert run_here(report, tmp_path) == 2
        assert f"{way}: expected scores of guidance.sh" in capsys.readouterr().err
        for scale in (1.0, 2.0):
            write_record(f"2000-samples/{scale}", way, 1000, 9 - scale, scale)
        for seed in (1, 2, 3):                      # seeds differ by more than ways do
            write_record(f"10000-samples/{seed}", way, seed, 10.0 * seed - gain, 2.0)
    assert run_here(report, tmp_path) == 0
    printed = capsys.readouterr().out
    tail = "0.5000 ± 0.0000 | 0.2500 ± 0.0000 | 0.7500 ± 0.0000 |"
    flags = "`--cfg-scale 2 --cfg-schedule constant --top-p 1 --cfg-scale-within 3`"
    assert f"| split | {flags} | 17.0000 ± 24.8414 | {tail} -3.0000 ± 0.0000 |" in printed
    table = json.loads((tmp_path / "guidance.json").read_text())
    assert [row["cfg_scale"] for row in table["linear"]] == [1.0, 2.0, 2.0, 2.0, 2.0]
    assert [row["global_seed"] for row in table["linear"]] == [1000, 1000, 1, 2, 3]
    assert (tmp_path / "guidance.png").stat().st_size > 5000
    write_record("10000-samples/old", "split", 1, 3.0, 1.0)
    assert run_here(report, tmp_path) == 2
    assert "expected scores of one setting" in capsys.readouterr().err


METRICS = ("Inception Score", "FID", "sFID", "Precision", "Recall", "Label agreement",
           "Validation accuracy of the classifier")
NUMBERS = dict.fromkeys(METRICS, 0.5)
QUICKSTART = {"vq.json": {"psnr": 20.5, "codes_used": 7}, "vq/000-x/config.json": {},
              "codes/manifest.json": {"codebook_size": 16}, "report-kmeans.json": {}}
for weight in (0, 1):
    run = f"gpt-lambda{weight}/000-x"
    QUICKSTART |= {f"{run}/finished.json": {"token_loss": 1.5, "cluster_loss": 0.5},
                   f"{run}/config.json": {"vq_model": "VQ-4-small", "codebook_size": 16},
                   f"{run}/metrics.jsonl": "",
                   f"samples-lambda{weight}/x.json": {"numbers": NUMBERS}}


@pytest.mark.parametrize("name, content, message", [
    ("vq.json", {"psnr": 20.5}, "expected codes_used as int, found none"),
    ("codes/manifest.json", [], "expected a JSON object"),
    ("gpt-lambda1/000-x/finished.json", {"token_loss": "1"},
     "expected token_loss as int or float, found str"),
    ("gpt-lambda0/000-x/config.json", {}, "expected vq_model as str"),
    ("samples-lambda1/x.json", {"numbers": {"FID": 1}},
     "expected numbers under Inception Score, sFID"),
    ("samples-lambda0/x.json", {}, "expected numbers as dict"),
    ("classifier.pt", None, "expected a classifier with settings"),
])
def test_the_report_of_the_quickstart_names_the_record_that_lacks_something(
        tmp_path, capsys, name, content, message):
    for path, known in QUICKSTART.items():
        write(tmp_path / path, known)
    torch.save({"settings": {}} if content is not None else {}, tmp_path / "classifier.pt")
    if content is not None:
        write(tmp_path / name, content)
    assert run_here("scripts/quickstart_report.py", tmp_path) == 2
    line = capsys.readouterr().err
    assert f"{name}: " in line and message in line and len(line.splitlines()) == 1
