"""The code store: what is written is what is read, and unfinished or foreign stores are refused."""

import errno
import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from autoregressive.data import checksums, code_writer, opening, store_checks
from autoregressive.data.batches import TokenBatches
from autoregressive.data.code_writer import CodeWriter
from autoregressive.data.codes import CodeStore, code_dtype
from autoregressive.data.combined_codes import CombinedCodes
from autoregressive.data.mapping import read_mapping
from autoregressive.data.opening import open_codes, open_older_stores
from autoregressive.data.store_checks import verify_checksums
from autoregressive.data.training_data import open_data
from autoregressive.runtime.distributed import Session, keyed_random
from autoregressive.runtime.files import mapping_sha256, write_json
from autoregressive.runtime.lock import hold, lock_of
from autoregressive.runtime.log import LOGGER
from autoregressive.train import train_c2i
from processes import run_here
from ready_files import write_older

MANIFEST = {
    "dataset": "test", "num_images": 7, "num_crops": 2, "num_tokens": 9, "grid": 3,
    "codebook_size": 24, "crops": ["centre", "centre, mirrored"], "class_names": ["a", "b", "c"],
    "images_sha256": "1" * 64, "image_size": 12, "codebook_sha256": "2" * 64,
    "tokenizer_sha256": "3" * 64}
LABELS = np.array([0, 0, 1, 1, 1, 2, 2])


def fill(path, manifest=MANIFEST, failures=None, upto=7):
    """Writes a store of known codes in batches of 3 rows."""
    codes = np.random.default_rng(0).integers(manifest["codebook_size"], size=(7, 2, 9))
    writer = CodeWriter(path, manifest)
    writer.create(LABELS)
    for first in range(0, upto, 3):
        rows = range(first, min(first + 3, 7))
        failed = {row: why for row, why in (failures or {}).items() if row in rows}
        writer.write(rows, codes[rows.start:rows.stop], failed)
    return writer, codes


@pytest.fixture
def store(tmp_path):
    writer, _ = fill(tmp_path / "codes")
    writer.finish(0)
    return open_codes(tmp_path / "codes")


