"""The code store: what is written is what is read, and unfinished or foreign stores are refused."""

import json

import numpy as np
import pytest
import torch

from autoregressive.data.batches import TokenBatches
from autoregressive.data.codes import CodeWriter, code_dtype, open_codes, read_mapping
from autoregressive.runtime.files import mapping_sha256, write_json

MANIFEST = {"dataset": "test", "num_images": 7, "num_crops": 2, "num_tokens": 9, "grid": 3, "codebook_size": 24,
            "class_names": ["a", "b", "c"]}
LABELS = np.array([0, 0, 1, 1, 1, 2, 2])


def fill(path, manifest=MANIFEST, failures=None, upto=7):
    """Writes a store of known codes in batches of 3 rows."""
    codes = np.random.default_rng(0).integers(manifest["codebook_size"], size=(7, 2, 9))
    CodeWriter.create(path, manifest, LABELS)
    writer = CodeWriter(path, manifest)
    for first in range(0, upto, 3):
        rows = range(first, min(first + 3, 7))
        writer.write(rows, codes[rows.start:rows.stop], {row: why for row, why in (failures or {}).items()
                                                         if row in rows})
    return writer, codes


@pytest.fixture
def store(tmp_path):
    writer, _ = fill(tmp_path / "codes")
    writer.finish()
    return open_codes(tmp_path / "codes")


def test_codes_read_are_the_codes_written(tmp_path):
    writer, codes = fill(tmp_path / "codes")
    writer.finish()
    store = open_codes(tmp_path / "codes")
    assert store.codes.dtype == np.uint16 and np.array_equal(store.codes, codes)
    assert np.array_equal(store.labels, LABELS) and np.array_equal(store.rows, np.arange(7))


def test_large_codebooks_get_a_wider_dtype():
    assert code_dtype(65536) == np.uint16 and code_dtype(65537) == np.int32


def test_unfinished_store_is_refused_and_can_be_continued(tmp_path):
    path = tmp_path / "codes"
    writer, codes = fill(path, upto=6)
    with pytest.raises(ValueError, match="unfinished"):
        open_codes(path)
    with pytest.raises(RuntimeError, match="1 rows were not written"):
        writer.finish()
    CodeWriter.create(path, MANIFEST, LABELS)                    # the same command again
    assert writer.is_written(range(3, 6)) and not writer.is_written(range(6, 7))
    writer.write(range(6, 7), codes[6:], {})
    writer.finish()
    assert np.array_equal(open_codes(path).codes, codes)


def test_store_of_another_extraction_is_never_touched(tmp_path):
    fill(tmp_path / "codes")
    before = {path.name: path.read_bytes() for path in (tmp_path / "codes").iterdir()}
    with pytest.raises(ValueError, match="expected a store with grid 4, found one with 3"):
        CodeWriter.create(tmp_path / "codes", MANIFEST | {"grid": 4}, LABELS)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "codes").iterdir()}


def test_folder_of_other_files_is_never_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="found other files"):
        CodeWriter.create(tmp_path, MANIFEST, LABELS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_failed_images_are_listed_and_left_out_and_labels_do_not_shift(tmp_path):
    writer, _ = fill(tmp_path / "codes", failures={4: ("b/x.jpg", "truncated"), 0: ("a/y.jpg", "empty")})
    writer.finish()
    store = open_codes(tmp_path / "codes")
    assert store.manifest["failed"] == [{"row": 0, "path": "a/y.jpg", "reason": "empty"},
                                        {"row": 4, "path": "b/x.jpg", "reason": "truncated"}]
    assert store.rows.tolist() == [1, 2, 3, 5, 6] and store.labels[5] == 2


def test_epoch_visits_every_image_once_with_its_own_label_and_one_of_its_crops(store):
    batches = TokenBatches(store, np.arange(24), 3, seed=1, num_classes=3, label_dropout=0.0)
    assert batches.per_epoch == 2
    seen = []
    for update in (2, 3):                                        # the second epoch
        tokens, labels = batches.batch(update, range(3))
        for row, label in zip(tokens.numpy(), labels.tolist(), strict=True):
            image, = np.flatnonzero((store.codes == row).all(-1).any(-1))
            assert store.labels[image] == label
            seen.append(image)
    assert len(set(seen)) == 6


def test_parts_of_processes_make_up_the_batch_of_one_process(store):
    whole, first, second = (TokenBatches(store, np.arange(24), 4, 5, 3, 0.5) for _ in range(3))
    tokens, labels = whole.batch(6, range(4))
    parts = [first.batch(6, range(1)), second.batch(6, range(1, 4))]
    assert torch.equal(tokens, torch.cat([part[0] for part in parts]))
    assert torch.equal(labels, torch.cat([part[1] for part in parts]))


def test_tokens_are_the_mapped_codes(store):
    mapping = np.random.default_rng(2).permutation(24)
    codes, _ = TokenBatches(store, np.arange(24), 4, 0, 3, 0.0).batch(0, range(4))
    tokens, _ = TokenBatches(store, mapping, 4, 0, 3, 0.0).batch(0, range(4))
    assert torch.equal(tokens, torch.from_numpy(mapping)[codes])


def test_dropped_labels_become_the_null_label_at_the_given_rate(store):
    batches = TokenBatches(store, np.arange(24), 5, 0, 3, label_dropout=0.3)
    labels = torch.cat([batches.batch(update, range(5))[1] for update in range(400)])
    assert 0.25 < (labels == 3).float().mean() < 0.35
    assert not (torch.cat([TokenBatches(store, np.arange(24), 5, 0, 3, 0.0).batch(u, range(5))[1]
                           for u in range(9)]) == 3).any()


@pytest.mark.parametrize("settings, message", [({"batch_size": 8}, "at least one batch of 8"),
                                               ({"num_classes": 2}, r"expected labels 0 \.\. 1, found 0 \.\. 2")])
def test_batches_that_cannot_be_are_refused(store, settings, message):
    with pytest.raises(ValueError, match=message):
        TokenBatches(**{"store": store, "mapping": np.arange(24), "batch_size": 2, "seed": 0, "num_classes": 3,
                        "label_dropout": 0.1} | settings)


def test_mapping_comes_with_its_hashes(tmp_path):
    permutation = torch.randperm(24)
    torch.save(permutation, tmp_path / "mapping.pt")
    assert read_mapping(tmp_path / "mapping.pt", 24).hashes == {"mapping_sha256": mapping_sha256(permutation)}
    write_json(tmp_path / "mapping.pt.json", {"mapping_sha256": mapping_sha256(permutation), "cluster_size": 4})
    assert read_mapping(tmp_path / "mapping.pt", 24).hashes["cluster_size"] == 4


@pytest.mark.parametrize("content, message", [
    (torch.arange(23), "expected a mapping of 24 codes, got shape"),
    (torch.zeros(24).long(), "expected a permutation"), ({"a": 1}, "expected a mapping of 24 codes")])
def test_other_mappings_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "mapping.pt")
    with pytest.raises(ValueError, match=message):
        read_mapping(tmp_path / "mapping.pt", 24)


def test_mapping_that_is_not_what_its_side_file_says_is_refused(tmp_path):
    torch.save(torch.arange(24), tmp_path / "mapping.pt")
    (tmp_path / "mapping.pt.json").write_text(json.dumps({"mapping_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="describes, got another"):
        read_mapping(tmp_path / "mapping.pt", 24)
