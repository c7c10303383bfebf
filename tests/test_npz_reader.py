"""Pictures read from an npz: what numpy reads, batch by batch, and damage noticed."""

import tracemalloc
import zipfile

import numpy as np
import pytest

from autoregressive.runtime.files import read_npz_settings
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
    pictures = random_pictures(3, 6)
    with (zipfile.ZipFile("large.npz", "w") as archive,
          archive.open("arr_0.npy", "w", force_zip64=True) as member):
        np.lib.format.write_array(member, pictures)
    np.testing.assert_array_equal(next(NpzImages("large.npz").batches(3)), pictures)


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
    fields = {"descr": "|u1", "fortran_order": False, "shape": (5, 2, 2, 3)}
    with zipfile.ZipFile("short.npz", "w") as archive, archive.open("arr_0.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, fields)
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


def write_npz(path, method=zipfile.ZIP_STORED, **members):
    """Writes arrays, or bytes as they are, as members of an npz."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            with archive.open(f"{name}.npy", "w") as member:
                if isinstance(content, bytes):
                    member.write(content)
                else:
                    np.lib.format.write_array(member, content, allow_pickle=False)


def header(descr, shape):
    """Returns the beginning of an array that says whatever it likes."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def with_field(path, offset_local, offset_central, value):
    """Changes a two-byte field of the first member in both of its headers."""
    content = bytearray(path.read_bytes())
    central = content.index(b"PK\x01\x02")
    for place in (offset_local, central + offset_central):
        content[place:place + 2] = value.to_bytes(2, "little")
    path.write_bytes(content)


def damage(path, method):
    """Writes an npz and changes bytes in the middle of its pictures."""
    write_npz(path, method, arr_0=random_pictures(90, 0))
    content = bytearray(path.read_bytes())
    middle = content.index(b"PK\x01\x02") // 2
    content[middle:middle + 40] = bytes(40)
    path.write_bytes(content)


PICTURES = random_pictures(3, 7)
HOSTILE = {
    "encrypted": ({"flag": (6, 8, 1)}, "encrypted"),
    "unknown method": ({"flag": (8, 10, 99)}, "compression"),
    "stored, damaged": ({"damaged": zipfile.ZIP_STORED}, "expected a whole npz, Bad CRC"),
    "deflated, damaged": ({"damaged": zipfile.ZIP_DEFLATED}, "expected a whole npz"),
    "bz2, damaged": ({"damaged": zipfile.ZIP_BZIP2}, "expected a whole npz"),
    "lzma, damaged": ({"damaged": zipfile.ZIP_LZMA}, "expected a whole npz"),
    "negative shape": ({"arr_0": header("|u1", (-3, -4, 12, 3)) + bytes(432)},
                       "expected pictures, found arr_0 of shape"),
    "absurd shape": ({"arr_0": header("|u1", (10**18, 12, 12, 3))}, "bytes of pictures"),
    "no type": ({"arr_0": header("none", (3, 12, 12, 3))}, "as a numpy array"),
    "negative labels": ({"labels": header("<i8", (-3,)) + bytes(24)}, "a plain array under labels"),
    "absurd labels": ({"labels": header("<i8", (10**17,))}, "a plain array under labels"),
    "deep settings": ({"settings": np.array("[" * 100_000)},
                      "expected settings as one JSON object"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_one_error_with_its_name(folder, case):
    content, message = HOSTILE[case]
    path = folder / "hostile.npz"
    if "damaged" in content:
        damage(path, content["damaged"])
    else:
        members = {name: array for name, array in content.items() if name != "flag"}
        write_npz(path, **{"arr_0": PICTURES} | members)
    if "flag" in content:
        with_field(path, *content["flag"])
    with pytest.raises(ValueError, match=f"^hostile.npz: .*{message}"):
        images = NpzImages("hostile.npz")
        images.labels()
        list(images.batches(50))


NO_SETTINGS = {
    "encrypted": (lambda path: with_field(path, 6, 8, 1), "expected a whole npz, .*encrypted"),
    "unknown method": (lambda path: with_field(path, 8, 10, 99),
                       "expected a whole npz, .*compression"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-30]), "expected a whole npz"),
    "empty": (lambda path: path.write_bytes(b""), "expected a whole npz"),
    "array": (lambda path: np.save(path.open("wb"), np.arange(3)), "expected a whole npz"),
    "list": (lambda path: write_npz(path, settings=np.array("[1]")),
             "expected settings as one JSON object"),
    "no JSON": (lambda path: write_npz(path, settings=np.array("{")),
                "expected settings as one JSON object"),
    "several": (lambda path: write_npz(path, settings=np.array(["{}", "{}"])),
                "expected settings as one JSON object"),
    "no array": (lambda path: write_npz(path, settings=b"{}"),
                 "expected a plain array under settings"),
    "objects": (lambda path: np.savez(path, settings=np.array({})),
                "expected a plain array under settings"),
}


@pytest.mark.parametrize("case", NO_SETTINGS)
def test_settings_that_cannot_be_read_are_one_error_with_the_files_name(folder, case):
    damage_it, message = NO_SETTINGS[case]
    write_npz(folder / "samples.npz", settings=np.array("{}"))
    assert read_npz_settings("samples.npz") == {}
    damage_it(folder / "samples.npz")
    whole = f"^samples.npz: {message}.*; (copy or )?make the file again$"
    with pytest.raises(ValueError, match=whole):
        read_npz_settings("samples.npz")
