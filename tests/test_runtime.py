"""The ground floor.

Whole files, run folders that resume, flags and one-line errors, hashes, batches read ahead.
"""

import argparse
import contextlib
import hashlib
import json
import random
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.runtime import log, speed
from autoregressive.runtime.distributed import Session, open_session, seed_everything
from autoregressive.runtime.entry import (
    Parser,
    above,
    at_least,
    checks,
    finite,
    fraction,
    fraction_above_0,
    fraction_up_to_1,
    may_vary,
    seed_number,
)
from autoregressive.runtime.files import (
    atomic_write,
    check_writable_folder,
    codebook_sha256,
    file_sha256,
    open_npz,
    read_npz_settings,
    weights_sha256,
)
from autoregressive.runtime.identity import RunFolder, find_run_folder
from autoregressive.runtime.loader import read_ahead
from autoregressive.runtime.log import MetricsFile, progress, read_metrics
from autoregressive.runtime.optim import (
    OptimSettings,
    add_optim_args,
    build_optimizer,
)
from autoregressive.runtime.pictures import CAPTION_HEIGHT, GAP, LEGIBLE_SIDE, save_grid
from autoregressive.runtime.run_settings import RunRequest, add_training_args, open_run_folder
from conftest import ROOT

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
    with open_npz(tmp_path / "a.npz", {"cfg_scale": 1.5}) as npz:
        rows = [np.full((2, 2), 7, np.uint8), np.full((3, 2), 9, np.uint8)]
        npz.add_rows("arr_0", np.uint8, (5, 2), rows)
        npz.add("text", np.array("abc"))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert arrays["arr_0"].tolist() == [[7, 7]] * 2 + [[9, 9]] * 3
        assert arrays["arr_0"].dtype == np.uint8
        assert str(arrays["text"]) == "abc"
        assert json.loads(str(arrays["settings"])) == {"cfg_scale": 1.5}
    assert read_npz_settings(tmp_path / "a.npz") == {"cfg_scale": 1.5}


def test_codebook_hash_is_that_of_little_endian_floats():
    codebook = torch.tensor([[1.5, -2.0], [0.0, 3.25]])
    content = struct.pack("<4f", 1.5, -2.0, 0.0, 3.25)
    assert codebook_sha256(codebook) == hashlib.sha256(content).hexdigest()
    assert codebook_sha256(codebook.double()) == codebook_sha256(codebook)


def test_weights_hash_sees_names_dtypes_shapes_and_values_but_not_order():
    state = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    same = weights_sha256(dict(reversed(state.items())))
    assert weights_sha256(state) == same
    for other in ({"a": torch.zeros(3, 2)}, {"a": torch.zeros(2, 3).double()},
                  {"a": torch.full((2, 3), 1e-9)}):
        assert weights_sha256(state | other) != same
    assert weights_sha256({"c": state["a"], "b": state["b"]}) != same


def test_file_hash_is_that_of_its_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 3_000_000)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(b"x" * 3_000_000).hexdigest()


def test_a_file_where_a_folder_is_expected_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/results: expected a writable folder"):
        check_writable_folder(tmp_path / "file" / "results")


def test_equal_configs_continue_one_folder_and_others_get_a_new_one(tmp_path):
    def find(identity, **settings):
        return find_run_folder(tmp_path, "GPT-B", identity, {"lr": 1, "epochs": 300}, **settings)

    first = find({"lr": 1})
    assert first.path.name == "000-GPT-B" and not first.path.exists()
    first.start({"lr": 1, "epochs": 3})  # what is no part of the identity may differ
    assert find({"lr": 1}).path == first.path
    other = find({"lr": 2})
    assert other.path.name == "001-GPT-B"
    other.start({"lr": 2, "epochs": 3})
    again = find({"lr": 1}, new_run=True)
    assert again.path.name == "002-GPT-B"
    again.start({"lr": 1, "epochs": 3})
    assert find({"lr": 1}).path == again.path                    # the newest of the equal ones


def test_a_flag_that_an_older_config_lacks_counts_as_its_default_and_as_nothing_else(tmp_path):
    defaults = {"lr": 7, "warmup": 0, "paths": ("a",)}

    def find(**identity):
        return find_run_folder(tmp_path, "x", {"lr": 1} | identity, defaults).path

    find_run_folder(tmp_path, "x", {"lr": 1}, {"lr": 7}).start({"lr": 1})
    assert find(warmup=0).name == find(warmup=0, paths=["a"]).name == "000-x" and find().is_dir()
    for other in ({"warmup": 5}, {"paths": ["b"]}, {"warmup": 0, "lr": 7},
                  {"codes_sha256": "1" * 64}):
        assert find(**other).name == "001-x", other              # a hash has no default


