"""Flags that files tell: they need not be given, are compared if they are, and find their files."""

import json
import shutil

import numpy as np
import pytest
import torch

from autoregressive.runtime.checkpoint import list_checkpoints, save_checkpoint
from autoregressive.runtime.files import codebook_sha256, mapping_sha256, write_json
from processes import run_here
from small_runs import (
    MANIFEST,
    SAMPLE,
    TRAIN,
    assert_same_end,
    sample_flags,
    train,
    write_store,
)
from tokenizer.tokenizer_image.loading import recorded_flags
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel

LENGTH = ("--max-steps", 3, "--log-every", 1, "--ckpt-steps", 3, "--global-batch-size", 8,
          "--mixed-precision", "none")


def write_mapping(path, cluster_size, codebook, seed=0):
    """Writes a mapping of MANIFEST's codes with its side file; `codebook` is the reordered one."""
    torch.manual_seed(seed)
    mapping = torch.randperm(64)
    save_checkpoint(path, mapping)
    write_json(f"{path}.json", {
        "mapping_sha256": mapping_sha256(mapping), "cluster_size": cluster_size,
        "original_codebook_sha256": MANIFEST["codebook_sha256"],
        "codebook_sha256": codebook_sha256(codebook)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Codes, and beside them what belongs to them, under the names of balance_k_means.py."""
    folder = tmp_path_factory.mktemp("recorded")
    write_store(folder / "codes", np.arange(50) % 3, seed=0)
    torch.manual_seed(0)
    for name in ("vq-reorder-a.pt", "other-reorder-b.pt"):
        model = VQModel(VQConfig("VQ-4-small", 64, 8))
        save_checkpoint(folder / name, {"model": model.state_dict()})
        if name.startswith("vq"):
            write_mapping(folder / "mapping-a.pt", 8, model.quantize.embedding.weight)
    shutil.copy(folder / "mapping-a.pt", folder / "mapping.pt")        # as small_runs names them
    shutil.copy(folder / "vq-reorder-a.pt", folder / "vq.pt")
    return folder


@pytest.fixture(scope="module")
def short(folder):
    """The results of a command without any flag that a file tells."""
    assert run_here(TRAIN, "--code-path", folder / "codes", "--results-dir", folder / "short",
                    "--gpt-model", "GPT-tiny", *LENGTH) == 0
    return folder / "short"


def test_training_takes_from_codes_and_mapping_what_is_not_given(folder, short, tmp_path):
    train(folder, tmp_path, *LENGTH)
    assert_same_end(tmp_path, short)
    run, = short.iterdir()
    assert run.name == "000-GPT-tiny-lambda=1-cluster_size=8"
    assert (run / "data.png").is_file()             # the tokenizer was found, too


def test_sampling_takes_from_the_run_what_is_not_given(folder, short, tmp_path):
    run, = short.iterdir()
    checkpoint, = list_checkpoints(run / "checkpoints")
    count = ("--num-fid-samples", 12, "--save-codes", "--precision", "none")
    assert run_here(SAMPLE, "--gpt-ckpt", run, "--sample-dir", tmp_path / "a", *count) == 0
    assert run_here(SAMPLE, *sample_flags(folder, checkpoint, tmp_path / "b")) == 0
    (one,), (other,) = ((tmp_path / name).glob("*.npz") for name in "ab")
    assert one.name == other.name
    with np.load(one) as found, np.load(other) as expected:
        assert found["arr_0"].shape == (12, 16, 16, 3)
        for name in ("arr_0", "labels", "tokens"):
            assert np.array_equal(found[name], expected[name])


def test_a_start_from_weights_takes_their_size(folder, short, tmp_path, capsys):
    run, = short.iterdir()
    command = (TRAIN, "--code-path", folder / "codes", "--results-dir", tmp_path, *LENGTH,
               "--gpt-ckpt", run, "--weights-only")
    assert run_here(*command) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["000-GPT-tiny-lambda=1-cluster_size=8"]
    capsys.readouterr()
    assert run_here(*command, "--gpt-model", "GPT-B") == 2
    assert "--gpt-model: expected GPT-tiny as in " in capsys.readouterr().err


@pytest.mark.parametrize("flag, value, recorded, source", [
    ("--vocab-size", 128, 64, "codes"), ("--codebook-size", 128, 64, "codes"),
    ("--num-classes", 10, 3, "codes"), ("--image-size", 32, 16, "codes"),
    ("--downsample-size", 8, 4, "codes"), ("--cluster-size", 16, 8, "mapping-a.pt"),
    ("--vq-model", "VQ-16", "VQ-4-small", "vq-reorder-a.pt")])
def test_flags_that_contradict_a_file_are_refused(folder, tmp_path, capsys, flag, value, recorded,
                                                  source):
    assert run_here(TRAIN, "--code-path", folder / "codes", "--results-dir", tmp_path,
                    "--gpt-model", "GPT-tiny", *LENGTH, flag, value) == 2
    line = capsys.readouterr().err
    assert f"{flag}: expected {recorded} as in {folder / source}, got {value}; leave" in line
    assert len(line.splitlines()) == 1


@pytest.fixture
def copied(folder, tmp_path):
    """A folder of its own with the codes, their mapping and their tokenizers."""
    for path in folder.glob("[mcvo]*"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    return tmp_path


def command_on(copied, *more):
    return (TRAIN, "--code-path", copied / "codes", "--gpt-model", "GPT-tiny", *LENGTH, *more,
            "--results-dir")


def test_of_several_mappings_the_size_decides_or_all_are_listed(copied, capsys):
    write_mapping(copied / "codes" / "mapping-c.pt", 16, torch.zeros(64, 8), seed=1)
    for size in (8, 16):
        assert run_here(*command_on(copied, "--cluster-size", size), copied / f"runs{size}") == 0
    capsys.readouterr()
    assert run_here(*command_on(copied), copied / "none") == 2      # the default is of neither
    line = capsys.readouterr().err
    assert "--mapping-path: expected one mapping of these codes in these folders, found " in line
    for path in ("codes/mapping-c.pt", "mapping-a.pt"):
        assert str(copied / path) in line
    assert len(line.splitlines()) == 1
    assert run_here(*command_on(copied, "--cluster-size", 32), copied / "none") == 2
    assert "--mapping-path: expected one mapping of these codes" in capsys.readouterr().err


def test_of_several_mappings_of_a_size_that_of_the_default_method_is_taken(copied, capsys):
    name = "mapping-kmeans+nearest-cluster_size=8"
    write_mapping(copied / f"{name}.pt", 8, torch.zeros(64, 8), seed=1)
    write_mapping(copied / f"{name}-random.pt", 8, torch.zeros(64, 8), seed=2)
    (copied / "mapping-damaged.pt.json").write_text("{")
    (copied / "damaged-reorder-x.pt").write_text("no weights")
    assert run_here(*command_on(copied), copied / "runs") == 0
    config = json.loads(next((copied / "runs").glob("*/config.json")).read_text())
    record = json.loads((copied / f"{name}.pt.json").read_text())
    assert config["mapping_sha256"] == record["mapping_sha256"]
    printed = capsys.readouterr()
    for damaged in ("mapping-damaged.pt.json", "damaged-reorder-x.pt"):
        assert damaged in printed.out + printed.err


def test_a_run_that_was_begun_with_flags_or_wrong_defaults_goes_on_without(copied):
    assert run_here(*command_on(copied, "--mapping-path", copied / "mapping-a.pt", "--vq-ckpt",
                                copied / "vq-reorder-a.pt", "--max-steps", 2), copied / "runs") == 0
    run, = (copied / "runs").glob("0*")
    config = json.loads((run / "config.json").read_text())
    write_json(run / "config.json", config | {"vq_model": "VQ-16"})     # an older default
    assert run_here(*command_on(copied), copied / "runs") == 0
    assert [path.name for path in (copied / "runs").glob("0*")] == [run.name]
    assert json.loads((run / "finished.json").read_text())["steps"] == 3


def test_a_tokenizer_of_another_size_is_refused_though_the_mapping_has_no_hashes(copied, capsys):
    model = VQModel(VQConfig("VQ-4-small", 128, 8))
    save_checkpoint(copied / "large.pt", {"model": model.state_dict()})
    assert run_here(*command_on(copied, "--mapping-path", copied / "mapping.pt", "--cluster-size",
                                8, "--vq-ckpt", copied / "large.pt"), copied / "runs") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "large.pt: expected a tokenizer of 64 codes and 4 pixels a token, found one of" in line


def test_of_several_tokenizers_of_a_codebook_all_are_listed(folder, short, tmp_path, capsys):
    shutil.copytree(short, tmp_path / "gpt")
    run, = (tmp_path / "gpt").iterdir()
    weights = torch.load(folder / "vq-reorder-a.pt", weights_only=True)
    save_checkpoint(tmp_path / "vq-reorder-a.pt", weights)
    save_checkpoint(run / "vq-reorder-copy.pt", weights)        # a copy is no other one
    command = ("--gpt-ckpt", run, "--sample-dir", tmp_path / "samples", "--num-fid-samples", 3)
    assert run_here(SAMPLE, *command) == 0
    weights["model"]["post_quant_conv.bias"] += 1
    save_checkpoint(tmp_path / "gpt" / "vq-reorder-tuned.pt", weights)
    capsys.readouterr()
    assert run_here(SAMPLE, *command) == 2
    line = capsys.readouterr().err
    assert "--vq-ckpt: expected one tokenizer of this codebook in these folders, found " in line
    assert str(run / "vq-reorder-copy.pt") in line and "vq-reorder-tuned.pt" in line


@pytest.mark.parametrize("name", ["VQ-16", "VQ-8", "VQ-4-small"])
def test_a_tokenizer_is_known_by_the_shapes_of_its_weights(tmp_path, name):
    if name == "VQ-4-small":
        state = VQModel(VQConfig(name, 32, 4)).state_dict()
    else:
        with torch.device("meta"):
            model = VQModel(VQConfig(name, 32, 4))
        state = {key: torch.zeros(1).expand(tensor.shape)
                 for key, tensor in model.state_dict().items()}
    save_checkpoint(tmp_path / "vq.pt", {"model": state})
    sizes = {"codebook_size": 32, "codebook_embed_dim": 4}
    assert recorded_flags(tmp_path / "vq.pt") == {"vq_model": name} | sizes
    del state["quant_conv.bias"]
    save_checkpoint(tmp_path / "lacking.pt", {"model": state})
    assert recorded_flags(tmp_path / "lacking.pt") == sizes


@pytest.mark.parametrize("changes, words", [
    ({"image_size": 2}, "expected downsample_size of at least 1, found 0"),
    ({"image_size": -16}, "expected image_size of at least 1, found -16"),
    ({"codebook_size": 0}, "expected vocab_size of at least 1, found 0"),
    ({"class_names": []}, "expected num_classes of at least 1, found 0"),
    ({"vq_model": 3}, "expected vq_model as str, found int"),
    ({"codebook_embed_dim": "8"}, "expected codebook_embed_dim as int, found str")])
def test_manifests_that_tell_nonsense_are_one_line(folder, tmp_path, capsys, changes, words):
    shutil.copytree(folder / "codes", tmp_path / "codes")
    manifest = json.loads((tmp_path / "codes/manifest.json").read_text())
    (tmp_path / "codes/manifest.json").write_text(json.dumps(manifest | changes))
    assert run_here(TRAIN, "--code-path", tmp_path / "codes", "--results-dir", tmp_path,
                    "--gpt-model", "GPT-tiny", *LENGTH) == 2
    line = capsys.readouterr().err
    assert words in line and len(line.splitlines()) == 1
