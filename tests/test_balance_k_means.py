"""balance_k_means.py: its files, the hashes in them, equal bytes for equal seeds, and one line for every mistake."""

import argparse
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import balance_k_means
from autoregressive.runtime.checkpoint import read_checkpoint, save_checkpoint
from autoregressive.runtime.entry import run
from tokenizer.clustering import balanced_sse, normalize_codes

CODEBOOK = "quantize.embedding.weight"
SUFFIX = "kmeans+nearest-cluster_size=7"
REORDERED, MAPPING = f"vq-reorder-{SUFFIX}.pt", f"mapping-{SUFFIX}.pt"
FILES = {REORDERED, MAPPING, f"{MAPPING}.json", f"report-{SUFFIX}.json", f"codebook-{SUFFIX}.png"}


def raw_codebook(num_codes=42, dimensions=5):
    """Returns codes of many lengths, so that normalized ones cannot be stored in their place unseen."""
    random = torch.Generator().manual_seed(3)
    return torch.randn(num_codes, dimensions, generator=random) * (1 + 4 * torch.rand(num_codes, 1, generator=random))


def balance(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["balance_k_means.py", *map(str, flags)])
    run(balance_k_means.main, balance_k_means.build_parser())


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of our own layout, with EMA weights and things that must stay."""
    path = tmp_path / "in" / "vq.pt"
    payload = {"model": {"encoder.conv_in.weight": torch.ones(2, 3), CODEBOOK: raw_codebook()},
               "ema": {CODEBOOK: raw_codebook() + 0.25}, "steps": 11, "args": argparse.Namespace(codebook_size=42)}
    save_checkpoint(path, payload)
    return path


def test_codes_stand_where_the_mapping_says_and_everything_else_stays(saved, monkeypatch):
    balance(monkeypatch, "--vq-ckpt", saved, "--cluster-size", 7)
    before, after = read_checkpoint(saved), read_checkpoint(saved.parent / REORDERED)
    mapping = read_checkpoint(saved.parent / MAPPING)
    assert {path.name for path in saved.parent.iterdir()} == FILES | {"vq.pt"}
    assert mapping.dtype == torch.int64 and mapping.is_contiguous()
    assert mapping.sort().values.tolist() == list(range(42))
    for part in ("model", "ema"):
        assert torch.equal(after[part][CODEBOOK][mapping], before[part][CODEBOOK])      # raw codes, not normalized
    assert torch.equal(after["model"]["encoder.conv_in.weight"], before["model"]["encoder.conv_in.weight"])
    assert (after["steps"], after["args"]) == (11, before["args"])


def test_hashes_travel_with_both_files_and_fit_them(saved, tmp_path, monkeypatch):
    out = tmp_path / "out"
    balance(monkeypatch, "--vq-ckpt", saved, "--cluster-size", 7, "--output-dir", out, "--seed", 5)
    after, mapping = read_checkpoint(out / REORDERED), read_checkpoint(out / MAPPING)
    record = after["reordering"]

    def sha256(tensor):
        return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()

    assert record == {"codebook_sha256": sha256(after["model"][CODEBOOK]), "mapping_sha256": sha256(mapping),
                      "original_codebook_sha256": sha256(raw_codebook()), "cluster_size": 7, "num_clusters": 6,
                      "method": "optimal", "seed": 5}
    assert json.loads((out / f"{MAPPING}.json").read_text()) == record


def test_report_holds_what_was_found(saved, monkeypatch):
    balance(monkeypatch, "--vq-ckpt", saved, "--cluster-size", 7, "--restarts", 3)
    report = json.loads((saved.parent / f"report-{SUFFIX}.json").read_text())
    codes = normalize_codes(raw_codebook())
    mapping = read_checkpoint(saved.parent / MAPPING).numpy()
    assert report["sse"] == pytest.approx(balanced_sse(codes, mapping // 7, 6))
    assert report["sse_of_indices_as_they_were"] == pytest.approx(balanced_sse(codes, np.arange(42) // 7, 6))
    assert list(report["sse_by_seed"]) == ["42", "43", "44", "45"]
    assert report["sse"] == min(report["sse_by_seed"].values())
    assert all(report["certificate"].values()) and report["codebook"] == [42, 5]


def test_picture_shows_both_orders(saved, monkeypatch):
    balance(monkeypatch, "--vq-ckpt", saved, "--cluster-size", 7)
    with Image.open(saved.parent / f"codebook-{SUFFIX}.png") as picture:
        assert picture.width > 2 * picture.height and len(picture.convert("RGB").getcolors(10**6)) > 20


def test_equal_seeds_give_equal_files_on_any_number_of_threads(tmp_path):
    save_checkpoint(tmp_path / "vq.pt", {"model": {CODEBOOK: raw_codebook(490, 8)}})
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, threads in zip(folders, ("1", "2"), strict=True):
        subprocess.run([sys.executable, ROOT / "balance_k_means.py", "--vq-ckpt", tmp_path / "vq.pt", "--cluster-size",
                        "7", "--output-dir", folder], check=True, capture_output=True,
                       env=os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads))
    for name in FILES - {f"report-{SUFFIX}.json"}:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    reports = [json.loads((folder / f"report-{SUFFIX}.json").read_text()) for folder in folders]
    for report in reports:
        del report["seconds"], report["cpu_seconds"]
    assert reports[0] == reports[1]


def test_greedy_from_the_published_start_reproduces_the_published_mapping(fixture, tmp_path, monkeypatch):
    published = fixture("kmeans_sphere")
    save_checkpoint(tmp_path / "vq.pt", {"model": {CODEBOOK: published["embedding"]}})
    balance(monkeypatch, "--vq-ckpt", tmp_path / "vq.pt", "--cluster-size", 32, "--method", "greedy")
    assert torch.equal(read_checkpoint(tmp_path / "mapping-kmeans+nearest-cluster_size=32.pt"), published["mapping"])
    stem = "vq-reorder-kmeans+nearest-cluster_size=32.pt"
    assert torch.equal(read_checkpoint(tmp_path / stem)["model"][CODEBOOK], published["reordered"])


def test_keep_best_never_gives_more_sse_than_the_last_greedy_round(fixture, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "vq.pt", {"model": {CODEBOOK: fixture("kmeans_sphere")["embedding"]}})
    found = []
    for flags in ([], ["--keep-best"]):
        balance(monkeypatch, "--vq-ckpt", tmp_path / "vq.pt", "--cluster-size", 32, "--method", "greedy", *flags)
        found.append(json.loads((tmp_path / "report-kmeans+nearest-cluster_size=32.json").read_text())["sse"])
    assert found[1] < found[0]


@pytest.mark.parametrize("wrap", [
    lambda state: state, lambda state: {"state_dict": state}, lambda state: {"module": state},
    lambda state: {"model": {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()}}],
    ids=["bare", "state_dict", "deepspeed", "wrapped"])
def test_every_layout_of_a_checkpoint_is_read(wrap, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "vq.pt", wrap({CODEBOOK: raw_codebook()}))
    balance(monkeypatch, "--vq-ckpt", tmp_path / "vq.pt", "--cluster-size", 7)
    payload, mapping = read_checkpoint(tmp_path / REORDERED), read_checkpoint(tmp_path / MAPPING)
    state = next(payload[key] for key in ("model", "module", "state_dict") if key in payload)
    codebook, = state.values()
    assert torch.equal(codebook[mapping], raw_codebook())


@pytest.mark.parametrize("flags, message", [
    (["--cluster-size", "8"], "positive divisor of the 42 codes, got 8"),
    (["--cluster-size", "0"], "--cluster-size: expected at least 1, got 0"),
    (["--cluster-size", "-7"], "--cluster-size: expected at least 1, got -7"),
    (["--restarts", "-1"], "--restarts: expected at least 0"),
    (["--seed", "-1"], "--seed: expected at least 0, got -1"),
    (["--seed", "9223372036854775808"], "--seed: expected 0 to 2^63 - 1, got 9223372036854775808"),
    (["--keep-best"], "--keep-best: expected --method greedy"),
    (["--vq-ckpt", "nowhere.pt"], "nowhere.pt: expected a file"),
    (["--vq-ckpt", "gpt.pt"], "expected a VQ checkpoint with"),
    (["--vq-ckpt", "broken.pt"], "1 values not finite"),
    (["--output-dir", "in/vq.pt"], "expected a writable folder"),
])
def test_a_mistake_is_one_line_with_exit_code_2_and_nothing_is_written(flags, message, saved, monkeypatch, capsys):
    monkeypatch.chdir(saved.parents[1])
    save_checkpoint("gpt.pt", {"model": {"norm.weight": torch.ones(4)}})
    codebook = raw_codebook()
    codebook[3, 1] = torch.nan
    save_checkpoint("broken.pt", {"model": {CODEBOOK: codebook}})
    before = sorted(saved.parents[1].rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        balance(monkeypatch, "--vq-ckpt", saved, "--cluster-size", "7", *flags)
    errors = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in errors and errors.count("\n") == 1
    assert sorted(saved.parents[1].rglob("*")) == before


def test_the_script_runs_with_no_flag_on_the_original_file_name(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "pretrained_models" / "vq_ds16_c2i.pt", {"model": {CODEBOOK: raw_codebook(256)}})
    monkeypatch.chdir(tmp_path)
    balance(monkeypatch)
    suffix = "kmeans+nearest-cluster_size=128.pt"
    for name in (f"vq_ds16_c2i-reorder-{suffix}", f"mapping-{suffix}"):
        assert (tmp_path / "pretrained_models" / name).is_file()
