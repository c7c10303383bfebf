"""Files in .safetensors: read wherever weights are, by the package alone, or refused in a line."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoregressive.models.config import gpt_config
from autoregressive.models.gpt import GPT
from autoregressive.models.loading import read_gpt
from autoregressive.runtime.checkpoint import model_state, read_checkpoint, save_checkpoint
from conftest import ROOT
from evaluations.c2i.classifier import ClassifierFeatures, SmallClassifier, save_classifier
from processes import run_here
from test_rules import house
from tokenizer.tokenizer_image.loading import load_vq
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel

VQ = VQConfig("VQ-4-small", 64, 8)
CODEBOOK = "quantize.embedding.weight"


def test_what_is_saved_is_read_and_equal_contents_give_equal_bytes(tmp_path):
    payload = {"model": {"b": torch.arange(6).view(2, 3).T, "a": torch.ones(2, dtype=torch.half)},
               "settings": {"names": ["x", None], "rate": 0.1}, "steps": 3}
    contents = set()
    for number in range(5):
        path = tmp_path / f"{number}.safetensors"
        save_checkpoint(path, payload)
        contents.add(path.read_bytes())
    found = read_checkpoint(path)
    for name, tensor in payload["model"].items():
        assert torch.equal(found["model"][name], tensor)
        assert found["model"][name].dtype == tensor.dtype
    assert found | {"model": None} == payload | {"model": None} and len(contents) == 1


def test_one_place_reads_weights_so_every_flag_takes_safetensors():
    readers = {"torch.load(": "autoregressive/runtime/checkpoint.py",
               "safetensors.torch": "autoregressive/runtime/safetensors_file.py"}
    for words, reader in readers.items():
        found = [path for path in house()
                 if re.search(rf"\b{re.escape(words)}", (ROOT / path).read_text())]
        assert found == [reader]


def test_bare_files_with_published_names_are_read_as_bare_checkpoints_are(tmp_path):
    torch.manual_seed(0)
    gpt = GPT(gpt_config("GPT-tiny", grid=4, vocab_size=64, num_classes=3)).state_dict()
    vq = VQModel(VQ).state_dict()
    save_file(gpt, tmp_path / "gpt.safetensors")
    save_file({f"module.{name}": tensor for name, tensor in vq.items()}, tmp_path / "a.safetensors")
    save_checkpoint(tmp_path / "b.pt", {"model": vq})
    file = read_gpt(tmp_path / "gpt.safetensors", bare=True)
    assert file.settings == {} and all(torch.equal(file.state[name], gpt[name]) for name in gpt)
    assert load_vq(tmp_path / "a.safetensors", VQ)[1] == load_vq(tmp_path / "b.pt", VQ)[1]
    mapping = torch.randperm(64)
    save_checkpoint(tmp_path / "mapping.pt", mapping)
    assert run_here("balance_k_means.py", "--vq-ckpt", tmp_path / "a.safetensors",
                    "--cluster-size", 8, "--mapping", tmp_path / "mapping.pt") == 0
    path, = tmp_path.glob("a-reorder*.pt")
    reordered = model_state(read_checkpoint(path), path)[CODEBOOK]
    assert torch.equal(reordered[mapping], vq[CODEBOOK])


def test_a_classifier_is_saved_and_read_by_its_name(tmp_path):
    settings = {"class_names": ["a", "b"], "image_size": 16, "accuracy": 0.5, "num_val": 3,
                "dataset": "digits", "seed": 0, "width": 4}
    model = SmallClassifier(2, 4)
    for name in ("a.pt", "a.safetensors"):
        save_classifier(tmp_path / name, model, settings)
    assert load_file(tmp_path / "a.safetensors").keys() == model.state_dict().keys()
    first, second = (ClassifierFeatures(tmp_path / name) for name in ("a.pt", "a.safetensors"))
    assert (first.sha256, first.settings) == (second.sha256, second.settings)


@pytest.mark.parametrize("keep", [0, 7, 8, 60, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    save_checkpoint(tmp_path / "a.safetensors", {"model": {"a": torch.ones(9)}, "settings": {}})
    content = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(content[:keep])
    with pytest.raises(ValueError, match=r"a\.safetensors: expected a whole safetensors file"):
        read_checkpoint(tmp_path / "a.safetensors")
