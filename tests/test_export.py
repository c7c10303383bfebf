"""A folder for a hub: it samples what the checkpoint samples, and says what it holds."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from autoregressive.models.config import gpt_config
from autoregressive.models.gpt import GPT
from autoregressive.runtime.checkpoint import read_checkpoint, save_checkpoint
from autoregressive.runtime.files import codebook_sha256, mapping_sha256, write_json
from processes import run_here
from small_runs import SAMPLE, flags, run_to_its_end, sample_flags, write_data

EXPORT = "autoregressive/sample/export_c2i.py"
LOOK = "autoregressive/sample/sample_c2i.py"
FILES = {"README.md", "config.json", "model.safetensors", "samples.png", "vq.safetensors"}
CODEBOOK = "quantize.embedding.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two trainings, an ordinary one and a guidance-free one, on data that carry hashes."""
    folder = tmp_path_factory.mktemp("export")
    write_data(folder)
    write_json(folder / "mapping.pt.json", {
        "mapping_sha256": mapping_sha256(read_checkpoint(folder / "mapping.pt")),
        "codebook_sha256": codebook_sha256(read_checkpoint(folder / "vq.pt")["model"][CODEBOOK]),
        "original_codebook_sha256": "2" * 64, "cluster_size": 8})
    few = ("--max-steps", 4, "--ckpt-steps", 2, "--lr", 0.01)
    run_to_its_end(folder, folder / "gpt", *few, "--ema")
    run_to_its_end(folder, folder / "free", *few, "--guidance-free")
    return folder


def run_of(folder, results="gpt"):
    path, = (folder / results).glob("000-*")
    return path


def export(run, out, *more):
    return run_here(EXPORT, run, out, *more)


@pytest.fixture(scope="module")
def exported(folder):
    assert export(run_of(folder), folder / "exported") == 0
    return folder / "exported"


def arrays_of(out):
    path, = out.glob("*.npz")
    with np.load(path) as found:
        return {name: found[name] for name in ("arr_0", "labels", "tokens")}


@pytest.mark.parametrize("results, weights, more", [
    ("gpt", "raw", ()),
    ("gpt", "ema", ()),
    ("free", "raw", ("--beta", 0.5)),
])
def test_an_export_samples_bit_by_bit_what_its_checkpoint_samples_and_needs_no_flag_of_it(
        folder, tmp_path, results, weights, more):
    run = run_of(folder, results)
    assert export(run, tmp_path / "out", "--weights", weights) == 0
    how = ("--precision", "none", "--image-size-eval", 16, "--per-proc-batch-size", 12, *more)
    known = sample_flags(folder, run, tmp_path / "a", "--weights", weights)
    assert run_here(SAMPLE, *known, *how) == 0
    words = ("--sample-dir", tmp_path / "b", "--num-fid-samples", 12, "--save-codes", *how)
    assert run_here(SAMPLE, "--gpt-ckpt", tmp_path / "out", *words) == 0
    expected, found = arrays_of(tmp_path / "a"), arrays_of(tmp_path / "b")
    assert len(np.unique(expected["tokens"])) > 8
    for name, array in expected.items():
        assert np.array_equal(found[name], array), name


def test_a_look_needs_no_flag_either_and_takes_the_first_classes(exported, tmp_path):
    for name, more in {"none": (), "given": ("--class-ids", "0,1,2")}.items():
        words = ("--num-per-class", 1, "--output", tmp_path / f"{name}.png", *more)
        assert run_here(LOOK, "--gpt-ckpt", exported, *words) == 0
    assert (tmp_path / "none.png").read_bytes() == (tmp_path / "given.png").read_bytes()