def test_codes_read_are_the_codes_written(tmp_path):
    writer, codes = fill(tmp_path / "codes")
    writer.finish(0)
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
        writer.finish(0)
    writer.create(LABELS)                                        # the same command again
    assert writer.rows.missing(3) == [range(6, 7)] and writer.rows.missing(4) == [range(4, 7)]
    assert writer.rows.num_done == 6
    writer.write(range(6, 7), codes[6:], {})
    writer.finish(0)
    assert np.array_equal(open_codes(path).codes, codes)
    names = sorted(item.name for item in path.iterdir())
    assert names == ["codes.npy", "labels.npy", "manifest.json"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_store_of_another_extraction_is_never_touched_without_overwrite(tmp_path):
    path, other = tmp_path / "codes", MANIFEST | {"num_crops": 1}
    fill(path)
    before = contents(path)
    words = "expected a store with num_crops 1, found one with 2; .* --overwrite"
    with pytest.raises(ValueError, match=words):
        CodeWriter(path, other).create(LABELS)
    assert before == contents(path)
    CodeWriter(path, other).create(LABELS, overwrite=True)
    assert CodeWriter(path, other).rows.missing(7) == [range(7)]
    assert np.load(path / "codes.npy").shape == (7, 1, 9)


def test_overwrite_replaces_a_finished_store_and_continues_an_unfinished_one(tmp_path, store):
    writer = CodeWriter(store.path, MANIFEST)
    writer.create(LABELS, overwrite=True)
    assert not writer.is_complete and writer.rows.num_done == 0
    assert not np.load(writer.path / "codes.npy").any()
    writer.write(range(3), np.ones((3, 2, 9), np.int64), {})
    writer.create(LABELS, overwrite=True)
    assert writer.rows.num_done == 3


def test_folder_of_other_files_is_never_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="found other files"):
            CodeWriter(tmp_path, MANIFEST).create(LABELS, overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_lock_in_a_folder_and_its_leftovers_are_no_other_files(tmp_path):
    folder = tmp_path / "codes"
    writer = CodeWriter(folder, MANIFEST)
    folder.mkdir()
    (folder / ".codes.npy.takeover.tmp").touch()
    with hold(writer.target):
        (folder / ".codes.npy.takeover.tmp").touch()
        writer.create(LABELS)
        lock = lock_of(writer.target)
        assert lock.parent == folder and lock.exists()
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["codes.npy", "labels.npy", "manifest.json", "status.npy"]


def test_full_disk_is_a_clear_error_and_the_same_command_works_when_there_is_room(
        tmp_path, monkeypatch):
    def no_room(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    writer = CodeWriter(tmp_path / "codes", MANIFEST)
    words = "codes.npy: expected room for 0.0 MiB, No space left on device"
    with pytest.raises(ValueError, match=words):
        writer.create(LABELS)
    monkeypatch.undo()
    fill(tmp_path / "codes")[0].finish(0)
    assert open_codes(tmp_path / "codes").rows.size == 7


@pytest.mark.parametrize("name, words", [
    ("codes.npy", "expected rows 0 to 6 as they were written"),
    ("labels.npy", "expected the labels as they were written")])
def test_one_changed_byte_breaks_a_checksum(store, name, words):
    verify_checksums(store)
    content = bytearray((Path(store.path) / name).read_bytes())
    content[-9] ^= 1
    (Path(store.path) / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        verify_checksums(open_codes(store.path))


def checksum(array):
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


@pytest.mark.parametrize("written_by", ["now", "before"])
@pytest.mark.parametrize("block_rows", [4, 7])
def test_checksum_of_labels_covers_all_of_them_and_that_of_older_stores_holds(
        tmp_path, monkeypatch, written_by, block_rows):
    for module in (checksums, code_writer, opening, store_checks):
        monkeypatch.setattr(module, "CHECKSUM_ROWS", block_rows)
    path = tmp_path / "codes"
    fill(path)[0].finish(0)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["labels_sha256"] == checksum(LABELS)
    if written_by == "before":  # by a commit that covered the first block alone
        manifest["labels_sha256"] = checksum(LABELS[:block_rows])
        write_json(path / "manifest.json", manifest)
    verify_checksums(open_codes(path))
    content = bytearray((path / "labels.npy").read_bytes())
    content[-8] ^= 1                                             # the last label
    (path / "labels.npy").write_bytes(content)
    if written_by == "before" and block_rows < 7:
        verify_checksums(open_codes(path))                       # its checksum does not tell
        return
    with pytest.raises(ValueError, match="expected the labels as they were written"):
        verify_checksums(open_codes(path))


@pytest.mark.parametrize(("content", "words"), [
    (b"", "expected JSON"),
    (b"[]", "expected a JSON object, found a list"),
    (b'{"a": "\xff"}', "expected JSON"),
    ({"complete": None}, "expected complete as bool, found NoneType"),
    ({"num_images": "7"}, "expected num_images as"),
    ({"grid": None}, "expected grid as"),
    ({"class_names": {}}, "expected class_names as"),
    ({"failed": None}, "expected failed as"),
    ({"failed": [3]}, "expected a row of every image in failed"),
    ({"tokenizer_sha256": 3}, "expected tokenizer_sha256 as"),
    ({"codes_sha256": None}, "expected codes_sha256 as"),
    ({"num_tokens": 10}, "found 10 tokens for a grid of 3 x 3"),
    ({"grid": 0, "num_tokens": 0}, "a grid of 0 x 0"),
    ({"codes_sha256": []}, "expected 1 checksums in codes_sha256, found 0"),
])
def test_manifest_that_lacks_something_is_refused_by_its_name_and_replaced_by_overwrite(
        store, content, words):
    path = Path(store.path) / "manifest.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content).encode()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as refused:
        verify_checksums(open_codes(store.path))
    assert str(path) in str(refused.value) or "grid" in words
    writer = CodeWriter(store.path, MANIFEST)
    writer.create(LABELS, overwrite=True)
    assert not writer.is_complete and writer.rows.num_done == 0


def test_codes_that_are_no_integers_are_refused(store):
    np.save(Path(store.path) / "codes.npy", np.zeros((7, 2, 9), np.float32))
    with pytest.raises(ValueError, match="codes.npy: expected an array of integers, found float32"):
        open_codes(store.path)


@pytest.mark.parametrize("name", ["codes.npy", "labels.npy"])
def test_file_that_was_cut_off_is_a_clear_error(store, name):
    content = (Path(store.path) / name).read_bytes()
    for length in (0, 50, len(content) - 1):
        (Path(store.path) / name).unlink()  # the map of the fixture keeps the old one
        (Path(store.path) / name).write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"{name}: expected an array, .*the store is damaged"):
            open_codes(store.path)


def test_failed_images_are_listed_and_left_out_and_labels_do_not_shift(tmp_path):
    failures = {4: ("b/x.jpg", "truncated"), 0: ("a/y.jpg", "empty")}
    writer, _ = fill(tmp_path / "codes", failures=failures)
    writer.finish(2)
    store = open_codes(tmp_path / "codes")
    assert store.manifest["failed"] == [{"row": 0, "path": "a/y.jpg", "reason": "empty"},
                                        {"row": 4, "path": "b/x.jpg", "reason": "truncated"}]
    assert store.rows.tolist() == [1, 2, 3, 5, 6] and store.labels[5] == 2


def test_too_many_failures_leave_a_store_unfinished_and_are_tried_again(tmp_path):
    failures = {4: ("b/x.jpg", "truncated"), 0: ("a/y.jpg", "empty")}
    writer, codes = fill(tmp_path / "codes", failures=failures)
    assert [failure["row"] for failure in writer.finish(1)] == [0, 4]
    assert len(json.loads((tmp_path / "codes" / "manifest.json").read_text())["failed"]) == 2
    with pytest.raises(ValueError, match="unfinished"):
        open_codes(tmp_path / "codes")
    writer.create(LABELS)
    assert writer.rows.missing(1) == [range(0, 1), range(4, 5)]
    for row in (0, 4):
        writer.write(range(row, row + 1), codes[row:row + 1], {})
    assert writer.finish(1) == [] and np.array_equal(open_codes(tmp_path / "codes").codes, codes)


def test_store_of_broken_images_alone_stays_unfinished_and_all_are_tried_again(tmp_path):
    writer, _ = fill(tmp_path / "codes", failures=dict.fromkeys(range(7), ("x.jpg", "truncated")))
    assert len(writer.finish(7)) == 7 and not writer.is_complete
    writer.create(LABELS)
    assert writer.rows.missing(7) == [range(7)]


def test_stores_of_the_same_images_add_their_crops_and_leave_out_what_failed_in_any(tmp_path):
    codes = [fill(tmp_path / "one", failures={4: ("b/x.jpg", "truncated")})[1]]
    writer = CodeWriter(tmp_path / "two", MANIFEST | {"num_crops": 3})
    writer.create(LABELS)
    codes.append(np.random.default_rng(1).integers(24, size=(7, 3, 9)))
    writer.write(range(7), codes[1], {0: ("a/y.jpg", "empty")})
    for name, manifest in (("one", MANIFEST), ("two", writer.manifest)):
        CodeWriter(tmp_path / name, manifest).finish(1)
    both = open_codes(tmp_path / "one", tmp_path / "two")
    assert both.rows.tolist() == [1, 2, 3, 5, 6] and both.codes.shape == (7, 5, 9)
    rows, crops = np.repeat(both.rows, 5), np.tile(np.arange(5), 5)
    assert np.array_equal(both.codes[rows, crops], np.concatenate(codes, axis=1)[rows, crops])


@pytest.mark.parametrize("change, labels, words", [
    ({"num_images": 6}, LABELS[:6], "expected a store with num_images 7"),
    ({"image_size": 24}, LABELS, "expected a store with image_size 12"),
    ({"grid": 9}, LABELS,
     "expected the tokens of a square grid, found 9 tokens for a grid of 9 x 9"),
    ({}, LABELS[::-1], "expected the labels of")])
def test_stores_of_other_images_are_not_combined(tmp_path, store, change, labels, words):
    writer = CodeWriter(tmp_path / "other", MANIFEST | change)
    writer.create(labels)
    writer.write(range(len(labels)), np.zeros((len(labels), 2, 9), np.int64), {})
    writer.finish(0)
    with pytest.raises(ValueError, match=words):
        open_codes(store.path, tmp_path / "other")


@pytest.fixture
def warnings(monkeypatch):
    """Returns the list of warnings that are logged from now on."""
    logged = []
    monkeypatch.setattr(LOGGER, "warning", lambda text, *values: logged.append(text % values))
    return logged


@pytest.mark.parametrize("padding", [0, 3])
def test_older_layout_is_read_without_the_images_that_filled_its_last_round_and_says_so(
        tmp_path, warnings, padding):
    codes = np.random.default_rng(0).integers(24, size=(11, 2, 9))
    labels = np.arange(11) % 3
    rows = [*range(11), *range(padding)]
    write_older(tmp_path / "old", codes[rows], labels[rows])
    store = open_codes(tmp_path / "old")
    assert store.grid == 3 and store.rows.tolist() == list(range(11))
    assert np.array_equal(store.labels, labels)
    chosen, crops = np.array([10, 0, 10]), np.array([1, 0, 0])
    assert np.array_equal(store.codes[chosen, crops], codes[chosen, crops])
    tokens, _ = TokenBatches(store, np.arange(24), 4, 0, 3, 0.0)[0, range(4)]
    assert tokens.shape == (4, 9)
    expected = ["left out the last 3 of 14 files"] if padding else []
    assert [warning.split(": ")[1].split(",")[0] for warning in warnings] == expected


def test_older_layout_is_opened_once_and_sent_to_the_other_processes(tmp_path, monkeypatch):
    codes = np.random.default_rng(0).integers(24, size=(11, 2, 9))
    write_older(tmp_path / "old", codes, np.arange(11) % 3)
    paths = [str(tmp_path / "old")]
    sent = pickle.dumps(open_older_stores(paths, Session(0, 2, torch.device("cpu"))))
    assert len(sent) < 2000
    monkeypatch.setattr(opening, "open_older_codes", None)
    store = open_codes(*paths, opened=pickle.loads(sent))
    assert store.labels.tolist() == [row % 3 for row in range(11)]
    assert np.array_equal(store.codes[np.array([10]), 1], codes[[10], 1])


class Rank1(Session):
    """Rank 1 of two, to which rank 0 has sent `stores`; no other process is asked for anything."""

    stores = {}

    def gather(self, item):
        return [item]

    def from_main(self, _item):
        return self.stores


def test_training_opens_no_older_layout_on_rank_1_and_takes_what_rank_0_sent(tmp_path, monkeypatch):
    write_older(tmp_path / "old", np.zeros((11, 2, 9), np.int64), np.arange(11) % 3)
    torch.save(torch.arange(24), tmp_path / "mapping.pt")
    path = str(tmp_path / "old")
    session = Rank1(1, 2, torch.device("cpu"), debug=True)
    monkeypatch.setattr(Rank1, "stores", open_older_stores([path], session))
    monkeypatch.setattr(opening, "open_older_codes", None)
    opened = []

    def open_data_and_stop(*arguments):
        opened.append(open_data(*arguments))
        raise ValueError("far enough")

    monkeypatch.setattr(train_c2i, "open_data", open_data_and_stop)
    args = train_c2i.build_parser().parse_args([
        "--code-path", path, "--mapping-path", str(tmp_path / "mapping.pt"), "--results-dir", "x",
        "--gpt-model", "GPT-tiny", "--vocab-size", "24", "--codebook-size", "24", "--num-classes",
        "3", "--cluster-size", "8", "--image-size", "48", "--global-batch-size", "4"])
    with pytest.raises(ValueError, match="far enough"):
        train_c2i.main(args, session)
    assert opened[0].store is Rank1.stores[path]


def test_flags_are_refused_before_an_older_layout_is_opened(tmp_path, monkeypatch, capsys):
    write_older(tmp_path / "old", np.zeros((11, 2, 9), np.int64), np.arange(11) % 3)
    monkeypatch.setattr(opening, "open_older_codes", None)
    code = run_here("autoregressive/train/train_c2i.py", "--code-path", tmp_path / "old",
                    "--results-dir", tmp_path, "--min-lr", 1e-5)
    assert code == 2 and "--min-lr: expected --lr-schedule" in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 2, 11])