def test_a_new_run_names_the_nearest_other_one_and_what_differs(tmp_path, caplog):
    for config in ({"lr": 1, "beta": 1}, {"lr": 3, "beta": 3}):
        find_run_folder(tmp_path, "x", config, {}).start(config)
    caplog.clear()
    find_run_folder(tmp_path, "x", {"lr": 2, "beta": 1}, {})
    assert "002-x: a new run; " in caplog.text and "000-x is another one, by lr\n" in caplog.text


def test_two_new_runs_of_one_moment_take_two_folders(tmp_path):
    """The second looks while the first has its folder, and not more."""
    parser = Parser("test")
    add_optim_args(parser)
    add_training_args(parser)
    with contextlib.ExitStack() as sessions:
        paths = []
        for lr in ("1", "2", "1"):
            args = parser.parse_args(["--results-dir", str(tmp_path), "--lr", lr])
            session = Session(0, 1, torch.device("cpu"), held=sessions)
            request = RunRequest(tmp_path, "x", args.identity(), args.plain(), args.defaults())
            if len(paths) < 2:
                paths.append(open_run_folder(session, request, 5).path.name)
                continue
            with pytest.raises(SystemExit):         # the same run again
                open_run_folder(session, request, 5)
    assert paths == ["000-x", "001-x"]


def test_a_folder_whose_start_was_killed_before_its_config_is_begun_again(tmp_path):
    (tmp_path / "000-x").mkdir()
    assert find_run_folder(tmp_path, "x", {"lr": 1}, {}).path.name == "000-x"
    (tmp_path / "000-x" / "checkpoints").mkdir()  # somebody's, whoever removed its config
    assert find_run_folder(tmp_path, "x", {"lr": 1}, {}).path.name == "001-x"


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_half_of_a_launchers_environment_is_refused(monkeypatch, name):
    monkeypatch.setenv(name, "0")
    words = f"expected numbers in both RANK and WORLD_SIZE .* found {name}=0"
    with pytest.raises(ValueError, match=words), open_session():
        pass