@pytest.mark.parametrize("is_free", [False, True])
def test_the_files_hold_the_published_names_for_whoever_has_the_package_alone(
        folder, tmp_path, is_free):
    run = run_of(folder, "free" if is_free else "gpt")
    assert export(run, tmp_path / "out") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    saved = read_checkpoint(run / "checkpoints" / "0000004.pt")
    config = gpt_config("GPT-tiny", grid=4, vocab_size=64, num_classes=3, guidance_free=is_free)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == GPT(config).state_dict().keys()
        for name, tensor in saved["model"].items():
            assert torch.equal(file.get_tensor(name), tensor), name
        record = json.loads(file.metadata()["iar_record"])
    assert record["settings"] == saved["settings"] and record["steps"] == 4
    assert ("t_embedder.mlp.0.weight" in saved["model"]) == is_free
    vq = load_file(tmp_path / "out" / "vq.safetensors")
    weights = read_checkpoint(folder / "vq.pt")["model"]
    assert vq.keys() == weights.keys()
    assert all(torch.equal(vq[name], weights[name]) for name in vq)


def test_the_model_card_says_what_settings_manifest_and_scores_say(folder, exported, tmp_path):
    hashes = json.loads((exported / "config.json").read_text())["hashes"]
    scores = {"numbers": {"FID": 12.3456}, "reference": {"name": "real|.npz"},
              "feature_network": {"name": "Inception"},
              "samples": {"num_images": 50, "settings": {"cfg_scale": 2.5, **hashes}}}
    write_json(tmp_path / "scores.json", scores)
    assert export(run_of(folder), tmp_path / "out", "--scores", tmp_path / "scores.json") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for line in ("# GPT-tiny on test, 16 x 16 pixels", "| GPT | GPT-tiny, 3 classes |",
                 "| codebook | 64 codes, 8 clusters of 8 |", "| classes | a, b, c |",
                 "| weights | as trained, after 4 steps of 8 images |", "| FID | 12.3456 |",
                 "| samples | 50 at guidance 2.5; |", "| reference | real\\|.npz |",
                 "![sample pictures](samples.png)"):
        assert line in card.splitlines() or line in card, line
    assert "hf upload USER/NAME OUT" in card and card.startswith("---\n")
    assert "## Scores" not in (exported / "README.md").read_text()


def test_the_same_command_writes_the_same_bytes_and_a_later_step_replaces_them(folder, tmp_path):
    out = tmp_path / "out"
    first = run_of(folder) / "checkpoints" / "0000002.pt"
    contents = []
    for run in (first, first, run_of(folder)):
        assert export(run, out) == 0
        contents.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert contents[0] == contents[1] != contents[2]
    (out / "config.json").unlink()                  # as if others had made the folder
    assert export(run_of(folder), out) == 2


def test_an_export_of_another_run_is_not_replaced(folder, tmp_path, capsys):
    shutil.copytree(run_of(folder), tmp_path / "000-other")
    assert export(tmp_path / "000-other", tmp_path / "out") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for run in (run_of(folder), run_of(folder, "free")):
        assert export(run, tmp_path / "out") == 2
        assert "expected an export with run " in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("change, words", [
    (lambda vq: vq["model"].update({CODEBOOK: vq["model"][CODEBOOK].flip(0)}),
     "other.pt: expected the codebook"),
    (lambda vq: vq.update(reordering={"mapping_sha256": "5" * 64}),
     "other.pt: expected a tokenizer of the mapping "),
    (lambda vq: vq.update(reordering=3), "other.pt: expected reordering as dict, found int"),
])
def test_a_tokenizer_that_does_not_belong_to_the_run_is_refused(
        folder, tmp_path, capsys, change, words):
    vq = read_checkpoint(folder / "vq.pt")
    change(vq)
    save_checkpoint(tmp_path / "other.pt", vq)
    assert export(run_of(folder), tmp_path / "out", "--vq-ckpt", tmp_path / "other.pt") == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def last_weights(folder):
    return read_checkpoint(run_of(folder) / "checkpoints" / "0000004.pt")["model"]


def test_a_training_starts_from_the_weights_of_an_export(folder, exported, tmp_path):
    words = flags(folder, tmp_path, "--gpt-ckpt", exported, "--max-steps", 1, "--lr", 0)
    assert run_here("autoregressive/train/train_c2i.py", *words) == 0
    path, = tmp_path.glob("*/checkpoints/0000001.pt")
    for name, tensor in read_checkpoint(path)["model"].items():
        assert torch.equal(tensor, last_weights(folder)[name]), name
