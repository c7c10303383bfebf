"""Arrays that several processes fill at once: one result in any order, nothing wrong by a kill."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from autoregressive.data.code_writer import CodeWriter
from autoregressive.data.opening import open_codes
from autoregressive.runtime import files
from autoregressive.runtime import rows as rows_module
from autoregressive.runtime.files import read_json
from autoregressive.runtime.rows import FAILED, BackgroundWriter, RowWriter

IDENTITY = {"seed": 3, "weights_sha256": "1" * 64}
ARRAYS = {"pictures": (np.dtype(np.uint8), (2, 2)), "labels": (np.dtype(np.int64), ())}
NUM_ROWS = 11
PICTURES = np.random.default_rng(0).integers(1, 256, size=(NUM_ROWS, 2, 2))
LABELS = np.arange(NUM_ROWS) - 4
FILES = ["identity.json", "labels.npy", "pictures.npy", "status.npy"]


class Killed(BaseException):
    """Ends the code at a chosen place, as a kill would."""


def writer_of(path, identity=IDENTITY):
    return RowWriter(path, identity, NUM_ROWS, ARRAYS)


def write(writer, rows, **more):
    part = slice(rows.start, rows.stop)
    writer.write(rows, pictures=PICTURES[part], labels=LABELS[part], **more)


def assert_holds_all(writer):
    assert np.array_equal(writer.array("pictures"), PICTURES)
    assert np.array_equal(writer.array("labels"), LABELS)


def names(path):
    return sorted(item.name for item in path.iterdir())


def killed_at(monkeypatch, target, name, count):
    """Lets a function be killed when it is called after `count` calls."""
    original, calls = getattr(target, name), []

    def counted(*args, **kwargs):
        if len(calls) == count:
            raise Killed
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, counted)


@pytest.fixture
def full(tmp_path):
    """A folder whose rows are all written."""
    writer = writer_of(tmp_path / "full")
    writer.create()
    write(writer, range(NUM_ROWS))
    return writer


def test_rows_that_are_not_consecutive_come_to_their_places(tmp_path):
    writer = writer_of(tmp_path)
    writer.create()
    rows = np.array([0, 3, 4, 5, 8, 10])
    writer.write(rows, pictures=PICTURES[rows], labels=LABELS[rows])
    others = np.setdiff1d(np.arange(NUM_ROWS), rows)
    assert np.flatnonzero(writer.is_missing()).tolist() == others.tolist()
    assert not writer.array("pictures")[others].any()
    writer.write(others, pictures=PICTURES[others], labels=LABELS[others])
    assert_holds_all(writer)


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_two_writers_in_any_order_make_one_array(tmp_path, seed):
    first, second = writer_of(tmp_path / "rows"), writer_of(tmp_path / "rows")
    first.create()
    batches = first.missing(2)
    pairs = [range(row, row + 2) for row in range(0, 10, 2)]
    assert batches == second.missing(2) == [*pairs, range(10, 11)]
    order = np.random.default_rng(seed)
    for count, place in enumerate(order.permutation(len(batches)).tolist()):
        assert len(first.missing(2)) == len(second.missing(2)) == len(batches) - count
        write((first, second)[order.integers(2)], batches[place])
    assert first.missing(2) == second.missing(3) == [] and second.num_done == NUM_ROWS
    first.wait_for_others()                                      # there is nothing to wait for
    for writer in (first, second):
        assert_holds_all(writer)
    assert first.array("pictures").dtype == np.uint8 and names(tmp_path / "rows") == FILES


@pytest.mark.parametrize("rows_at_once", [1, 4, 11, 100])
def test_rows_are_read_in_order_and_never_more_together_than_asked_for(full, rows_at_once):
    chunks = list(full.read("pictures", rows_at_once))
    assert max(map(len, chunks)) == min(rows_at_once, NUM_ROWS)
    assert np.array_equal(np.concatenate(chunks), PICTURES)
    assert np.array_equal(np.concatenate(list(full.read("labels", rows_at_once))), LABELS)


def test_missing_batches_are_cut_at_absolute_rows(tmp_path):
    writer = writer_of(tmp_path)
    writer.create()
    write(writer, range(4, 6))
    # Row 3 is missing.
    assert writer.missing(3) == [range(3), range(3, 6), range(6, 9), range(9, 11)]
    assert writer.missing(2) == [range(2), range(2, 4), range(6, 8), range(8, 10), range(10, 11)]


def test_a_status_that_is_given_is_the_one_that_counts(tmp_path):
    writer = writer_of(tmp_path)
    writer.create()
    write(writer, range(2), status=np.array([FAILED, 0]))
    assert writer.num_done == 1 and writer.missing(1)[0] == range(1, 2)


@pytest.mark.parametrize("other", [{"seed": 4}, {"weights_sha256": "2" * 64}, {"torch": "2.9"}])
def test_rows_of_another_identity_are_refused_and_left_alone(full, other):
    before = {path.name: path.read_bytes() for path in full.path.iterdir()}
    name, = other
    message = f"full: expected rows with {name} .*, found one with .*name another folder"
    with pytest.raises(ValueError, match=message):
        writer_of(full.path, IDENTITY | other).create()
    assert {path.name: path.read_bytes() for path in full.path.iterdir()} == before


def test_rows_of_the_same_identity_are_found_again(full):
    again = writer_of(full.path)
    again.create()
    assert again.num_done == NUM_ROWS and np.array_equal(again.array("pictures"), PICTURES)


@pytest.mark.parametrize("identity", [IDENTITY, IDENTITY | {"seed": 4}])
def test_rows_without_their_record_count_for_nobody(full, identity):
    (full.path / "identity.json").unlink()
    writer = writer_of(full.path, identity)
    writer.create()
    assert writer.num_done == 0 and not writer.array("pictures").any() and names(full.path) == FILES
    assert read_json(full.path / "identity.json") == identity | {"complete": False}


def test_removal_leaves_files_of_others_and_no_folder_without_them(full):
    (full.path / ".pictures.npy.tmp").touch()                    # left by a kill
    (full.path / "thesis.txt").write_text("mine")
    full.remove()
    assert names(full.path) == ["thesis.txt"]
    (full.path / "thesis.txt").unlink()
    full.remove()
    assert not full.path.exists()
    full.remove()                                                # there is nothing to remove


@pytest.mark.parametrize("count", range(1, 5))
def test_interrupted_removal_leaves_nothing_that_counts(full, monkeypatch, count):
    (full.path / ".labels.npy.tmp").touch()
    killed_at(monkeypatch, Path, "unlink", count)
    with pytest.raises(Killed):
        full.remove()
    monkeypatch.undo()
    assert "status.npy" not in names(full.path) and "identity.json" in names(full.path)
    with pytest.raises(ValueError, match="expected rows with seed 4"):
        writer_of(full.path, IDENTITY | {"seed": 4}).create()
    full.create()
    assert full.num_done == 0 and len(full.missing(1)) == NUM_ROWS
    write(full, range(NUM_ROWS))
    assert_holds_all(full)


@pytest.mark.parametrize("count", range(3))
def test_interrupted_layout_is_completed_by_the_next_start(tmp_path, monkeypatch, count):
    writer = writer_of(tmp_path / "rows")
    killed_at(monkeypatch, np.lib.format, "open_memmap", count)
    with pytest.raises(Killed):
        writer.create()
    monkeypatch.undo()
    writer.create()
    assert writer.num_done == 0 and names(writer.path) == FILES


@pytest.mark.parametrize("count", range(3))
def test_rows_killed_before_their_status_are_still_to_do(tmp_path, monkeypatch, count):
    writer = writer_of(tmp_path)
    writer.create()
    write(writer, range(3))
    others = {"pictures": np.full((3, 2, 2), 7), "labels": np.full(3, 7)}
    # The arrays, then the status, each by one call.
    killed_at(monkeypatch, rows_module, "_write_rows", count)
    with pytest.raises(Killed):
        writer.write(range(3, 6), status=np.ones(3), **others)
    monkeypatch.undo()
    again = writer_of(tmp_path)
    again.create()
    assert again.num_done == 3 and again.missing(3) == [range(3, 6), range(6, 9), range(9, 11)]
    for rows in again.missing(3):
        write(again, rows)
    assert_holds_all(again)


MANIFEST = {"num_images": 5, "num_crops": 2, "num_tokens": 4, "codebook_size": 24}


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("count", range(3))
def test_store_killed_while_its_manifest_is_written_is_laid_out_by_the_same_command(
        tmp_path, monkeypatch, is_old, count):
    path = tmp_path / "codes"
    if is_old:
        old = CodeWriter(path, MANIFEST | {"num_tokens": 9})
        old.create(np.arange(5))
        old.write(range(5), np.ones((5, 2, 9)), {})
        old.finish(0)
        (path / "check.png").touch()                             # where check_codes.py puts it
    writer = CodeWriter(path, MANIFEST)
    killed_at(monkeypatch, files.os, "replace", count)
    monkeypatch.setattr(files.Path, "unlink", unlink_if_not_killed(path))
    with pytest.raises(Killed):
        writer.create(np.arange(5), overwrite=is_old)
        raise Killed                    # it came later than the last replacement
    monkeypatch.undo()
    writer.create(np.arange(5), overwrite=is_old)
    assert writer.rows.num_done == 0 and writer.rows.array("codes").shape == (5, 2, 4)
    writer.write(range(5), np.ones((5, 2, 4)), {})
    writer.finish(0)
    others = ["check.png"] if is_old else []
    assert names(path) == [*others, "codes.npy", "labels.npy", "manifest.json"]


def unlink_if_not_killed(path):
    """A kill leaves its temporary file, which an exception would remove."""
    original = Path.unlink

    def unlink(self, missing_ok=False):
        if self.parent != path or not self.name.startswith(".manifest.json."):
            original(self, missing_ok)

    return unlink


def test_store_killed_after_it_was_finished_is_cleaned_by_the_next_start(tmp_path):
    writer = CodeWriter(tmp_path / "codes", MANIFEST)
    writer.create(np.arange(5))
    writer.write(range(5), np.ones((5, 2, 4)), {1: ("a.jpg", "broken")})
    status = (writer.path / "status.npy").read_bytes()
    writer.finish(1)
    (writer.path / "status.npy").write_bytes(status)
    (writer.path / "failures").mkdir()
    (writer.path / "failures" / ".000000001.json.host.7.tmp").touch()
    (writer.path / ".manifest.json.host.7.tmp").touch()
    writer.create(np.arange(5))
    assert names(writer.path) == ["codes.npy", "labels.npy", "manifest.json"] and writer.is_complete


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("count", range(6))
def test_interrupted_replacement_of_a_store_is_done_by_the_next_start(
        tmp_path, monkeypatch, finished, count):
    writer = CodeWriter(tmp_path / "codes", MANIFEST)
    writer.create(np.arange(5))
    writer.write(range(5), np.ones((5, 2, 4)), {} if finished else {2: ("a.jpg", "broken")})
    if finished:
        writer.finish(0)
    other = CodeWriter(tmp_path / "codes", MANIFEST | {"num_tokens": 9})
    killed_at(monkeypatch, Path, "unlink", count)
    with pytest.raises(Killed):
        other.create(np.arange(5), overwrite=True)
        raise Killed                    # it came later than the last unlink
    monkeypatch.undo()
    if count > finished:                # a finished store has no status to remove
        with pytest.raises(ValueError):
            open_codes(tmp_path / "codes")
    other.create(np.arange(5), overwrite=True)
    assert other.rows.num_done == 0 and other.rows.array("codes").shape == (5, 2, 9)
    assert "failures" not in names(tmp_path / "codes")


def write_behind(writer, rows):
    part = slice(rows.start, rows.stop)
    writer.write(rows, pictures=torch.from_numpy(PICTURES[part]),
                 labels=torch.from_numpy(LABELS[part]))


def test_rows_written_behind_are_all_there_at_the_end(tmp_path):
    rows = writer_of(tmp_path)
    rows.create()
    with BackgroundWriter(rows) as writer:
        for batch in rows.missing(2):
            write_behind(writer, batch)
    assert rows.missing(2) == []
    assert_holds_all(rows)


def test_what_was_handed_over_is_written_when_a_signal_ends_the_sampling(tmp_path):
    rows = writer_of(tmp_path)
    rows.create()
    with pytest.raises(SystemExit), BackgroundWriter(rows) as writer:
        write_behind(writer, range(3))
        write_behind(writer, range(3, 6))
        raise SystemExit(143)
    assert rows.missing(3) == [range(6, 9), range(9, 11)]
    assert np.array_equal(rows.array("pictures")[:6], PICTURES[:6])


def test_an_error_of_the_writing_thread_is_logged_when_another_one_ends_the_sampling(
        tmp_path, monkeypatch, caplog):
    rows = writer_of(tmp_path)
    rows.create()
    monkeypatch.setattr(rows, "write", lambda *_, **__: int("no number"))
    with pytest.raises(SystemExit), BackgroundWriter(rows) as writer:
        write_behind(writer, range(3))
        raise SystemExit(143)
    assert "writing rows: invalid literal for int" in caplog.text


@pytest.mark.parametrize("num_batches", [1, 2])
def test_an_error_of_the_writing_thread_ends_the_sampling(tmp_path, monkeypatch, num_batches):
    rows = writer_of(tmp_path)
    rows.create()

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fail)
    begun = []
    with pytest.raises(OSError, match="No space left"), BackgroundWriter(rows) as writer:
        for batch in rows.missing(2)[:num_batches]:
            begun.append(batch)
            write_behind(writer, batch)
    assert len(begun) == num_batches and rows.num_done == 0
