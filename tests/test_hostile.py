"""Hostile command lines: one line and exit code 2, or exit code 0 and a right result; never a traceback.

Every row starts from a command of hostile_files.COMMANDS that is right, adds flags, and says what comes of it: words of
the one line, or a check of the result. The working folder holds `good` and `bad`, and `new`, where results go.
"""

import collections
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.runtime.checkpoint import read_checkpoint
from hostile_files import COMMANDS, call, make_bad, make_good, sample_name
from processes import contents

MOST_OF_A_KIND, FEWEST_OF_A_SCRIPT, FEWEST = 5, 6, 100
HUGE = 10**18


def codes_are_right(store: str = "new/codes") -> None:
    for name in ("codes.npy", "labels.npy", "manifest.json"):
        assert Path(store, name).read_bytes() == Path("good/codes", name).read_bytes()


def codes_are_nearly_right() -> None:
    found, expected = (np.load(Path(folder, "codes/codes.npy")) for folder in ("new", "good"))
    assert (found == expected).mean() > 0.95


def pictures_but_broken_ones_are_extracted() -> None:
    manifest = json.loads(Path("new/codes/manifest.json").read_text())
    assert manifest["class_names"] == ["class 0", "class 1"]
    failed = {failure["path"] for failure in manifest["failed"]}
    assert {"class 1/cut.png", "class 1/text.jpg", "class 1/empty.webp"} <= failed
    assert manifest["num_images"] - len(failed) == 24


def training_is_right(results: str = "new") -> None:
    (run,) = Path(results).glob("**/000-GPT-tiny*")
    assert contents(run)["metrics.jsonl"] == contents(Path("good/run"))["metrics.jsonl"]
    weights = read_checkpoint(run / "checkpoints" / "0000004.pt")["model"]
    for name, value in read_checkpoint("good/gpt.pt")["model"].items():
        assert torch.equal(weights[name], value), name


def is_right_in(results: str) -> Callable[[], None]:
    """Returns the check that a GPT was trained rightly in a folder of results."""
    return lambda: training_is_right(results)


def is_finished_in(results: str) -> Callable[[], None]:
    """Returns the check that a run in a folder of results came to its end, all but the metrics that were damaged."""
    return lambda: a_run_is_finished(results)


def a_run_is_finished(results: str = "new") -> None:
    (run,) = Path(results).glob("0*")
    assert json.loads((run / "finished.json").read_text())["steps"] == 4


def samples_are_right(sample_dir: str = "new") -> None:
    (path,) = Path(sample_dir).glob("*.npz")
    with np.load(path) as found, np.load("good/samples.npz") as expected:
        for name in ("arr_0", "labels"):
            assert np.array_equal(found[name], expected[name])


def flags_that_are_given_win() -> None:
    (path,) = Path("new").glob("GPT-tiny*.npz")
    with np.load(path) as found:
        settings = json.loads(str(found["settings"]))
        assert found["arr_0"].shape == (20, 16, 16, 3)
    assert settings["cfg_scale"] == 1.7                         # of the preset: it was not given


def samples_are_threes() -> None:
    (path,) = Path("new").glob("*.npz")
    with np.load(path) as found:
        assert found["labels"].tolist() == [3] * 20


def picture_is_right() -> None:
    paths = [path for path in Path("new").rglob("*") if path.is_file()]
    assert len(paths) == 1
    assert np.array_equal(np.asarray(Image.open(paths[0])), np.asarray(Image.open("good/classes.png")))


def some_picture_is_there() -> None:
    assert np.asarray(Image.open("new/classes.png")).std() > 0


def mapping_is_right() -> None:
    (found,) = Path("new").rglob("mapping*.pt")
    assert torch.equal(read_checkpoint(found), read_checkpoint("good/mapping.pt"))


def mapping_is_a_permutation() -> None:
    (found,) = Path("new").rglob("mapping*.pt")
    assert read_checkpoint(found).sort().values.tolist() == list(range(64))


def scores_are_right(output: str = "new/scores.json") -> None:
    found, expected = (json.loads(Path(path).read_text()) for path in (output, "good/scores.json"))
    for title, number in found["numbers"].items():
        assert number == pytest.approx(expected["numbers"][title], rel=1e-4, abs=1e-4), title
    assert found["numbers"]


