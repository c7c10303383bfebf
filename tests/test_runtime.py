"""The ground floor: whole files, run folders that resume, one-line errors, hashes."""

import hashlib
import json
import math
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from autoregressive.runtime.distributed import Session, seed_everything
from autoregressive.runtime.entry import Parser, checks
from autoregressive.runtime.files import (
    atomic_write,
    codebook_sha256,
    file_sha256,
    npz_writer,
    require_writable_folder,
    weights_sha256,
)
from autoregressive.runtime.log import MetricsFile, find_run_folder, read_metrics, start_run_folder
from autoregressive.runtime.pictures import CAPTION_HEIGHT, GAP, LEGIBLE_SIDE, save_grid
from autoregressive.train.optim import build_optimizer, learning_rate

ALONE = Session(rank=0, world_size=1, device=torch.device("cpu"))


def test_a_file_is_whole_or_as_it_was(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "file") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with atomic_write(tmp_path / "file") as file:
        file.write(b"new")
    assert (tmp_path / "file").read_text() == "new"


def test_streamed_npz_is_read_by_numpy(tmp_path):
    with npz_writer(tmp_path / "a.npz") as add:
        add("arr_0", np.uint8, (5, 2), [np.full((2, 2), 7, np.uint8), np.full((3, 2), 9, np.uint8)])
        add("text", "<U3", (), [np.array("abc")])
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert arrays["arr_0"].tolist() == [[7, 7]] * 2 + [[9, 9]] * 3 and str(arrays["text"]) == "abc"


def test_codebook_hash_is_that_of_little_endian_floats():
    codebook = torch.tensor([[1.5, -2.0], [0.0, 3.25]])
    assert codebook_sha256(codebook) == hashlib.sha256(struct.pack("<4f", 1.5, -2.0, 0.0, 3.25)).hexdigest()
    assert codebook_sha256(codebook.double()) == codebook_sha256(codebook)


def test_weights_hash_sees_names_dtypes_shapes_and_values_but_not_order():
    state = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    same = weights_sha256(dict(reversed(state.items())))
    assert weights_sha256(state) == same
    for other in ({"a": torch.zeros(3, 2)}, {"a": torch.zeros(2, 3).double()}, {"a": torch.full((2, 3), 1e-9)}):
        assert weights_sha256(state | other) != same
    assert weights_sha256({"c": state["a"], "b": state["b"]}) != same


def test_file_hash_is_that_of_its_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 3_000_000)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(b"x" * 3_000_000).hexdigest()


def test_a_file_where_a_folder_is_expected_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/results: expected a writable folder"):
        require_writable_folder(tmp_path / "file" / "results")


def test_equal_configs_continue_one_folder_and_others_get_a_new_one(tmp_path):
    def find(config, **settings):
        return find_run_folder(tmp_path, "GPT-B", config, ignored=("epochs",), **settings)

    first = find({"lr": 1, "epochs": 3})
    assert first.path.name == "000-GPT-B" and not first.path.exists()
    start_run_folder(first, {"lr": 1, "epochs": 3})
    assert find({"lr": 1, "epochs": 9}).path == first.path
    other = find({"lr": 2, "epochs": 3})
    assert other.path.name == "001-GPT-B"
    start_run_folder(other, {"lr": 2, "epochs": 3})
    again = find({"lr": 1, "epochs": 3}, new_run=True)
    assert again.path.name == "002-GPT-B"
    start_run_folder(again, {"lr": 1, "epochs": 3})
    assert find({"lr": 1, "epochs": 3}).path == again.path       # the newest of the equal ones


def test_a_run_is_finished_when_it_says_so(tmp_path):
    folder = find_run_folder(tmp_path, "x", {})
    start_run_folder(folder, {})
    assert folder.result is None
    folder.mark_finished({"updates": 5})
    assert find_run_folder(tmp_path, "x", {}).result == {"updates": 5}


