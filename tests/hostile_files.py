"""Files for wrong and odd command lines.

A folder `good` holds a small one of everything, and a folder `bad` its relatives.
"""

import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from autoregressive.models import gpt
from autoregressive.models.config import gpt_config
from autoregressive.runtime.checkpoint import read_checkpoint, save_checkpoint
from processes import run_here
from ready_files import npy, numbered_files, write_folders, write_tar
from tokenizer.tokenizer_image.images import open_dataset
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel

VQ = "--vq-model VQ-4-small --codebook-size 64"
GPT = "--gpt-model GPT-tiny --num-classes 10 --image-size 16 --downsample-size 4 --cluster-size 8"
DIGITS = "--dataset digits --data-path val --image-size 16"
PIPELINE = (f"{GPT} {VQ} --vq-ckpt good/reordered.pt --gpt-ckpt good/gpt.pt "
            "--image-size-eval 16 --precision none")
# Script and flags of a command that is right, and writes into the folder `new`.
COMMANDS = {
    "extract": ("autoregressive/train/extract_codes_c2i.py",
                f"{VQ} {DIGITS} --vq-ckpt good/vq.pt --code-path new/codes --num-workers 0"),
    "import": ("autoregressive/train/import_codes.py",
               f"{VQ} --image-size 16 --vq-ckpt good/vq.pt --from good/ready.tar "
               "--code-path new/codes"),
    "check": ("autoregressive/train/check_codes.py",
              "--dataset digits --data-path val --vq-ckpt good/vq.pt "
              "--code-path good/codes --output new/check.png"),
    "balance": ("balance_k_means.py", "--vq-ckpt good/vq.pt --cluster-size 8 --output-dir new"),
    "train": ("autoregressive/train/train_c2i.py",
              f"{GPT} {VQ} --vocab-size 64 --code-path good/codes "
              "--mapping-path good/mapping.pt --vq-ckpt good/reordered.pt --results-dir new "
              "--mixed-precision none --max-steps 4 --ckpt-steps 2 --log-every 1 "
              "--global-batch-size 32 --num-workers 0"),
    "sample many": ("autoregressive/sample/sample_c2i_ddp.py",
                    f"{PIPELINE} --sample-dir new --num-fid-samples 20 --per-proc-batch-size 8"),
    "sample few": ("autoregressive/sample/sample_c2i.py",
                   f"{PIPELINE} --output new/classes.png --class-ids 3,7 --num-per-class 2"),
    "export": ("autoregressive/sample/export_c2i.py", ""),
    "classifier": ("evaluations/c2i/train_classifier.py",
                   f"{DIGITS} --val-path val --output new/classifier.pt --max-steps 6"),
    "reference": ("evaluations/c2i/make_reference.py", f"{DIGITS} --output new/reference.npz"),
    "evaluate": ("evaluations/c2i/evaluator.py",
                 "--classifier good/classifier.pt --output new/scores.json"),
    "tokenizer": ("tokenizer/tokenizer_image/vq_train.py",
                  f"{VQ} {DIGITS} --mixed-precision none --num-workers 0 --global-batch-size 16 "
                  "--perceptual-weight 0 --disc-weight 0 --results-dir new "
                  "--max-steps 4 --ckpt-steps 2 --log-every 1"),
    "validate": ("tokenizer/validation/val.py",
                 f"{VQ} {DIGITS} --vq-ckpt good/vq.pt --output new/reconstructions.npz "
                 "--num-workers 0"),
    "sweep report": ("scripts/sweep_report.py", ""),
    "quickstart report": ("scripts/quickstart_report.py", ""),
    "report": ("scripts/report.py", ""),
}
CODEBOOK = "quantize.embedding.weight"
MAPPING = "mapping-kmeans+nearest-cluster_size=8.pt"             # as the right command names it
EXPORT = "good/run new/export"
SCORE = "good/reference.npz good/samples.npz"
HUGE = 10**18


def call(name: str, *more: str) -> int:
    """Runs a right command in this process, with more flags; returns its exit code."""
    script, flags = COMMANDS[name]
    words = flags.split()
    # In training a second one adds to the first.
    if "--code-path" in more:
        place = words.index("--code-path")
        del words[place:place + 2]
    return run_here(script, *words, *more)


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns size and time of every file below a folder, and the folders, all by their paths."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            found[str(path)] = (0, 0)
        else:
            found[str(path)] = (path.lstat().st_size, path.lstat().st_mtime_ns)
    return found


