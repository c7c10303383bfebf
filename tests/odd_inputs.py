"""Command lines and files that look wrong and are right, by script, with checks of results.

A row starts from the command of hostile_files.COMMANDS that is right, and adds flags, of which
the last counts. It ends with exit code 0 and a result that passes the check.
"""

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.runtime.checkpoint import read_checkpoint
from hostile_files import HUGE, SCORE
from processes import contents
from wrong_inputs_of_images import RUN


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
    """Returns the check that a run in a folder of results came to its end.

    Its metrics were damaged, so they are not compared.
    """
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
    found, expected = (np.asarray(Image.open(path)) for path in (paths[0], "good/classes.png"))
    assert np.array_equal(found, expected)


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
    name = "reconstructions.npz"
    with np.load(f"new/{name}") as found, np.load(f"good/{name}") as expected:
        assert np.array_equal(found["labels"], expected["labels"])
        assert np.abs(found["arr_0"].astype(int) - expected["arr_0"]).max() <= 1


def check_is_plotted(output: str = "new/check.png") -> None:
    assert Image.open(output).size[0] > 100


def table_is_right() -> None:
    table = json.loads(Path("good/sweep/sweep.json").read_text())
    first, second = table["scores"]
    assert (first["cfg_scale"], second["cfg_scale"]) == (1.0, 1.5) and first["FID"] == second["FID"]


def is_a_page(folder: str) -> Callable[[], None]:
    """Returns the check that a page was written into a folder."""
    return lambda: HTMLParser().feed(Path(folder, "report.html").read_text())


# The flag or kind of file that looks wrong, flags, and a check of the result.
Row = tuple[str, str, Callable[[], None]]
ODD_INPUTS: dict[str, list[Row]] = {
    "extract": [
        ("weights", "--vq-ckpt bad/vq-half.pt", codes_are_nearly_right),
        ("pictures", "--dataset imagenet --data-path bad/pictures --max-failures 0.9",
         pictures_but_broken_ones_are_extracted),
        ("--num-workers", f"--num-workers {HUGE}", codes_are_right),
    ],
    "check": [
        ("--num-rows", f"--num-rows {HUGE}", check_is_plotted),
    ],
    "train": [
        *(("metrics.jsonl", f"--results-dir bad/results-metrics-{name}",
           is_finished_in(f"bad/results-metrics-{name}"))
          for name in ("binary", "numbers")),
        *(("checkpoint of a run", f"--results-dir bad/results-checkpoint-{name}",
           is_right_in(f"bad/results-checkpoint-{name}"))
          for name in ("text", "folder", "steps", "moments", "tokenizer")),
        ("mapping", "--mapping-path bad/mapping-int8.pt", training_is_right),
        ("--epochs", f"--epochs {HUGE}", training_is_right),
        ("--loss-mib", f"--loss-mib {HUGE}", training_is_right),
        ("--ckpt-minutes", "--ckpt-minutes 1e308", training_is_right),
        ("--warmup", f"--warmup {HUGE}", a_run_is_finished),
        ("--results-dir", "--results-dir 'new/Größe 模型 \n b'", training_is_right),
    ],
    "sample many": [
        ("--labels", "--labels ٣", samples_are_threes),
        ("--preset", "--preset IAR-XXL-384", flags_that_are_given_win),
    ],
    "sample few": [
        ("--class-ids", "--class-ids ' 3 , 7 '", picture_is_right),
        ("--class-ids", "--class-ids '３,７'", picture_is_right),
        ("--output", "--output new/\udcff\udcfe.png", picture_is_right),
        ("--temperature", "--temperature 1e-300", some_picture_is_there),
        ("--temperature", "--temperature 1e308", some_picture_is_there),
    ],
    "balance": [
        ("codebook", "--vq-ckpt bad/vq-zeros.pt", mapping_is_a_permutation),
        ("path", "--vq-ckpt \"bad/Tökenizer 模型 'a b'.pt\"", mapping_is_right),
        ("--cluster-size", "--cluster-size 64", mapping_is_a_permutation),
        ("--cluster-size", "--cluster-size 1", mapping_is_a_permutation),
        ("--seed", f"--seed {2**63 - 1}", mapping_is_a_permutation),
    ],
    "evaluate": [
        ("npz file", "good/reference.npz bad/twice.npz", scores_are_right),
        ("settings in npz", "good/reference.npz bad/settings-kind-list.npz", scores_are_right),
        ("statistics in npz", "bad/mu-complex.npz good/samples.npz --metrics is", scores_are_right),
        ("--metrics", f"{SCORE} --metrics fid,fid", scores_are_right),
        ("--batch-size", f"{SCORE} --batch-size {HUGE}", scores_are_right),
    ],
    "reference": [
        ("--data-path", "--data-path good/samples.npz", reference_holds_the_samples),
        ("pictures", "--dataset imagenet --data-path bad/strange", strange_pictures_are_read),
    ],
    "classifier": [
        ("--lr", "--lr 1e-320", classifier_is_right),
        ("--max-steps", "--max-steps 1", classifier_is_right),
        ("--global-seed", f"--global-seed {2**64 - 1}", classifier_is_right),
    ],
    "tokenizer": [
        ("--revive-every", f"--revive-every {HUGE}", a_run_is_finished),
    ],
    "validate": [
        ("--batch-size", f"--batch-size {HUGE}", reconstructions_are_right),
        ("pictures", "--dataset imagenet --data-path bad/strange", strange_pictures_are_read),
    ],
    "report": [
        ("folder", "good/run", is_a_page("good/run")),
        ("folder", "good/tokenizer_run", is_a_page("good/tokenizer_run")),
        *(("metrics.jsonl", f"bad/results-metrics-{name}/{RUN}",
           is_a_page(f"bad/results-metrics-{name}/{RUN}")) for name in ("binary", "numbers")),
    ],
    "sweep report": [
        ("folder", "good/sweep", table_is_right),
    ],
}