def reference_is_right() -> None:
    with np.load("new/reference.npz") as found, np.load("good/reference.npz") as expected:
        assert np.array_equal(found["arr_0"], expected["arr_0"])
        assert np.array_equal(found["labels"], expected["labels"])


def reference_holds_the_samples() -> None:
    with np.load("new/reference.npz") as found, np.load("good/samples.npz") as expected:
        assert np.array_equal(found["arr_0"], expected["arr_0"])


def strange_pictures_are_read() -> None:
    (path,) = Path("new").glob("*.npz")
    with np.load(path) as found:
        assert len(found["arr_0"]) == 8 and sorted(found["labels"].tolist()) == [0] * 7 + [1]


def classifier_is_right() -> None:
    settings = read_checkpoint("new/classifier.pt")["settings"]
    assert settings["class_names"] == [str(digit) for digit in range(10)]
    assert 0 <= settings["accuracy"] <= 1


def reconstructions_are_right() -> None:
    with np.load("new/reconstructions.npz") as found, np.load("good/reconstructions.npz") as expected:
        assert np.array_equal(found["labels"], expected["labels"])
        assert np.abs(found["arr_0"].astype(int) - expected["arr_0"]).max() <= 1


def check_is_drawn(output: str = "new/check.png") -> None:
    assert Image.open(output).size[0] > 100


def table_is_right() -> None:
    table = json.loads(Path("good/sweep/sweep.json").read_text())
    assert [row["cfg_scale"] for row in table] == [1.0, 1.5]
    assert table[0]["FID"] == table[1]["FID"]


