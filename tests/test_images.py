"""Image sets, crops and conversions against computed fixtures, torchvision and Pillow."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from autoregressive.runtime.entry import Parser
from autoregressive.runtime.log import LOGGER
from tokenizer.tokenizer_image.crops import CenterCrops
from tokenizer.tokenizer_image.images import (
    add_source_args,
    center_crop,
    crop_names,
    cut_crops,
    enlarged_side,
    open_dataset,
    random_crop,
    read_picture,
    to_float,
    to_uint8,
)
from tokenizer.validation.metrics import psnr


@pytest.fixture(scope="module")
def photo(fixture):
    return fixture("data_center_crop")["image"].numpy()


@pytest.mark.parametrize("size", [64, 256, 281])
def test_center_crop_is_adms(fixture, photo, size):
    expected = fixture("data_center_crop")[f"center_crop_{size}"]
    assert np.array_equal(center_crop(photo, size), expected)


def test_center_crop_of_a_tall_picture_is_adms(fixture, photo):
    turned = np.ascontiguousarray(np.rot90(photo))
    expected = fixture("data_center_crop")["center_crop_64_rot"]
    assert np.array_equal(center_crop(turned, 64), expected)


def test_center_crop_enlarges_as_adm(fixture, photo):
    expected = fixture("data_center_crop_422")["center_crop_422"]
    assert np.array_equal(center_crop(photo, 422), expected)


def ten_crop(picture, size, crop_range):
    enlarged = center_crop(picture, enlarged_side(size, crop_range))
    return cut_crops(enlarged[None], size, crop_names(True, True))[0]


@pytest.mark.parametrize("crop_range", [1.1, 1.05])
def test_ten_crops_are_the_published_ones(fixture, photo, crop_range):
    expected = fixture("data_ten_crop")[f"ten_crop_64_{crop_range}"]
    assert torch.equal(to_float(ten_crop(photo, 64, crop_range)), expected)


@pytest.mark.parametrize(("size", "crop_range"), [(16, 1.1), (15, 1.3), (16, 1.0)])
def test_ten_crops_are_torchvisions_at_any_size(photo, size, crop_range):
    enlarged = Image.fromarray(center_crop(photo, int(size * crop_range)))
    expected = np.stack([np.asarray(crop) for crop in transforms.TenCrop(size)(enlarged)])
    assert np.array_equal(ten_crop(photo, size, crop_range), expected)


def test_flip_pair_is_the_published_one(fixture, photo):
    pair, = cut_crops(center_crop(photo, 64)[None], 64, crop_names(ten_crop=False, mirrored=True))
    assert torch.equal(to_float(pair), fixture("data_flip_and_resize")["flip_pair_64"])


def test_uint8_rule_with_and_without_resize_is_the_published_one(fixture):
    expected = fixture("data_flip_and_resize")
    assert torch.equal(to_uint8(expected["post_in"], 32), expected["post_uint8"])
    assert torch.equal(to_uint8(expected["post_in"]), expected["post_uint8_noresize"])
    antialiased = to_uint8(expected["post_in"], 32, antialias=True)
    assert not torch.equal(antialiased, expected["post_uint8"])


def test_every_uint8_value_survives_the_round_trip():
    values = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 16, 48, 1)
    values = values.expand(1, 16, 48, 3)
    assert torch.equal(to_uint8(to_float(values)), values)


def test_random_crop_is_a_function_of_its_generator(photo):
    crops = [random_crop(photo, 30, np.random.default_rng(seed), 0.8) for seed in (0, 1, 0)]
    assert crops[0].shape == (30, 30, 3) and crops[0].dtype == np.uint8
    assert np.array_equal(crops[0], crops[2]) and not np.array_equal(crops[0], crops[1])


def test_random_crop_shows_the_published_fractions_of_the_shorter_side():
    columns = np.arange(0, 240, dtype=np.uint8)[None, :, None].repeat(240, axis=0).repeat(3, axis=2)
    shown = [np.ptp(random_crop(columns, 40, np.random.default_rng(seed), 0.8)[0, :, 0]) / 240
             for seed in range(200)]
    assert 0.74 < min(shown) < 0.82 and 0.93 < max(shown) <= 1


def test_random_crop_of_a_square_at_ratio_one_is_the_centre_crop(photo):
    square = photo[:300, :300]
    crop = random_crop(square, 40, np.random.default_rng(0), 1.0)
    assert np.array_equal(crop, center_crop(square, 40))


def test_pictures_of_both_orientations_and_single_pixels_give_full_crops():
    random = np.random.default_rng(0)
    for height, width in [(1, 1), (9, 50), (50, 9), (8, 8)]:
        picture = random.integers(256, size=(height, width, 3), dtype=np.uint8)
        for crop in (center_crop(picture, 16), random_crop(picture, 16, random, 0.8)):
            assert crop.shape == (16, 16, 3)


def save(path, array, mode=None, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **kwargs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photo):
    root = tmp_path_factory.mktemp("images")
    small = photo[:20, :30]
    for name in ("b/2.png", "b/10.PNG", "b/deep/1.webp", "a/x.JPEG", "C/y.jpg"):
        save(root / name, small)
    (root / "a" / "notes.txt").write_text("no image")
    (root / ".cache").mkdir()
    (root / "readme.txt").write_text("no class")
    return root


def test_folder_lists_the_rows_that_torchvision_lists(folder):
    ours = open_dataset("imagenet", folder)
    assert ours.class_names == ["C", "a", "b"]
    label_of_class = {"C": 0, "a": 1, "b": 2}
    expected = ImageFolder.make_dataset(str(folder), label_of_class,
                                        extensions=(".jpg", ".jpeg", ".png", ".webp"))
    found = [(str(folder / ours.name_of(row)), ours.labels[row]) for row in range(len(ours))]
    assert found == expected
    assert ours.labels.dtype == np.int64 and ours.read(4).shape == (20, 30, 3)


@pytest.fixture
def warnings(monkeypatch):
    """Returns the list of warnings that are logged from now on."""
    logged = []
    monkeypatch.setattr(LOGGER, "warning", lambda text, *values: logged.append(text % values))
    return logged


def test_nine_endings_have_the_rows_and_labels_of_torchvision(tmp_path, photo, warnings):
    small = photo[:4, :6]
    names = ("b/2.jpg", "b/3.JPEG", "b/4.png", "b/5.ppm", "b/6.bmp", "b/7.Tif", "b/8.tiff",
             "b/9.webp", "b-c/1.bmp", "b/x/1.ppm", "b/x-y/1.tif", "b/x/deep/1.bmp", "other/1.bmp")
    for name in names:
        save(tmp_path / "all" / name, small)
    save(tmp_path / "all" / "b" / "1.pgm", small[:, :, 0])
    (tmp_path / "all" / "b" / "linked").symlink_to(tmp_path / "all" / "other")
    ours, theirs = open_dataset("imagenet", tmp_path / "all"), ImageFolder(str(tmp_path / "all"))
    assert ours.class_names == theirs.classes and len(ours) == len(theirs) == 15 and not warnings
    for row, (path, label) in enumerate(theirs.samples):
        assert str(tmp_path / "all" / ours.name_of(row)) == path
        assert ours.labels[row] == label
        if not path.endswith((".jpg", ".JPEG")):
            assert np.array_equal(ours.read(row), np.asarray(theirs.loader(path)))


@pytest.mark.parametrize(("make", "rows", "what"), [
    (lambda root: (root / "a" / "notes.txt").touch(), [], "1 .txt"),
    (lambda root: (root / "a" / "1").touch(), [], "1 without an ending"),
    (lambda root: (root / "a" / "._1.png").touch(), [], "1 hidden"),
    (lambda root: (root / "loose.png").touch(), [], "1 outside the class folders"),
    (lambda root: os.mkfifo(root / "a" / "pipe.png"), [], "1 pipes or devices"),
    (lambda root: (root / "a" / "device.png").symlink_to("/dev/zero"), [], "1 pipes or devices"),
    (lambda root: (root / "a" / "again").symlink_to(root / "a"), [], "1 links that lead back"),
    (lambda root: (root / "a" / "all").symlink_to(root), [], "1 links that lead back"),
    (lambda root: (root / "a" / "above").symlink_to(root.parent), [], "1 links that lead back"),
    (lambda root: (root / "a" / "itself.png").symlink_to(root / "a" / "itself.png"),
     ["a/itself.png"], None),
    (lambda root: (root / "a" / "nowhere.png").symlink_to("/no/such/file"),
     ["a/nowhere.png"], None),
])
def test_what_is_left_out_is_counted_and_pipes_are_not_opened_and_loops_end(
        tmp_path, warnings, make, rows, what):
    save(tmp_path / "root" / "a" / "1.png", np.zeros((3, 4, 3), np.uint8))
    make(tmp_path / "root")
    ours = open_dataset("imagenet", tmp_path / "root")
    assert [ours.name_of(row) for row in range(len(ours))] == ["a/1.png", *rows]
    warning = f"{tmp_path / 'root'}: left out 1 entries that are no images: {what}"
    assert warnings == ([warning] if what else [])


def test_links_that_lead_in_a_circle_end(tmp_path, warnings):
    for name in ("a/x/1.png", "a/y/2.png"):
        save(tmp_path / name, np.zeros((3, 4, 3), np.uint8))
    (tmp_path / "a/x/other").symlink_to(tmp_path / "a/y")
    (tmp_path / "a/y/other").symlink_to(tmp_path / "a/x")
    ours = open_dataset("imagenet", tmp_path)
    assert [ours.name_of(row) for row in range(len(ours))] == [
        "a/x/1.png", "a/x/other/2.png", "a/y/2.png", "a/y/other/1.png"]
    assert len(warnings) == 1 and "2 links that lead back" in warnings[0]


def test_folder_called_like_an_image_is_entered_and_no_row_as_in_torchvision(tmp_path, warnings):
    for name in ("a/1.png", "a/x.png/inside.jpg", "a/y.png", "other/1.jpg"):
        save(tmp_path / name, np.zeros((3, 4, 3), np.uint8))
    (tmp_path / "a" / "empty.png").mkdir()
    (tmp_path / "a" / "linked.png").symlink_to(tmp_path / "other")
    ours, theirs = open_dataset("imagenet", tmp_path), ImageFolder(str(tmp_path))
    assert [ours.name_of(row) for row in range(len(ours))] == [
        "a/1.png", "a/y.png", "a/linked.png/1.jpg", "a/x.png/inside.jpg", "other/1.jpg"]
    found = [str(tmp_path / ours.name_of(row)) for row in range(len(ours))]
    assert found == [path for path, _ in theirs.samples]
    assert not warnings


@pytest.mark.parametrize(("make", "found"), [
    (lambda root: None, "found none"),
    (lambda root: root.write_text(""), "found a file"),
    (lambda root: root.mkdir(), "0 files and no folder"),
    (lambda root: save(root / "1.png", np.zeros((4, 4, 3), np.uint8)), "1 files and no folder"),
    (lambda root: (root / "cat").mkdir(parents=True), "cat: expected images"),
])
def test_folder_without_classes_or_images_is_refused(tmp_path, make, found):
    make(tmp_path / "data")
    with pytest.raises(ValueError, match=found):
        open_dataset("imagenet", tmp_path / "data")


def test_modes_of_image_files_become_rgb(tmp_path):
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    grey = np.stack([ramp] * 3, axis=2)
    colour = np.stack([ramp, ramp.T, 255 - ramp], axis=2)
    alpha = np.concatenate([colour, ramp[:, :, None]], axis=2)
    save(tmp_path / "grey.png", ramp)
    save(tmp_path / "grey_alpha.png", np.stack([ramp, ramp.T], axis=2))
    save(tmp_path / "grey16.png", ramp.astype(np.uint16) * 257)
    save(tmp_path / "alpha.png", alpha)
    opaque = np.concatenate([colour, np.full((8, 8, 1), 255, np.uint8)], axis=2)
    save(tmp_path / "alpha.webp", opaque, lossless=True)
    Image.fromarray(grey).quantize(64).save(tmp_path / "palette.png")
    save(tmp_path / "cmyk.jpg", colour, mode="CMYK", quality=100)
    for name, expected in [("grey.png", grey), ("grey_alpha.png", grey), ("grey16.png", grey),
                           ("alpha.png", colour), ("alpha.webp", colour), ("palette.png", grey)]:
        picture = read_picture(tmp_path / name)
        assert picture.dtype == np.uint8 and np.array_equal(picture, expected), name
    assert np.abs(read_picture(tmp_path / "cmyk.jpg").astype(int) - colour.astype(int)).mean() < 12


def test_exif_orientation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees"
    Image.new("RGB", (12, 5)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").shape == (5, 12, 3)


def test_broken_files_are_value_errors_that_name_them(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    save(tmp_path / "whole.jpg", noise)
    save(tmp_path / "whole.png", noise)
    jpg = (tmp_path / "whole.jpg").read_bytes()
    png = (tmp_path / "whole.png").read_bytes()
    broken = {"truncated.jpg": jpg[:len(jpg) // 2],
              "empty.jpg": b"",
              "text.jpg": b"not a picture",
              "truncated.png": png[:len(png) // 2],
              "damaged.png": png[:60] + b"\0" * 40 + png[100:]}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.png").mkdir()
    for name in (*broken, "folder.png", "missing.png"):
        with pytest.raises(ValueError, match=name):
            read_picture(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 3)
    with pytest.raises(ValueError, match="whole.jpg"):
        read_picture(tmp_path / "whole.jpg")


@pytest.mark.parametrize("size", [(1, 60000), (60000, 1)])
def test_strip_that_would_be_enlarged_beyond_memory_is_one_failure(tmp_path, size):
    save(tmp_path / "a" / "1.png", np.zeros((300, 200, 3), np.uint8))
    save(tmp_path / "a" / "strip.png", np.zeros((*size, 3), np.uint8))
    batch = CenterCrops(open_dataset("imagenet", tmp_path), 256)[range(2)]
    (row, (path, reason)), = batch.failures.items()
    assert (row, path) == (1, "a/strip.png")
    assert "a/strip.png: expected a picture whose sides differ less" in reason
    assert len(batch.whole()) == 1
    with pytest.raises(ValueError, match="sides differ less"):
        random_crop(np.zeros((*size, 3), np.uint8), 256, np.random.default_rng(0), 0.8)


def test_picture_of_floats_is_refused_instead_of_clipped(tmp_path):
    Image.fromarray(np.full((3, 4), 0.5, np.float32)).save(tmp_path / "1.tif")
    with pytest.raises(ValueError, match="1.tif: expected an image, found floating-point values"):
        read_picture(tmp_path / "1.tif")


def test_digits_splits_are_disjoint_whole_and_stratified():
    train, val = open_dataset("digits", "train"), open_dataset("digits", "val")
    rows = [images.name_of(row) for images in (train, val) for row in range(len(images))]
    assert len(set(rows)) == len(train) + len(val) == 1797
    assert 280 <= len(val) <= 320
    fractions = np.bincount(val.labels) / np.bincount(np.concatenate([train.labels, val.labels]))
    assert fractions.min() > 0.15 and fractions.max() < 0.18
    assert train.class_names == list("0123456789")


def test_digits_are_scikit_learns_pictures_with_their_labels():
    from sklearn.datasets import load_digits

    images, digits = open_dataset("digits", "val"), load_digits()
    for row in (0, 7, len(images) - 1):
        source = int(images.name_of(row))
        assert images.labels[row] == digits.target[source]
        picture = images.read(row)
        assert picture.shape == (8, 8, 3) and picture.dtype == np.uint8
        assert np.abs(picture[:, :, 1] / 255 * 16 - digits.images[source]).max() < 0.04


def test_unknown_split_and_data_set_are_refused(capsys):
    with pytest.raises(ValueError, match="train or val"):
        open_dataset("digits", "/path/to/imagenet")
    parser = Parser("test")
    add_source_args(parser)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--dataset", "cifar", "--data-path", "train"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--dataset: invalid choice: 'cifar' (choose from " in error
    assert "imagenet" in error and "digits" in error and error.count("\n") == 1


def test_psnr_is_its_closed_form_for_every_picture():
    pictures = torch.zeros(3, 4, 5, 3, dtype=torch.uint8)
    others = pictures.clone()
    others[1], others[2] = 255, 51
    expected = torch.tensor([torch.inf, 0.0, 20 * np.log10(5)], dtype=torch.float64)
    torch.testing.assert_close(psnr(pictures, others), expected)
