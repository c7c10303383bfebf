"""balance_k_means.py: its files and their hashes, equal bytes for equal seeds, and its mistakes."""

import argparse
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.runtime.checkpoint import read_checkpoint, save_checkpoint
from autoregressive.runtime.lock import hold
from conftest import ROOT
from processes import run_here
from tokenizer.clustering import balanced_sse, normalize_codes

SCRIPT = "balance_k_means.py"
CODEBOOK = "quantize.embedding.weight"
SUFFIX = "kmeans+nearest-cluster_size=7"
REORDERED, MAPPING = f"vq-reorder-{SUFFIX}.pt", f"mapping-{SUFFIX}.pt"
FILES = {REORDERED, MAPPING, f"{MAPPING}.json", f"report-{SUFFIX}.json", f"codebook-{SUFFIX}.png"}


def raw_codebook(num_codes=42, dimensions=5):
    """Returns codes of many lengths, so that normalized ones in their place would be noticed."""
    random = torch.Generator().manual_seed(3)
    directions = torch.randn(num_codes, dimensions, generator=random)
    return directions * (1 + 4 * torch.rand(num_codes, 1, generator=random))


def sha256(tensor):
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def balance(*flags):
    assert run_here(SCRIPT, *flags) == 0


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of our own layout, with EMA weights and things that must stay."""
    path = tmp_path / "in" / "vq.pt"
    payload = {"model": {"encoder.conv_in.weight": torch.ones(2, 3), CODEBOOK: raw_codebook()},
               "ema": {CODEBOOK: raw_codebook() + 0.25}, "steps": 11,
               "args": argparse.Namespace(codebook_size=42)}
    save_checkpoint(path, payload)
    return path


def test_codes_stand_where_the_mapping_says_and_everything_else_stays(saved):
    balance("--vq-ckpt", saved, "--cluster-size", 7)
    before, after = read_checkpoint(saved), read_checkpoint(saved.parent / REORDERED)
    mapping = read_checkpoint(saved.parent / MAPPING)
    assert {path.name for path in saved.parent.iterdir()} == FILES | {"vq.pt"}
    assert mapping.dtype == torch.int64 and mapping.is_contiguous()
    assert mapping.sort().values.tolist() == list(range(42))
    for part in ("model", "ema"):                               # raw codes, not normalized
        assert torch.equal(after[part][CODEBOOK][mapping], before[part][CODEBOOK])
    other = "encoder.conv_in.weight"
    assert torch.equal(after["model"][other], before["model"][other])
    assert (after["steps"], after["args"]) == (11, before["args"])


def test_hashes_travel_with_both_files_and_fit_them(saved, tmp_path):
    out = tmp_path / "out"
    balance("--vq-ckpt", saved, "--cluster-size", 7, "--output-dir", out, "--seed", 5)
    after, mapping = read_checkpoint(out / REORDERED), read_checkpoint(out / MAPPING)
    record = after["reordering"]

    assert record == {"codebook_sha256": sha256(after["model"][CODEBOOK]),
                      "mapping_sha256": sha256(mapping),
                      "original_codebook_sha256": sha256(raw_codebook()),
                      "cluster_size": 7, "num_clusters": 6, "method": "optimal", "seed": 5}
    assert json.loads((out / f"{MAPPING}.json").read_text()) == record


def test_report_holds_what_was_found(saved):
    balance("--vq-ckpt", saved, "--cluster-size", 7, "--restarts", 3)
    report = json.loads((saved.parent / f"report-{SUFFIX}.json").read_text())
    codes = normalize_codes(raw_codebook())
    mapping = read_checkpoint(saved.parent / MAPPING).numpy()
    assert report["sse"] == pytest.approx(balanced_sse(codes, mapping // 7, 6))
    sse_before = balanced_sse(codes, np.arange(42) // 7, 6)
    assert report["sse_of_indices_as_they_were"] == pytest.approx(sse_before)
    assert list(report["sse_by_seed"]) == ["42", "43", "44", "45"]
    assert report["sse"] == min(report["sse_by_seed"].values())
    assert all(report["certificate"].values()) and report["codebook"] == [42, 5]


def test_picture_shows_both_orders(saved):
    balance("--vq-ckpt", saved, "--cluster-size", 7)
    with Image.open(saved.parent / f"codebook-{SUFFIX}.png") as picture:
        assert picture.width > 2 * picture.height
        assert len(picture.convert("RGB").getcolors(10**6)) > 20


def test_equal_seeds_give_equal_files_on_any_number_of_threads(tmp_path):
    save_checkpoint(tmp_path / "vq.pt", {"model": {CODEBOOK: raw_codebook(490, 8)}})
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, threads in zip(folders, ("1", "2"), strict=True):
        command = [sys.executable, ROOT / SCRIPT, "--vq-ckpt", tmp_path / "vq.pt",
                   "--cluster-size", "7", "--output-dir", folder]
        limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
        subprocess.run(command, check=True, capture_output=True, env=os.environ | limits)
    for name in FILES - {f"report-{SUFFIX}.json"}:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    reports = [json.loads((folder / f"report-{SUFFIX}.json").read_text()) for folder in folders]
    for report in reports:
        del report["seconds"], report["cpu_seconds"]
    assert reports[0] == reports[1]


def test_greedy_from_the_published_start_reproduces_the_published_mapping(fixture, tmp_path):
    published = fixture("kmeans_sphere")
    save_checkpoint(tmp_path / "vq.pt", {"model": {CODEBOOK: published["embedding"]}})
    balance("--vq-ckpt", tmp_path / "vq.pt", "--cluster-size", 32, "--method", "greedy")
    mapping = read_checkpoint(tmp_path / "mapping-kmeans+nearest-cluster_size=32-greedy.pt")
    assert torch.equal(mapping, published["mapping"])
    stem = "vq-reorder-kmeans+nearest-cluster_size=32-greedy.pt"
    assert torch.equal(read_checkpoint(tmp_path / stem)["model"][CODEBOOK], published["reordered"])


def test_keep_best_never_gives_more_sse_than_the_last_greedy_round(fixture, tmp_path):
    codebook = fixture("kmeans_sphere")["embedding"]
    save_checkpoint(tmp_path / "vq.pt", {"model": {CODEBOOK: codebook}})
    report_path = tmp_path / "report-kmeans+nearest-cluster_size=32-greedy.json"
    found = []
    for flags in ([], ["--keep-best", "--overwrite"]):
        balance("--vq-ckpt", tmp_path / "vq.pt", "--cluster-size", 32, "--method", "greedy", *flags)
        found.append(json.loads(report_path.read_text())["sse"])
    assert found[1] < found[0]


@pytest.mark.parametrize("wrap", [
    lambda state: state,
    lambda state: {"state_dict": state},
    lambda state: {"module": state},
    lambda state: {"model": {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()}},
], ids=["bare", "state_dict", "deepspeed", "wrapped"])
def test_every_layout_of_a_checkpoint_is_read(wrap, tmp_path):
    save_checkpoint(tmp_path / "vq.pt", wrap({CODEBOOK: raw_codebook()}))
    balance("--vq-ckpt", tmp_path / "vq.pt", "--cluster-size", 7)
    payload = read_checkpoint(tmp_path / REORDERED)
    mapping = read_checkpoint(tmp_path / MAPPING)
    state = next(payload[key] for key in ("model", "module", "state_dict") if key in payload)
    codebook, = state.values()
    assert torch.equal(codebook[mapping], raw_codebook())


def test_the_script_runs_with_no_flag_on_the_original_file_name(tmp_path, monkeypatch):
    folder = tmp_path / "pretrained_models"
    save_checkpoint(folder / "vq_ds16_c2i.pt", {"model": {CODEBOOK: raw_codebook(256)}})
    monkeypatch.chdir(tmp_path)
    balance()
    suffix = "kmeans+nearest-cluster_size=128.pt"
    for name in (f"vq_ds16_c2i-reorder-{suffix}", f"mapping-{suffix}"):
        assert (folder / name).is_file()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def other_decoder(saved):
    payload = read_checkpoint(saved)
    payload["model"] = payload["model"] | {"encoder.conv_in.weight": torch.zeros(2, 3)}
    save_checkpoint(saved, payload)


def other_codebook(saved):
    save_checkpoint(saved, {"model": {CODEBOOK: raw_codebook() + 1}})


def published_mapping(saved):
    (saved.parent / f"{MAPPING}.json").unlink()


def swapped_mapping(saved):
    save_checkpoint(saved.parent / MAPPING, torch.arange(42))


def published_tokenizer(saved):
    save_checkpoint(saved.parent / REORDERED, {"model": {CODEBOOK: raw_codebook()}})


@pytest.mark.parametrize("change, flags, message", [
    (None, ["--seed", "7"], f"{MAPPING}.json: expected a mapping with seed 7, found one with 42"),
    (None, ["--restarts", "1"], "expected a mapping with restarts 1, found one with None"),
    (other_codebook, [], "expected a mapping with original_codebook_sha256"),
    (other_decoder, [],
     f"{REORDERED}: expected the weights of the tokenizer, found another encoder.conv_in"),
    (published_mapping, [],
     f"{MAPPING}: expected it with {MAPPING}.json, found a mapping of others"),
    (swapped_mapping, [],
     f"{MAPPING}: expected what {MAPPING}.json describes, found another mapping"),
    (published_tokenizer, [], f"{REORDERED}: expected a checkpoint of balance_k_means.py"),
])
def test_files_of_others_are_replaced_by_overwrite_alone(change, flags, message, saved, capsys):
    balance("--vq-ckpt", saved, "--cluster-size", 7)
    if change:
        change(saved)
    before = contents(saved.parent)
    assert run_here(SCRIPT, "--vq-ckpt", saved, "--cluster-size", 7, *flags) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert message in line and line.endswith("replace it with --overwrite")
    assert contents(saved.parent) == before
    balance("--vq-ckpt", saved, "--cluster-size", 7, *flags, "--overwrite")
    record = json.loads((saved.parent / f"{MAPPING}.json").read_text())
    assert record["mapping_sha256"] == sha256(read_checkpoint(saved.parent / MAPPING))
    assert record == read_checkpoint(saved.parent / REORDERED)["reordering"]
    assert record["original_codebook_sha256"] == sha256(read_checkpoint(saved)["model"][CODEBOOK])


def test_a_start_removes_what_killed_ones_left_of_all_files(saved):
    for name in FILES:
        (saved.parent / f".{name}.host.7.tmp").touch()
    balance("--vq-ckpt", saved, "--cluster-size", 7)
    assert {path.name for path in saved.parent.iterdir()} == FILES | {"vq.pt"}
    (saved.parent / f".{REORDERED}.host.7.tmp").touch()
    balance("--vq-ckpt", saved, "--cluster-size", 7, "--mapping", saved.parent / MAPPING)
    assert {path.name for path in saved.parent.iterdir()} == FILES | {"vq.pt"}


def test_one_start_at_a_time_writes_a_mapping_or_what_belongs_to_it(saved, capsys):
    balance("--vq-ckpt", saved, "--cluster-size", 7)
    for flags in ([], ["--mapping", saved.parent / MAPPING]):
        with hold(saved.parent / MAPPING):
            assert run_here(SCRIPT, "--vq-ckpt", saved, "--cluster-size", 7, *flags) == 2
        assert f"{MAPPING}: expected to be the only one who writes here" in capsys.readouterr().err


@pytest.mark.parametrize("lost", [[], [REORDERED], [MAPPING], [f"report-{SUFFIX}.json"],
                                  [MAPPING, REORDERED]])
def test_the_same_command_again_leaves_the_same_files(lost, saved, capsys):
    balance("--vq-ckpt", saved, "--cluster-size", 7)
    before = contents(saved.parent)
    for name in lost:
        (saved.parent / name).unlink()
    balance("--vq-ckpt", saved, "--cluster-size", 7)
    after = contents(saved.parent)
    assert before.keys() == after.keys()
    changed = [name for name in after if after[name] != before[name]]
    assert not [name for name in changed if not name.startswith("report")]
    assert ("is finished" in capsys.readouterr().out) == (not lost)


def test_methods_lie_side_by_side(saved):
    for method in ("optimal", "greedy", "random"):
        balance("--vq-ckpt", saved, "--cluster-size", 7, "--method", method)
    others = {name.replace(SUFFIX, f"{SUFFIX}-{method}")
              for name in FILES for method in ("greedy", "random")}
    assert set(contents(saved.parent)) == FILES | others | {"vq.pt"}


def test_a_mapping_that_ships_alone_gets_its_reordered_checkpoint(saved, capsys):
    order = torch.randperm(42, generator=torch.Generator().manual_seed(1))
    view = torch.cat([torch.arange(42), order])[42:]        # as IAR saved it: not its own storage
    save_checkpoint(saved.parent / MAPPING, view)
    assert read_checkpoint(saved.parent / MAPPING).storage_offset() == 42
    before = contents(saved.parent)
    for _ in range(2):                                          # the same command again is fine
        balance("--vq-ckpt", saved, "--cluster-size", 7, "--mapping", saved.parent / MAPPING)
        after = contents(saved.parent)
        reordered = read_checkpoint(saved.parent / REORDERED)
        for part, codes in (("model", raw_codebook()), ("ema", raw_codebook() + 0.25)):
            assert torch.equal(reordered[part][CODEBOOK][order], codes)
        assert after.pop(REORDERED) and after == before
    record = reordered["reordering"]
    assert record["mapping_sha256"] == sha256(order) and record["method"] is None
    assert record["codebook_sha256"] == sha256(reordered["model"][CODEBOOK])
    assert "carries no hash of its codebook" in capsys.readouterr().out


def test_our_own_mapping_gives_the_checkpoint_that_it_came_with(saved, tmp_path):
    words = ["--vq-ckpt", saved, "--cluster-size", 7]
    balance(*words, "--method", "greedy")
    name = REORDERED.replace(SUFFIX, f"{SUFFIX}-greedy")
    mapping = saved.parent / MAPPING.replace(SUFFIX, f"{SUFFIX}-greedy")
    balance(*words, "--mapping", mapping, "--output-dir", tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == (saved.parent / name).read_bytes()


def test_a_codebook_of_one_code_is_plotted(tmp_path):
    save_checkpoint(tmp_path / "vq.pt", {"model": {CODEBOOK: raw_codebook(1)}})
    balance("--vq-ckpt", tmp_path / "vq.pt", "--cluster-size", 1)
    assert (tmp_path / "codebook-kmeans+nearest-cluster_size=1.png").stat().st_size > 5000
    assert read_checkpoint(tmp_path / "mapping-kmeans+nearest-cluster_size=1.pt").tolist() == [0]