def make_good(folder: Path) -> None:
    """Makes `good` in the working folder `folder`: the result of every command of COMMANDS."""
    good, new = folder / "good", folder / "new"
    good.mkdir()
    torch.manual_seed(0)
    save_checkpoint(good / "vq.pt", {"model": VQModel(VQConfig("VQ-4-small", 64, 8)).state_dict()})

    def keep(name: str, *more: str, **names: str) -> None:
        """Runs a command and moves what it left from `new` to `good`: new names = patterns."""
        assert call(name, *more) == 0
        for kept, pattern in names.items():
            (found,) = new.glob(pattern)
            shutil.move(found, good / kept.replace("__", "."))
        shutil.rmtree(new)

    keep("extract", codes="codes")
    codes = np.load(good / "codes" / "codes.npy")
    write_tar(good / "ready.tar", numbered_files(codes, np.load(good / "codes" / "labels.npy")))
    keep("import", imported="codes")
    keep("balance", mapping__pt="mapping*.pt", mapping__pt__json="mapping*.json",
         reordered__pt="vq-reorder*.pt")
    keep("train", gpt__pt="*/checkpoints/0000004.pt", run="*")
    keep("sample many", samples__npz="*.npz")
    keep("sample few", classes__png="classes.png")
    keep("classifier", classifier__pt="classifier.pt")
    keep("reference", reference__npz="reference.npz")
    keep("evaluate", "good/reference.npz", "good/samples.npz", scores__json="scores.json")
    keep("tokenizer", tokenizer__pt="*/tokenizer.pt", tokenizer_run="*")
    keep("validate", reconstructions__npz="reconstructions.npz")
    for scale in ("1.0", "1.5"):
        path = good / "sweep/20-samples" / f"cfg-scale-{scale}" / "samples.json"
        path.parent.mkdir(parents=True)
        record = json.loads((good / "scores.json").read_text())
        record["samples"]["settings"]["cfg_scale"] = float(scale)
        path.write_text(json.dumps(record))
    dataset = open_dataset("digits", "val")
    for row in range(24):
        path = good / "pictures" / f"class {row % 2}" / f"{row:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(dataset.read(row)).resize((20, 24)).save(path)


def make_bad(folder: Path) -> None:
    """Makes `bad` beside `good`."""
    good, bad = folder / "good", folder / "bad"
    bad.mkdir()
    make_bad_paths(good, bad)
    make_bad_weights(good, bad)
    make_bad_safetensors(good, bad)
    make_bad_mappings(good, bad)
    make_bad_stores(good, bad)
    make_bad_ready_codes(bad)
    make_bad_runs(good, bad)
    make_bad_archives(good, bad)
    make_bad_pictures(good, bad)
    make_bad_sweeps(good, bad)


def make_bad_paths(good: Path, bad: Path) -> None:
    (bad / "empty.pt").write_bytes(b"")
    (bad / "text.pt").write_text("weights\n" * 1000)
    (bad / "loop.pt").symlink_to("loop.pt")
    (bad / "nowhere").symlink_to("no/such/folder")
    os.mkfifo(bad / "pipe.pt")
    shutil.copy(good / "samples.npz", bad / "npz.pt")
    shutil.copy(good / "vq.pt", bad / "Tökenizer 模型 'a b'.pt")
    (bad / "link.pt").symlink_to("../good/vq.pt")
    (bad / "made.npz").symlink_to("../new/reference.npz")
    # Folders where a script would write a file.
    for name in (MAPPING, "reference.npz", "x.json", "y.txt"):
        (bad / "taken" / name).mkdir(parents=True)