def test_older_layout_has_checksums_by_which_other_codes_and_labels_are_told_apart(tmp_path, count):
    codes, labels = np.random.default_rng(0).integers(24, size=(count, 2, 9)), np.arange(count)
    other_codes, other_labels = codes.copy(), labels.copy()
    other_codes[0, 1, 8] += 1
    other_labels[-1] += 1
    stores = {"old": (codes, labels), "same": (codes.astype(np.int32), labels),
              "codes": (other_codes, labels), "labels": (codes, other_labels),
              "longer": (codes[[*range(count), 0]], labels[[*range(count), 0]])}
    found = {}
    for name, (its_codes, its_labels) in stores.items():
        write_older(tmp_path / name, its_codes, its_labels)
        store = open_codes(tmp_path / name)
        verify_checksums(store)                                  # there is nothing to compare
        found[name] = store.manifest["codes_sha256"], store.manifest["labels_sha256"]
    assert found["old"] == found["same"] and found["old"][1] == checksum(labels)
    for name, are_equal in (("codes", [False, True]), ("labels", [True, False])):
        assert [old == new for old, new in zip(found["old"], found[name], strict=True)] == are_equal
    assert isinstance(found["old"][0], str) and found["longer"][0] != found["old"][0]


@pytest.mark.parametrize(("rows", "lengths"), [
    ([0, 0, 0, 0], "1 or 2 or 3"), ([0, 1, 0, 1, 0], "1 or 3"), ([0, 1, 0, 2, 0, 1, 0], "1 or 3")])
