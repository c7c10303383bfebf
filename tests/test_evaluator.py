"""The evaluator and the scripts around it: files in, numbers and one-line errors out."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.runtime.files import file_sha256
from autoregressive.runtime.lock import hold
from conftest import ROOT
from evaluations.c2i import train_classifier
from evaluations.c2i.classifier import ClassifierFeatures, SmallClassifier, save_classifier
from evaluations.c2i.features import extract_features, to_numpy
from evaluations.c2i.npz_reader import NpzImages
from processes import run_here
from tokenizer.tokenizer_image.images import dataset_sha256, open_dataset

EVALUATE, MAKE_REFERENCE = "evaluations/c2i/evaluator.py", "evaluations/c2i/make_reference.py"
TRAIN = "evaluations/c2i/train_classifier.py"
SCORE = ("ref.npz", "samples.npz", "--classifier", "classifier.pt")
ON_DIGITS = ("--dataset", "digits", "--data-path", "val", "--val-path", "val", "--image-size", 8)
SIZE = 12           # pixels
NUM_CLASSES = 3
SETTINGS = {"class_names": ["cat", "dog", "owl"], "image_size": SIZE, "accuracy": 0.875,
            "num_val": 40, "dataset": "imagenet", "seed": 0}


def random_pictures(count, seed, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A working folder with ref.npz, samples.npz and classifier.pt.

    There are 90 pictures in ref.npz, and 80 in samples.npz, with labels and settings.
    """
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_classifier("classifier.pt", SmallClassifier(NUM_CLASSES), SETTINGS)
    np.savez("ref.npz", arr_0=random_pictures(90, 0))
    np.savez("samples.npz", arr_0=random_pictures(80, 1), labels=np.arange(80) % NUM_CLASSES,
             settings=np.array(json.dumps({"cfg_scale": 2.0})))
    return tmp_path


def call(script, *words):
    assert run_here(script, *words) == 0


def refusal(capsys, script, *words):
    """Returns the one line with which a script refuses its arguments."""
    capsys.readouterr()
    assert run_here(script, *words) == 2
    printed = capsys.readouterr()
    assert not printed.out and len(printed.err.splitlines()) == 1, printed.err
    return printed.err


