"""Hostile calls of the shell scripts: what is true of the entry scripts is true of these, too.

Rows are as those of test_hostile.py, with the environment of the call before the flags. torchrun
ends with status 1 when its workers leave with 2; the one line is theirs.
"""

import collections
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT
from hostile_files import COMMANDS, PIPELINE, files_of, make_bad, make_good
from odd_inputs import (
    check_is_plotted,
    codes_are_right,
    mapping_is_right,
    picture_is_right,
    reconstructions_are_right,
    samples_are_right,
    scores_are_right,
    training_is_right,
)
from processes import ENVIRONMENT

TIMEOUT = 900                   # seconds, also on a machine that does other work
MOST_OF_A_KIND = 5
FEWEST_OF_A_SCRIPT = 6
TORCHRUN = {"extract", "sample many", "train", "tokenizer", "sweep"}
OF_SEVERAL_STEPS = {"sweep", "own images"}
OWN_STEPS = "TOKENIZER_STEPS=60 GPT_STEPS=20"
# The script of a command, and the flags of a right call of it.
SHELL = {name: (path, COMMANDS[name][1]) for name, path in {
    "extract": "scripts/autoregressive/extract_codes_c2i.sh",
    "check": "scripts/autoregressive/check_codes.sh",
    "balance": "scripts/autoregressive/balance_k_means.sh",
    "train": "scripts/autoregressive/train_c2i.sh",
    "sample many": "scripts/autoregressive/sample_c2i_ddp.sh",
    "sample few": "scripts/autoregressive/sample_c2i.sh",
    "evaluate": "scripts/autoregressive/evaluate_c2i.sh",
    "tokenizer": "scripts/tokenizer/train_vq.sh",
    "validate": "scripts/tokenizer/val.sh",
}.items()} | {
    "sweep": ("scripts/autoregressive/sweep_cfg.sh",
              f"{PIPELINE} --per-proc-batch-size 8"),
    "own images": ("scripts/own_images.sh", ""),
}
SWEEP = ("REFERENCE=good/reference.npz OUT=new CFG_SCALES='1.0 2.0' NUM_SAMPLES=20 "
         "NUM_FINAL_SAMPLES=0 "
         "EVALUATE='--classifier good/classifier.pt'")


def tokenizer_is_there() -> None:
    (run,) = Path("new").glob("000-VQ-4-small")
    assert (run / "tokenizer.pt").is_file()


def sweep_is_right(scales: tuple[float, ...] = (1.0, 2.0)) -> None:
    table = json.loads(Path("new/sweep.json").read_text())
    assert [row["cfg_scale"] for row in table["scores"]] == list(scales)
    assert all(np.isfinite(row["FID"]) for row in table["scores"])


def own_images_are_sampled() -> None:
    assert np.asarray(Image.open("new/a b'ä/samples.png")).std() > 0