def test_older_layout_of_data_that_repeat_themselves_is_read_whole_with_a_warning(
        tmp_path, warnings, rows, lengths):
    codes = np.random.default_rng(0).integers(24, size=(3, 2, 9))
    write_older(tmp_path / "old", codes[rows], np.zeros(len(rows), np.int64))
    store = open_codes(tmp_path / "old")
    assert store.rows.tolist() == list(range(len(rows)))
    assert np.array_equal(store.codes[store.rows, 0], codes[rows, 0])
    warning, = warnings
    assert f"the last files repeat the first ones, {lengths} of them" in warning


@pytest.mark.parametrize(("kind", "row", "content", "words"), [
    ("labels", 2, b"", "expected an array, No data left in file"),
    ("labels", 2, -4, "expected an array"),
    ("labels", 2, np.arange(2), r"expected one label, found shape \(2,\)"),
    ("labels", 2, np.zeros(1), "expected an array of integers, found float64"),
    ("codes", 2, -4, "expected 272 bytes as in 0.npy, found 268"),
    ("codes", 2, np.zeros((1, 3, 9), np.int64), "expected 272 bytes as in 0.npy, found 344"),
    ("codes", 0, np.zeros((1, 2, 9), np.float32), "expected an array of integers, found float32"),
    ("codes", 3, np.zeros((1, 2, 9)), "expected an array of integers, found float64"),
    ("codes", 3, np.zeros((1, 9, 2), np.int64),
     r"expected shape \(1, 2, 9\) as in 0.npy, found \(1, 9, 2\)"),
    ("codes", 0, np.zeros((2, 9), np.int64), r"expected codes \(1, crops, T\), found \(2, 9\)"),
])
def test_damaged_file_of_the_older_layout_is_refused_by_name(tmp_path, kind, row, content, words):
    write_older(tmp_path, np.random.default_rng(0).integers(24, size=(4, 2, 9)), np.arange(4))
    path = tmp_path / f"imagenet48_{kind}" / f"{row}.npy"
    if isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else path.read_bytes()[:content])
    with pytest.raises(ValueError, match=f"{kind}/{row}.npy: {words}"):
        open_codes(tmp_path)


