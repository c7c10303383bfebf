"""The entry scripts one after the other, with real processes, on a tokenizer of random weights."""

import json
import subprocess

import numpy as np
import pytest
import torch

from autoregressive.data.opening import open_codes
from autoregressive.runtime.checkpoint import read_checkpoint, save_checkpoint
from autoregressive.runtime.rows import RowWriter
from processes import ENVIRONMENT, command, start
from tokenizer.tokenizer_image.images import center_crop, open_dataset, to_float
from tokenizer.tokenizer_image.loading import load_vq
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel

VQ = "--vq-model VQ-4-small --codebook-size 64".split()
GPT = ("--gpt-model GPT-tiny --num-classes 10 --image-size 16 --downsample-size 4 "
       "--cluster-size 8").split()
REORDERED = "vq-reorder-kmeans+nearest-cluster_size=8.pt"
MAPPING = "mapping-kmeans+nearest-cluster_size=8.pt"
RUN = "000-GPT-tiny-lambda=1-cluster_size=8"


def extract(folder, name, *more):
    """Returns the words of a command; so do the next two."""
    return ("autoregressive/train/extract_codes_c2i.py", *VQ, "--dataset", "digits",
            "--data-path", "val", "--image-size", 16, "--vq-ckpt", folder / "vq.pt",
            "--code-path", folder / name, *more)


def train(folder, results, *more):
    return ("autoregressive/train/train_c2i.py", *GPT, *VQ, "--vocab-size", 64,
            "--code-path", folder / "codes", "--mapping-path", folder / MAPPING,
            "--vq-ckpt", folder / REORDERED, "--results-dir", results, "--mixed-precision", "none",
            "--epochs", 2, "--ckpt-every", 1, "--global-batch-size", 80, "--log-every", 2, *more)


def sample(folder, out, *more):
    run = folder / "gpt" / RUN
    return ("autoregressive/sample/sample_c2i_ddp.py", *GPT, *VQ, "--vq-ckpt", folder / REORDERED,
            "--gpt-ckpt", run, "--image-size-eval", 16, "--precision", "none",
            "--num-fid-samples", 21, "--per-proc-batch-size", 8, "--sample-dir", out, *more)


def call(*words, processes=0):
    """Types a command, with torchrun or python, and returns the process that has finished."""
    words = command(*words, processes=processes)
    return subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """Extraction, training and sampling by two processes each: all they left."""
    folder = tmp_path_factory.mktemp("a pipeline")              # with a space in its path
    torch.manual_seed(0)
    model = VQModel(VQConfig("VQ-4-small", 64, 8))
    save_checkpoint(folder / "vq.pt", {"model": model.state_dict()})
    balance = ("balance_k_means.py", "--vq-ckpt", folder / "vq.pt", "--cluster-size", 8,
               "--output-dir", folder)
    for done in (call(*extract(folder, "codes"), processes=2), call(*balance),
                 start(*train(folder, folder / "gpt"), processes=2),
                 call(*sample(folder, folder / "samples"), processes=2)):
        assert done.returncode == 0, done.stderr
    return folder


def only_npz(folder):
    path, = folder.glob("*.npz")
    return np.load(path, allow_pickle=False)


def test_codes_equal_encoding_each_image_alone_by_any_number_of_processes(pipeline):
    done = start(*extract(pipeline, "alone"))
    assert done.returncode == 0, done.stderr
    for name in ("codes.npy", "labels.npy", "manifest.json"):
        assert (pipeline / "codes" / name).read_bytes() == (pipeline / "alone" / name).read_bytes()
    dataset, store = open_dataset("digits", "val"), open_codes(pipeline / "codes")
    vq, _ = load_vq(pipeline / "vq.pt", VQConfig("VQ-4-small", 64, 8))
    assert store.codes.shape == (len(dataset), 2, 16)
    assert np.array_equal(store.labels, dataset.labels)
    for row in (0, 57, len(dataset) - 1):
        picture = center_crop(dataset.read(row), 16)
        for place, crop in enumerate((picture, picture[:, ::-1])):
            alone = vq.quantize.codes(vq.encode(to_float(crop[None].copy())))
            assert np.array_equal(store.codes[row, place], alone[0])


def test_extraction_says_that_it_is_finished_and_refuses_to_change_a_store(pipeline):
    assert "is finished" in start(*extract(pipeline, "codes")).stdout
    other = start(*extract(pipeline, "codes", "--image-size", 32))
    assert other.returncode == 2
    assert "expected a store with image_size 32, found one with 16" in other.stderr