# Command, the flag or kind of file that is tried, flags, and words of the line or a check of the result.
Row = tuple[str, str, str, str | Callable[[], None]]
ROWS: list[Row] = [
    ("extract", "tokenizer file", "--vq-ckpt good/classifier.pt", "classifier.pt"),
    ("extract", "tokenizer file", "--vq-ckpt bad/late.pt", "late.pt"),
    ("extract", "weights", "--vq-ckpt bad/vq-half.pt", codes_are_nearly_right),
    ("extract", "pictures", "--dataset imagenet --data-path bad/pictures --max-failures 0.9",
     pictures_but_broken_ones_are_extracted),
    ("extract", "pictures", "--dataset imagenet --data-path 'bad/hollow\nclass'", "expected images"),
    ("extract", "--data-path", "--dataset imagenet --data-path good/reference.npz", "reference.npz"),
    ("extract", "--batch-size", f"--batch-size {HUGE}", "--batch-size"),
    ("extract", "--num-workers", f"--num-workers {HUGE}", codes_are_right),
    ("extract", "--code-path", "--code-path good/vq.pt", "vq.pt"),
    ("extract", "--crop-range", "--crop-range nan", "--crop-range"),
    ("extract", "--crop-range", "--ten-crop --crop-range 1e308", "--crop-range"),
    ("extract", "--image-size", f"--image-size {HUGE}", "--image-size"),
    ("extract", "--codebook-embed-dim", f"--codebook-embed-dim {2**63}", "--codebook-embed-dim"),
    ("extract", "manifest", "--code-path bad/store-size-zero --overwrite --data-path train --vq-ckpt bad/loop.pt",
     "loop.pt"),

    ("check", "--data-path", "--data-path train", "--data-path"),
    ("check", "manifest", "--code-path bad/store-names-text", "manifest.json"),
    ("check", "manifest", "--code-path bad/store-crops-unknown", "crops"),
    ("check", "manifest", "--code-path bad/store-negative", "store-negative"),
    ("check", "manifest checksums", "--code-path bad/store-checksums-none", "codes_sha256"),
    ("check", "failed rows", "--code-path bad/store-failed-text", "failed"),
    ("check", "failed rows", "--code-path bad/store-failed-far", "failed"),
    ("check", "codes.npy", "--code-path bad/store-codes-cut", "codes.npy"),
    ("check", "labels.npy", "--code-path bad/store-labels-float", "labels"),
    ("check", "--num-rows", f"--num-rows {HUGE}", check_is_drawn),
    ("check", "picture of the check", "--output good/vq.pt/check.png", "vq.pt"),

    ("train", "GPT file", "--gpt-ckpt good/vq.pt", "vq.pt"),
    ("train", "GPT settings", "--gpt-ckpt bad/gpt-settings-list.pt", "settings"),
    ("train", "GPT training state", "--gpt-ckpt bad/gpt-steps-text.pt", "steps"),
    ("train", "GPT training state", "--gpt-ckpt bad/gpt-other-moments.pt", "gpt-other-moments.pt"),
    ("train", "weights", "--gpt-ckpt bad/gpt-infinite.pt --weights-only", "output.weight"),
    ("train", "mapping", "--mapping-path bad/mapping-int8.pt", training_is_right),
    ("train", "mapping", "--mapping-path bad/mapping-complex.pt", "mapping-complex.pt"),
    ("train", "mapping", "--mapping-path bad/mapping-one-based.pt", "expected a permutation"),
    ("train", "mapping", "--mapping-path bad/mapping-text.pt", "mapping-text.pt"),
    ("train", "mapping side file", "--mapping-path bad/mapping-side-numbers.pt", "mapping-side-numbers.pt.json"),
    ("train", "mapping side file", "--mapping-path bad/mapping-side-empty.pt", "mapping-side-empty.pt.json"),
    ("train", "codes.npy", "--code-path bad/store-codes-float", "codes.npy"),
    ("train", "codes.npy", "--code-path bad/store-codes-text", "codes.npy"),
    ("train", "labels.npy", "--code-path bad/store-labels-far", "labels"),
    ("train", "older layout", "--code-path bad/older", "labels"),
    ("train", "config.json", "--results-dir bad/results-config-bytes", "config.json"),
    ("train", "config.json", "--results-dir bad/results-config-number", "config.json"),
    ("train", "finished.json", "--results-dir bad/results-finished-text", "finished.json"),
    *(("train", "metrics.jsonl", f"--results-dir bad/results-metrics-{name}",
       is_finished_in(f"bad/results-metrics-{name}")) for name in ("binary", "numbers")),
    *(("train", "checkpoint of a run", f"--results-dir bad/results-checkpoint-{name}",
       is_right_in(f"bad/results-checkpoint-{name}")) for name in ("text", "folder", "steps", "moments", "tokenizer")),
    ("train", "log.txt", "--results-dir bad/results-log-folder", "log.txt"),
    ("train", "--val-share", "--val-share 0.9999 --val-every 1", "--global-batch-size"),
    ("train", "--epochs", f"--epochs {HUGE}", training_is_right),
    ("train", "--loss-mib", f"--loss-mib {HUGE}", training_is_right),
    ("train", "--ckpt-minutes", "--ckpt-minutes 1e308", training_is_right),
    ("train", "--warmup", f"--warmup {HUGE}", a_run_is_finished),
    ("train", "--gradient-accumulation-steps", f"--gradient-accumulation-steps {HUGE}", "--global-batch-size"),
    ("train", "--results-dir", "--results-dir 'new/Größe 模型 \n b'", training_is_right),
    ("train", "--results-dir", "--results-dir bad/nowhere", "nowhere"),
    ("train", "--weight-decay", "--weight-decay nan", "--weight-decay"),
    ("train", "--lambda-cce", "--lambda-cce -inf", "--lambda-cce"),
    ("train", "path", "--vq-ckpt bad/loop.pt", "loop.pt"),

    ("sample many", "--labels", "--labels ''", "--labels"),
    ("sample many", "--labels", "--labels 1,,2", "--labels"),
    ("sample many", "--labels", "--labels ٣", samples_are_threes),
    ("sample many", "--labels", f"--labels {HUGE}", "--labels"),
    ("sample many", "--per-proc-batch-size", f"--per-proc-batch-size {HUGE}", "--per-proc-batch-size"),
    ("sample many", "--num-fid-samples", f"--num-fid-samples {HUGE}", "expected room"),
    ("sample many", "--image-size-eval", f"--image-size-eval {HUGE}", "--image-size-eval"),
    ("sample many", "--top-p", "--top-p nan", "--top-p"),
    ("sample many", "--top-k", f"--top-k {HUGE}", "--top-k"),
    ("sample many", "--sample-dir", "--sample-dir good/vq.pt", "vq.pt"),
    ("sample many", "--sample-dir", "--sample-dir bad/nowhere", "nowhere"),
    ("sample many", "npz in the way", "--sample-dir bad/sampled", sample_name()),
    ("sample many", "npz in the way", "--sample-dir bad/npz-folder", sample_name()),
    ("sample many", "rows in the way", "--sample-dir bad/rows-file", sample_name()),
    ("sample many", "rows in the way", "--sample-dir bad/rows-list", "identity.json"),
    ("sample many", "--preset", "--preset IAR-XXL-384", flags_that_are_given_win),
    ("sample many", "--weights", "--weights ema", "--weights"),
    ("sample many", "swapped files", "--vq-ckpt bad/link.pt", "different runs"),
    ("sample many", "GPT settings", "--gpt-ckpt bad/gpt-settings-text.pt", "grid"),

    ("sample few", "--class-ids", "--class-ids ''", "--class-ids"),
    ("sample few", "--class-ids", "--class-ids 3.0", "--class-ids"),
    ("sample few", "--class-ids", "--class-ids ' 3 , 7 '", picture_is_right),
    ("sample few", "--class-ids", "--class-ids '３,７'", picture_is_right),
    ("sample few", "--num-per-class", f"--num-per-class {HUGE}", "--num-per-class"),
    ("sample few", "--output", "--output new/\udcff\udcfe.png", picture_is_right),
    ("sample few", "--output", "--output ''", "expected the name of a file"),
    ("sample few", "GPT settings", "--gpt-ckpt bad/gpt-settings-zero-grid.pt", "grid"),
    ("sample few", "GPT settings", "--gpt-ckpt bad/gpt-settings-names.pt", "class_names"),
    ("sample few", "GPT settings", "--gpt-ckpt bad/gpt-few-names.pt", "class_names"),
    ("sample few", "GPT file", "--gpt-ckpt ''", "expected a checkpoint"),
    ("sample few", "GPT file", "--gpt-ckpt bad/npz.pt", "npz.pt"),
    ("sample few", "--cfg-scale", "--cfg-scale 1e308", "--cfg-scale"),
    ("sample few", "--temperature", "--temperature 1e-300", some_picture_is_there),
    ("sample few", "--temperature", "--temperature 1e308", some_picture_is_there),
    ("sample few", "weights", "--vq-ckpt bad/vq-infinite.pt", "decoder.conv_out.bias"),

    ("balance", "tokenizer file", "--vq-ckpt good/mapping.pt", "mapping.pt"),
    ("balance", "codebook", "--vq-ckpt bad/vq-flat.pt", "vq-flat.pt"),
    ("balance", "codebook", "--vq-ckpt bad/vq-complex.pt", "vq-complex.pt"),
    ("balance", "codebook", "--vq-ckpt bad/vq-sparse.pt", "vq-sparse.pt"),
    ("balance", "codebook", "--vq-ckpt bad/vq-zeros.pt", mapping_is_a_permutation),
    ("balance", "codebook", "--vq-ckpt bad/vq-whole-numbers.pt", "vq-whole-numbers.pt"),
    ("balance", "checkpoint", "--vq-ckpt bad/vq-list.pt", "vq-list.pt"),
    ("balance", "checkpoint", "--vq-ckpt bad/vq-integers.pt", "vq-integers.pt"),
    ("balance", "checkpoint", "--vq-ckpt bad/vq-number.pt", "vq-number.pt"),
    ("balance", "checkpoint", "--vq-ckpt bad/vq-none.pt", "vq-none.pt"),
    ("balance", "checkpoint", "--vq-ckpt bad/vq-empty-state.pt", "vq-empty-state.pt"),
    ("balance", "path", "--vq-ckpt bad/pipe.pt", "pipe.pt"),
    ("balance", "path", "--vq-ckpt /proc/self/mem", "/proc/self/mem"),
    ("balance", "path", "--vq-ckpt \"bad/Tökenizer 模型 'a b'.pt\"", mapping_is_right),
    ("balance", "path", f"--vq-ckpt {'x' * 5000}.pt", "xxx"),
    ("balance", "--cluster-size", f"--cluster-size {HUGE}", "cluster size"),
    ("balance", "--cluster-size", "--cluster-size 64", mapping_is_a_permutation),
    ("balance", "--cluster-size", "--cluster-size 1", mapping_is_a_permutation),
    ("balance", "--seed", f"--seed {2**63 - 1}", mapping_is_a_permutation),
    ("balance", "--output-dir", "--output-dir bad/nowhere", "nowhere"),

    ("evaluate", "pictures in npz", "good/reference.npz bad/pictures-flat.npz", "pictures-flat.npz"),
    ("evaluate", "pictures in npz", "good/reference.npz bad/pictures-two-sizes.npz", "pictures-two-sizes.npz"),
    ("evaluate", "pictures in npz", "good/reference.npz bad/pictures-signed.npz", "pictures-signed.npz"),
    ("evaluate", "npz file", "good/reference.npz bad/array.npz", "array.npz"),
    ("evaluate", "npz file", "bad/huge.npz good/samples.npz", "huge.npz"),
    ("evaluate", "npz file", "good/reference.npz bad/twice.npz", scores_are_right),
    ("evaluate", "labels in npz", "good/reference.npz bad/labels-column.npz", "labels-column.npz"),
    ("evaluate", "labels in npz", "good/reference.npz bad/labels-negative.npz", "labels-negative.npz"),
    ("evaluate", "labels in npz", "good/reference.npz bad/labels-objects.npz", "labels-objects.npz"),
    ("evaluate", "settings in npz", "good/reference.npz bad/settings-names-number.npz", "settings-names-number.npz"),
    ("evaluate", "settings in npz", "good/reference.npz bad/settings-kind-list.npz", scores_are_right),
    ("evaluate", "settings in npz", "bad/settings-bytes.npz good/samples.npz", "settings-bytes.npz"),
    ("evaluate", "statistics in npz", "bad/mu-alone.npz good/samples.npz", "mu-alone.npz"),
    ("evaluate", "statistics in npz", "bad/mu-complex.npz good/samples.npz --metrics is", scores_are_right),
    ("evaluate", "statistics in npz", "bad/mu-text.npz good/samples.npz --metrics fid", "mu-text.npz"),
    ("evaluate", "statistics in npz", "bad/sigma-skew.npz good/samples.npz --metrics fid", "sigma-skew.npz"),
    ("evaluate", "--metrics", "good/reference.npz good/samples.npz --metrics ''", "--metrics"),
    ("evaluate", "--metrics", "good/reference.npz good/samples.npz --metrics fid,fid", scores_are_right),
    ("evaluate", "--batch-size", f"good/reference.npz good/samples.npz --batch-size {HUGE}", scores_are_right),
    ("evaluate", "record of scores", "good/reference.npz good/samples.npz --output new/.json", ".json"),
    ("evaluate", "classifier settings",
     "good/reference.npz good/samples.npz --classifier bad/classifier-names-number.pt", "class_names"),
    ("evaluate", "classifier settings",
     "good/reference.npz good/samples.npz --classifier bad/classifier-size-text.pt", "image_size"),
    ("evaluate", "classifier settings",
     "good/reference.npz good/samples.npz --classifier bad/classifier-accuracy-text.pt", "accuracy"),
    ("evaluate", "classifier file", "good/reference.npz good/samples.npz --classifier good/gpt.pt", "gpt.pt"),

    ("reference", "labels in npz", "--data-path bad/labels-text.npz", "labels-text.npz"),
    ("reference", "--num-images", "--num-images 1", "--num-images"),
    ("reference", "--num-images", f"--num-images {HUGE}", "--num-images"),
    ("reference", "--data-path", "--data-path good/samples.npz", reference_holds_the_samples),
    ("reference", "--data-path", "--data-path new/reference.npz", "reference.npz"),
    ("reference", "reference in the way", "--output good/samples.npz --data-path good/samples.npz", "samples.npz"),
    ("reference", "pictures", "--dataset imagenet --data-path bad/strange", strange_pictures_are_read),
    ("reference", "pictures", "--dataset imagenet --data-path bad/looping", "looping"),
    ("reference", "classifier settings", "--classifier bad/classifier-size-zero.pt", "classifier-size-zero.pt"),

    ("classifier", "--val-path", "--val-path good/pictures --dataset imagenet --data-path bad/strange", "--val-path"),
    ("classifier", "--batch-size", f"--batch-size {HUGE}", "--batch-size"),
    ("classifier", "--batch-size", "--batch-size 1", "--batch-size"),
    ("classifier", "--lr", "--lr 1e-320", classifier_is_right),
    ("classifier", "--max-steps", "--max-steps 1", classifier_is_right),
    ("classifier", "--image-size", f"--image-size {HUGE}", "--image-size"),
    ("classifier", "--output", "--output bad/nowhere/c.pt", "nowhere"),
    ("classifier", "--global-seed", f"--global-seed {2**64 - 1}", classifier_is_right),

    ("tokenizer", "tokenizer file", "--vq-ckpt good/gpt.pt", "gpt.pt"),
    ("tokenizer", "VGG file", "--perceptual-weight 1 --vgg-path good/vq.pt --lpips-path good/vq.pt", "vq.pt"),
    ("tokenizer", "LPIPS file", "--perceptual-weight 1 --vgg-path bad/text.pt --lpips-path bad/empty.pt", "text.pt"),
    ("tokenizer", "--output", "--output good/codes", "codes"),
    ("tokenizer", "--smallest-crop", "--smallest-crop nan", "--smallest-crop"),
    ("tokenizer", "--revive-every", f"--revive-every {HUGE}", a_run_is_finished),
    ("tokenizer", "--disc-weight", "--disc-weight 1", "--disc-weight"),
    ("tokenizer", "--entropy-ratio", "--entropy-ratio inf", "--entropy-ratio"),
    ("tokenizer", "--codebook-embed-dim", "--codebook-embed-dim 0", "--codebook-embed-dim"),
    ("tokenizer", "--global-seed", "--global-seed 1e3", "--global-seed"),
    ("tokenizer", "--val-path", "--val-path good/pictures", "--data-path"),

    ("validate", "VGG file", "--vgg-path good/vq.pt --lpips-path good/vq.pt", "vq.pt"),
    ("validate", "VGG file", "--vgg-path bad/empty.pt", "empty.pt"),
    ("validate", "--batch-size", f"--batch-size {HUGE}", reconstructions_are_right),
    ("validate", "--output", "--output new/x.json", "--output"),
    ("validate", "--vq-model", "--vq-model VQ-16", "vq.pt"),
    ("validate", "--image-size", "--image-size 18", "--image-size"),
    ("validate", "pictures", "--dataset imagenet --data-path bad/strange", strange_pictures_are_read),
    ("validate", "tokenizer file", "--vq-ckpt bad/cut.pt", "cut.pt"),

    ("sweep report", "folder", "good/vq.pt", "vq.pt"),
    ("sweep report", "folder", "bad/nowhere", "nowhere"),
    ("sweep report", "scores", "bad/sweep-list", "samples.json"),
    ("sweep report", "scores", "bad/sweep-no-numbers", "numbers"),
    ("sweep report", "scores", "bad/sweep-numbers-list", "numbers"),
    ("sweep report", "scores", "bad/sweep-numbers-text", "samples.json"),
    ("sweep report", "samples of scores", "bad/sweep-no-settings", "settings"),
    ("sweep report", "samples of scores", "bad/sweep-scale-text", "cfg_scale"),
    ("sweep report", "scores", "bad/sweep-other-metrics", "samples.json"),
    ("sweep report", "folder", "good/sweep", table_is_right),
    ("quickstart report", "folder", "good", "good"),
    ("quickstart report", "folder", "bad/nowhere", "nowhere"),
]


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns size and time of every file below a folder, which no refused command may change."""
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")
            if path.is_symlink() or not path.is_dir()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile lines")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_good(folder)
        make_bad(folder)
    return folder


def test_the_table_is_wide():
    kinds = collections.Counter(what for _, what, _, _ in ROWS)
    scripts = collections.Counter(COMMANDS[command][0] for command, _, _, _ in ROWS)
    assert kinds.most_common(1)[0][1] <= MOST_OF_A_KIND, kinds
    assert len(ROWS) >= FEWEST
    entries = [script for script in scripts if not script.startswith("scripts/")]
    assert len(entries) == 11 and all(scripts[script] >= FEWEST_OF_A_SCRIPT for script in entries), scripts


@pytest.mark.long
@pytest.mark.parametrize("command, what, flags, expected", ROWS)
def test_a_hostile_line_is_refused_in_one_line_or_does_what_it_says(folder, monkeypatch, capsys, command, what, flags,
                                                                    expected):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", [])
    shutil.rmtree(folder / "new", ignore_errors=True)
    words = shlex.split(flags)
    before = files_of(folder)
    code = call(command, *words)
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err + printed.out
    if callable(expected):
        assert code in (0, None), printed.err
        expected()
    else:
        assert code == 2, printed.out + printed.err
        assert len(printed.err.splitlines()) == 1 and expected in printed.err, printed.err
        assert files_of(folder) == before
