"""Ready codes become a store equal to their arrays, in every layout, whatever happens."""

import io
import json
import re
import resource
import tarfile
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.data import importing
from autoregressive.data.opening import open_codes
from autoregressive.runtime.checkpoint import read_checkpoint, save_checkpoint
from autoregressive.runtime.files import codebook_sha256, mapping_sha256, write_json
from autoregressive.train import import_codes as import_codes_script
from processes import run_forked, run_here, start, start_and_kill
from ready_files import (
    npy,
    numbered_files,
    write_folders,
    write_lpd,
    write_older,
    write_tar,
)
from tokenizer.tokenizer_image.images import crop_names
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel

IMPORT, TRAIN = "autoregressive/train/import_codes.py", "autoregressive/train/train_c2i.py"
EXTRACT, CHECK = "autoregressive/train/extract_codes_c2i.py", "autoregressive/train/check_codes.py"
VQ = ("--vq-model", "VQ-4-small", "--codebook-size", 64)
LABELS = np.array([0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 3])                # of 11 images
CODES = np.random.default_rng(0).integers(64, size=(11, 2, 9))
TEN = np.random.default_rng(1).integers(64, size=(11, 10, 9))
NAMES = ["n02", "n07", "n11", "n30"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tokenizer, and CODES as RandAR's tar."""
    folder = tmp_path_factory.mktemp("import")
    torch.manual_seed(0)
    model = VQModel(VQConfig("VQ-4-small", 64, 8))
    save_checkpoint(folder / "vq.pt", {"model": model.state_dict()})
    write_tar(folder / "ready.tar", numbered_files(CODES, LABELS))
    return folder


def flags(folder, source, store, *more):
    return ("--from", source, "--code-path", store, "--vq-ckpt", folder / "vq.pt", *VQ,
            "--image-size", 12, *more)


def import_codes(folder, source, store, *more):
    assert run_here(IMPORT, *flags(folder, source, store, *more)) == 0
    return open_codes(store)


def contents(path):
    return {item.name: item.read_bytes() for item in path.iterdir()}


def write_source(layout, path):
    """Writes the 11 images in a layout at `path`."""
    if layout in ("w", "w:gz", "w:xz"):
        write_tar(path, numbered_files(CODES, LABELS), layout)
    elif layout == "folders":
        write_folders(path, numbered_files(CODES, LABELS, prefix=""))
    elif layout == "LPD":
        write_lpd(path, CODES, LABELS, NAMES)
    else:
        write_older(path, TEN if layout == "ten crops" else CODES, LABELS)


@pytest.mark.parametrize("layout, word", [
    ("w", "RandAR"), ("w:gz", "RandAR"), ("w:xz", "RandAR"), ("folders", "RandAR"),
    ("LPD", "LPD"), ("two crops", "LlamaGen"), ("ten crops", "LlamaGen")])
def test_store_equals_the_arrays_that_the_source_was_made_of(folder, tmp_path, capsys, layout,
                                                             word):
    write_source(layout, tmp_path / "source")
    store = import_codes(folder, tmp_path / "source", tmp_path / "store", "--crop-range", 1.05)
    assert f"{word}'s layout, 11 images of 4 classes" in capsys.readouterr().out
    is_ten = layout == "ten crops"
    assert store.codes.dtype == np.uint16
    assert np.array_equal(store.codes, TEN if is_ten else CODES)
    assert np.array_equal(store.labels, LABELS) and store.rows.tolist() == list(range(11))
    manifest = store.manifest
    assert manifest["crops"] == crop_names(is_ten, mirrored=True)
    assert manifest["crop_range"] == (1.05 if is_ten else 1)
    assert manifest["class_names"] == (NAMES if layout == "LPD" else ["0", "1", "2", "3"])
    assert manifest["grid"] == 3 and manifest["image_size"] == 12


def test_store_does_not_depend_on_the_order_of_the_members_nor_on_being_unpacked(
        folder, tmp_path, monkeypatch):
    import_codes(folder, folder / "ready.tar", tmp_path / "straight")
    expected = contents(tmp_path / "straight")
    monkeypatch.setattr(importing, "WRITTEN_TOGETHER", 4)
    members = numbered_files(CODES, LABELS, prefix="./")
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(11)
        write_tar(tmp_path / f"{seed}.tar", [members[place] for place in order])
        import_codes(folder, tmp_path / f"{seed}.tar", tmp_path / str(seed))
        assert contents(tmp_path / str(seed)) == expected
    write_source("folders", tmp_path / "source")
    import_codes(folder, tmp_path / "source", tmp_path / "unpacked")
    assert contents(tmp_path / "unpacked") == expected


def test_class_names_come_from_a_file_which_also_says_how_many_there_are(folder, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("crane\nfig\ncrane\nGröße\n")
    names = ("--class-names", tmp_path / "names.txt")
    store = import_codes(folder, folder / "ready.tar", tmp_path / "named", *names)
    assert store.manifest["class_names"] == ["crane", "fig", "crane", "Größe"]
    write_tar(tmp_path / "gap.tar", numbered_files(CODES[4:], LABELS[4:] - 1))
    code = run_here(IMPORT, *flags(folder, tmp_path / "gap.tar", tmp_path / "gap"))
    assert code == 2
    assert "found none of class 0 of 3; name all classes with --class-names" in \
        capsys.readouterr().err
    store = import_codes(folder, tmp_path / "gap.tar", tmp_path / "gap", *names)
    assert np.array_equal(store.labels, LABELS[4:] - 1)


BROKEN = {
    "shape": (npy(np.zeros((2, 16), np.int64)), r"expected codes \(2, 9\) of pictures of 12 pix"),
    "flat": (npy(np.zeros(18, np.int64)), r"expected codes \(2, 9\) .*, found \(18,\)"),
    "range": (npy(np.full((2, 9), 64)), r"expected codes 0 \.\. 63, found 64 \.\. 64"),
    "negative": (npy(np.full((2, 9), -1)), r"expected codes 0 \.\. 63, found -1 \.\. -1"),
    "huge": (npy(np.full((2, 9), 2**64 - 1, np.uint64)), ".*found 18446744073709551615"),
    "floats": (npy(np.zeros((2, 9))), "expected an array of integers, found float64"),
    "objects": (b"", "expected an array, Object arrays cannot be loaded"),
    "cut": (npy(CODES[0])[:-4], "expected an array"),
    "text": (b"codes", "expected an array"),
    "shape of 10^18": (npy(CODES[0]).replace(b"(2, 9)", b"(%d,)" % 10**18), "expected an array"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_member_is_named_listed_and_left_out_and_labels_do_not_shift(
        folder, tmp_path, capsys, kind):
    content, reason = BROKEN[kind]
    if kind == "objects":
        file = io.BytesIO()
        np.save(file, np.array([{}] * 2), allow_pickle=True)
        content = file.getvalue()
    members = numbered_files(CODES, LABELS)
    members[3] = (members[3][0], content)
    write_tar(tmp_path / "broken.tar", members)
    source = tmp_path / "broken.tar"
    assert run_here(IMPORT, *flags(folder, source, tmp_path / "store")) == 1
    printed = capsys.readouterr()
    assert "1 of 11 images are broken" in printed.out and not printed.err.count("Traceback")
    assert re.search(f"broken.tar/1/3.npy: {reason}", printed.out), printed.out
    store = import_codes(folder, source, tmp_path / "store", "--max-failures", 0.1)
    failure, = store.manifest["failed"]
    assert failure["row"] == 3 and failure["path"] == "1/3.npy"
    whole = [row for row in range(11) if row != 3]
    assert store.rows.tolist() == whole and np.array_equal(store.labels, LABELS)
    assert np.array_equal(store.codes[whole], CODES[whole])


@pytest.mark.parametrize("arrays, reason", [
    ({"indices": CODES[0, 0]}, "expected codes under indices and indices_flip"),
    ({"indices": CODES[0, 0], "indices_flip": CODES[0, 1, :8]}, "expected as many indices as"),
    ({"indices": CODES[0, 0], "indices_flip": CODES[0, 1] / 2}, "found float64"),
    (None, "expected a whole npz"),
])
def test_broken_npz_is_named_and_left_out(folder, tmp_path, arrays, reason):
    write_lpd(tmp_path / "source", CODES, LABELS, NAMES)
    path = tmp_path / "source/n02/n02_0001.npz"
    if arrays:
        np.savez(path, **arrays)
    else:
        path.write_bytes(path.read_bytes()[:300])
    store = import_codes(folder, tmp_path / "source", tmp_path / "store", "--max-failures", 0.1)
    failure, = store.manifest["failed"]
    assert failure["path"] == "n02/n02_0001.npz" and reason in failure["reason"]
    assert store.rows.tolist() == [0, *range(2, 11)]


def refusal(folder, source, capsys):
    """Returns the one line by which a source is refused, while nothing is written."""
    before = sorted(source.parent.rglob("*"))
    assert run_here(IMPORT, *flags(folder, source, source.parent / "new" / "store")) == 2
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1 and not printed.out, printed.err
    assert sorted(source.parent.rglob("*")) == before
    return printed.err


def test_tar_that_is_cut_off_anywhere_is_refused(folder, tmp_path, capsys):
    content = (folder / "ready.tar").read_bytes()
    block = 512
    size_of_member = 2 * block          # its header, and 128 + 144 bytes
    lengths = (0, 100, block, size_of_member, size_of_member + 200, 3 * size_of_member,
               3 * size_of_member + block + 99, 11 * size_of_member)
    for length in lengths:
        (tmp_path / "cut.tar").write_bytes(content[:length])
        assert "found no whole tar" in refusal(folder, tmp_path / "cut.tar", capsys), length
    damaged = bytearray(content)
    damaged[4 * size_of_member:][:9] = b""
    damaged[4 * size_of_member + 3] ^= 1
    (tmp_path / "cut.tar").write_bytes(damaged)
    assert "after 4 files" in refusal(folder, tmp_path / "cut.tar", capsys)
    (tmp_path / "cut.tar").write_bytes(content + content)
    assert "after 11 files: more content after its end" in \
        refusal(folder, tmp_path / "cut.tar", capsys)
    (tmp_path / "cut.tar").write_bytes(b"\x1f\x8b\x08")          # the header of gzip, in part
    assert "found no whole tar" in refusal(folder, tmp_path / "cut.tar", capsys)
    write_tar(tmp_path / "whole.tgz", numbered_files(CODES, LABELS), "w:gz")
    (tmp_path / "cut.tar").write_bytes((tmp_path / "whole.tgz").read_bytes()[:-200])
    (tmp_path / "whole.tgz").unlink()
    assert "found no whole tar" in refusal(folder, tmp_path / "cut.tar", capsys)


@pytest.mark.parametrize("name, words", [
    ("a/1/3.npy", "expected every file once, found 1/3.npy twice"),
    ("a/1/03.npy", "alone, found 'a/1/03.npy'"),
    ("a/readme.txt", "alone, found 'a/readme.txt'"),
    ("a/one/3.npy", "alone, found 'a/one/3.npy'"),
    ("a/1/3.npz", "alone, found 'a/1/3.npz'"),
    ("a/1/3.npy\n", "alone, found 'a/1/3.npy\\n'"),
    ("../a/1/99.npy", "expected one folder of class folders, found 'a/' and '../a/'"),
    ("/a/1/99.npy", "expected one folder of class folders, found 'a/' and '/a/'"),
])
def test_member_that_does_not_belong_there_is_refused_by_name(folder, tmp_path, capsys, name,
                                                              words):
    members = [*numbered_files(CODES, LABELS, "a/"), (name, npy(CODES[0]))]
    write_tar(tmp_path / "odd.tar", members)
    assert words in refusal(folder, tmp_path / "odd.tar", capsys)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE,
                                  tarfile.CHRTYPE])
def test_link_or_device_in_a_tar_is_refused_by_name(folder, tmp_path, capsys, kind):
    with tarfile.open(tmp_path / "odd.tar", "w") as tar:
        member = tarfile.TarInfo("a/0/0.npy")
        member.type = kind
        member.linkname = "/etc/passwd"
        tar.addfile(member)
    words = "found 'a/0/0.npy', a link, a device or of 0 bytes"
    assert words in refusal(folder, tmp_path / "odd.tar", capsys)


def test_folders_and_hidden_files_are_left_out(folder, tmp_path, capsys):
    write_folders(tmp_path / "a", numbered_files(CODES, LABELS, prefix=""))
    (tmp_path / "a/1/._3.npy").write_text("of macOS")
    with tarfile.open(tmp_path / "whole.tar", "w") as tar:
        tar.add(tmp_path / "a", "a")
    for source in ("whole.tar", "a"):
        store = import_codes(folder, tmp_path / source, tmp_path / "store")
        assert np.array_equal(store.codes, CODES)
        assert f"{source}: left out 1 hidden files" in capsys.readouterr().out


@pytest.mark.parametrize("files, words", [
    ([], "found an empty folder"),
    (["1.npy"], "1.npy': expected codes"),
    (["a/0/1.npy"], "a/0': expected a file .npy or .npz in a class folder"),
    (["0/1.npy", "0/readme.txt"], "in a class folder, found something else"),
    (["0/1.npy", "1/1.npz"], "in a class folder, found something else"),
    (["a/1.npy"], "alone, found 'a/1.npy'"),
    (["0/1.jpg"], "0/1.jpg': expected a file .npy or .npz in a class folder"),
    (["x_codes/0.npy", "x_labels/1.npy"], "x_labels: expected files 0.npy, 1.npy, ..."),
])
def test_folder_of_no_known_layout_is_refused(folder, tmp_path, capsys, files, words):
    (tmp_path / "source").mkdir()
    write_folders(tmp_path / "source", [(name, npy(CODES[0])) for name in files])
    assert words in refusal(folder, tmp_path / "source", capsys)


def test_source_of_which_nothing_fits_the_flags_is_refused_before_any_work(folder, tmp_path,
                                                                           capsys):
    write_tar(tmp_path / "large.tar", numbered_files(np.zeros((300, 2, 16)), np.zeros(300, int)))
    line = refusal(folder, tmp_path / "large.tar", capsys)
    assert "0/0.npy: expected codes (2, 9) of pictures of 12 pixels, found (2, 16); give the " \
        "--image-size" in line
    write_older(tmp_path / "old", TEN[:3, :4], LABELS[:3])
    assert "expected 1, 2, 5, 10 crops of an image, found 4" in \
        refusal(folder, tmp_path / "old", capsys)


def test_finished_store_is_verified_and_other_codes_are_not_mixed_into_one(folder, tmp_path,
                                                                           capsys):
    import_codes(folder, folder / "ready.tar", tmp_path / "store")
    before = contents(tmp_path / "store")
    import_codes(folder, folder / "ready.tar", tmp_path / "store")
    assert "checksums verified" in capsys.readouterr().out
    write_tar(tmp_path / "fewer.tar", numbered_files(CODES[:8], LABELS[:8]))
    words = flags(folder, tmp_path / "fewer.tar", tmp_path / "store")
    assert run_here(IMPORT, *words) == 2
    assert "expected a store with num_images 8, found one with 11" in capsys.readouterr().err
    assert contents(tmp_path / "store") == before
    assert run_here(IMPORT, *words, "--overwrite") == 0
    assert np.array_equal(open_codes(tmp_path / "store").codes, CODES[:8])


def test_other_codes_at_the_place_of_the_source_are_not_mixed_into_a_begun_store(
        folder, tmp_path, capsys, monkeypatch):
    write_tar(tmp_path / "codes.tar", numbered_files(CODES, LABELS))
    words = flags(folder, tmp_path / "codes.tar", tmp_path / "store")
    with monkeypatch.context() as patch:
        patch.setattr(import_codes_script, "finish_store", lambda *_: None)    # stopped before it
        assert run_here(IMPORT, *words) == 0
    others = CODES.copy()
    others[3, 0, 0] = (others[3, 0, 0] + 1) % 64
    write_tar(tmp_path / "codes.tar", numbered_files(others, LABELS))
    capsys.readouterr()
    assert run_here(IMPORT, *words) == 2
    assert "expected the codes that" in capsys.readouterr().err
    write_tar(tmp_path / "codes.tar", numbered_files(CODES, LABELS))
    assert run_here(IMPORT, *words) == 0
    assert np.array_equal(open_codes(tmp_path / "store").codes, CODES)


@pytest.fixture(scope="module")
def pictures(folder):
    """A folder with pictures of three classes, and a tar of their extracted codes."""
    noise = np.random.default_rng(0)
    for number in range(30):
        path = folder / "pictures" / ("apple", "fig", "pear")[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(256, size=(12, 14, 3), dtype=np.uint8)).save(path)
    words = ("--data-path", folder / "pictures", "--image-size", 12, *VQ, "--num-workers", 0,
             "--vq-ckpt", folder / "vq.pt", "--code-path", folder / "extracted")
    assert run_here(EXTRACT, *words) == 0
    extracted = open_codes(folder / "extracted")
    write_tar(folder / "pictures.tar", numbered_files(extracted.codes, extracted.labels))
    return folder


def check(folder, store, capsys, vq="vq.pt"):
    """Returns exit code and output of a check of a store against the pictures."""
    capsys.readouterr()
    code = run_here(CHECK, "--code-path", store, "--data-path", folder / "pictures",
                    "--vq-ckpt", folder / vq)
    return code, capsys.readouterr().out


def test_check_codes_passes_imported_codes_of_its_pictures(pictures, tmp_path, capsys):
    store = import_codes(pictures, pictures / "pictures.tar", tmp_path / "store")
    extracted = open_codes(pictures / "extracted")
    assert np.array_equal(store.codes, extracted.codes)
    assert np.array_equal(store.labels, extracted.labels)
    code, printed = check(pictures, tmp_path / "store", capsys)
    assert code == 0 and "all checks passed" in printed, printed
    assert "tokenizer is the one claimed" in printed
    assert "number of classes: the imported codes do not tell their names" in printed
    (tmp_path / "names.txt").write_text("apple\nfig\npear\n")
    import_codes(pictures, pictures / "pictures.tar", tmp_path / "named",
                 "--class-names", tmp_path / "names.txt")
    code, printed = check(pictures, tmp_path / "named", capsys)
    assert code == 0 and "ok     class names, in order" in printed


def test_check_codes_finds_a_claim_that_is_wrong(pictures, tmp_path, capsys):
    torch.manual_seed(1)
    model = VQModel(VQConfig("VQ-4-small", 64, 8))
    save_checkpoint(pictures / "other.pt", {"model": model.state_dict()})
    import_codes(pictures, pictures / "pictures.tar", tmp_path / "store",
                 "--vq-ckpt", pictures / "other.pt")
    code, printed = check(pictures, tmp_path / "store", capsys, "other.pt")
    assert code == 1 and "ok     tokenizer is the one claimed" in printed
    assert "WRONG  codes of 30 random rows are those of their images" in printed
    code, printed = check(pictures, tmp_path / "store", capsys)
    assert code == 1 and "WRONG  tokenizer is the one claimed" in printed


def train_flags(folder, store, results, *more):
    """Returns the flags of a training of 20 steps on a store; the mapping lies in `results`."""
    return ("--code-path", store, "--mapping-path", results / "mapping.pt",
            "--results-dir", results / "runs", "--gpt-model", "GPT-tiny", "--vocab-size", 64,
            "--codebook-size", 64, "--cluster-size", 8, "--downsample-size", 4,
            "--vq-model", "VQ-4-small", "--vq-ckpt", folder / "vq.pt", "--mixed-precision", "none",
            "--global-batch-size", 4, "--max-steps", 20, "--num-workers", 0, *more)


def write_mapping(path, original_codebook_sha256):
    mapping = torch.arange(64)
    torch.save(mapping, path)
    write_json(f"{path}.json", {"mapping_sha256": mapping_sha256(mapping), "cluster_size": 8,
                                "codebook_sha256": original_codebook_sha256,
                                "original_codebook_sha256": original_codebook_sha256})


def test_training_compares_a_claimed_codebook_and_says_that_it_is_claimed(folder, tmp_path,
                                                                          capsys):
    store = import_codes(folder, folder / "ready.tar", tmp_path / "store")
    claimed = store.manifest["codebook_sha256"]
    state = read_checkpoint(folder / "vq.pt")["model"]
    assert claimed == codebook_sha256(state["quantize.embedding.weight"])
    assert {"codebook_sha256", "tokenizer_sha256", "image_size"} <= set(store.manifest["claimed"])
    words = train_flags(folder, tmp_path / "store", tmp_path, "--num-classes", 4,
                        "--image-size", 12)
    write_mapping(tmp_path / "mapping.pt", "0" * 64)
    capsys.readouterr()
    assert run_here(TRAIN, *words) == 2
    assert f"expected the codebook {claimed[:12]} of" in capsys.readouterr().err
    write_mapping(tmp_path / "mapping.pt", claimed)
    assert run_here(TRAIN, *words) == 0
    assert "imported codes, whose codebook is claimed, not verified" in capsys.readouterr().out


class Large(NamedTuple):
    """Codes (20000, 2, 256), labels (20000,), and the peak memory in KiB of their imports."""

    codes: np.ndarray
    labels: np.ndarray
    peaks: dict[str, int]


@pytest.fixture(scope="module")
def large(folder):
    """20,000 images of 256 tokens: their shuffled tar, the store, and one of the first 4,000."""
    random = np.random.default_rng(0)
    codes = random.integers(64, size=(20000, 2, 256))
    labels = np.repeat(np.arange(100), 200)
    members = numbered_files(codes, labels)
    write_tar(folder / "large.tar", [members[place] for place in random.permutation(20000)])
    write_tar(folder / "small.tar", members[:4000])
    peaks = {}
    for name in ("small", "large"):
        words = flags(folder, folder / f"{name}.tar", folder / name, "--image-size", 64)
        done = run_forked(import_and_say_peak, *words)
        assert done.returncode == 0, done.stderr
        peaks[name] = int(re.findall(r"PEAK (\d+)", done.stdout)[0])
    return Large(codes, labels, peaks)


def import_and_say_peak(*flags):
    code = run_here(IMPORT, *flags)
    print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return code


@pytest.mark.long
def test_peak_memory_does_not_depend_on_the_number_of_codes(large):
    # The checksums map the file of the codes, 16 MiB more of it, which counts here. The codes in
    # memory, or what tarfile keeps of each member, would be more than that again.
    assert large.peaks["large"] - large.peaks["small"] < 28 * 1024


@pytest.mark.long
def test_twenty_thousand_codes_killed_twice_and_resumed_are_the_same_store_and_train(
        folder, large, tmp_path):
    status = tmp_path / "killed" / "status.npy"

    def done_rows():
        return np.count_nonzero(np.load(status)) if status.exists() else 0

    def words(name):
        return flags(folder, folder / "large.tar", tmp_path / name, "--image-size", 64)

    for goal in (4000, 12000):
        code = start_and_kill(IMPORT, *words("killed"),
                              when=lambda goal=goal: done_rows() >= goal)
        assert code == -9 and goal <= done_rows() < 20000
    done = start(IMPORT, *words("killed"))
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "killed") == contents(folder / "large")
    store = open_codes(tmp_path / "killed")
    assert np.array_equal(store.codes, large.codes)
    assert np.array_equal(store.labels, large.labels)
    torch.save(torch.arange(64), tmp_path / "mapping.pt")
    words = train_flags(folder, tmp_path / "killed", tmp_path, "--num-classes", 100,
                        "--image-size", 64)
    assert run_here(TRAIN, *words) == 0
    run, = (tmp_path / "runs").iterdir()
    assert json.loads((run / "finished.json").read_text())["steps"] == 20
