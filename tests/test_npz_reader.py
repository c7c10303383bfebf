"""Pictures read from an npz: what numpy reads, batch by batch, and damage noticed."""

import tracemalloc
import zipfile

import numpy as np
import pytest

from evaluations.c2i.npz_reader import NpzImages


def random_pictures(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 12, 12, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reader_streams_what_numpy_reads(folder, save):
    pictures = random_pictures(11, 5)
    save("other.npz", labels=np.arange(11, dtype=np.int32), arr_0=pictures, mu=np.arange(3.0))
    images = NpzImages("other.npz")
    assert len(images) == 11 and images.settings == {} and images.array("sigma") is None
    assert [len(batch) for batch in images.batches(4)] == [4, 4, 3]
    np.testing.assert_array_equal(np.concatenate(list(images.batches(4))), pictures)
    np.testing.assert_array_equal(images.array("mu"), [0, 1, 2])
    assert images.labels().dtype == np.int64


def test_reader_takes_zip64_members(folder):
    with zipfile.ZipFile("large.npz", "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, random_pictures(3, 6))
    np.testing.assert_array_equal(next(NpzImages("large.npz").batches(3)), random_pictures(3, 6))


def test_reader_holds_a_batch_and_not_the_file(folder):
    pictures = np.zeros((400, 64, 64, 3), np.uint8)
    np.savez("long.npz", arr_0=pictures)
    tracemalloc.start()
    for _ in NpzImages("long.npz").batches(8):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < pictures.nbytes / 4


def test_reader_refuses_an_array_that_is_shorter_than_it_says(folder):
    with zipfile.ZipFile("short.npz", "w") as archive, archive.open("arr_0.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (5, 2, 2, 3)})
        member.write(bytes(30))
    with pytest.raises(ValueError, match="short.npz: expected 60 bytes of pictures"):
        NpzImages("short.npz")


def test_reader_notices_bytes_that_changed(folder):
    np.savez("ref.npz", arr_0=random_pictures(90, 0))
    content = bytearray((folder / "ref.npz").read_bytes())
    content[len(content) // 2] ^= 255
    (folder / "changed.npz").write_bytes(content)
    with pytest.raises(ValueError, match="changed.npz: expected a whole npz, Bad CRC"):
        list(NpzImages("changed.npz").batches(50))
