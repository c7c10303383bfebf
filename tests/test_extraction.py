"""Extraction from folders of real files: kills, broken files, precision, a look at the result."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from autoregressive.data.opening import open_codes
from autoregressive.runtime.checkpoint import save_checkpoint
from autoregressive.runtime.lock import hold
from processes import run_here, start, start_and_kill
from tokenizer.tokenizer_image.encoding import CropEncoder, agreement, default_batch_size
from tokenizer.tokenizer_image.images import (
    center_crop,
    crop_names,
    cut_crops,
    open_dataset,
    to_float,
)
from tokenizer.tokenizer_image.loading import load_vq
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel

EXTRACT, CHECK = "autoregressive/train/extract_codes_c2i.py", "autoregressive/train/check_codes.py"
TEN = crop_names(ten_crop=True, mirrored=True)
BROKEN = ("apple/broken.jpg", "apple/empty.jpg", "pear/nowhere.jpg", "pear/text.jpg")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of 41 pictures in three classes, four of them broken, and a tokenizer."""
    folder = tmp_path_factory.mktemp("extraction")
    noise = np.random.default_rng(0)
    for number in range(36):
        small = Image.fromarray(noise.integers(256, size=(5, 6, 3), dtype=np.uint8))
        path = folder / "images" / ("apple", "pear", "fig")[number % 3] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = small.resize((40 + number, 50), Image.Resampling.BICUBIC)
        picture.save(path, quality=95)
    Image.new("RGB", (1, 1)).save(folder / "images/fig/single.png")
    whole = (folder / "images/apple/0.jpg").read_bytes()
    for name, content in zip(BROKEN[:2], (whole[:len(whole) // 2], b""), strict=True):
        (folder / "images" / name).write_bytes(content)
    (folder / "images/pear/text.jpg").write_text("not a picture")
    (folder / "images/pear/nowhere.jpg").symlink_to("/no/such/file")
    torch.manual_seed(0)
    model = VQModel(VQConfig("VQ-4-small", 64, 8))
    save_checkpoint(folder / "vq.pt", {"model": model.state_dict()})
    done = extract(folder, "codes")
    assert done.returncode == 0, done.stderr
    return folder


def flags(folder, name, *more):
    return ("--data-path", folder / "images", "--code-path", folder / name,
            "--vq-ckpt", folder / "vq.pt", "--vq-model", "VQ-4-small", "--codebook-size", 64,
            "--image-size", 32, "--ten-crop", "--batch-size", 10, "--num-workers", 1,
            "--max-failures", 0.2, *more)


def extract(folder, name, *more, processes=0):
    return start(EXTRACT, *flags(folder, name, *more), processes=processes)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.long), 3])
def test_store_does_not_depend_on_the_number_of_processes(folder, processes):
    done = extract(folder, f"codes{processes}", processes=processes)
    assert done.returncode == 0, done.stderr
    assert contents(folder / f"codes{processes}") == contents(folder / "codes")


@pytest.mark.parametrize("kills, processes", [
    (2, 2),
    pytest.param(5, 0, marks=pytest.mark.long),
    pytest.param(5, 3, marks=pytest.mark.long),
])
def test_killed_and_resumed_extraction_makes_the_same_store(folder, kills, processes):
    path = folder / f"killed{kills}{processes}"
    status_path = path / "status.npy"
    goals = sorted(random.Random(kills).sample(range(1, 40), kills))

    def done_rows():
        return np.count_nonzero(np.load(status_path)) if status_path.exists() else -1

    for goal in goals:
        status = start_and_kill(EXTRACT, *flags(folder, path.name), processes=processes,
                                when=lambda goal=goal: done_rows() >= goal)
        assert status == -9 and goal <= done_rows() < 41
    assert extract(folder, path.name, processes=processes).returncode == 0
    assert contents(path) == contents(folder / "codes")


def test_failures_are_listed_and_labels_do_not_shift(folder):
    store = open_codes(folder / "codes")
    images = open_dataset("imagenet", folder / "images")
    class_names = ["apple", "fig", "pear"]
    failed = store.manifest["failed"]
    assert sorted(failure["path"] for failure in failed) == sorted(BROKEN)
    for failure in failed:
        assert images.name_of(failure["row"]) == failure["path"]
        assert failure["path"] in failure["reason"]
        assert not store.codes[failure["row"]].any() and failure["row"] not in store.rows
    assert store.manifest["class_names"] == class_names
    assert len(store.rows) == len(images) - 4 == 37
    for row in store.rows:
        assert images.name_of(row).split("/")[0] == class_names[store.labels[row]]