def test_older_layout_whose_tokens_are_no_square_is_refused(tmp_path):
    write_older(tmp_path, np.random.default_rng(0).integers(24, size=(4, 2, 10)), np.arange(4))
    with pytest.raises(ValueError, match="found 10 tokens for a grid of 3 x 3"):
        open_codes(tmp_path)


def test_older_layout_with_gaps_or_without_labels_is_refused(tmp_path):
    write_older(tmp_path, np.zeros((4, 2, 9), np.int64), np.arange(4))
    (tmp_path / "imagenet48_codes" / "2.npy").unlink()
    with pytest.raises(ValueError, match="without gaps, found 3 files up to 3.npy"):
        open_codes(tmp_path)
    (tmp_path / "imagenet48_labels").rename(tmp_path / "labels")
    with pytest.raises(ValueError, match="expected the labels of imagenet48_codes"):
        open_codes(tmp_path)


def test_epoch_visits_every_image_once_with_its_own_label_and_one_of_its_crops(store):
    batches = TokenBatches(store, np.arange(24), 3, seed=1, num_classes=3, label_dropout=0.0)
    assert batches.order.per_epoch == 2
    seen = []
    for step in (2, 3):                                          # the second epoch
        tokens, labels = batches[step, range(3)]
        for row, label in zip(tokens.numpy(), labels.tolist(), strict=True):
            image, = np.flatnonzero((store.codes == row).all(-1).any(-1))
            assert store.labels[image] == label
            seen.append(image)
    assert len(set(seen)) == 6


