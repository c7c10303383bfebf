"""Training a tokenizer: its data, its losses, and the script from start to finish."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.runtime.checkpoint import read_checkpoint, save_checkpoint
from autoregressive.runtime.distributed import Session, keyed_random
from autoregressive.runtime.loader import BatchOrder, read_ahead
from autoregressive.runtime.optim import OptimSettings
from processes import run_forked, run_here, start, start_and_kill, without_time
from tokenizer.tokenizer_image import vq_trainer
from tokenizer.tokenizer_image.crops import TrainingCrops
from tokenizer.tokenizer_image.discriminator import PatchDiscriminator
from tokenizer.tokenizer_image.images import center_crop, open_dataset, random_crop, to_float
from tokenizer.tokenizer_image.loading import load_vq
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel
from tokenizer.validation.metrics import codebook_usage
from waits import NoWaits

SCRIPT, VALIDATE = "tokenizer/tokenizer_image/vq_train.py", "tokenizer/validation/val.py"
DATA_AND_MODEL = ("--dataset digits --data-path val --image-size 8 "
                  "--vq-model VQ-4-small --codebook-size 48").split()
SMALL = [*DATA_AND_MODEL, *("--mixed-precision none --num-workers 0 --global-batch-size 14 "
                            "--perceptual-weight 0 --disc-weight 0").split()]


def train(results, *flags):
    """Runs the script in this process and returns its exit code."""
    return run_here(SCRIPT, *SMALL, "--results-dir", results, *flags)


def test_an_epoch_visits_every_image_once_and_drops_the_last_incomplete_batch():
    order = BatchOrder(23, 5, seed=1)
    batches = [order.rows(step) for step in range(8)]
    assert [epoch for epoch, _ in batches] == [0] * 4 + [1] * 4
    for epoch in (0, 1):
        rows = np.concatenate([rows for _, rows in batches[4 * epoch:4 * epoch + 4]])
        assert len(rows) == len(set(rows.tolist())) == 20
    assert not np.array_equal(batches[0][1], batches[4][1])


def test_parts_of_processes_make_up_the_batch_and_a_later_start_continues_the_order():
    order = BatchOrder(23, 6, seed=1)
    whole = [order.rows(step)[1].tolist() for step in range(9)]
    first, second = ([order.rows(step, part)[1].tolist() for step in range(9)]
                     for part in (range(0, 3), range(3, 6)))
    assert [one + other for one, other in zip(first, second, strict=True)] == whole
    later = BatchOrder(23, 6, seed=1)
    assert [later.rows(step)[1].tolist() for step in range(5, 9)] == whole[5:]


def make_crops(seed, smallest_crop, flip):
    dataset = open_dataset("digits", "val")
    return TrainingCrops(dataset, BatchOrder(len(dataset), 7, seed), 16, smallest_crop, flip)


def test_crops_depend_on_seed_epoch_and_row_alone():
    crops = make_crops(5, 0.5, flip=True)
    keys = [(0, 3), (1, 3), (0, 4), (1, 2)]
    forward = [crops.crop(*key) for key in keys]
    backward = [crops.crop(*key) for key in keys[::-1]]
    assert np.array_equal(forward, backward[::-1])
    assert not np.array_equal(forward[0], forward[1])
    assert not np.array_equal(make_crops(6, 0.5, flip=True).crop(0, 3), crops.crop(0, 3))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_of_crops_are_the_crops_of_their_rows(num_workers):
    crops = make_crops(5, 0.5, flip=True)
    keys = [(step, range(2, 6)) for step in (41, 42, 43, 0)]
    for key, found in zip(keys, read_ahead(crops, keys, num_workers), strict=True):
        epoch, rows = crops.order.rows(*key)
        assert found.dtype == torch.uint8 and epoch == (key[0] >= 42)
        assert np.array_equal(found, [crops.crop(epoch, row) for row in rows])


BROKEN_ROWS = (2, 3, 17)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two folders of pictures of one class: `broken`, of 24 with three broken ones, and `whole`."""
    folder = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)
    for name in ("whole", "broken"):
        (folder / name / "a").mkdir(parents=True)
    for row in range(24):
        path = folder / "broken" / "a" / f"{row:02d}.png"
        Image.fromarray(noise.integers(256, size=(9 + row, 12, 3), dtype=np.uint8)).save(path)
        if row not in BROKEN_ROWS:
            (folder / "whole" / "a" / path.name).write_bytes(path.read_bytes())
    content = (folder / "broken/a/02.png").read_bytes()
    (folder / "broken/a/02.png").write_bytes(content[:len(content) // 2])
    (folder / "broken/a/03.png").write_text("not a picture")
    Image.new("RGB", (600000, 1)).save(folder / "broken/a/17.png")
    return folder


@pytest.mark.parametrize("num_workers", [0, 2])
def test_in_place_of_a_broken_picture_comes_the_next_whole_one_in_every_worker(photos, num_workers):
    dataset = open_dataset("imagenet", photos / "broken")
    order = BatchOrder(24, 6, seed=1)
    crops = TrainingCrops(dataset, order, 16, 0.8, True, max_failures=0.2)
    keys = [(step, range(6)) for step in range(4)]
    for key, batch in zip(keys, read_ahead(crops, keys, num_workers), strict=True):
        for row, crop in zip(order.rows(*key)[1], batch.numpy(), strict=True):
            used = {2: 4, 3: 4, 17: 18}.get(row, row)
            random = keyed_random(1, 0, 1 + row)
            expected = random_crop(dataset.read(used), 16, random, 0.8)
            assert np.array_equal(crop, expected[:, ::-1] if random.random() < 0.5 else expected)
    found = crops.failures(known=())
    expected = {row: f"a/{row:02d}.png" for row in BROKEN_ROWS}
    assert {row: path for row, (path, _) in found.items()} == expected
    assert all(path in reason for path, reason in found.values())
    assert not crops.failures(known=BROKEN_ROWS)


def crops_of(folder, max_failures):
    dataset = open_dataset("imagenet", folder)
    return TrainingCrops(dataset, BatchOrder(24, 6, seed=1), 16, 0.8, True, max_failures)


@pytest.mark.parametrize("max_failures", [0.0, 0.12])
def test_one_broken_picture_too_many_is_an_error(photos, max_failures):
    crops = crops_of(photos / "broken", max_failures)
    with pytest.raises(ValueError, match="png: "):
        for row in range(24):
            crops.crop(0, row)


def test_no_whole_picture_is_an_error_whatever_their_fraction(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").touch()
    crops = crops_of(tmp_path, max_failures=1.0)
    message = "1.png|expected images that can be read, found none"
    with pytest.raises(ValueError, match=message):
        crops.crop(0, 0)


def photo_flags(photos, name):
    """Flags in which a later one counts."""
    return (*SMALL, "--dataset", "imagenet", "--data-path", photos / name,
            "--image-size", 16, "--global-batch-size", 6)


@pytest.mark.parametrize(("flags", "code", "words"), [
    (("--max-failures", 0.2), 0,
     ["3 of 24 images are broken, and others take their place",
      "3 of 24 images are broken, and they are left out"]),
    (("--max-failures", 0.05), 1,
     ["2 of 24 images are broken, such as", "More than --max-failures 0.05"]),
    (("--max-failures", 0.05, "--num-workers", 1), 1,
     ["More than --max-failures 0.05"]),
    (("--data-path", "{0}/whole", "--val-path", "{0}/broken"), 1,
     ["3 of 24 images are broken, such as"]),
])
def test_training_goes_on_without_broken_pictures_up_to_a_fraction(
        photos, tmp_path, capsys, flags, code, words):
    flags = [str(flag).format(photos) for flag in ("--val-path", photos / "broken", *flags)]
    found = run_here(SCRIPT, *photo_flags(photos, "broken"), "--max-steps", 4,
                     "--results-dir", tmp_path, *flags)
    printed = capsys.readouterr()
    assert found == code and "Traceback" not in printed.err
    for word in words:
        assert word in printed.out
    assert "broken: " in printed.out and "a/02.png" in printed.out + printed.err
    assert (tmp_path / "000-VQ-4-small" / "tokenizer.pt").is_file() == (code == 0)


def test_half_of_the_crops_are_mirrored_unless_flips_are_off():
    whole = center_crop(open_dataset("digits", "val").read(3), 16)
    assert np.array_equal(make_crops(0, 1.0, flip=False).crop(7, 3), whole)
    mirroring = make_crops(0, 1.0, flip=True)
    flipped = [np.array_equal(mirroring.crop(epoch, 3), whole[:, ::-1]) for epoch in range(40)]
    assert 8 < sum(flipped) < 32


def test_usage_and_perplexity_are_their_closed_forms():
    found = codebook_usage(torch.tensor([3.0, 0, 3, 3, 0]))
    assert found == pytest.approx({"codes_used": 3, "usage": 0.6, "perplexity": 3.0})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trained by two processes: a folder with all that they left."""
    folder = tmp_path_factory.mktemp("a tokenizer")
    done = start(SCRIPT, *SMALL, "--results-dir", folder, "--val-path", "val", "--max-steps", 18,
                 "--lr", 2e-3, "--log-every", 1, "--output", folder / "vq.pt", processes=2)
    assert done.returncode == 0, done.stderr
    return folder


def read_losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["reconstruction"] for row in rows if "reconstruction" in row]


def test_training_lowers_the_reconstruction_loss(trained):
    losses = read_losses(trained / "000-VQ-4-small")
    assert len(losses) == 18 and losses[-1] < 0.7 * losses[0]


def test_checkpoint_loads_strictly_and_says_what_it_was_trained_on(trained):
    model, _ = load_vq(trained / "vq.pt", VQConfig("VQ-4-small", 48, 8))
    assert len(model.quantize.codebook_used.unique()) > 1
    settings = read_checkpoint(trained / "vq.pt")["settings"]
    expected = {"vq_model": "VQ-4-small", "codebook_size": 48, "codebook_embed_dim": 8,
                "image_size": 8, "dataset": "digits", "num_classes": 10, "steps": 18}
    assert settings.items() >= expected.items()


def test_result_and_pictures_lie_beside(trained):
    result = json.loads((trained / "vq.json").read_text())
    assert 5 < result["psnr"] < 40 and result["num_images"] == len(open_dataset("digits", "val"))
    assert 1 <= result["codes_used"] <= result["codebook_size"] == 48
    names = {path.name for path in (trained / "000-VQ-4-small").iterdir()}
    assert names >= {"config.json", "log.txt", "curves.png", "reconstructions.png", "finished.json"}


def test_one_process_trains_as_two_and_a_finished_run_is_left_alone(trained, tmp_path, capsys):
    flags = ("--max-steps", "5", "--lr", "2e-3", "--log-every", "1")
    assert train(tmp_path, *flags) == 0
    found = read_losses(tmp_path / "000-VQ-4-small")
    expected = read_losses(trained / "000-VQ-4-small")[:5]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert "is finished" not in capsys.readouterr().out
    assert train(tmp_path, *flags) == 0
    assert "is finished" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 1


GAN = ("--image-size 24 --disc-weight 0.5 --disc-start 3 --disc-adaptive-weight --ema "
       "--global-batch-size 8 --gradient-accumulation-steps 2 --revive-every 4 --log-every 1 "
       "--ckpt-steps 2 --max-steps 7 --val-every 5").split()


def gan_flags(photos):
    return (*photo_flags(photos, "whole"), *GAN, "--val-path", photos / "whole")


def rows_of(results):
    path, = results.glob("*/metrics.jsonl")
    return [without_time(json.loads(line)) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("processes", [0, pytest.param(2, marks=pytest.mark.long)])
def test_killed_and_resumed_training_of_both_networks_ends_bit_for_bit_like_a_straight_one(
        photos, tmp_path, processes):
    common = gan_flags(photos)
    straight = start(SCRIPT, *common, "--results-dir", tmp_path / "straight", processes=processes)
    assert straight.returncode == 0, straight.stderr
    killed = (*common, "--results-dir", tmp_path / "killed")

    def num_rows():
        found = list((tmp_path / "killed").glob("*/metrics.jsonl"))
        return len(found[0].read_text().splitlines()) if found else 0

    for goal in (3, 6):
        status = start_and_kill(SCRIPT, *killed, processes=processes,
                                when=lambda goal=goal: num_rows() >= goal)
        assert status == -9
    resumed = start(SCRIPT, *killed, processes=processes)
    assert resumed.returncode == 0, resumed.stderr
    assert rows_of(tmp_path / "straight") == rows_of(tmp_path / "killed")
    ends = [read_checkpoint(next((tmp_path / name).glob("*/checkpoints/0000007.pt")))
            for name in ("straight", "killed")]
    for end in ends:
        end["discriminator"] = end["discriminator"]["model"]
    for kind in ("model", "discriminator", "ema"):
        expected, found = (end[kind] for end in ends)
        assert all(torch.equal(expected[name], found[name]) for name in expected), kind
    assert ends[0]["steps"] == 7
    assert max(row.get("discriminator", 0) for row in rows_of(tmp_path / "killed")) > 0


def train_in_double(*flags):
    """Trains in float64.

    In float32 the rounding of another batch size puts one of the discriminator's 218,000 leaky
    ReLUs on the other side of zero, and that changes gradients by 1e-4 at once.
    """
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    return run_here(SCRIPT, *flags)


def test_two_processes_train_both_networks_as_one(photos, tmp_path):
    common = (*gan_flags(photos), "--gradient-accumulation-steps", 1)
    for processes in (0, 2):
        done = run_forked(train_in_double, *common, "--results-dir", tmp_path / f"{processes}",
                   processes=processes)
        assert done.returncode == 0, done.stderr
    compared = ("reconstruction", "codebook", "generator", "discriminator", "grad_norm", "val_psnr")
    for one, two in zip(rows_of(tmp_path / "0"), rows_of(tmp_path / "2"), strict=True):
        for name in one.keys() & compared:
            expected = pytest.approx(two[name], rel=1e-9, abs=1e-12)
            assert one[name] == expected, (one["step"], name)


def test_fine_tuning_starts_from_the_given_tokenizer_and_refuses_others(trained, tmp_path, capsys):
    assert train(tmp_path, "--max-steps", 1, "--vq-ckpt", trained / "vq.pt", "--log-every", 1) == 0
    tuned = read_losses(tmp_path / "000-VQ-4-small")
    from_scratch = read_losses(trained / "000-VQ-4-small")
    assert tuned[0] < 0.8 * from_scratch[0]
    assert train(tmp_path, "--vq-ckpt", trained / "vq.pt", "--codebook-size", 64) == 2
    assert f"--codebook-size: expected 48 as in {trained / 'vq.pt'}, got 64" in (
        capsys.readouterr().err)


SETTINGS = vq_trainer.TokenizerSettings(
    reconstruction_loss="l2", reconstruction_weight=1.0, perceptual_weight=0.0, disc_weight=0.5,
    entropy_ratio=0.1, disc_loss="hinge", disc_start=0, disc_adaptive_weight=True, revive_every=0,
    global_seed=0, mixed_precision="none", gradient_accumulation_steps=2)


def small_trainer():
    torch.manual_seed(0)
    model = VQModel(VQConfig("VQ-4-small", 48, 8))
    optim = OptimSettings(lr=1e-4, ema=True)
    networks = vq_trainer.Networks(model, PatchDiscriminator())
    session = Session(0, 1, torch.device("cpu"))
    return vq_trainer.TokenizerTrainer(networks, SETTINGS, optim, session, num_steps=9)


def test_no_step_waits_for_the_device():
    trainer = small_trainer()
    with NoWaits():
        for step in range(2):
            trainer.step(step, torch.zeros(4, 24, 24, 3, dtype=torch.uint8), 1e-4)


def test_codes_are_counted_as_bincount_counts_them():
    trainer = small_trainer()
    pictures = torch.randint(256, (4, 24, 24, 3), dtype=torch.uint8)
    expected = torch.zeros(48)
    for step in range(2):
        codes = trainer.model.quantize.codes(trainer.model.encode(to_float(pictures)))
        expected += torch.bincount(codes.flatten(), minlength=48)
        trainer.step(step, pictures, 1e-4)
    assert torch.equal(trainer.used, expected) and torch.equal(trainer.meter.counts, expected)
    assert expected.sum() == 2 * 4 * 36


def test_validation_reconstructs_a_set_into_an_npz_for_rfid(trained, tmp_path):
    for name in ("r.npz", "r.json"):
        (tmp_path / f".{name}.host.7.tmp").touch()              # of a start that was killed
    code = run_here(VALIDATE, *DATA_AND_MODEL, "--vq-ckpt", trained / "vq.pt",
                    "--output", tmp_path / "r.npz", "--num-workers", 0, "--batch-size", 50)
    assert code == 0
    with np.load(tmp_path / "r.npz") as arrays:
        assert arrays["arr_0"].shape == (296, 8, 8, 3) and len(arrays["labels"]) == 296
        assert json.loads(str(arrays["settings"]))["kind"] == "reconstructions"
    found = json.loads((tmp_path / "r.json").read_text())["psnr"]
    expected = json.loads((trained / "vq.json").read_text())["psnr"]
    assert found == pytest.approx(expected, abs=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.npz"]


@pytest.fixture(scope="module")
def small_vq(tmp_path_factory):
    """A tokenizer of random weights."""
    path = tmp_path_factory.mktemp("small") / "vq.pt"
    torch.manual_seed(0)
    save_checkpoint(path, {"model": VQModel(VQConfig("VQ-4-small", 48, 8)).state_dict()})
    return path


def validate(photos, name, small_vq, output, *flags):
    return run_here(VALIDATE, *DATA_AND_MODEL, "--dataset", "imagenet",
                    "--data-path", photos / name, "--image-size", 16, "--vq-ckpt", small_vq,
                    "--num-workers", 0, "--batch-size", 1, "--vgg-path", "none",
                    "--output", output, *flags)


def test_validation_of_a_set_with_broken_pictures_is_that_of_the_whole_ones(
        photos, small_vq, tmp_path):
    assert validate(photos, "broken", small_vq, tmp_path / "broken.npz", "--max-failures", 0.2) == 0
    assert validate(photos, "whole", small_vq, tmp_path / "whole.npz") == 0
    results = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("broken", "whole")]
    assert results[0] == results[1] and results[0]["num_images"] == 21
    with np.load(tmp_path / "broken.npz") as broken, np.load(tmp_path / "whole.npz") as whole:
        assert broken["arr_0"].shape == (21, 16, 16, 3) and len(broken["labels"]) == 21
        assert all(np.array_equal(broken[name], whole[name]) for name in whole)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["broken.json", "broken.npz", "whole.json", "whole.npz"]


def test_validation_of_too_many_broken_pictures_leaves_a_list_and_nothing_else(
        photos, small_vq, tmp_path, capsys):
    assert validate(photos, "broken", small_vq, tmp_path / "r.npz") == 1
    printed = capsys.readouterr()
    assert printed.out.count("broken: ") == 3 and "3 of 24 images are broken" in printed.out
    assert "Traceback" not in printed.err
    assert not list(tmp_path.iterdir())


def test_codebook_of_one_code_trains_and_is_validated(photos, tmp_path, capsys):
    code = train(tmp_path, "--codebook-size", 1, "--max-steps", 4, "--revive-every", 2,
                 "--entropy-ratio", 0.1, "--val-path", "val", "--output", tmp_path / "vq.pt")
    assert code == 0
    assert json.loads((tmp_path / "vq.json").read_text())["perplexity"] == pytest.approx(1)
    code = run_here(VALIDATE, *DATA_AND_MODEL, "--codebook-size", 1,
                    "--vq-ckpt", tmp_path / "vq.pt", "--vgg-path", "none", "--num-workers", 0,
                    "--output", tmp_path / "r.npz")
    assert code == 0
    assert json.loads((tmp_path / "r.json").read_text())["codes_used"] == 1


def test_entropy_and_mixed_precision_train(tmp_path):
    flags = ("--max-steps", 2, "--entropy-ratio", 0.1, "--mixed-precision", "bf16")
    assert train(tmp_path, *flags) == 0
    row, = rows_of(tmp_path)
    assert row["step"] == 2 and row["entropy"] != 0 and np.isfinite(row["reconstruction"])


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(tmp_path, monkeypatch):
    def not_finite(a, b):
        return (a - b).mean() * torch.nan

    monkeypatch.setitem(vq_trainer.RECONSTRUCTION_LOSSES, "l2", not_finite)
    with pytest.raises(FloatingPointError, match="step 1"):
        train(tmp_path, "--max-steps", 2)
