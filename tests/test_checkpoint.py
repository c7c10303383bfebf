"""Checkpoints: every published layout is read, nothing in a file runs, differences are named."""

import argparse
import contextlib
import errno
import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from autoregressive.runtime import checkpoint
from autoregressive.runtime.checkpoint import (
    find_checkpoint,
    load_strictly,
    model_state,
    newest_whole_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from autoregressive.runtime.files import atomic_write

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor([4, 5])}
# Keys that the published code saves, and that are no weights.
BUFFERS = {"freqs_cis": torch.ones(2), "layers.11.attention.kv_cache.k_cache": torch.ones(3)}


class Runs:
    """Would make a file if unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def prefixed(prefix):
    return {prefix + name: tensor for name, tensor in STATE.items()}


@pytest.mark.parametrize("payload", [
    {"model": STATE},
    {"module": STATE},
    {"state_dict": STATE},
    STATE,
    {"model": prefixed("_orig_mod.")},
    prefixed("module."),
    {"model": prefixed("module._orig_mod.")},
    {"model": prefixed("_orig_mod.module.")},
    {"model": STATE, "optimizer": {"state": {}}, "steps": 3, "args": argparse.Namespace(lr=1e-4)},
    {"model": STATE | BUFFERS},
], ids=str)
def test_every_published_layout_is_read(payload, tmp_path):
    torch.save(payload, tmp_path / "file.pt")
    found = model_state(read_checkpoint(tmp_path / "file.pt"), "file.pt")
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], STATE[name]) for name in STATE)


def test_files_of_the_older_format_are_read(tmp_path):
    torch.save({"model": STATE}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(tmp_path / "old.pt")["model"]["b"], STATE["b"])


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, as_zip):
    torch.save({"model": STATE, "extra": Runs(tmp_path / "made")}, tmp_path / "evil.pt",
               _use_new_zipfile_serialization=as_zip)
    message = r"expected tensors and plain containers, found posix\.mkdir; refused"
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "made").exists()


def test_a_plain_pickle_that_would_run_code_is_refused(tmp_path):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Runs(tmp_path / "made")))
    with pytest.raises(ValueError, match=r"evil\.pt"):
        read_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "made").exists()


def test_an_unknown_type_is_named(tmp_path):
    torch.save({"model": STATE, "config": zipfile.ZipInfo("x")}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"zipfile\.ZipInfo"):
        read_checkpoint(tmp_path / "odd.pt")


@pytest.mark.parametrize("keep", [0, 10, 400, -30])
def test_a_truncated_file_is_refused(tmp_path, keep):
    save_checkpoint(tmp_path / "whole.pt", {"model": STATE})
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut\.pt: expected a .*checkpoint"):
        read_checkpoint(tmp_path / "cut.pt")


def test_one_changed_bit_of_a_weight_is_refused(tmp_path):
    path = tmp_path / "changed.pt"
    save_checkpoint(path, {"weight": torch.arange(1.0, 500.0)})
    content = bytearray(path.read_bytes())
    content[content.find(np.float32([250, 251]).tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"changed\.pt: .* a damaged one \(.*has changed"):
        read_checkpoint(path)


def test_a_file_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "bare.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_checkpoint(tmp_path / "bare.pt")["b"], STATE["b"])


@pytest.mark.parametrize("payload", [{"steps": 3}, [1, 2], {"model": {"a": "text"}}, {}])
def test_a_file_without_weights_is_refused(payload):
    with pytest.raises(ValueError, match="expected a state dict"):
        model_state(payload, "file.pt")


def test_differences_are_named_precisely():
    state = {"weight": torch.zeros(3, 5), "scale": torch.zeros(1)}
    message = (r"file\.pt: .*missing bias; unexpected scale; "
               r"weight expected \(4, 5\), got \(3, 5\)\. the file holds X")
    with pytest.raises(ValueError, match=message):
        load_strictly(nn.Linear(5, 4), state, "file.pt", "the file holds X")


def test_a_model_on_the_meta_device_takes_the_tensors_themselves_in_its_own_precision():
    with torch.device("meta"):
        model = nn.Linear(2, 3)
    weight = torch.randn(3, 2)
    load_strictly(model, {"weight": weight, "bias": torch.ones(3, dtype=torch.float16)}, "file.pt")
    assert model.weight.data_ptr() == weight.data_ptr() and model.bias.dtype == torch.float32


def test_equal_contents_give_equal_bytes(tmp_path):
    copied = {name: tensor.clone() for name, tensor in STATE.items()}
    save_checkpoint(tmp_path / "one.pt", {"model": STATE})
    save_checkpoint(tmp_path / "another_name.pt", {"model": copied})
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "another_name.pt").read_bytes()


def test_a_failed_save_leaves_the_older_file_and_nothing_else(tmp_path):
    save_checkpoint(tmp_path / "file.pt", {"model": STATE})
    before = (tmp_path / "file.pt").read_bytes()
    with pytest.raises(AttributeError):
        save_checkpoint(tmp_path / "file.pt", {"model": lambda: None})
    assert (tmp_path / "file.pt").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_folder_stands_for_its_newest_checkpoint(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in ("0000900.pt", "0001000.pt", ".0002000.pt.abc.tmp", "notes.pt"):
        save_checkpoint(tmp_path / "checkpoints" / name, {"model": {"weight": torch.ones(2)}})
    for path in (tmp_path, tmp_path / "checkpoints"):
        assert find_checkpoint(path).name == "0001000.pt"


OURS = {"model": {"weight": torch.arange(20000.0)}, "optimizer": {"state": {}, "param_groups": []},
        "steps": 1, "processes": [], "settings": {}}


def truncated(size):
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("spoil", [
    *(truncated(size) for size in (0, 1, 100, 4096, 4097, 20000, 65536)),
    flip_a_byte,
    lambda path: save_checkpoint(path, torch.ones(3)),
    lambda path: save_checkpoint(path, {"model": {}}),
    lambda path: save_checkpoint(path, {3: torch.ones(2)}),
    lambda path: path.write_text("no checkpoint"),
    lambda path: save_checkpoint(path, OURS | {"steps": "six"}),
])
def test_training_goes_on_from_the_newest_checkpoint_that_is_whole_and_ours(tmp_path, spoil):
    save_checkpoint(tmp_path / "0000003.pt", OURS)
    save_checkpoint(tmp_path / "0000006.pt", OURS)
    spoil(tmp_path / "0000006.pt")
    found, skipped = newest_whole_checkpoint(tmp_path)
    assert found == tmp_path / "0000003.pt"
    assert len(skipped) == 1 and "0000006.pt: expected " in skipped[0].reason


def test_sampling_takes_the_newest_whole_file_of_a_folder_too(tmp_path):
    save_checkpoint(tmp_path / "0000003.pt", OURS)
    save_checkpoint(tmp_path / "0000006.pt", OURS)
    flip_a_byte(tmp_path / "0000006.pt")
    assert find_checkpoint(tmp_path) == tmp_path / "0000003.pt"
    save_checkpoint(tmp_path / "0000006.pt", torch.ones(3))      # whole, but not of a training run
    assert find_checkpoint(tmp_path) == tmp_path / "0000003.pt"


@pytest.mark.parametrize("optimizer, words", [
    ({"state": [], "param_groups": []}, "expected optimizer.state as dict, found list"),
    ({"state": {}}, "expected optimizer.param_groups as list, found none"),
])
def test_a_key_inside_the_optimizer_is_named_with_it(tmp_path, optimizer, words):
    save_checkpoint(tmp_path / "0000003.pt", OURS | {"optimizer": optimizer})
    _, skipped = newest_whole_checkpoint(tmp_path)
    assert words in skipped[0].reason


def test_an_error_of_the_disk_is_no_damage(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "0000003.pt", OURS)

    def fail(*_arguments, **_named):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(OSError, match="Stale"):
        newest_whole_checkpoint(tmp_path)


def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, _data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextlib.contextmanager
    def open_full(path):
        with atomic_write(path):
            yield Full()

    monkeypatch.setattr(checkpoint, "atomic_write", open_full)
    with pytest.raises(OSError, match="No space left on device: .*0000003.pt"):
        save_checkpoint(tmp_path / "0000003.pt", OURS)
    assert not list(tmp_path.iterdir())


def test_the_newest_folder_of_a_sharded_training_is_found(tmp_path):
    for step in ("0005000", "0010000"):
        (tmp_path / step).mkdir()
        save_checkpoint(tmp_path / step / "consolidated.pth", {"weight": torch.ones(2)})
    assert find_checkpoint(tmp_path) == tmp_path / "0010000" / "consolidated.pth"
    assert find_checkpoint(tmp_path / "0005000") == tmp_path / "0005000" / "consolidated.pth"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    module = torch.nn.Linear(3, 2)
    state = module.state_dict() | {"bias": torch.tensor([1, value])}
    with pytest.raises(ValueError, match="found NaN or infinity in bias"):
        load_strictly(module, state, "a file")


def test_a_folder_without_a_complete_checkpoint_is_refused(tmp_path):
    (tmp_path / ".0002000.pt.abc.tmp").touch()
    with pytest.raises(ValueError, match="expected a checkpoint .* in this folder, found none"):
        find_checkpoint(tmp_path)
