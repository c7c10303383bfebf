"""What own_images.sh decides before it trains: which images judge, which sizes the data ask for."""

import os

import numpy as np
import pytest
from PIL import Image

from processes import run_here
from scripts.own_images_plan import Plan, choose_plan

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
    write_images(tmp_path / "in/cat", 25)
    write_images(tmp_path / "in/a dog", 3)
    printed = plan(tmp_path / "in", tmp_path / "out", capsys)
    assert printed.out == "32 512 16 600 600 25\n"
    assert "25 images of 2 classes train, 3 judge" in printed.err
    links = links_of(tmp_path / "out")
    sources = {os.path.relpath(path, tmp_path / "in"): link.split("/")[1:3]
               for link, path in links.items()}
    judging = {path for path, (part, _) in sources.items() if part == "val"}
    assert judging == {"cat/009.png", "cat/019.png", "a dog/002.png"}
    assert len(sources) == len(links) == 28
    assert all(path.split("/")[0] == name for path, (_, name) in sources.items())


def test_links_follow_the_images_that_are_there(tmp_path, capsys):
    write_images(tmp_path / "in/cat", 12)
    write_images(tmp_path / "in/dog", 12)
    plan(tmp_path / "in", tmp_path / "out", capsys)
    (tmp_path / "in/cat/003.png").unlink()
    for path in (tmp_path / "in/dog").iterdir():
        path.unlink()
    (tmp_path / "in/dog").rmdir()
    (tmp_path / "in/cat/new.png").write_text("no image")
    printed = plan(tmp_path / "in", tmp_path / "out", capsys)
    assert f"{tmp_path / 'in/cat/new.png'}: not read as an image, left out" in printed.err
    found = links_of(tmp_path / "out")
    assert sorted(path.rsplit("/")[-1] for path in found.values()) == sorted(
        path.name for path in (tmp_path / "in/cat").iterdir() if path.name != "new.png")
    assert not (tmp_path / "out/images/train/dog").exists()
    again = plan(tmp_path / "in", tmp_path / "out", capsys)
    assert links_of(tmp_path / "out") == found and again.out == printed.out


def test_a_folder_that_is_divided_is_taken_as_it_is(tmp_path, capsys):
    for part, count in (("train", 4), ("val", 2)):
        write_images(tmp_path / "in" / part / "cat", count)
    plan(tmp_path / "in", tmp_path / "out", capsys)
    for link, source in links_of(tmp_path / "out").items():
        assert link.split("/")[1] == os.path.relpath(source, tmp_path / "in").split("/")[0]


@pytest.mark.parametrize("count, side, expected", [
    (10, 32, Plan(32, 512, 16, 600, 600, 10)),
    (2000, 32, Plan(32, 1024, 32, 1250, 937, 2000)),
    (50000, 32, Plan(32, 1024, 32, 1500, 3000, 2000)),
    (1345, 256, Plan(64, 1024, 32, 750, 630, 1345)),
    (50000, 256, Plan(64, 1024, 32, 750, 750, 2000))])
def test_sizes_follow_from_number_and_side_of_the_images(count, side, expected):
    assert choose_plan([side] * count) == expected
    given = choose_plan([side] * count, tokenizer_steps=5, gpt_steps=7)
    assert (given.tokenizer_steps, given.gpt_steps) == (5, 7)


def test_every_plan_can_be_trained():
    random = np.random.default_rng(0)
    for _ in range(100):
        plan = choose_plan([int(random.integers(1, 500))] * int(random.integers(1, 5000)))
        assert plan.codebook_size % plan.cluster_size == 0 and plan.image_size % 4 == 0
        assert min(plan.tokenizer_steps, plan.gpt_steps, plan.num_samples) > 0


@pytest.mark.parametrize("make, words", [
    (lambda folder: None, "expected a folder of class folders, found none"),
    (lambda folder: write_images(folder / "cat", 1), "expected at least 2 images of a class"),
    (lambda folder: (folder / "cat").mkdir(parents=True), "expected images"),
    (lambda folder: [write_images(folder / path, 2) for path in ("train/cat", "val/dog")],
     "expected equal class folders in train and val, found cat, dog in one of them")])
def test_images_that_cannot_be_divided_are_one_line(tmp_path, capsys, make, words):
    make(tmp_path / "in")
    assert run_here(PLAN, tmp_path / "in", tmp_path / "out") == 2
    printed = capsys.readouterr()
    assert words in printed.err and len(printed.err.splitlines()) == 1 and not printed.out


def test_results_inside_the_images_are_refused(tmp_path, capsys):
    write_images(tmp_path / "in/cat", 3)
    assert run_here(PLAN, tmp_path / "in", tmp_path / "in/results") == 2
    assert "expected a folder outside" in capsys.readouterr().err
