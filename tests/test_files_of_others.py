"""Files that others publish, by stand-ins of the same names and shapes: read, or refused by name.

Codes of others are in test_import.py, files of guidance-free GPTs in test_guidance_free.py.
"""

import argparse

import numpy as np
import pytest
import torch

from autoregressive.data.mapping import read_mapping
from autoregressive.models.config import gpt_config
from autoregressive.runtime.checkpoint import find_checkpoint, save_checkpoint
from autoregressive.runtime.files import codebook_sha256, mapping_sha256
from processes import run_here
from small_runs import SAMPLE, metrics, public_checkpoint, sample_flags, train, write_data
from tokenizer.tokenizer_image.loading import load_vq
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel

CODEBOOK = "quantize.embedding.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A VQ model, a store and a mapping; and one GPT in the layouts of several trainings."""
    folder = tmp_path_factory.mktemp("others")
    write_data(folder)
    payload, _ = public_checkpoint(gpt_config("GPT-tiny", grid=4, vocab_size=64, num_classes=3))
    torch.nn.init.normal_(payload["model"]["output.weight"], std=0.3)
    weights = payload["model"]
    save_checkpoint(folder / "bare.pt", weights)

    # IAR's and LlamaGen's checkpoints.
    average = {f"module.{name}": weight.flip(0) for name, weight in weights.items()}
    save_checkpoint(folder / "public" / "checkpoints" / "0000004.pt", payload | {"ema": average})

    # A run of LlamaGen's sharded training.
    for step, model in (("0005000", {name: 0 * weight for name, weight in weights.items()}),
                        ("0010000", weights)):
        path = folder / "sharded" / "checkpoints" / step
        save_checkpoint(path / "consolidated.pth", model)
        (path / "resume_step.txt").write_text(step)
        for rank in range(2):
            shard = {"state": {rank: {"step": torch.ones(())}}, "param_groups": [{"lr": 1e-4}]}
            save_checkpoint(path / f"optimizer.{rank:05d}-of-00002.pth", shard)
    return folder


def tokens_of(folder, path, out, *more):
    assert run_here(SAMPLE, *sample_flags(folder, path, out, *more)) == 0
    path, = out.glob("*.npz")
    with np.load(path) as arrays:
        return arrays["tokens"]


@pytest.fixture(scope="module")
def tokens(folder, tmp_path_factory):
    """Tokens sampled from the weights alone."""
    return tokens_of(folder, folder / "bare.pt", tmp_path_factory.mktemp("tokens"))


@pytest.mark.parametrize("name, more", [
    ("public/checkpoints/0000004.pt", ()),
    ("public", ()),
    ("sharded/checkpoints/0010000", ("--from-fsdp",)),
    ("sharded/checkpoints", ("--from-fsdp",)),
    ("sharded", ()),
])
def test_a_published_training_is_sampled_from(folder, tmp_path, tokens, name, more):
    assert np.array_equal(tokens_of(folder, folder / name, tmp_path, *more), tokens)


def test_the_average_in_a_published_training_is_sampled_from(folder, tmp_path, tokens):
    assert not np.array_equal(
        tokens_of(folder, folder / "public", tmp_path, "--weights", "ema"), tokens)


def test_a_sharded_training_is_started_from_by_its_weights(folder, tmp_path):
    for name, start in (("bare", folder / "bare.pt"), ("sharded", folder / "sharded")):
        train(folder, tmp_path / name, "--gpt-ckpt", start, "--max-steps", 2)
    assert metrics(tmp_path / "sharded") == metrics(tmp_path / "bare")


def test_a_sharded_step_that_is_chosen_is_taken(folder):
    path = folder / "sharded" / "checkpoints" / "0005000"
    assert find_checkpoint(path) == path / "consolidated.pth"


def test_a_guidance_free_training_of_others_is_continued(folder, tmp_path):
    config = gpt_config("GPT-tiny", grid=4, vocab_size=64, num_classes=3, guidance_free=True)
    payload, _ = public_checkpoint(config)
    save_checkpoint(tmp_path / "0000004.pt", payload)
    train(folder, tmp_path / "results", "--guidance-free", "--gpt-ckpt", tmp_path / "0000004.pt",
          "--max-steps", 6)
    assert [row["step"] for row in metrics(tmp_path / "results")] == [5, 6]


def test_a_mapping_that_is_a_view_is_the_permutation_it_shows(tmp_path):
    permutation = torch.randperm(24)
    view = torch.cat([torch.arange(24), permutation])[24:]      # as IAR saved its own
    save_checkpoint(tmp_path / "mapping.pt", view)
    mapping = read_mapping(tmp_path / "mapping.pt", 24)
    assert mapping.tokens.tolist() == permutation.tolist()
    assert mapping.hashes == {"mapping_sha256": mapping_sha256(permutation)}


@pytest.fixture(scope="module")
def gear():
    """The weights of a tokenizer of VQ-16's shape with a codebook of its own, as GEAR's is."""
    with torch.device("meta"):
        shapes = VQModel(VQConfig()).state_dict()
    # A kilobyte each: an expanded tensor stores one value.
    state = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in shapes.items()}
    return state | {CODEBOOK: torch.randn(16384, 8)}


def test_a_tokenizer_with_another_codebook_is_loaded_and_known_by_its_hash(gear, tmp_path):
    save_checkpoint(tmp_path / "gear.pt", {"model": gear, "args": argparse.Namespace(z_channels=8)})
    model, hashes = load_vq(tmp_path / "gear.pt", VQConfig())
    assert torch.equal(model.quantize.embedding.weight, gear[CODEBOOK])
    assert hashes["codebook_sha256"] == codebook_sha256(gear[CODEBOOK])


@pytest.mark.parametrize("changed, words", [
    ({CODEBOOK: torch.zeros(16384, 16)}, rf"{CODEBOOK} expected \(16384, 8\), got \(16384, 16\)"),
    ({"projection.weight": torch.zeros(2)}, "unexpected projection.weight"),
    ({"quant_conv.bias": None}, "missing quant_conv.bias"),
])
def test_a_tokenizer_of_another_make_is_refused_by_the_key_that_differs(
        gear, tmp_path, changed, words):
    state = {name: tensor for name, tensor in (gear | changed).items() if tensor is not None}
    save_checkpoint(tmp_path / "gear.pt", {"model": state})
    with pytest.raises(ValueError, match=words):
        load_vq(tmp_path / "gear.pt", VQConfig())