def test_crops_of_one_store_are_chosen_as_ever(store):
    batches = TokenBatches(store, np.arange(24), 7, seed=5, num_classes=3, label_dropout=0.0)
    for epoch in range(3):
        crops = keyed_random(5, epoch, 1).integers(2, size=7)
        rows = batches.rows(epoch)
        assert np.array_equal(batches[epoch, range(7)][0], store.codes[rows, crops[rows]])


@pytest.mark.parametrize("sizes", [(2, 2), (1, 3), (2, 4), (2, 3, 1)])
def test_stores_are_chosen_equally_often_whatever_their_crops_and_their_crops_equally_often(sizes):
    codes = CombinedCodes([np.zeros((5, size, 4), np.uint16) for size in sizes])
    crops = CodeStore("", {}, codes, np.zeros(5), np.arange(5)).crops_to_draw
    shares = np.bincount(crops) / len(crops)
    assert shares == pytest.approx([1 / len(sizes) / size for size in sizes for _ in range(size)])
    if len(set(sizes)) == 1:
        assert np.array_equal(crops, np.arange(sum(sizes)))      # the draws that there were before


def test_images_of_two_stores_of_unequal_size_come_from_each_half_of_the_time():
    stores = [np.full((100, crops, 4), store, np.uint16) for store, crops in enumerate((1, 3))]
    codes = CombinedCodes(stores)
    store = CodeStore("", {}, codes, np.zeros(100, np.int64), np.arange(100))
    batches = TokenBatches(store, np.arange(2), 100, seed=1, num_classes=1, label_dropout=0.0)
    drawn = torch.cat([batches[epoch, range(100)][0] for epoch in range(20)])
    assert 0.46 < drawn.double().mean() < 0.54  # uniformly over the crops it would be 0.75


def test_parts_of_processes_make_up_the_batch_of_one_process(store):
    whole, first, second = (TokenBatches(store, np.arange(24), 4, 5, 3, 0.5) for _ in range(3))
    tokens, labels = whole[6, range(4)]
    parts = [first[6, range(1)], second[6, range(1, 4)]]
    assert torch.equal(tokens, torch.cat([part[0] for part in parts]))
    assert torch.equal(labels, torch.cat([part[1] for part in parts]))


def test_tokens_are_the_mapped_codes(store):
    mapping = np.random.default_rng(2).permutation(24)
    codes, _ = TokenBatches(store, np.arange(24), 4, 0, 3, 0.0)[0, range(4)]
    tokens, _ = TokenBatches(store, mapping, 4, 0, 3, 0.0)[0, range(4)]
    assert torch.equal(tokens, torch.from_numpy(mapping)[codes])


