"""Loading GPT and VQ files: strictly, without a second copy, and only parts that fit together."""

import subprocess
import sys

import pytest
import torch

from autoregressive.models.config import gpt_config
from autoregressive.models.gpt import GPT
from autoregressive.models.loading import build_gpt, describe_gpt, read_gpt
from autoregressive.runtime.checkpoint import save_checkpoint
from autoregressive.runtime.files import codebook_sha256
from autoregressive.runtime.identity import check_codebook
from conftest import ROOT
from tokenizer.tokenizer_image.loading import load_vq
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel

SHAPE = {"grid": 4, "vocab_size": 24, "num_classes": 5}

MEASURE_LOADING = """
import resource, sys
import torch
sys.path.insert(0, sys.argv[2])
from autoregressive.models.config import gpt_config
from autoregressive.models.loading import build_gpt, read_gpt
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.ones(2, 2) @ torch.ones(2, 2)
before = peak()
model = build_gpt(read_gpt(sys.argv[1]), gpt_config(sys.argv[3]))
with torch.inference_mode():
    # Every weight is read.
    model.prefill(torch.zeros(1, dtype=torch.int64), model.new_cache(1))
weights = sum(parameter.nbytes for parameter in model.parameters())
print((peak() - before) / weights)
"""


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = GPT(gpt_config("GPT-tiny", **SHAPE))
    path = tmp_path / "0000007.pt"
    save_checkpoint(path, {"model": model.state_dict(), "settings": {"grid": 4, "lambda_cce": 1.0}})
    return path, model.eval()


def test_a_loaded_gpt_computes_the_same(saved):
    path, model = saved
    file = read_gpt(path.parent)
    loaded = build_gpt(file, gpt_config("GPT-tiny", **SHAPE))
    tokens, labels = torch.randint(24, (2, 15)), torch.tensor([0, 5])
    assert file.path == path and file.settings == {"grid": 4, "lambda_cce": 1.0}
    assert not loaded.training
    assert torch.equal(loaded(tokens, labels), model(tokens, labels))


def test_another_size_is_refused_and_the_files_own_size_is_named(tmp_path):
    with torch.device("meta"):
        large = GPT(gpt_config("GPT-L", vocab_size=4, num_classes=2))
    # A kilobyte each: an expanded tensor stores one value.
    zeros = {name: torch.zeros(()).expand(tensor.shape)
             for name, tensor in large.state_dict().items()}
    save_checkpoint(tmp_path / "large.pt", zeros)
    message = ("the file holds GPT-L with 4 codes and 2 classes; "
               "asked for GPT-B with 24 codes and 5 classes")
    with pytest.raises(ValueError, match=message):
        build_gpt(read_gpt(tmp_path / "large.pt"), gpt_config("GPT-B", **SHAPE))


def test_description_names_size_codes_and_classes():
    with torch.device("meta"):
        state = GPT(gpt_config("GPT-L", num_classes=7, vocab_size=64)).state_dict()
    assert describe_gpt(state) == "the file holds GPT-L with 64 codes and 7 classes"


def test_weights_of_another_grid_are_refused(saved):
    with pytest.raises(ValueError, match="expected weights trained on a grid of 6, got 4"):
        build_gpt(read_gpt(saved[0]), gpt_config("GPT-tiny", **SHAPE | {"grid": 6}))


def test_a_file_that_names_no_grid_is_loaded_and_the_assumed_grid_is_said(saved, tmp_path, caplog):
    save_checkpoint(tmp_path / "published.pt", saved[1].state_dict())
    file = read_gpt(tmp_path / "published.pt")
    build_gpt(file, gpt_config("GPT-tiny", **SHAPE))
    assert file.settings == {} and "names no grid; 4 x 4 tokens are assumed" in caplog.text


def test_a_loaded_vq_model_comes_with_the_hash_of_its_codebook(tmp_path):
    model = VQModel(VQConfig("VQ-4-small", 48, 8))
    save_checkpoint(tmp_path / "vq.pt", {"model": model.state_dict(), "ema": {}})
    loaded, hashes = load_vq(tmp_path / "vq.pt", VQConfig("VQ-4-small", 48, 8))
    assert hashes["codebook_sha256"] == codebook_sha256(model.quantize.embedding.weight)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    message = r"quantize\.embedding\.weight expected \(64, 8\), got \(48, 8\)"
    with pytest.raises(ValueError, match=message):
        load_vq(tmp_path / "vq.pt", VQConfig("VQ-4-small", 64, 8))


def test_hashes_that_differ_are_refused_and_unknown_ones_are_a_warning(caplog):
    check_codebook("a" * 64, "a" * 64, "gpt.pt", "vq.pt")
    assert not caplog.text
    check_codebook(None, "a" * 64, "gpt.pt", "vq.pt")
    assert "gpt.pt: carries no hash of its codebook" in caplog.text
    message = r"vq\.pt: expected the codebook aaaaaaaaaaaa of gpt\.pt, got bbbbbbbbbbbb"
    with pytest.raises(ValueError, match=message):
        check_codebook("a" * 64, "b" * 64, "gpt.pt", "vq.pt")


def test_loading_needs_no_second_copy_of_the_weights(tmp_path):
    save_checkpoint(tmp_path / "b.pt", {"model": GPT(gpt_config("GPT-B")).state_dict()})
    command = [sys.executable, "-c", MEASURE_LOADING, tmp_path / "b.pt", ROOT, "GPT-B"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.15