def test_decoding_tokens_with_the_reordered_codebook_gives_bit_identical_images(pipeline):
    codes = torch.from_numpy(open_codes(pipeline / "codes").codes[:5, 0].astype(np.int64))
    mapping = read_checkpoint(pipeline / MAPPING)
    original, _ = load_vq(pipeline / "vq.pt", VQConfig("VQ-4-small", 64, 8))
    reordered, _ = load_vq(pipeline / REORDERED, VQConfig("VQ-4-small", 64, 8))
    assert not torch.equal(mapping, torch.arange(64))
    assert torch.equal(original.decode_codes(codes, 4), reordered.decode_codes(mapping[codes], 4))


def test_training_leaves_what_a_person_looks_at(pipeline):
    folder = pipeline / "gpt" / RUN
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert rows[-1]["token_loss"] < rows[0]["token_loss"] < np.log(64) + 0.01
    assert {path.name for path in folder.iterdir()} == {
        "checkpoints", "config.json", "curves.png", "data.png", "finished.json", "log.txt",
        "metrics.jsonl", "verified"}
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert checkpoints == ["0000003.pt", "0000006.pt"]


def test_checkpoint_carries_hashes_classes_and_the_grid(pipeline):
    last = pipeline / "gpt" / RUN / "checkpoints" / "0000006.pt"
    settings = read_checkpoint(last)["settings"]
    hashes = json.loads((pipeline / f"{MAPPING}.json").read_text())
    assert settings["codebook_sha256"] == hashes["codebook_sha256"]
    assert settings["mapping_sha256"] == hashes["mapping_sha256"]
    assert settings["grid"] == 4 and settings["class_names"] == [str(digit) for digit in range(10)]


def test_the_same_command_says_that_the_run_is_finished(pipeline):
    again = start(*train(pipeline, pipeline / "gpt"))
    assert again.returncode == 0 and "is finished" in again.stdout
    assert len(list((pipeline / "gpt").iterdir())) == 1


def test_a_run_that_only_lacks_its_end_is_finished_by_the_same_command(pipeline):
    finished = pipeline / "gpt" / RUN / "finished.json"
    before = finished.read_bytes()
    finished.unlink()                   # as if killed between its last checkpoint and this file
    again = start(*train(pipeline, pipeline / "gpt"))
    assert again.returncode == 0, again.stderr
    assert finished.read_bytes() == before


@pytest.mark.parametrize("processes", [3])
def test_samples_do_not_depend_on_the_number_of_processes(pipeline, tmp_path, processes):
    done = start(*sample(pipeline, tmp_path), processes=processes)
    assert done.returncode == 0, done.stderr
    expected, found = only_npz(pipeline / "samples"), only_npz(tmp_path)
    assert found["arr_0"].shape == (21, 16, 16, 3) and found["arr_0"].dtype == np.uint8
    for name in ("arr_0", "labels"):
        assert np.array_equal(found[name], expected[name])
    settings = json.loads(str(found["settings"]))
    assert settings["cfg_scale"] == 1.5 and settings["resize"] == "bicubic without antialiasing"


def test_finished_samples_are_kept_and_never_taken_for_those_of_other_settings(pipeline):
    path, = (pipeline / "samples").glob("*.npz")
    before = path.stat().st_mtime_ns
    assert "is finished" in start(*sample(pipeline, pipeline / "samples")).stdout
    other = start(*sample(pipeline, pipeline / "samples", "--num-fid-samples", 20))
    assert other.returncode == 2
    assert "expected samples with num_fid_samples 20, found one with 21" in other.stderr
    assert path.stat().st_mtime_ns == before


def test_sampling_continues_from_the_rows_of_a_killed_run(pipeline, tmp_path):
    done = start(*sample(pipeline, tmp_path))
    assert done.returncode == 0, done.stderr
    npz, = tmp_path.glob("*.npz")
    with np.load(npz) as arrays:
        images = arrays["arr_0"]
        labels = arrays["labels"]
        settings = json.loads(str(arrays["settings"]))
    npz.unlink()
    arrays = {"arr_0": (np.dtype(np.uint8), (16, 16, 3)), "labels": (np.dtype(np.int64), ())}
    rows = RowWriter(npz.with_suffix(".rows"), settings, 21, arrays)
    rows.create()
    # Not what would be drawn: whoever finds it knows that it came from the disk.
    marked = np.full_like(images[8:16], 7)
    rows.write(range(8, 16), arr_0=marked, labels=labels[8:16])
    done = start(*sample(pipeline, tmp_path))
    assert done.returncode == 0, done.stderr
    found = only_npz(tmp_path)["arr_0"]
    assert np.array_equal(found[8:16], marked) and not rows.path.exists()
    assert np.array_equal(found[:8], images[:8]) and np.array_equal(found[16:], images[16:])
