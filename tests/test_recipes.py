"""Recipes and presets: their flags and numbers are those of tests/fixtures/published.md."""

import logging
import re
from fractions import Fraction

import numpy as np
import pytest

from autoregressive.models.recipes import (
    PRESETS,
    RECIPES,
    find_guidance,
    log_sampling,
    published_numbers,
    read_published,
    sampling_flags,
)
from autoregressive.models.sampler import Sampler
from autoregressive.runtime.checkpoint import read_checkpoint
from autoregressive.runtime.entry import flag_of
from autoregressive.runtime.files import read_json
from autoregressive.runtime.log import LOGGER
from autoregressive.train import train_c2i
from conftest import FIXTURES
from processes import run_here
from small_runs import TRAIN, flags, train, write_data, write_store

NUMBERS = ("FID", "IS", "precision", "recall")


def tables():
    """Returns the tables of published.md, each a list of rows by the names of its columns."""
    found = []
    for block in (FIXTURES / "published.md").read_text().split("\n\n"):
        if block.startswith("|"):
            names, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]]
                               for line in block.splitlines()]
            found.append([dict(zip(names, row, strict=True)) for row in rows])
    return found


def test_published_numbers_are_those_of_the_papers():
    expected = {}
    for row in tables()[0]:
        for column, cell in row.items():
            if column in ("grid", "size") or not cell:
                continue
            recipe, epochs = column.split()
            pixels = str(16 * int(row["grid"]))
            expected[recipe, row["size"], pixels, epochs] = list(map(float, cell.split("/")))
    found = {}
    for row in read_published():
        key = (row["recipe"], row["size"], row["pixels"], row["epochs"])
        found[key] = [float(row[name]) for name in NUMBERS if row[name] != "-"]
    assert found == expected and len(found) == len(read_published())


def test_guidance_is_that_of_the_papers():
    presets = set()
    for row in tables()[1]:
        pixels = 16 * int(row["grid"])
        for recipe in RECIPES:
            if row[recipe]:
                guidance, _ = find_guidance(recipe, row["size"], pixels)
                assert guidance["cfg_scale"] == float(row[recipe])
                assert (guidance.get("cfg_schedule") == "linear") == (recipe == "strong")
                presets.add(f"{RECIPES[recipe].title}-{row['size']}-{pixels}")
    assert presets == set(PRESETS)


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_flags_are_those_of_the_papers(recipe):
    expected = {}
    for row in tables()[2]:
        cell = row[recipe]
        expected[row["flag"]] = float(Fraction(cell)) if re.match(r"[\d.]", cell) else cell
    found = {flag_of(name): value for name, value in RECIPES[recipe].training.items()}
    assert found == expected
    defaults = train_c2i.build_parser().parse_args(["--code-path", "x", "--results-dir", "x"])
    if recipe == "iar":                             # the defaults are the paper's
        assert RECIPES[recipe].training.items() <= defaults.plain().items()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_a_sampler_and_says_the_published_numbers(preset, caplog):
    sets = sampling_flags(preset, {"recipe": "strong"})
    title, size, pixels = preset.split("-")
    assert sets["gpt_model"] == f"GPT-{size}" and sets["image_size"] == int(pixels)
    sampler = Sampler(**{name: value for name, value in sets.items() if hasattr(Sampler, name)})
    scales = sampler.scales(256)[:, 0]
    if title == "strong":
        assert np.allclose(scales, 1 + 3.5 * np.arange(256) / 256)
    else:
        assert (scales == sets["cfg_scale"]).all()
    recipe = PRESETS[preset][0]
    with caplog.at_level(logging.INFO, logger="iar"):
        LOGGER.propagate = True
        log_sampling(preset, {"recipe": recipe}, sets)
    text, = caplog.messages
    assert text.startswith(f"{preset}: --gpt-model GPT-{size} --image-size {pixels} ")
    assert text.endswith(published_numbers(recipe, size, int(pixels)))


def test_published_numbers_name_every_length_of_training():
    assert published_numbers("iar", "L", 384) == (
        "published: FID 3.18, IS 234.8, precision 0.82, recall 0.53 after 300 epochs; "
        "FID 4.35, IS 197.2, precision 0.81, recall 0.51 after 50 epochs")
    assert published_numbers("strong", "XL", 256) == (
        "published (at lambda 0): FID 2.12 after 450 epochs")
    assert published_numbers("strong", "B", 384) == (
        "published (at lambda 0): nothing for GPT-B at 384 pixels")


@pytest.mark.parametrize("recorded, expected", [
    ({}, {}),
    ({"recipe": None, "gpt_model": "GPT-B", "image_size": 384}, {}),
    ({"recipe": "of a later version", "gpt_model": "GPT-B", "image_size": 384}, {}),
    ({"recipe": "iar", "gpt_model": "GPT-tiny", "image_size": 16}, {}),
    ({"recipe": "iar"}, {}),
    ({"recipe": "iar", "gpt_model": "GPT-B", "image_size": 384}, {"cfg_scale": 2.25}),
    ({"recipe": "llamagen", "gpt_model": "GPT-3B", "image_size": 384}, {"cfg_scale": 1.65}),
    ({"recipe": "strong", "gpt_model": "GPT-tiny", "image_size": 16},
     {"cfg_scale": 4.5, "cfg_schedule": "linear", "cfg_start": 1.0}),
])
def test_guidance_of_a_recorded_recipe_is_the_default_of_sampling(recorded, expected):
    assert sampling_flags(None, recorded) == expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    write_data(folder)
    return folder


def test_a_recipe_sets_what_is_not_given_and_is_recorded(folder, tmp_path, capsys):
    train(folder, tmp_path, "--recipe", "strong", "--weight-decay", 0.05, "--max-steps", 2)
    printed = capsys.readouterr().out
    assert "recipe strong: --epochs 450 --global-batch-size 8 --lr 0.0001" in printed
    assert "--weight-decay 0.05" in printed         # what is used, not what the recipe would set
    assert "nothing for GPT-tiny at 16 pixels" in printed and "expected codes" not in printed
    run, = tmp_path.iterdir()
    config = read_json(run / "config.json")
    assert config["weight_decay"] == 0.05 and config["global_batch_size"] == 8      # were given
    assert config["lr_schedule"] == "cosine" and config["max_grad_norm"] == 3
    saved = read_checkpoint(run / "checkpoints" / "0000002.pt")
    assert saved["settings"]["recipe"] == "strong"
    assert config["recipe"] == "strong"


def test_a_recipe_says_that_codes_were_extracted_otherwise(folder, tmp_path, capsys):
    train(folder, tmp_path, "--recipe", "iar", "--max-steps", 1)
    message = "recipe iar: expected codes extracted with --ten-crop, 10 crops of an image, found 2"
    assert f"{message}\n" in capsys.readouterr().out
    write_store(folder / "more", np.arange(50) % 3, seed=1)
    train(folder, tmp_path, "--recipe", "iar", "--max-steps", 1, "--code-path", folder / "more")
    assert f"{message} and 2\n" in capsys.readouterr().out
    train(folder, tmp_path, "--recipe", "strong", "--max-steps", 1, "--code-path", folder / "more")
    assert "expected codes" not in capsys.readouterr().out


def test_a_recipe_of_a_warm_up_in_epochs_says_how_to_give_steps(folder, tmp_path, capsys):
    steps = ("--recipe", "strong", "--warmup", 9)
    assert run_here(TRAIN, *flags(folder, tmp_path, *steps)) == 2
    assert "0 for the other" in capsys.readouterr().err
    train(folder, tmp_path, *steps, "--warmup-epochs", 0, "--max-steps", 1)