@pytest.mark.parametrize("content", ["[]", "", "{", "\x80", '{"steps": "five"}', "{}"])
def test_a_damaged_record_is_refused_by_name(tmp_path, content):
    (tmp_path / "finished.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match="finished.json: expected"):
        RunFolder(tmp_path).is_finished(5)


def test_metrics_end_where_they_are_damaged(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n[]\n{"step": 2}\n\xff')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_a_run_is_finished_when_it_says_so(tmp_path):
    folder = find_run_folder(tmp_path, "x", {}, {})
    folder.start({})
    assert folder.result is None and not folder.is_finished(0)
    folder.mark_finished({"steps": 5})
    again = find_run_folder(tmp_path, "x", {}, {})
    assert again.result == {"steps": 5} and again.is_finished(5) and not again.is_finished(6)


@pytest.mark.parametrize("seconds, num_lines", [(0.5, 0), (5, 1)])
def test_progress_off_a_terminal_is_printed_at_its_end_if_it_took_a_second(
        capsys, seconds, num_lines):
    with progress(Session(0, 1, torch.device("cpu")), 3, "read", "image") as bar:
        bar.start_t -= seconds
        bar.last_print_t -= seconds
        bar.update(3)
    printed = capsys.readouterr().err.split()
    assert printed.count("100%|██████████|") == num_lines and bool(printed) == bool(num_lines)


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
    levels = np.uint8([0, 100, 200])[:, None, None, None]
    images = levels.repeat(2, 1).repeat(2, 2).repeat(3, 3)        # (3, 2, 2, 3)
    save_grid(tmp_path / "grid.png", images, columns=2, captions=["a", "b", "a very long caption"])
    canvas = np.asarray(Image.open(tmp_path / "grid.png"))
    side = LEGIBLE_SIDE                                           # of 2 pixels each, enlarged
    assert canvas.shape == (2 * (side + CAPTION_HEIGHT + GAP) + GAP, 2 * (side + GAP) + GAP, 3)
    upper, left = GAP + CAPTION_HEIGHT, GAP + side + GAP
    assert (canvas[upper:upper + side, left:left + side] == 100).all()
    assert (canvas[upper + side + GAP + CAPTION_HEIGHT:][:side, GAP:GAP + side] == 200).all()
    save_grid(tmp_path / "rows.png", images, columns=1, row_titles=["a", "of all its row", ""])
    rows = np.asarray(Image.open(tmp_path / "rows.png"))
    assert (rows[upper:upper + side, GAP:GAP + side] == 0).all()
    titles = [rows[GAP + row * (side + CAPTION_HEIGHT + GAP):][:CAPTION_HEIGHT] for row in range(3)]
    assert [(title < 128).any() for title in titles] == [True, True, False]
    # Letters beyond ASCII are not all the same box; what is cut says so.
    texts = ["ü", "ö", "ł", "a very long name", "a very long story"]
    save_grid(tmp_path / "letters.png", images[[0] * 5], columns=1, captions=texts)
    letters = np.asarray(Image.open(tmp_path / "letters.png"))
    shown = {letters[GAP + row * (side + CAPTION_HEIGHT + GAP):][:CAPTION_HEIGHT].tobytes()
             for row in range(5)}
    assert len(shown) == 4


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
    integers = session.gather_integers(session.rank, 7)
    if session.is_main:
        print("worked", ranks, integers)
run(main, Parser("test"))
"""


def test_several_processes_leave_without_finalising_the_interpreter(tmp_path):
    (tmp_path / "script.py").write_text(LEAVES)  # else gloo's thread may abort a rank as it ends
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node=2", tmp_path / "script.py", ROOT],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # torch 2.9 says more before.
    assert done.stdout.endswith("worked [0, 1] [(0, 7), (1, 7)]\n"), done.stdout


@pytest.mark.parametrize("words", [
    ["--global-seed", "-1"], ["--no-such-flag"], ["--global-see", "1"]])
def test_unknown_flags_and_values_are_one_line_and_exit_code_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        Parser("test").parse_args(words)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


NOT_FINITE = ("nan", "inf", "-inf", "NaN", "infinity", "1e999")


@pytest.mark.parametrize("kind", [
    at_least(0), at_least(0.0), at_least(-1.0), above(0.0), above(-1.0), finite,
    fraction, fraction_above_0, fraction_up_to_1, seed_number])
@pytest.mark.parametrize("text", NOT_FINITE)
def test_numbers_that_are_not_finite_are_one_line_and_exit_code_2(kind, text, capsys):
    parser = Parser("test")
    parser.add_argument("--number", type=kind)
    for words in ([f"--number={text}"], ["--number", text]):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(words)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and "error: --number: " in error and error.count("\n") == 1


@pytest.mark.parametrize("kind, accepted, refused", [
    (at_least(1), "1 2", "0 -3 1.5 x"),
    (at_least(0.5), "0.5 1 1e9", "0.49 x"),
    (above(0.0), "1e-300 3", "0 -1"),
    (finite, "-1.5 0 1e300", "x"),
    (fraction, "0 0.999", "-0.1 1"),
    (fraction_above_0, "0.001 1", "0 1.001"),
    (fraction_up_to_1, "0 1", "-0.001 1.001"),
    (seed_number, f"0 {2**64 - 1}", f"-1 {2**64} 0.5")])
def test_numbers_are_accepted_in_their_range_alone(kind, accepted, refused):
    for text in accepted.split():
        expected = float(text) if "e" in text or "." in text else int(text)
        assert kind(text) == expected
    for text in refused.split():
        with pytest.raises((argparse.ArgumentTypeError, ValueError)):
            kind(text)


def settled(*words, recorded, preset):
    parser = Parser("test")
    for name in ("--top-k", "--width", "--depth", "--height"):
        parser.add_argument(name, type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    flags = parser.parse_args(words)
    flags.resolve(recorded, "a.pt", preset)
    return [flags.top_k, flags.width, flags.depth, flags.height, flags.compile]


def test_flags_are_what_was_given_else_what_the_file_records_else_the_preset_else_the_default():
    recorded = {"top_k": 2, "width": 2}
    preset = {"top_k": 2, "width": 2, "depth": 3, "compile": True}
    both = {"recorded": recorded, "preset": preset}
    assert settled(**both) == [2, 2, 3, 0, True]
    assert settled("--top-k", "1", "--depth", "1", **both) == [1, 2, 1, 0, True]
    assert settled("--top-k", "0", "--no-compile", **both) == [0, 2, 3, 0, False]
    assert settled(recorded=recorded, preset={}) == [2, 2, 0, 0, False]
    assert settled(recorded={}, preset={}) == [0, 0, 0, 0, False]


def test_preset_that_contradicts_the_file_is_refused_unless_the_flag_is_given():
    both = {"recorded": {"top_k": 2}, "preset": {"top_k": 3, "width": 4}}
    words = r"^--preset: expected --top-k 2 as in a\.pt, got 3; choose the"
    with pytest.raises(ValueError, match=words):
        settled(**both)
    with pytest.raises(ValueError, match="--top-k 2"):
        settled("--width", "2", **both)
    assert settled("--top-k", "3", **both)[:2] == [3, 4]
    assert settled("--top-k", "0", **both)[:2] == [0, 4]         # the default, but given


def test_identity_holds_every_flag_that_may_not_vary():
    parser = Parser("test")
    parser.add_argument("--lr", type=float, default=0.1)
    may_vary(parser.add_argument("--log-every", type=int, default=100))
    flags = parser.parse_args(["--log-every", "7"])
    assert flags.identity() == {"lr": 0.1, "global_seed": 0}
    assert flags.plain() == flags.identity() | {"log_every": 7, "device": "auto", "debug": False}
    assert flags.defaults() == flags.plain() | {"log_every": 100}


class Squares(torch.utils.data.Dataset):
    def __getitem__(self, key):
        return np.full(3, key * key)


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_ahead_leaves_the_global_random_numbers_alone(workers):
    torch.manual_seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    batches = list(read_ahead(Squares(), range(5), workers))
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert [batch.tolist() for batch in batches] == [[key * key] * 3 for key in range(5)]


@pytest.mark.parametrize("count, world_size", [(7, 3), (2, 3), (9, 1)])
def test_parts_of_processes_cover_everything_once(count, world_size):
    parts = [Session(rank, world_size, torch.device("cpu")).part_of(count)
             for rank in range(world_size)]
    assert [row for part in parts for row in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_speed_leaves_out_what_it_is_paused_for(monkeypatch):
    now = 0.0
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now)
    speedometer = speed.Speedometer(torch.device("cpu"), 1, tokens=4)
    speedometer.add(6, step=0)
    now = 2.0
    with speedometer.paused():
        now = 100.0
    speedometer.add(6, step=0)
    now = 102.0
    rates = speedometer.read()
    assert rates["images_per_second"] == 3 and rates["tokens_per_second"] == 12


def test_seeds_of_ranks_differ_and_repeat():
    draws = []
    for seed, rank in ((0, 0), (0, 1), (1, 0), (0, 0)):
        seed_everything(seed, rank)
        draws.append(torch.rand(1).item())
    assert draws[0] == draws[3] and len(set(draws)) == 3


def test_weight_decay_spares_vectors():
    model = torch.nn.LayerNorm(4)
    model.matrix = torch.nn.Parameter(torch.ones(2, 2))
    decayed, spared = build_optimizer(model, OptimSettings(1e-3, weight_decay=0.05)).param_groups
    assert [p.dim() for p in decayed["params"]] == [2]
    assert [p.dim() for p in spared["params"]] == [1, 1]
    assert json.dumps([decayed["weight_decay"], spared["weight_decay"]]) == "[0.05, 0.0]"


def test_curves_show_validation_beside_training_and_mark_a_point_that_is_alone(
        tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 5, "token_loss": 3.0, "val_token_loss": 4.0}\n')
    shown = []
    monkeypatch.setattr(log, "plot_panels", lambda path, panels: shown.extend(panels))
    log.plot_metrics(tmp_path / "curves.png", {"run": tmp_path / "metrics.jsonl"})
    assert shown[0].curves == {"run": [(5, 3.0)], "run, val": [(5, 4.0)]}
    monkeypatch.undo()
    sizes = []
    for points in ([], [(5, 3.0)]):
        log.plot_panels(tmp_path / "one.png", [log.Panel("steps", "loss", {"run": points})])
        picture = np.asarray(Image.open(tmp_path / "one.png").convert("RGB"), dtype=int)
        sizes.append((np.ptp(picture, axis=-1) > 50).sum())         # coloured pixels
    assert sizes[0] == 0 and sizes[1] > 20


def test_bands_are_drawn_where_they_are_known(tmp_path):
    curves = {"a": [(0, 0.01), (1, 0.02)], "b": [(0, 0.5), (1, 0.6)]}
    panel = log.Panel("steps", "difference", curves, {"a": [0.01, 0.02]})
    bare = log.Panel("steps", "difference", curves)
    log.plot_panels(tmp_path / "none.png", [log.Panel("steps", "difference", {"a": []}, {"a": []})])
    sizes = []
    for name, each in (("bands.png", panel), ("bare.png", bare)):
        log.plot_panels(tmp_path / name, [each])
        picture = np.asarray(Image.open(tmp_path / name).convert("RGB"), dtype=int)
        sizes.append((np.ptp(picture, axis=-1) > 20).sum())
    assert sizes[0] > 2 * sizes[1]


def test_panels_stand_in_columns(tmp_path):
    panel = log.Panel("steps", "loss", {"a": [(0, 1.0), (1, 2.0)]})
    shapes = []
    for number, columns in ((1, None), (1, 2), (3, None), (3, 2)):
        log.plot_panels(tmp_path / "panels.png", number * [panel], columns=columns)
        shapes.append(np.asarray(Image.open(tmp_path / "panels.png").convert("L")).shape)
    one, few, row, block = shapes
    assert few == one and row == (one[0], 3 * one[1])
    assert one[0] < block[0] < 2 * one[0] and block[1] == 2 * one[1]
    last = np.asarray(Image.open(tmp_path / "panels.png").convert("L"))[one[0]:, one[1]:]
    assert (last[:, last.shape[1] // 2:] == 255).all()              # nothing in the fourth place