def test_codes_equal_encoding_each_image_alone_where_the_nearest_code_is_clear(folder):
    store = open_codes(folder / "codes")
    images = open_dataset("imagenet", folder / "images")
    vq, _ = load_vq(folder / "vq.pt", VQConfig("VQ-4-small", 64, 8))
    codebook = F.normalize(vq.quantize.embedding.weight, dim=1)
    num_clear = 0
    for row in store.rows.tolist():
        crops, = cut_crops(center_crop(images.read(row), 35)[None], 32, TEN)
        alone = [vq.encode(image[None]) for image in to_float(crops)]
        latents = torch.cat(alone).permute(0, 2, 3, 1).flatten(1, 2)        # (10, T, E)
        distances = torch.cdist(F.normalize(latents, dim=-1), codebook).square()
        nearest, codes = distances.topk(2, largest=False)                   # (10, T, 2)
        clear = (nearest[..., 1] - nearest[..., 0] > 1e-5).numpy()
        assert np.array_equal(codes[..., 0].numpy()[clear], store.codes[row][clear])
        num_clear += clear.sum()
    assert num_clear > 0.99 * 37 * 10 * 64


@pytest.mark.parametrize("precision, least", [("bf16", 0.9), ("fp16", 0.98)])
def test_half_precision_agrees_with_float32_on_most_codes(folder, precision, least):
    vq, _ = load_vq(folder / "vq.pt", VQConfig("VQ-4-small", 64, 8))
    picture = center_crop(open_dataset("imagenet", folder / "images").read(1), 35)[None]
    cpu = torch.device("cpu")
    rate = agreement(vq, CropEncoder(vq, cpu, precision, 5), picture, 32, TEN, cpu)
    assert least < rate <= 1


def test_codes_do_not_depend_on_how_crops_are_put_together(folder):
    vq, _ = load_vq(folder / "vq.pt", VQConfig("VQ-4-small", 64, 8))
    pictures = np.random.default_rng(0).integers(256, size=(3, 35, 35, 3), dtype=np.uint8)
    alone, together = (CropEncoder(vq, torch.device("cpu"), "none", size).codes(pictures, 32, TEN)
                       for size in (1, 7))
    assert alone.shape == (3, 10, 64) and (alone == together).float().mean() > 0.999


def test_default_batch_size_follows_the_size_of_a_crop():
    cpu = torch.device("cpu")
    sizes = [default_batch_size("VQ-16", size, torch.float32, cpu) for size in (512, 256, 128, 16)]
    assert sizes == [1, 2, 8, 512]


def test_too_many_failures_end_with_exit_code_1_and_repaired_files_are_tried_again(folder):
    strict = ("--max-failures", 0.08)
    done = extract(folder, "strict", *strict)
    assert done.returncode == 1 and "4 of 41 images are broken" in done.stdout
    assert "Traceback" not in done.stderr
    assert len(json.loads((folder / "strict/manifest.json").read_text())["failed"]) == 4
    broken = folder / "images" / BROKEN[0]
    before = broken.read_bytes()
    shutil.copy(folder / "images/apple/0.jpg", broken)
    try:
        done = extract(folder, "strict", *strict)
        assert done.returncode == 0, done.stderr
        assert len(open_codes(folder / "strict").manifest["failed"]) == 3
    finally:
        broken.write_bytes(before)


def test_finished_store_is_verified_and_replaced_only_by_overwrite(folder):
    shutil.copytree(folder / "codes", folder / "kept")
    done = extract(folder, "kept")
    assert done.returncode == 0 and "checksums verified" in done.stdout
    with open(folder / "kept/codes.npy", "r+b") as file:
        file.seek(5000)
        file.write(b"\1")
    done = extract(folder, "kept")
    assert done.returncode == 2 and "extract it again with --overwrite" in done.stderr
    assert extract(folder, "kept", "--overwrite").returncode == 0
    assert contents(folder / "kept") == contents(folder / "codes")


def check(folder, name, images="images"):
    return start(CHECK, "--code-path", folder / name, "--data-path", folder / images,
                 "--vq-ckpt", folder / "vq.pt", "--output", folder / f"{name}.png")


def test_check_passes_a_right_store_and_draws_it(folder):
    done = check(folder, "codes")
    assert done.returncode == 0 and "all checks passed" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("ok ") == 8 and "37 images, 4 broken" in done.stdout
    assert Image.open(folder / "codes.png").size == (4 * (128 + 4) + 4, 8 * (64 + 15 + 4) + 4)