def test_a_command_prints_the_lines_of_adm_and_leaves_them_beside_the_samples(files):
    before = file_sha256("samples.npz")
    done = subprocess.run([sys.executable, ROOT / EVALUATE, "ref.npz", "samples.npz",
                           "--classifier", "classifier.pt", "--batch-size", "32"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = [line.split(": ") for line in done.stdout.splitlines()]
    assert [title for title, _ in printed] == [
        "Inception Score", "FID", "sFID", "Precision", "Recall", "Label agreement",
        "Validation accuracy of the classifier"]
    assert (files / "samples.txt").read_text() == done.stdout
    record = json.loads((files / "samples.json").read_text())
    assert record["numbers"] == {title: float(number) for title, number in printed}
    assert record["reference"]["sha256"] == file_sha256("ref.npz")
    assert record["reference"]["num_images"] == 90
    assert record["samples"]["settings"] == {"cfg_scale": 2.0}
    assert record["samples"]["num_images"] == 80
    assert record["feature_network"]["name"] == "small classifier classifier.pt (not Inception)"
    assert record["numbers"]["Validation accuracy of the classifier"] == SETTINGS["accuracy"]
    assert file_sha256("samples.npz") == before
    assert sorted(path.name for path in files.iterdir()) == [
        "classifier.pt", "ref.npz", "samples.json", "samples.npz", "samples.txt"]


def test_offline_it_says_where_to_put_inception(files, capsys, monkeypatch):
    monkeypatch.setattr("evaluations.c2i.inception.INCEPTION_URL", "http://127.0.0.1:9/graph.pb")
    line = refusal(capsys, EVALUATE, "ref.npz", "samples.npz", "--backend", "torch")
    path = "pretrained_models/classify_image_graph_def.pb"
    assert f"{path}: could not be downloaded (<urlopen error " in line
    assert "get it from http://127.0.0.1:9/graph.pb and put it there" in line
    assert not (files / "samples.txt").exists() and not list(files.glob("pretrained_models/*"))
    line = refusal(capsys, EVALUATE, "ref.npz", "samples.npz", "--backend", "torch",
                   "--inception-path", "no.pb")
    assert "no.pb: expected the frozen Inception graph" in line


def test_fewer_metrics_and_another_output(files, capsys):
    call(EVALUATE, *SCORE, "--metrics", "recall,fid", "--output", "there/scores.json")
    printed = capsys.readouterr()
    assert [line.split(":")[0] for line in printed.out.splitlines()][:2] == ["FID", "Recall"]
    assert (files / "there/scores.txt").is_file() and not (files / "samples.txt").exists()
    assert json.loads((files / "there/scores.json").read_text())["warnings"] == []


def test_label_agreement_is_the_fraction_of_labels_that_the_classifier_gives(files, capsys):
    pictures = random_pictures(80, 1)
    given = ClassifierFeatures("classifier.pt").features(pictures)[2].argmax(axis=1)
    given[:20] = (given[:20] + 1) % NUM_CLASSES
    np.savez("samples.npz", arr_0=pictures, labels=given)
    call(EVALUATE, *SCORE, "--metrics", "is")
    assert "Label agreement: 0.75\n" in capsys.readouterr().out


def test_fewer_pictures_than_features_are_a_warning(files, capsys):
    np.savez("samples.npz", arr_0=random_pictures(30, 1))
    call(EVALUATE, *SCORE, "--metrics", "fid")
    warning = "warning: FID is biased upwards: 30 sample pictures for 64 features"
    assert warning in capsys.readouterr().err
    assert len(json.loads((files / "samples.json").read_text())["warnings"]) == 1


def test_numbers_do_not_depend_on_the_batch_size(files):
    network, images = ClassifierFeatures("classifier.pt"), NpzImages("samples.npz")
    whole, parts = (extract_features(network, images, batch_size, lambda count: None)
                    for batch_size in (80, 7))
    assert whole.pool.shape == (80, 64) and whole.spatial.shape == (80, 3 * 3 * 7)
    assert whole.probabilities.shape == (80, NUM_CLASSES)
    for name in ("pool", "spatial", "probabilities"):
        np.testing.assert_allclose(getattr(whole, name), getattr(parts, name), rtol=1e-4, atol=1e-6)


def test_features_come_back_in_one_copy_as_contiguous_float32_arrays():
    torch.manual_seed(0)
    tensors = [torch.randn(5, 4), torch.randn(5, 7).bfloat16(), torch.randn(9, 5).t()]
    arrays = to_numpy(*tensors)
    for tensor, array in zip(tensors, arrays, strict=True):
        assert array.dtype == np.float32 and array.flags.c_contiguous
        assert np.array_equal(array, tensor.float().numpy())


def test_spatial_features_are_the_first_channels_of_the_middle_map(files):
    pictures = random_pictures(5, 2)
    payload = torch.load("classifier.pt", weights_only=True)
    model = SmallClassifier(NUM_CLASSES).eval()
    model.load_state_dict(payload["model"])
    middle = model.maps(torch.from_numpy(pictures))[1].detach().numpy()            # (5, 64, 3, 3)
    spatial = ClassifierFeatures("classifier.pt").features(pictures)[1].reshape(5, 3, 3, 7)
    np.testing.assert_allclose(spatial, middle[:, :7].transpose(0, 2, 3, 1), rtol=1e-5, atol=1e-6)


def test_a_feature_that_is_not_finite_is_an_error(files):
    class Broken:
        name = "broken network"

        def features(self, images):
            return (np.full((len(images), 4), np.nan, np.float32),) * 3

    with pytest.raises(ValueError, match="samples.npz: expected finite features.*broken network"):
        extract_features(Broken(), NpzImages("samples.npz"), 8, lambda count: None)


BAD_FILES = {
    "no arr_0": ({"pictures": random_pictures(9, 0)},
                 "expected pictures under arr_0, found pictures"),
    "floats": ({"arr_0": np.zeros((9, SIZE, SIZE, 3), np.float32)}, "found float32"),
    "channels": ({"arr_0": np.zeros((9, SIZE, SIZE, 4), np.uint8)}, "(9, 12, 12, 4)"),
    "no pictures": ({"arr_0": np.zeros((0, SIZE, SIZE, 3), np.uint8)}, "expected pictures, found"),
    "objects": ({"arr_0": np.array([None, {}])}, "found object"),
    "one picture": ({"arr_0": random_pictures(1, 0)}, "expected at least 4 pictures"),
    "size": ({"arr_0": random_pictures(9, 0, size=15)}, "expected pictures of 12 x 12 pixels"),
    "settings": ({"arr_0": random_pictures(9, 0), "settings": np.arange(2)},
                 "expected settings as one JSON object"),
    "label count": ({"arr_0": random_pictures(9, 0), "labels": np.arange(8)},
                    "expected labels as 9 integers"),
    "label range": ({"arr_0": random_pictures(9, 0), "labels": np.arange(9)},
                    "expected labels in 0 .. 2"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_samples_are_refused_in_one_line(files, capsys, case):
    arrays, message = BAD_FILES[case]
    np.savez("bad.npz", **arrays)
    line = refusal(capsys, EVALUATE, "ref.npz", "bad.npz", "--classifier", "classifier.pt")
    assert message in line and "bad.npz" in line
    assert not list(files.glob("bad.[tj]*"))


def save(path, count=9, seed=0, size=SIZE, **settings):
    arrays = {name: settings.pop(name) for name in ("labels", "mu", "sigma") if name in settings}
    np.savez(path, arr_0=random_pictures(count, seed, size),
             settings=np.array(json.dumps(settings)), **arrays)


SAMPLES = {"kind": "samples"}
RECONSTRUCTIONS = {"kind": "reconstructions", "images_sha256": "one"}
FID_REFERENCE = {"kind": "fid reference"}
RFID_REFERENCE = {"kind": "rfid reference"}
NAMES = SETTINGS["class_names"]
LABELS = np.arange(9) % NUM_CLASSES
# Settings of the reference and of the samples, and words of the refusal.
PAIRS = {
    "samples as reference": (
        SAMPLES, {}, "ref.npz: expected a reference, found samples; the order is"),
    "swapped": (
        SAMPLES, FID_REFERENCE, "ref.npz: expected a reference, found samples"),
    "swapped, rfid": (
        RECONSTRUCTIONS, RFID_REFERENCE, "expected a reference, found reconstructions"),
    "reference as samples": (
        {}, FID_REFERENCE, "samples.npz: expected samples, found a fid reference"),
    "reference of ADM as samples": (
        {}, {"mu": np.zeros(64)}, "samples.npz: expected samples, found a reference"),
    "fid for rfid": (
        FID_REFERENCE, RECONSTRUCTIONS,
        "expected a rfid reference, since samples.npz holds reconstructions; "
        "found a fid reference"),
    "rfid for fid": (
        RFID_REFERENCE, SAMPLES, "expected a fid reference, since samples.npz"),
    "number": (
        RFID_REFERENCE | {"count": 8}, RECONSTRUCTIONS, "ref.npz: expected 9 pictures of 12 x 12"),
    "number, unknown": (
        {"count": 8}, RECONSTRUCTIONS, "originals of samples.npz, found 8 pictures of 12 x 12"),
    "set": (
        RFID_REFERENCE | {"images_sha256": "two"}, RECONSTRUCTIONS,
        "ref.npz: expected the originals of samples.npz, found other images"),
    "names of samples": (
        {}, {"labels": LABELS, "class_names": ["dog", "cat", "owl"]},
        "samples.npz: expected the 3 classes of small classifier classifier.pt (not Inception), "
        "in order, found dog instead of cat"),
    "names of the reference": (
        {"class_names": ["cat", "dog", "hen"]}, {"labels": LABELS, "class_names": NAMES},
        "ref.npz: expected the 3 classes of small classifier"),
    "number of names": (
        {}, {"labels": LABELS, "class_names": [*NAMES, "hen"]}, "in order, found 4 of them"),
}


@pytest.mark.parametrize("case", PAIRS)
def test_files_that_do_not_belong_together_are_refused(files, capsys, case):
    reference, samples, message = PAIRS[case]
    save("ref.npz", **reference)
    save("samples.npz", seed=1, **samples)
    assert message in refusal(capsys, EVALUATE, *SCORE)


@pytest.mark.parametrize("reference, samples", [
    (RFID_REFERENCE | {"images_sha256": "one"}, RECONSTRUCTIONS),
    (RFID_REFERENCE, RECONSTRUCTIONS),
    ({}, RECONSTRUCTIONS),
    (FID_REFERENCE, FID_REFERENCE),                              # real pictures: the floor
    (FID_REFERENCE | {"class_names": NAMES}, SAMPLES | {"labels": LABELS, "class_names": NAMES}),
    ({"class_names": ["other"]}, {"class_names": ["another"]}),  # no labels to compare
    ({"kind": ["odd"]}, {"kind": 7})])
def test_files_that_may_belong_together_are_scored(files, reference, samples, capsys):
    save("ref.npz", **reference)
    save("samples.npz", seed=1, **samples)
    Path("samples.json").write_text("what made them")
    call(EVALUATE, *SCORE, "--metrics", "precision")
    assert "Precision: " in capsys.readouterr().out
    of_val = samples is RECONSTRUCTIONS             # val.py's numbers stay
    assert (Path("samples.json").read_text() == "what made them") == of_val
    record = Path("samples.rfid.json" if of_val else "samples.json")
    assert "Precision" in json.loads(record.read_text())["numbers"]


STATISTICS = {
    "NaN": (np.full(64, np.nan), np.eye(64),
            "mu and sigma: expected finite numbers, found 64 NaN"),
    "no covariance": (np.zeros(64), -np.eye(64),
                      "mu and sigma: expected a covariance, found a matrix"),
    "asymmetric": (np.zeros(64), np.triu(np.ones((64, 64))),
                   "expected a covariance, found an asymmetric"),
    "texts": (np.full(64, "x"), np.eye(64),
              "expected numbers under mu and sigma, found another type"),
    "one alone": (np.zeros(64), np.zeros(()),
                  "with 64 features, found shapes (64,) and ()"),
}


@pytest.mark.parametrize("case", STATISTICS)
def test_bad_statistics_of_a_reference_are_refused_with_its_name(files, capsys, case):
    mean, covariance, message = STATISTICS[case]
    save("ref.npz", mu=mean, sigma=covariance)
    line = refusal(capsys, EVALUATE, *SCORE)
    assert "ref.npz: " in line and message in line


def test_damage_that_shows_while_pictures_are_read_is_one_line(files, capsys):
    content = bytearray((files / "samples.npz").read_bytes())
    content[len(content) // 2] ^= 255
    (files / "samples.npz").write_bytes(content)
    assert run_here(EVALUATE, *SCORE) == 2
    assert not (files / "samples.json").exists()
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert "error: samples.npz: expected a whole npz, Bad CRC" in last_line


@pytest.mark.parametrize("script, outputs, words", [
    (EVALUATE, ("made.json", "made.txt"), (*SCORE, "--metrics", "recall")),
    (MAKE_REFERENCE, ("made.npz",), ("--data-path", "ref.npz", "--image-size", SIZE)),
    (TRAIN, ("made.pt",), (*ON_DIGITS, "--max-steps", 1)),
])
def test_a_start_removes_what_killed_ones_left_and_is_alone(files, capsys, script, outputs, words):
    for name in outputs:
        (files / f".{name}.host.7.tmp").touch()
    with hold(outputs[0]):
        (files / f".{outputs[0]}.host.8.tmp").touch()           # of the start that holds it
        line = refusal(capsys, script, *words, "--output", outputs[0])
        assert "expected to be the only one who writes here" in line
        assert (files / f".{outputs[0]}.host.8.tmp").exists()
    call(script, *words, "--output", outputs[0])
    assert sorted(path.name for path in files.glob("*made*")) == sorted(outputs)


@pytest.mark.parametrize("change, words, is_reused", [
    ({}, (), True),
    ({}, ("--metrics", "fid"), False),
    ({"cfg_scale": 3.0}, (), False),
    ({"global_seed": 7}, (), False),
    ({"reference": 1}, (), False),
    ({"classifier": 1}, (), False),
    ({"damaged": 1}, (), False)])
def test_a_record_is_reused_for_the_same_samples_reference_and_network(
        files, change, words, is_reused, capsys):
    settings = {"cfg_scale": 2.0, "global_seed": 0}
    save("samples.npz", seed=1, **settings)
    call(EVALUATE, *SCORE, "--metrics", "recall")
    printed = capsys.readouterr().out
    if "reference" in change:
        save("ref.npz", seed=2)
    if "classifier" in change:
        torch.manual_seed(1)
        save_classifier("classifier.pt", SmallClassifier(NUM_CLASSES), SETTINGS)
    if "damaged" in change:
        (files / "samples.json").write_text("[]")
    changed = {name: change[name] for name in change.keys() & settings.keys()}
    save("samples.npz", seed=1, **settings | changed)
    call(EVALUATE, *SCORE, "--reuse", *(words or ("--metrics", "recall")))
    found = capsys.readouterr()
    assert ("by an earlier start" in found.err) == is_reused
    assert not is_reused or found.out == printed


def test_ready_statistics_give_the_numbers_of_computed_ones(files, capsys):
    call(MAKE_REFERENCE, "--data-path", "ref.npz", "--image-size", SIZE, "--output", "ready.npz",
         "--classifier", "classifier.pt")
    results = []
    for reference in ("ref.npz", "ready.npz"):
        call(EVALUATE, reference, "samples.npz", "--classifier", "classifier.pt")
        results.append(json.loads((files / "samples.json").read_text()))
    assert results[1]["reference"]["ready_statistics"] == ["fid", "sfid"]
    for title, number in results[0]["numbers"].items():
        assert results[1]["numbers"][title] == pytest.approx(number, rel=1e-5), title


def test_statistics_of_another_network_are_refused(files, capsys):
    call(MAKE_REFERENCE, "--data-path", "ref.npz", "--image-size", SIZE, "--output", "ready.npz",
         "--classifier", "classifier.pt")
    torch.manual_seed(1)
    save_classifier("other.pt", SmallClassifier(NUM_CLASSES), SETTINGS)
    line = refusal(capsys, EVALUATE, "ready.npz", "samples.npz", "--classifier", "other.pt")
    assert "make the reference again with this network" in line
    np.savez("inception.npz", arr_0=random_pictures(9, 0), mu=np.zeros(20), sigma=np.eye(20))
    line = refusal(capsys, EVALUATE, "inception.npz", *SCORE[1:])
    network = "small classifier classifier.pt (not Inception)"
    assert f"expected mu and sigma of {network} with 64 features" in line


@pytest.fixture
def folder(files):
    """An image folder of two classes: 7 dark pictures and 5 light ones, 20 x 16 pixels."""
    for name, count, level in (("dark", 7, 40), ("light", 5, 200)):
        class_folder = files / "images" / name
        class_folder.mkdir(parents=True)
        for index in range(count):
            picture = Image.new("RGB", (20, 16), (level + index, level, level))
            picture.save(class_folder / f"{index}.png")
    return files / "images"


def test_a_folder_becomes_a_reference(folder, capsys):
    call(MAKE_REFERENCE, "--data-path", folder, "--image-size", SIZE, "--output", "made.npz",
         "--kind", "rfid")
    images = NpzImages("made.npz")
    pictures = np.concatenate(list(images.batches(5)))
    assert pictures.shape == (12, SIZE, SIZE, 3)
    np.testing.assert_array_equal(pictures[:, 0, 0, 0], [*range(40, 47), *range(200, 205)])
    np.testing.assert_array_equal(images.labels(), [0] * 7 + [1] * 5)
    assert images.settings["kind"] == "rfid reference" and images.settings["num_images"] == 12
    assert images.settings["class_names"] == ["dark", "light"]
    assert "ADM centre crop" in images.settings["resize"]
    assert file_sha256("made.npz")
    assert np.load("made.npz", allow_pickle=False)["arr_0"].dtype == np.uint8


def test_fewer_pictures_are_spread_evenly_and_equal_commands_give_equal_files(folder, capsys):
    for name in ("one.npz", "two.npz"):
        call(MAKE_REFERENCE, "--data-path", folder, "--image-size", SIZE, "--output", name,
             "--num-images", 4)
    images = NpzImages("one.npz")
    np.testing.assert_array_equal(next(images.batches(9))[:, 0, 0, 0], [40, 43, 46, 202])
    assert file_sha256("one.npz") == file_sha256("two.npz")


@pytest.mark.parametrize("script, words", [
    (MAKE_REFERENCE, ("--output", "made.npz", "--image-size", SIZE)),
    (TRAIN, ("--output", "made.pt", "--image-size", 8, "--max-steps", 2, "--batch-size", 4)),
])
def test_broken_pictures_are_left_out_and_listed_up_to_a_fraction(folder, capsys, script, words):
    (folder / "light" / "2.png").write_bytes(b"no picture")
    words = ["--data-path", folder, *words]
    if script == TRAIN:
        words += ["--val-path", folder]
    assert run_here(script, *words) == 1
    printed = capsys.readouterr().out
    assert "1 of 12 images are broken" in printed and "light/2.png" in printed
    assert not list(folder.parent.glob("*made*"))
    call(script, *words, "--max-failures", 0.1)
    assert "1 of 12 images are broken, and they are left out" in capsys.readouterr().out
    if script == TRAIN:
        assert ClassifierFeatures("made.pt").settings["num_val"] == 11
        return
    images = NpzImages("made.npz")
    pictures = next(images.batches(20))
    np.testing.assert_array_equal(pictures[:, 0, 0, 0], [*range(40, 47), 200, 201, 203, 204])
    np.testing.assert_array_equal(images.labels(), [0] * 7 + [1] * 4)
    assert images.settings["num_images"] == 11 and images.settings["num_source_images"] == 12
    failed, = images.settings["failed"]
    assert (failed["row"], failed["path"]) == (9, "light/2.png")


def test_a_reference_of_originals_knows_which_pictures_these_are(folder, capsys):
    words = ("--image-size", SIZE, "--kind", "rfid")
    call(MAKE_REFERENCE, "--data-path", folder, *words, "--output", "made.npz")
    call(MAKE_REFERENCE, "--data-path", "made.npz", *words, "--output", "again.npz")
    call(MAKE_REFERENCE, "--data-path", "made.npz", *words, "--output", "some.npz",
         "--num-images", 5)
    call(MAKE_REFERENCE, "--data-path", folder, *words, "--output", "fewer.npz",
         "--num-images", 5)
    made, again, some, fewer = (NpzImages(f"{name}.npz").settings["images_sha256"]
                                for name in ("made", "again", "some", "fewer"))
    assert made == again == dataset_sha256(open_dataset("imagenet", folder)) != fewer
    assert some is None


@pytest.mark.parametrize("lr", [1e3, 1e30])
def test_a_classifier_whose_training_diverged_is_not_saved(files, capsys, lr):
    assert run_here(TRAIN, *ON_DIGITS, "--max-steps", 60, "--output", "new.pt", "--lr", lr) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "the training diverged; choose a smaller --lr" in line
    assert not list(files.glob("*new*"))


def test_a_classifier_with_weights_that_are_not_finite_is_not_saved(files):
    model = SmallClassifier(NUM_CLASSES)
    model.lower[0][1].running_var[3] = torch.inf                # a loss in training does not see it
    words = "new.pt: expected finite weights.*lower.0.1.running_var.*diverged"
    with pytest.raises(ValueError, match=words):
        save_classifier("new.pt", model, SETTINGS)
    assert not list(files.glob("*new*"))


def test_the_classifier_learns_and_is_reproducible(folder, capsys):
    for name in ("a.pt", "b.pt"):
        call(TRAIN, "--data-path", folder, "--val-path", folder, "--image-size", "8",
             "--batch-size", "6", "--max-steps", "25", "--output", name,
             "--global-seed", "3", "--device", "cpu")
    network = ClassifierFeatures("a.pt")
    assert network.settings["accuracy"] == 1 and network.settings["num_val"] == 12
    assert network.settings["class_names"] == ["dark", "light"] and network.settings["seed"] == 3
    assert network.image_size == 8 and network.sha256 == ClassifierFeatures("b.pt").sha256


def test_a_wider_classifier_has_more_features(folder):
    call(TRAIN, "--data-path", folder, "--val-path", folder, "--image-size", "8",
         "--batch-size", "6", "--max-steps", "2", "--output", "wide.pt",
         "--width", "40", "--flip", "--device", "cpu")
    network = ClassifierFeatures("wide.pt")
    assert network.settings["width"] == 40
    assert network.features(random_pictures(3, 0)[:, :8, :8])[0].shape == (3, 80)


def test_flip_mirrors_some_pictures_and_leaves_the_others():
    pictures = torch.arange(3, dtype=torch.uint8).reshape(1, 1, 3, 1).expand(200, 2, 3, 3)
    torch.manual_seed(0)
    rows = train_classifier.flip(pictures)[:, 0, :, 0].tolist()
    assert 70 < rows.count([2, 1, 0]) < 130 and rows.count([0, 1, 2]) + rows.count([2, 1, 0]) == 200


def test_shift_moves_whole_pictures_and_repeats_the_border():
    picture = torch.arange(5 * 5, dtype=torch.uint8).reshape(1, 5, 5, 1).expand(200, 5, 5, 3)
    torch.manual_seed(0)
    moved = train_classifier.shift(picture, reach=1)
    channel = picture[:1, ..., 0].float()
    padded = torch.nn.functional.pad(channel, (1, 1, 1, 1), mode="replicate")[0].byte()
    allowed = {tuple(padded[top:top + 5, left:left + 5].flatten().tolist())
               for top in range(3) for left in range(3)}
    assert {tuple(each.flatten().tolist()) for each in moved[..., 0]} == allowed
