"""What own_images.sh decides before it trains: which images judge, which sizes the data ask for."""

import math
import os

import numpy as np
import pytest
from PIL import Image

from processes import run_here
from scripts.own_images_plan import FEWEST_IMAGES, GPT_BATCH, Plan, choose_plan

PLAN = "scripts/own_images_plan.py"


def write_images(folder, count, side=20):
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (side, side + 4), (number, 0, 0)).save(folder / f"{number:03d}.png")


def links_of(output):
    return {str(path.relative_to(output)): os.readlink(path)
            for path in sorted((output / "images").rglob("*")) if path.is_symlink()}


def plan(images, output, capsys, *more):
    assert run_here(PLAN, images, output, *more) == 0
    return capsys.readouterr()


def test_every_tenth_image_of_a_class_judges_and_none_does_both(tmp_path, capsys):
    write_images(tmp_path / "in/cat", 75)
    write_images(tmp_path / "in/a dog", 3)
    printed = plan(tmp_path / "in", tmp_path / "out", capsys)
    assert printed.out == "32 512 16 600 32 600 70\n"
    assert "70 images of 2 classes train, 8 judge" in printed.err
    links = links_of(tmp_path / "out")
    sources = {os.path.relpath(path, tmp_path / "in"): link.split("/")[1:3]
               for link, path in links.items()}
    judging = {path for path, (part, _) in sources.items() if part == "val"}
    assert judging == {f"cat/0{tens}9.png" for tens in range(7)} | {"a dog/002.png"}
    assert len(sources) == len(links) == 78
    assert all(path.split("/")[0] == name for path, (_, name) in sources.items())


def test_the_same_command_goes_on_and_other_images_or_lengths_are_refused(tmp_path, capsys):
    write_images(tmp_path / "in/cat", 80)
    (tmp_path / "in/cat/broken.png").write_text("no image")
    printed = plan(tmp_path / "in", tmp_path / "out", capsys)
    assert f"{tmp_path / 'in/cat/broken.png'}: not read as an image, left out" in printed.err
    links = links_of(tmp_path / "out")
    assert len(links) == 80 and not any("broken" in link for link in links)
    next((tmp_path / "out/images/train/cat").iterdir()).unlink()    # as a kill leaves it
    again = plan(tmp_path / "in", tmp_path / "out", capsys, "--gpt-steps", 700)
    assert links_of(tmp_path / "out") == links and " 700 " in again.out
    for change in (("--tokenizer-steps", 700), ()):
        assert run_here(PLAN, tmp_path / "in", tmp_path / "out", *change) == (2 if change else 0)
    assert "expected a plan with tokenizer_steps 700, found one with 600" in capsys.readouterr().err
    (tmp_path / "in/cat/003.png").unlink()
    assert run_here(PLAN, tmp_path / "in", tmp_path / "out") == 2
    assert "expected a plan with images_sha256" in capsys.readouterr().err
    assert links_of(tmp_path / "out") == links


def test_a_folder_that_is_divided_is_taken_as_it_is(tmp_path, capsys):
    for part, count in (("train", 70), ("val", 2)):
        write_images(tmp_path / "in" / part / "cat", count)
    plan(tmp_path / "in", tmp_path / "out", capsys)
    for link, source in links_of(tmp_path / "out").items():
        assert link.split("/")[1] == os.path.relpath(source, tmp_path / "in").split("/")[0]


@pytest.mark.parametrize("count, side, expected", [
    (66, 32, Plan(32, 512, 16, 600, 30, 600, 66)),
    (2000, 32, Plan(32, 1024, 32, 1250, 937, 937, 2000)),
    (50000, 32, Plan(32, 1024, 32, 1500, 2000, 3000, 2000)),
    (1345, 256, Plan(64, 1024, 32, 750, 500, 630, 1345)),
    (50000, 256, Plan(64, 1024, 32, 750, 500, 750, 2000))])
def test_sizes_follow_from_number_and_side_of_the_images(count, side, expected):
    assert choose_plan([side] * count) == expected
    given = choose_plan([side] * count, tokenizer_steps=5, gpt_steps=7)
    assert (given.tokenizer_steps, given.gpt_steps) == (5, 7)


def test_every_plan_can_be_trained():
    random = np.random.default_rng(0)
    for _ in range(100):
        count = int(random.integers(FEWEST_IMAGES, 5000))
        plan = choose_plan([int(random.integers(1, 500))] * count)
        assert plan.codebook_size % plan.cluster_size == 0 and plan.image_size % 4 == 0
        assert min(plan.tokenizer_steps, plan.gpt_steps, plan.num_samples) > 0
        assert count - math.ceil(count / 100) >= GPT_BATCH          # train_c2i.py holds 1 % out


@pytest.mark.parametrize("make, words", [
    (lambda folder: None, "expected a folder of class folders, found none"),
    (lambda folder: write_images(folder / "cat", 1), "expected at least 2 images of a class"),
    (lambda folder: (folder / "cat").mkdir(parents=True), "expected images"),
    (lambda folder: write_images(folder / "cat", 65), "expected at least 66 images to train on"),
    (lambda folder: [write_images(folder / path, 70) for path in ("train/cat", "test/cat")],
     "found train with folders inside; give it as IMAGES"),
    (lambda folder: [write_images(folder / path, 2) for path in ("train/cat", "val/dog")],
     "expected equal class folders in train and val, found cat, dog in one of them")])
def test_images_that_cannot_be_divided_are_one_line(tmp_path, capsys, make, words):
    make(tmp_path / "in")
    assert run_here(PLAN, tmp_path / "in", tmp_path / "out") == 2
    printed = capsys.readouterr()
    assert words in printed.err and len(printed.err.splitlines()) == 1 and not printed.out


@pytest.mark.parametrize("images, output", [
    ("in", "in/results"), ("in", "in"), ("out/images", "out"), ("out/images/in", "out")])
def test_results_inside_the_images_or_around_them_are_refused(tmp_path, capsys, images, output):
    write_images(tmp_path / images / "cat", 70)
    before = sorted(tmp_path.rglob("*"))
    assert run_here(PLAN, tmp_path / images, tmp_path / output) == 2
    assert "expected a folder outside" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_of_images_that_is_not_ours_is_left_alone(tmp_path, capsys):
    write_images(tmp_path / "in/cat", 80)
    write_images(tmp_path / "out/images/dog", 1)
    assert run_here(PLAN, tmp_path / "in", tmp_path / "out") == 2
    assert "out/images: expected none in a new folder of results" in capsys.readouterr().err