def test_metrics_are_cut_back_to_the_step_that_training_continues_from(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (10, 20, 30):
        metrics.write(step, loss=1 / step)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "lo')                           # the process was killed here
    MetricsFile(tmp_path / "metrics.jsonl", resume_step=20).write(25, loss=2.0)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [10, 20, 25]


def test_pictures_stand_where_they_belong(tmp_path):
    from PIL import Image
    images = np.arange(3, dtype=np.uint8)[:, None, None, None].repeat(2, 1).repeat(2, 2).repeat(3, 3) * 100
    save_grid(tmp_path / "grid.png", images, columns=2, captions=["a", "b", "a very long caption"])
    canvas = np.asarray(Image.open(tmp_path / "grid.png"))
    side = LEGIBLE_SIDE                                           # of 2 pixels each, enlarged
    assert canvas.shape == (2 * (side + CAPTION_HEIGHT + GAP) + GAP, 2 * (side + GAP) + GAP, 3)
    upper, left = GAP + CAPTION_HEIGHT, GAP + side + GAP
    assert (canvas[upper:upper + side, left:left + side] == 100).all()
    assert (canvas[upper + side + GAP + CAPTION_HEIGHT:][:side, GAP:GAP + side] == 200).all()


@pytest.mark.parametrize("error, line", [
    (ValueError("x: expected 1,\n  got 2"), "x: expected 1, got 2"),
    (FileNotFoundError(2, "No such file or directory", "/a/b"), "/a/b: No such file or directory")])
def test_mistakes_are_one_line_and_exit_code_2(error, line, capsys):
    with pytest.raises(SystemExit) as stop, checks(ALONE):
        raise error
    assert stop.value.code == 2 and capsys.readouterr().err.endswith(f": error: {line}\n")


def test_mistakes_keep_their_traceback_when_debugging():
    with pytest.raises(ValueError), checks(Session(0, 1, torch.device("cpu"), debug=True)):
        raise ValueError


def test_errors_of_the_code_are_never_taken_for_mistakes():
    with pytest.raises(ZeroDivisionError), checks(ALONE):
        print(1 / 0)


LEAVES = """
import atexit, sys
sys.path.insert(0, sys.argv.pop(1))
from autoregressive.runtime.entry import Parser, run
atexit.register(lambda: print("finalised"))
def main(args, session):
    ranks = session.gather(session.rank)
    if session.is_main:
        print("worked", ranks)
run(main, Parser("test"))
"""


def test_several_processes_leave_without_finalising_the_interpreter(tmp_path):
    (tmp_path / "script.py").write_text(LEAVES)                  # else gloo's thread may abort a rank as it ends
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           tmp_path / "script.py", ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "worked [0, 1]\n"


@pytest.mark.parametrize("words", [["--global-seed", "-1"], ["--no-such-flag"], ["--global-see", "1"]])
def test_unknown_flags_and_values_are_one_line_and_exit_code_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        Parser("test").parse_args(words)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("count, world_size", [(7, 3), (2, 3), (9, 1)])
def test_shares_of_processes_cover_everything_once(count, world_size):
    shares = [Session(rank, world_size, torch.device("cpu")).share_of(count) for rank in range(world_size)]
    assert [row for share in shares for row in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_seeds_of_ranks_differ_and_repeat():
    draws = []
    for seed, rank in ((0, 0), (0, 1), (1, 0), (0, 0)):
        seed_everything(seed, rank)
        draws.append(torch.rand(1).item())
    assert draws[0] == draws[3] and len(set(draws)) == 3


def test_learning_rate_warms_up_and_ends_as_its_schedule_says():
    rates = {schedule: [learning_rate(update, 30, 2.0, 10, schedule) for update in range(30)]
             for schedule in ("constant", "linear", "cosine")}
    assert all(rate[:10] == pytest.approx([0.2 * (update + 1) for update in range(10)]) for rate in rates.values())
    assert rates["constant"][10:] == [2.0] * 20
    assert rates["linear"][10:] == pytest.approx([2.0 * (1 - i / 20) for i in range(20)])
    assert rates["cosine"][10:] == pytest.approx([1 + math.cos(math.pi * i / 20) for i in range(20)])


def test_weight_decay_spares_vectors():
    model = torch.nn.LayerNorm(4)
    model.matrix = torch.nn.Parameter(torch.ones(2, 2))
    decayed, spared = build_optimizer(model, 1e-3, (0.9, 0.95), 0.05).param_groups
    assert [p.dim() for p in decayed["params"]] == [2] and [p.dim() for p in spared["params"]] == [1, 1]
    assert json.dumps([decayed["weight_decay"], spared["weight_decay"]]) == "[0.05, 0.0]"