def test_dropped_labels_become_the_null_label_at_the_given_rate(store):
    batches = TokenBatches(store, np.arange(24), 5, 0, 3, label_dropout=0.3)
    labels = torch.cat([batches[step, range(5)][1] for step in range(400)])
    assert 0.25 < (labels == 3).float().mean() < 0.35
    without = TokenBatches(store, np.arange(24), 5, 0, 3, label_dropout=0.0)
    labels = torch.cat([without[step, range(5)][1] for step in range(9)])
    assert not (labels == 3).any()


@pytest.mark.parametrize("settings, message", [
    ({"batch_size": 8}, "at least one batch of 8"),
    ({"num_classes": 2}, r"expected labels 0 \.\. 1, found 0 \.\. 2")])
def test_batches_that_cannot_be_are_refused(store, settings, message):
    valid = {"mapping": np.arange(24), "batch_size": 2, "seed": 0, "num_classes": 3,
             "label_dropout": 0.1}
    with pytest.raises(ValueError, match=message):
        TokenBatches(store, **valid | settings)


def test_mapping_comes_with_its_hashes(tmp_path):
    permutation = torch.randperm(24)
    torch.save(permutation, tmp_path / "mapping.pt")
    hashes = {"mapping_sha256": mapping_sha256(permutation)}
    assert read_mapping(tmp_path / "mapping.pt", 24).hashes == hashes
    write_json(tmp_path / "mapping.pt.json", hashes | {"cluster_size": 4})
    assert read_mapping(tmp_path / "mapping.pt", 24).hashes["cluster_size"] == 4


@pytest.mark.parametrize("content, message", [
    (torch.arange(23), "expected a mapping of 24 codes, got shape"),
    (torch.zeros(24).long(), "expected a permutation"),
    ({"a": 1}, "expected a mapping of 24 codes"),
    ([1, 2], "expected a mapping of 24 codes"),
    (torch.arange(24).float(), "a dense one of torch.float32"),
    (torch.arange(24).bfloat16(), "a dense one of torch.bfloat16"),
    (torch.arange(24) > 3, "a dense one of torch.bool"),
    (torch.arange(24).to_sparse(), "a sparse one of torch.int64")])
def test_other_mappings_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "mapping.pt")
    with pytest.raises(ValueError, match=message):
        read_mapping(tmp_path / "mapping.pt", 24)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_mapping_of_other_integers_is_the_same_mapping(tmp_path, dtype):
    permutation = torch.randperm(24)
    torch.save(permutation.to(dtype), tmp_path / "mapping.pt")
    mapping = read_mapping(tmp_path / "mapping.pt", 24)
    assert mapping.tokens.dtype == np.int64 and mapping.tokens.tolist() == permutation.tolist()
    assert mapping.hashes["mapping_sha256"] == mapping_sha256(permutation)


@pytest.mark.parametrize("content", [b"[]", b"", b"\xff", b"{}", b'{"mapping_sha256": 3}'])
def test_side_file_that_is_none_is_refused_by_name(tmp_path, content):
    torch.save(torch.arange(24), tmp_path / "mapping.pt")
    (tmp_path / "mapping.pt.json").write_bytes(content)
    with pytest.raises(ValueError, match="mapping.pt.json: expected"):
        read_mapping(tmp_path / "mapping.pt", 24)


def test_mapping_of_one_code_is_a_mapping(tmp_path):
    torch.save(torch.zeros(1).long(), tmp_path / "mapping.pt")
    assert read_mapping(tmp_path / "mapping.pt", 1).tokens.tolist() == [0]


def test_mapping_that_is_not_what_its_side_file_says_is_refused(tmp_path):
    torch.save(torch.arange(24), tmp_path / "mapping.pt")
    (tmp_path / "mapping.pt.json").write_text(json.dumps({"mapping_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="describes, got another"):
        read_mapping(tmp_path / "mapping.pt", 24)