def test_check_fails_a_store_whose_codes_belong_to_other_rows(folder):
    shutil.copytree(folder / "codes", folder / "shifted")
    codes = np.load(folder / "codes/codes.npy")
    np.save(folder / "shifted/codes.npy", np.roll(codes, 1, axis=0))
    done = check(folder, "shifted")
    assert done.returncode == 1, done.stderr
    assert "WRONG  checksums" in done.stdout
    assert "random rows are those of their images" in done.stdout
    assert done.stdout.count("WRONG") == 2


def test_check_fails_images_in_another_order(folder):
    shutil.copytree(folder / "images", folder / "renamed", symlinks=True)
    (folder / "renamed/apple").rename(folder / "renamed/zebra")
    done = check(folder, "codes", "renamed")
    assert done.returncode == 1
    wrong = [line for line in done.stdout.splitlines() if "WRONG" in line]
    for what in ("class names", "names of the images", "labels of the images", "random rows"):
        assert any(what in line for line in wrong), done.stdout


def test_strip_that_would_be_enlarged_beyond_memory_is_a_failure(folder, tmp_path, capsys):
    (tmp_path / "images" / "a").mkdir(parents=True)
    shutil.copy(folder / "images/apple/0.jpg", tmp_path / "images/a/0.jpg")
    Image.new("RGB", (1, 600000)).save(tmp_path / "images/a/strip.png")
    more = ("--data-path", tmp_path / "images", "--code-path", tmp_path / "codes",
            "--num-workers", 0, "--max-failures", 0.5)
    assert run_here(EXTRACT, *flags(folder, "", *more)) == 0
    failure, = open_codes(tmp_path / "codes").manifest["failed"]
    assert failure["path"] == "a/strip.png"
    assert "a/strip.png: expected a picture whose sides" in failure["reason"]
    assert "1 of 2 images are broken" in capsys.readouterr().out


def test_broken_images_alone_are_tried_again_by_the_same_command(folder, tmp_path, capsys):
    broken = tmp_path / "images" / "a" / "0.jpg"
    broken.parent.mkdir(parents=True)
    broken.write_text("not a picture")
    more = ("--data-path", tmp_path / "images", "--code-path", tmp_path / "codes",
            "--num-workers", 0, "--max-failures", 1)
    for _ in range(2):
        assert run_here(EXTRACT, *flags(folder, "", *more)) == 1
        printed = capsys.readouterr()
        assert "the same command tries only these again" in printed.out
        assert "error" not in printed.err
    shutil.copy(folder / "images/apple/0.jpg", broken)
    assert run_here(EXTRACT, *flags(folder, "", *more)) == 0
    assert open_codes(tmp_path / "codes").rows.tolist() == [0]


def test_one_extraction_at_a_time_by_a_lock_inside_its_folder(folder, tmp_path, capsys):
    held = tmp_path / "codes" / "codes.npy"
    with hold(held):
        assert run_here(EXTRACT, *flags(folder, "", "--code-path", tmp_path / "codes")) == 2
    assert f"{held}: expected to be the only one who writes here" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["codes"]
    assert not any((tmp_path / "codes").iterdir())


def test_check_removes_what_a_killed_one_left(folder, tmp_path):
    for name in (".check.png.host.7.tmp", ".other.png.host.7.tmp"):
        (tmp_path / name).touch()
    words = ("--code-path", folder / "codes", "--data-path", folder / "images",
             "--vq-ckpt", folder / "vq.pt", "--output", tmp_path / "check.png", "--num-rows", 1)
    assert run_here(CHECK, *words) == 0
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".other.png.host.7.tmp", "check.png"]


def test_check_says_that_labels_and_codes_are_out_of_range(folder, tmp_path, capsys):
    shutil.copytree(folder / "codes", tmp_path / "codes")
    np.save(tmp_path / "codes/labels.npy", np.full(41, -1))
    np.save(tmp_path / "codes/codes.npy", np.full((41, 10, 64), -7, np.int32))
    words = ("--code-path", tmp_path / "codes", "--data-path", folder / "images",
             "--vq-ckpt", folder / "vq.pt")
    assert run_here(CHECK, *words) == 1
    printed = capsys.readouterr().out
    for line in ("WRONG  codes are below 64: 0 different ones",
                 "WRONG  0 classes with images: 0 to 0 each"):
        assert line in printed