def make_bad_weights(good: Path, bad: Path) -> None:
    """Makes relatives of the tokenizer, the GPT and the classifier."""
    content = (good / "vq.pt").read_bytes()
    (bad / "cut.pt").write_bytes(content[:len(content) * 2 // 3])
    (bad / "late.pt").write_bytes(b"\0" * 512 + content)        # moved by a block, by a bad copy
    vq = read_checkpoint(good / "vq.pt")["model"]
    codes = vq[CODEBOOK]
    with_a_nan = codes.clone()
    with_a_nan[3, 1] = torch.nan
    tokenizers = {
        "list": [vq],
        "number": {"model": 3},
        "integers": dict(enumerate(vq.values())),
        "none": {"model": None},
        "empty-state": {"model": {}},
        "flat": {"model": vq | {CODEBOOK: codes.flatten()}},
        "complex": {"model": vq | {CODEBOOK: codes.to(torch.complex64)}},
        "whole-numbers": {"model": vq | {CODEBOOK: (100 * codes).long()}},
        "sparse": {"model": vq | {CODEBOOK: codes.to_sparse()}},
        "zeros": {"model": vq | {CODEBOOK: torch.zeros_like(codes)}},
        "half": {"model": {name: value.half() for name, value in vq.items()}},
        "nan": {"model": vq | {CODEBOOK: with_a_nan}},
        "infinite": {"model": vq | {"decoder.conv_out.bias": torch.full((3,), torch.inf)}},
    }
    for name, payload in tokenizers.items():
        torch.save(payload, bad / f"vq-{name}.pt")
    whole = read_checkpoint(good / "gpt.pt")
    settings = whole["settings"]
    smaller = gpt.GPT(gpt_config("GPT-tiny", grid=4, vocab_size=32, num_classes=10))
    infinite = torch.full_like(whole["model"]["output.weight"], -torch.inf)
    gpts = {
        "settings-list": whole | {"settings": [1, 2]},
        "settings-text": whole | {"settings": settings | {"grid": "four"}},
        "settings-zero-grid": whole | {"settings": settings | {"grid": 0}},
        "settings-names": whole | {"settings": settings | {"class_names": 7}},
        "settings-model": whole | {"settings": settings | {"gpt_model": "GPT-9"}},
        "settings-tensor": whole | {"settings": settings | {"recipe": None, "x": infinite}},
        "few-names": whole | {"settings": settings | {"class_names": ["0", "1"]}},
        "unguided": whole | {"settings": settings | {"label_dropout": 0}},
        "bare": whole["model"],
        "other-size": {"model": smaller.state_dict()},
        "steps-text": whole | {"steps": "four"},
        "other-moments": whole | {"steps": 2, "optimizer": {"state": {0: {}}, "param_groups": []}},
        "no-moments": whole | {"steps": 2, "optimizer": {"state": {}, "param_groups": []}},
        "infinite": whole | {"model": whole["model"] | {"output.weight": infinite}},
    }
    for name, payload in gpts.items():
        torch.save(payload, bad / f"gpt-{name}.pt")
    classifier = read_checkpoint(good / "classifier.pt")
    classifiers = {
        "bare": {"model": {}},
        "names-none": {"model": {}, "settings": classifier["settings"] | {"class_names": None}},
        "names-number": classifier | {"settings": classifier["settings"] | {"class_names": 10}},
        "size-text": classifier | {"settings": classifier["settings"] | {"image_size": "16"}},
        "size-zero": classifier | {"settings": classifier["settings"] | {"image_size": 0}},
        "accuracy-text": classifier | {"settings": classifier["settings"] | {"accuracy": "high"}},
    }
    for name, payload in classifiers.items():
        torch.save(payload, bad / f"classifier-{name}.pt")


def make_bad_safetensors(good: Path, bad: Path) -> None:
    """Makes .safetensors that are damaged, or whose metadata are."""
    payload = read_checkpoint(good / "gpt.pt")
    weights = {"model": payload["model"], "settings": payload["settings"]}
    save_checkpoint(bad / "cut.safetensors", weights)
    content = (bad / "cut.safetensors").read_bytes()
    os.truncate(bad / "cut.safetensors", len(content) // 2)
    (bad / "long.safetensors").write_bytes(struct.pack("<Q", 2**62) + content[8:])
    shutil.copy(good / "vq.pt", bad / "renamed.safetensors")
    records = {"text": "{settings}", "list": "[1]", "optimizer": json.dumps({"optimizer": {}}),
               "settings": json.dumps({"settings": "none"})}
    for name, record in records.items():
        save_file(payload["model"], bad / f"record-{name}.safetensors", {"iar_record": record})
    # Exports whose tokenizer is none.
    for name in ("none", "cut"):
        save_checkpoint(bad / f"export-{name}" / "model.safetensors", weights)
        save_checkpoint(bad / f"export-{name}" / "vq.safetensors", {"model": {}, "settings": {}})
    os.truncate(bad / "export-cut" / "vq.safetensors", 5)


def make_bad_mappings(good: Path, bad: Path) -> None:
    tokens = read_checkpoint(good / "mapping.pt")
    mappings = {
        "int8": tokens.to(torch.int8),
        "complex": tokens.to(torch.complex64),
        "one-based": tokens + 1,
        "text": {"mapping": tokens},
        "side-numbers": tokens,
        "side-empty": tokens,
        "short": torch.arange(63),
        "foreign": tokens,
    }
    for name, payload in mappings.items():
        torch.save(payload, bad / f"mapping-{name}.pt")
    (bad / "mapping-side-numbers.pt.json").write_text(json.dumps({"mapping_sha256": 5}))
    (bad / "mapping-side-empty.pt.json").write_text("")
    hashes = json.loads((good / "mapping.pt.json").read_text())
    hashes["original_codebook_sha256"] = "0" * 64               # as if made for another codebook
    (bad / "mapping-foreign.pt.json").write_text(json.dumps(hashes))


def make_bad_stores(good: Path, bad: Path) -> None:
    """Makes code stores of wrong records and arrays."""
    manifest = json.loads((good / "codes" / "manifest.json").read_text())
    labels, codes = (np.load(good / "codes" / f"{name}.npy") for name in ("labels", "codes"))

    def store(name: str, record: Any, **arrays: np.ndarray) -> None:
        path = bad / f"store-{name}"
        shutil.copytree(good / "codes", path)
        (path / "manifest.json").write_text(json.dumps(record))
        for array_name, array in arrays.items():
            np.save(path / f"{array_name}.npy", array)

    store("names-text", manifest | {"class_names": "0123456789"})
    store("crops-unknown", manifest | {"crops": ["upside down", "inside out"]})
    store("crops-none", manifest | {"crops": []})
    store("crop-range", manifest | {"crop_range": 0.5})
    store("vq-model-none", manifest | {"vq_model": None})
    store("vq-model-unknown", manifest | {"vq_model": "VQ-2"})
    store("codebook-huge", manifest | {"codebook_size": HUGE})
    store("unfinished", manifest | {"complete": False})
    store("failed-text", manifest | {"failed": [{"row": "first"}]})
    store("failed-far", manifest | {"failed": [{"row": 10**12, "path": "x", "reason": "y"}]})
    store("negative", manifest | {"num_tokens": -16})
    store("size-zero", manifest | {"image_size": 0})
    store("checksums-none", manifest | {"codes_sha256": []})
    store("labels-float", manifest, labels=labels + 0.5)
    store("labels-far", manifest, labels=labels + 10)
    store("codes-float", manifest, codes=codes.astype(np.float64))
    for name, change in (("codes-text", lambda path: path.write_text("codes")),
                         ("codes-cut", lambda path: os.truncate(path, 999))):
        store(name, manifest)
        change(bad / f"store-{name}" / "codes.npy")
    (bad / "older" / "x_codes").mkdir(parents=True)
    (bad / "older" / "x_labels").mkdir()
    for row in range(40):
        label = -1 if row == 7 else labels[row]
        np.save(bad / "older" / "x_codes" / f"{row}.npy", codes[row][None].astype(np.int64))
        np.save(bad / "older" / "x_labels" / f"{row}.npy", np.array([label]))


def make_bad_ready_codes(bad: Path) -> None:
    """Makes tars and folders of ready codes that cannot be imported, and names of their classes."""
    codes = np.arange(40 * 2 * 16).reshape(40, 2, 16) % 64
    labels = np.arange(40) % 10
    members = numbered_files(codes, labels)
    tars = {
        "gap": [member for member in members if "/7/" not in member[0]],
        "twice": [*members, members[3]],
        "text": [*members, ("readme\nfirst.txt", b"codes")],
        "empty": [],
        "floats": [(name, npy(np.zeros((2, 16)))) for name, _ in members],
        "range": numbered_files(codes + 64, labels),
        "large": numbered_files(np.zeros((40, 2, 64)), labels),
        "far": [(f"{10**15}/0.npy", members[0][1])],
    }
    for name, content in tars.items():
        write_tar(bad / f"ready-{name}.tar", content)
    (bad / "ready-cut.tar").write_bytes((bad / "ready-gap.tar").read_bytes()[:2500])
    write_folders(bad / "ready-mixed", [("0/0.npy", b""), ("0/0.npz", b"")])
    write_folders(bad / "ready-loose", [("0.npy", b"")])
    write_folders(bad / "ready-pairs", [("a/0.npz", b"PK"), ("b/0.npz", b"PK")])
    (bad / "ready-pairs" / "c").mkdir()
    write_folders(bad / "ready-npz", [("a/0.npz", b"PK"), ("b/0.npz", b"PK")])
    (bad / "names-few.txt").write_text("one\ntwo\n")
    (bad / "names-blank.txt").write_text("one\n\nthree\n")
    (bad / "names-bytes.txt").write_bytes(b"\xff\xfe\n")


def make_bad_runs(good: Path, bad: Path) -> None:
    """Makes results folders, each with one damaged run, most of them without their end."""
    checkpoint = read_checkpoint(good / "gpt.pt")

    def results(name: str, change: Callable[[Path], Any]) -> None:
        path = bad / f"results-{name}" / "000-GPT-tiny-lambda=1-cluster_size=8"
        shutil.copytree(good / "run", path)
        shutil.copy(good / "gpt.pt", path / "checkpoints" / "0000004.pt")
        change(path)

    def unfinish(path: Path) -> Path:
        (path / "finished.json").unlink()
        return path / "checkpoints" / "0000004.pt"

    results("config-bytes", lambda path: (path / "config.json").write_bytes(b"\xff\xfe{}"))
    results("config-number", lambda path: (path / "config.json").write_text("7"))
    results("finished-text", lambda path: (path / "finished.json").write_text('{"steps": "many"}'))

    def with_metrics(content: bytes) -> Callable[[Path], Any]:
        def change(path: Path) -> None:
            unfinish(path)
            (path / "metrics.jsonl").write_bytes(content)
        return change

    def with_checkpoint(payload: Any) -> Callable[[Path], Any]:
        return lambda path: torch.save(payload, unfinish(path))

    def put_folder_for_checkpoint(path: Path) -> None:
        last = unfinish(path)
        last.unlink()
        last.mkdir()

    def put_folder_for_log(path: Path) -> None:
        unfinish(path)
        (path / "log.txt").unlink()
        (path / "log.txt").mkdir()

    no_moments = {"optimizer": {"state": [], "param_groups": {}}}
    results("metrics-binary", with_metrics(b"\0\xff\n"))
    results("metrics-numbers", with_metrics(b"1\n2\n"))
    results("checkpoint-text", lambda path: unfinish(path).write_text("weights"))
    results("checkpoint-folder", put_folder_for_checkpoint)
    results("checkpoint-steps", with_checkpoint(checkpoint | {"steps": "four"}))
    results("checkpoint-moments", with_checkpoint(checkpoint | no_moments))
    results("checkpoint-tokenizer", lambda path: shutil.copy(good / "tokenizer.pt", unfinish(path)))
    results("log-folder", put_folder_for_log)


def make_bad_archives(good: Path, bad: Path) -> None:
    """Makes npz files that are none, or hold what nobody asked for."""
    with np.load(good / "samples.npz") as arrays:
        pictures = arrays["arr_0"]
        labels = arrays["labels"]
        settings = json.loads(str(arrays["settings"]))

    def archive(name: str, **arrays: Any) -> None:
        np.savez(bad / f"{name}.npz", **({"arr_0": pictures, "labels": labels} | arrays))

    archive("labels-column", labels=labels[:, None])
    archive("labels-negative", labels=labels - 5)
    archive("labels-text", labels=labels.astype(str))
    archive("labels-objects", labels=np.array([{}] * len(labels)))
    archive("pictures-two-sizes", arr_0=np.array([pictures[0], pictures[0, :8]], dtype=object))
    archive("pictures-flat", arr_0=pictures.reshape(len(pictures), -1))
    archive("pictures-signed", arr_0=pictures.astype(np.int8))
    archive("settings-names-number", settings=np.array(json.dumps(settings | {"class_names": 3})))
    archive("settings-kind-list", settings=np.array(json.dumps(settings | {"kind": ["samples"]})))
    archive("settings-bytes", settings=np.frombuffer(b"\xff\xfe", np.uint8))
    archive("mu-alone", mu=np.zeros(64))
    archive("mu-complex", mu=np.zeros(64, complex), sigma=np.eye(64))
    archive("mu-text", mu=np.array(["a"] * 64), sigma=np.eye(64))
    archive("sigma-skew", mu=np.zeros(64), sigma=np.triu(np.ones((64, 64))))
    np.save(bad / "array.npy", pictures)
    shutil.move(bad / "array.npy", bad / "array.npz")
    content = (good / "samples.npz").read_bytes()
    (bad / "renamed.zip").write_bytes(content)
    (bad / "cut.npz").write_bytes(content[:len(content) // 2])
    # 10^18 pictures, it says.
    fields = {"descr": "|u1", "fortran_order": False, "shape": (10**18, 16, 16, 3)}
    header = repr(fields).ljust(117) + "\n"
    start = b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header.encode()
    with zipfile.ZipFile(bad / "huge.npz", "w") as file:
        file.writestr("arr_0.npy", start + b"\0" * 768)
    with zipfile.ZipFile(good / "samples.npz") as source:
        member = source.read("arr_0.npy")
    with zipfile.ZipFile(bad / "twice.npz", "w") as file:
        for _ in range(2):
            file.writestr("arr_0.npy", member)
    (bad / "sampled").mkdir()
    name = sample_name()
    (bad / "sampled" / f"{name}.npz").write_text("no archive")
    (bad / "rows-file").mkdir()
    (bad / "rows-file" / f"{name}.rows").write_text("no folder")
    rows = bad / "rows-list" / f"{name}.rows"
    rows.mkdir(parents=True)
    (rows / "identity.json").write_text("[]")
    (bad / "npz-folder" / f"{name}.npz").mkdir(parents=True)


def sample_name() -> str:
    """Returns the name of the npz that the right command of sampling writes, without its ending."""
    return ("GPT-tiny-8-gpt-size-16-size-16-VQ-4-small"
            "-topk-0-topp-1.0-temperature-1.0-cfg-1.5-seed-0")


def make_bad_pictures(good: Path, bad: Path) -> None:
    """Makes folders of pictures, most of them strange."""
    first = (good / "pictures" / "class 0" / "000.png").read_bytes()
    odd = bad / "pictures"
    shutil.copytree(good / "pictures", odd)
    broken = odd / "class 1"
    (broken / "cut.png").write_bytes(first[:len(first) // 2])
    (broken / "text.jpg").write_text("a picture")
    (broken / "empty.webp").write_bytes(b"")
    (broken / "folder.jpeg").mkdir()
    strange = bad / "strange"
    (strange / "Größe 大 \n b").mkdir(parents=True)
    (strange / "-rf").mkdir()
    picture = Image.open(good / "pictures" / "class 0" / "000.png")
    for name, mode in (("grey.png", "L"), ("bits.png", "1"), ("palette.png", "P"),
                       ("alpha.png", "RGBA"), ("wide grey.png", "I;16"), ("print.jpg", "CMYK"),
                       ("UPPER.JPG", "RGB")):
        picture.convert("L" if mode == "I;16" else mode).convert(mode).save(strange / "-rf" / name)
    picture.save(strange / "Größe 大 \n b" / "two\nlines.png")
    (bad / "hollow\nclass" / "a\nb").mkdir(parents=True)
    for name in ("classless/1.jpg", "hollow/a/1.jpg", "hollow/b/readme.txt"):
        path = bad / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (bad / "empty").mkdir()
    (bad / "looping").mkdir()
    (bad / "looping" / "round").symlink_to(".")


def make_bad_sweeps(good: Path, bad: Path) -> None:
    """Makes folders of evaluator records for the sweep's report."""
    record = json.loads((good / "scores.json").read_text())
    numbers, samples = record["numbers"], record["samples"]
    records = {
        "list": [record],
        "no-numbers": {"samples": samples},
        "numbers-list": record | {"numbers": [1]},
        "numbers-text": record | {"numbers": dict.fromkeys(numbers, "good")},
        "no-settings": record | {"samples": {"name": "x"}},
        "scale-text": record | {"samples": samples | {"settings": {"cfg_scale": "large"}}},
        "other-metrics": record | {"numbers": {"Inception Score": 2.0}},
    }
    for name, content in records.items():
        shutil.copytree(good / "sweep", bad / f"sweep-{name}")
        path = bad / f"sweep-{name}" / "20-samples/cfg-scale-1.5/samples.json"
        path.write_text(json.dumps(content))