# Command, the flag or kind of file that is tried, environment, flags, and words of the line or a
# check of the result.
Row = tuple[str, str, str, str, str | Callable[[], None]]
ROWS: list[Row] = [
    ("extract", "--code-path", "", "--code-path 'new/*'", lambda: codes_are_right("new/*")),
    ("extract", "no such flag", "", "--code-paths x", "unrecognized arguments"),
    ("extract", "--data-path", "", "--data-path 'val train'", "--data-path"),
    ("extract", "--data-path", "", "--dataset imagenet --data-path '$(touch new)'", "$(touch new)"),
    ("extract", "NPROC_PER_NODE", "NPROC_PER_NODE=3", "--batch-size 7", codes_are_right),
    ("extract", "tokenizer file", "", "--vq-ckpt bad/empty.pt", "empty.pt"),

    ("check", "paths with spaces", "", "--output 'new/a b/check.png'",
     lambda: check_is_plotted("new/a b/check.png")),
    ("check", "no such flag", "", "--help-me", "unrecognized arguments"),
    ("check", "code path", "", "--code-path ''", "expected"),
    ("check", "code path", "", "--code-path bad/nowhere", "nowhere"),
    ("check", "tokenizer file", "", "--vq-ckpt good/codes/codes.npy", "codes.npy"),
    ("check", "RANK", "RANK=0", "", "WORLD_SIZE"),

    ("balance", "--method", "", "--method ''", "--method"),
    ("balance", "--seed", "", "--seed 0x10", "--seed"),
    ("balance", "--output-dir", "", "--output-dir \"new/it's; ls\"", mapping_is_right),
    ("balance", "tokenizer file", "", "--vq-ckpt good/pictures", "pictures"),
    ("balance", "RANK", "RANK=1", "", "WORLD_SIZE"),
    ("balance", "no such flag", "", "vq.pt", "unrecognized arguments"),

    ("train", "NPROC_PER_NODE", "NPROC_PER_NODE=3", "", "--global-batch-size"),
    ("train", "--results-dir", "", "--results-dir 'new/-rf *'",
     lambda: training_is_right("new/-rf *")),
    ("train", "--results-dir", "", "--results-dir good/gpt.pt", "gpt.pt"),
    ("train", "--max-steps", "", "--max-steps 4.0", "--max-steps"),
    ("train", "--debug", "NPROC_PER_NODE=2", "--debug", "--debug"),
    ("train", "mapping", "", "--mapping-path good/classes.png", "classes.png"),

    ("sample many", "NPROC_PER_NODE", "NPROC_PER_NODE=3", "", samples_are_right),
    ("sample many", "--labels", "", "--labels '3 7'", "--labels"),
    ("sample many", "--sample-dir", "", "--sample-dir 'new/模型 \n'",
     lambda: samples_are_right("new/模型 \n")),
    ("sample many", "GPT file", "", "--gpt-ckpt 'good/*.pt'", "good/*.pt"),
    ("sample many", "GPT file", "", "--gpt-ckpt good/classifier.pt", "classifier.pt"),
    ("sample many", "--top-p", "", "--top-p=-0.5", "--top-p"),

    ("sample few", "--class-ids", "", "--class-ids='-1'", "--class-ids"),
    ("sample few", "--output", "", "--output /dev/null/x.png", "/dev/null"),
    ("sample few", "encoding", "PYTHONIOENCODING=ascii",
     "--output 'new/模型.png'", picture_is_right),
    ("sample few", "language", "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0",
     "--output 'new/ä.png'", picture_is_right),
    ("sample few", "--device", "", "--device cuda:7", "--device"),
    ("sample few", "CUDA_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES=", "--device cuda", "CUDA"),

    ("evaluate", "number of files", "", "", "required"),
    ("evaluate", "number of files", "", "good/reference.npz", "required"),
    ("evaluate", "number of files", "", "good/reference.npz good/samples.npz good/samples.npz",
     "unrecognized arguments"),
    ("evaluate", "npz file", "", "good/classes.png good/samples.npz", "classes.png"),
    ("evaluate", "npz file", "", "good/reference.npz /dev/null", "/dev/null"),
    ("evaluate", "--output", "", "good/reference.npz good/samples.npz --output 'new/a b.json'",
     lambda: scores_are_right("new/a b.json")),

    ("tokenizer", "--output", "", "--output good/pictures", "pictures"),
    ("tokenizer", "NPROC_PER_NODE", "NPROC_PER_NODE=2", "--results-dir new", tokenizer_is_there),
    ("tokenizer", "--val-path", "", "--val-path ''", tokenizer_is_there),
    ("tokenizer", "--val-path", "", "--val-path test", "--val-path"),
    ("tokenizer", "--lr-schedule", "", "--lr-schedule none", "--lr-schedule"),
    ("tokenizer", "--mixed-precision", "", "--mixed-precision fp16", "--mixed-precision"),

    ("validate", "--output", "", "--output /dev/null", "--output"),
    ("validate", "--output", "", "--output 'new/../new/reconstructions.npz'",
     reconstructions_are_right),
    ("validate", "--vq-ckpt", "", "--vq-ckpt", "--vq-ckpt"),
    ("validate", "--vq-ckpt", "", "--vq-ckpt bad/vq-infinite.pt", "decoder.conv_out.bias"),
    ("validate", "--codebook-size", "", "--codebook-size 1e2", "--codebook-size"),
    ("validate", "WORLD_SIZE", "WORLD_SIZE=two", "", "WORLD_SIZE"),

    ("sweep", "REFERENCE", "REFERENCE=good OUT=new", "", "REFERENCE"),
    ("sweep", "REFERENCE", SWEEP.replace("reference.npz", "samples.npz").replace("1.0 2.0", "1.0"),
     "", "samples.npz"),
    ("sweep", "CFG_SCALES", SWEEP.replace("1.0 2.0", "large"), "", "numbers in CFG_SCALES"),
    ("sweep", "CFG_SCALES", SWEEP.replace("1.0 2.0", "2.0 1.0 2.0"), "", sweep_is_right),
    ("sweep", "CFG_SCHEDULES", f"{SWEEP} CFG_SCHEDULES='linear steep'", "",
     "in CFG_SCHEDULES, got 'steep'"),
    ("sweep", "NUM_FINAL_SAMPLES", SWEEP.replace("=0", "=-1"), "", "expected NUM_FINAL_SAMPLES"),
    ("sweep", "--top-p", SWEEP, "--top-p 0.9", "expected no --top-p, but a variable"),
    ("sweep", "EVALUATE", SWEEP.replace("--classifier", "--metrics kid --classifier"), "", "kid"),
    ("sweep", "OUT", SWEEP.replace("OUT=new", "OUT='new/a *'"), "",
     lambda: Path("new/a */sweep.json").stat()),

    ("own images", "number of folders", "", "good/pictures", "expected IMAGES OUT"),
    ("own images", "number of folders", "", "good/pictures good/pictures new",
     "expected IMAGES OUT"),
    ("own images", "IMAGES", OWN_STEPS, "bad/nowhere new", "nowhere"),
    ("own images", "IMAGES", OWN_STEPS, "bad/looping new", "looping"),
    ("own images", "OUT", OWN_STEPS, "many good/gpt.pt", "gpt.pt"),
    ("own images", "OUT", OWN_STEPS, "many many/new", "expected a folder outside"),
    ("own images", "OUT", OWN_STEPS, "many \"new/a b'ä\"", own_images_are_sampled),
    ("own images", "TOKENIZER_STEPS", "TOKENIZER_STEPS=many", "many new", "--tokenizer-steps"),
    ("own images", "GPT_STEPS", "GPT_STEPS=-1", "many new", "--gpt-steps"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with `good`, `bad` and `many`, 80 pictures of two classes."""
    folder = tmp_path_factory.mktemp("hostile calls")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_good(folder)
        make_bad(folder)
    for number in range(80):
        path = folder / "many" / ("light", "dark")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        darkest = 128 * (number % 2)
        noise = np.random.default_rng(number).integers(darkest, darkest + 128, (32, 32, 3))
        Image.fromarray(noise.astype(np.uint8)).save(path)
    return folder


def test_the_table_is_wide():
    kinds = collections.Counter(what for _, what, *_ in ROWS)
    scripts = collections.Counter(command for command, *_ in ROWS)
    assert max(kinds.values()) <= MOST_OF_A_KIND, kinds
    assert scripts.keys() == SHELL.keys() and min(scripts.values()) >= FEWEST_OF_A_SCRIPT, scripts


def without_new(files, folder):
    """Returns the files that do not lie in `new`."""
    new = str(folder / "new")
    return {name: value for name, value in files.items() if not name.startswith(new)}


@pytest.mark.long
@pytest.mark.parametrize("command, what, environment, flags, expected", ROWS)
def test_a_hostile_call_is_refused_in_one_line_or_does_what_it_says(
        folder, monkeypatch, command, what, environment, flags, expected):
    monkeypatch.chdir(folder)
    shutil.rmtree(folder / "new", ignore_errors=True)
    before = files_of(folder)
    script, right = SHELL[command]
    words = right.split()
    if command == "train" and "--code-path" in flags:
        del words[words.index("--code-path"):words.index("--code-path") + 2]
    given = dict(word.split("=", 1) for word in shlex.split(environment))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    port = str(20000 + os.getpid() % 20000)
    variables = ENVIRONMENT | {"PATH": path, "VIRTUAL_ENV": sys.prefix, "NPROC_PER_NODE": "1",
                               "MASTER_PORT": port, "TQDM_DISABLE": "1"} | given
    done = subprocess.run(["bash", ROOT / script, *words, *shlex.split(flags)], env=variables,
                          capture_output=True, text=True, timeout=TIMEOUT, cwd=folder)
    if callable(expected):
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        expected()
        return
    lines = [line for line in done.stderr.splitlines() if ": error: " in line and expected in line]
    assert len(lines) == 1, done.stderr
    by_torchrun = "ChildFailedError" in done.stderr
    assert done.returncode == (1 if by_torchrun else 2), done.stderr
    if by_torchrun:
        assert command in TORCHRUN and "exitcode  : 2" in done.stderr
        assert not re.search(r'File "[^"]*/(autoregressive|tokenizer)/', done.stderr), done.stderr
    else:
        # Earlier steps of a script may have shown their bars.
        assert done.stderr.splitlines()[-1:] == lines
        assert command in OF_SEVERAL_STEPS or len(done.stderr.splitlines()) == 1
    assert without_new(files_of(folder), folder) == without_new(before, folder)
