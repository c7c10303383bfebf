"""Sampling: the same pictures however they are divided, killed and resumed; chosen classes."""

import json
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.models.config import gpt_config
from autoregressive.models.gpt import GPT
from autoregressive.models.sampler import Sampler
from autoregressive.runtime.checkpoint import save_checkpoint
from autoregressive.sample import sample_c2i, sample_c2i_ddp
from processes import run_forked, run_here, start, start_and_kill
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel

SAMPLE, LOOK = "autoregressive/sample/sample_c2i_ddp.py", "autoregressive/sample/sample_c2i.py"
RECORD = {"gpt_model": "GPT-tiny", "grid": 4, "cluster_size": 8,
          "class_names": ["apple", "fig", "pear"], "label_dropout": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GPT and a VQ model of random weights, whose pictures differ from each other."""
    folder = tmp_path_factory.mktemp("sampling")
    torch.manual_seed(0)
    config = gpt_config("GPT-tiny", grid=4, vocab_size=64, num_classes=3)
    model = GPT(config)
    average = GPT(config)
    for gpt in (model, average):
        torch.nn.init.normal_(gpt.output.weight, std=0.3)
    vq = VQModel(VQConfig("VQ-4-small", 64, 8))
    weights = model.state_dict()
    averaged = average.state_dict()
    recorded = RECORD | {"vocab_size": 64, "num_classes": 3, "image_size": 16}
    unguided = RECORD | {"label_dropout": 0}
    files = {
        "0000007.pt": {"model": weights, "ema": averaged, "settings": RECORD},
        "bare.pt": weights,
        "strong.pt": {"model": weights, "settings": RECORD | {"recipe": "strong",
                                                              "image_size": 16}},
        "average.pt": {"model": averaged, "settings": RECORD},
        "recorded.pt": {"model": weights, "settings": recorded},
        "unguided.pt": {"model": weights, "settings": unguided},
        "vq.pt": {"model": vq.state_dict()},
    }
    for name, payload in files.items():
        save_checkpoint(folder / name, payload)
    return folder


def flags(folder, *more, name="0000007.pt"):
    return ("--gpt-ckpt", folder / name, "--vq-ckpt", folder / "vq.pt", "--gpt-model", "GPT-tiny",
            "--num-classes", 3, "--image-size", 16, "--downsample-size", 4, "--cluster-size", 8,
            "--vq-model", "VQ-4-small", "--codebook-size", 64, "--image-size-eval", 16,
            "--precision", "none", *more)


def ddp_flags(folder, out, *more, **which):
    return flags(folder, "--sample-dir", out, "--num-fid-samples", 40, *more, **which)


def sample(folder, out, *more, **which):
    assert run_here(SAMPLE, *ddp_flags(folder, out, *more, **which)) == 0
    return arrays_of(out)


def arrays_of(out):
    path, = out.glob("*.npz")
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected")
    return sample(folder, out, "--save-codes", "--per-proc-batch-size", 32)


def assert_equal(found, expected):
    for name in ("arr_0", "labels", "tokens"):
        assert np.array_equal(found[name], expected[name]), name


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_samples_do_not_depend_on_the_batch_size(folder, tmp_path, expected, batch_size):
    found = sample(folder, tmp_path, "--save-codes", "--per-proc-batch-size", batch_size)
    assert_equal(found, expected)


def test_killed_and_resumed_sampling_by_two_processes_gives_the_same(folder, tmp_path, expected):
    settings = ddp_flags(folder, tmp_path, "--save-codes", "--per-proc-batch-size", 1)

    def done_rows():
        return sum(np.count_nonzero(np.load(path)) for path in tmp_path.glob("*.rows/status.npy"))

    for goal in (5, 20):
        status = start_and_kill(SAMPLE, *settings, processes=2,
                                when=lambda goal=goal: done_rows() >= goal)
        assert status == -9 and goal <= done_rows() < 40
    done = start(SAMPLE, *settings, processes=2)
    assert done.returncode == 0, done.stderr
    assert_equal(arrays_of(tmp_path), expected)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".npz", ".png"]


def test_npz_carries_tokens_labels_and_what_they_depend_on(expected):
    assert expected["tokens"].shape == (40, 16) and expected["tokens"].dtype == np.uint16
    assert expected["arr_0"].shape == (40, 16, 16, 3)
    assert len(np.unique(expected["arr_0"], axis=0)) == 40
    settings = json.loads(str(expected["settings"]))
    assert settings["class_names"] == RECORD["class_names"] and len(settings["gpt_sha256"]) == 64


@pytest.mark.parametrize("labels, wanted", [
    ("balanced", np.arange(40) % 3),
    ("2,0,2", np.array([2, 0, 2] * 14)[:40]),
])
def test_labels_can_be_balanced_or_listed(folder, tmp_path, expected, labels, wanted):
    found = sample(folder, tmp_path, "--labels", labels, "--save-codes")
    assert np.array_equal(found["labels"], wanted)
    same = wanted == expected["labels"]                         # (seed, index, label) decide
    assert np.array_equal(found["tokens"][same], expected["tokens"][same])


def test_averaged_and_bare_weights_are_used_when_asked_for(folder, tmp_path, expected):
    average = sample(folder, tmp_path / "ema", "--weights", "ema", "--save-codes")
    assert_equal(average, sample(folder, tmp_path / "file", "--save-codes", name="average.pt"))
    assert not np.array_equal(average["tokens"], expected["tokens"])
    bare = sample(folder, tmp_path / "bare", "--from-fsdp", "--save-codes", name="bare.pt")
    assert_equal(bare, expected)


def test_antialiased_resize_is_another_file_with_other_pictures(folder, tmp_path):
    small = ("--image-size-eval", 8)
    published = sample(folder, tmp_path / "a", *small)
    other = sample(folder, tmp_path / "b", *small, "--resize", "antialias")
    assert published["arr_0"].shape == (40, 8, 8, 3)
    assert not np.array_equal(published["arr_0"], other["arr_0"])
    assert "-resize-antialias" in next((tmp_path / "b").glob("*.npz")).name


def test_classes_are_sampled_by_index_and_by_name(folder, tmp_path):
    for name, classes in (("a", "2,0"), ("b", "PEAR, apple")):
        more = ("--class-ids", classes, "--output", tmp_path / f"{name}.png")
        assert run_here(LOOK, *flags(folder, *more)) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert Image.open(tmp_path / "a.png").size == (4 * 68 + 4, 2 * (64 + 15 + 4) + 4)


@pytest.fixture
def sheet(folder, tmp_path):
    """One picture of each of the three classes, side by side on one PNG."""
    assert run_here(LOOK, *flags(folder, "--all-classes", "--output", tmp_path / "all.png")) == 0
    return np.asarray(Image.open(tmp_path / "all.png"))


def test_a_sheet_shows_one_picture_of_every_class(folder, tmp_path, sheet):
    words = ("--class-ids", "0,1,2", "--num-per-class", 1, "--output", tmp_path / "rows.png")
    assert run_here(LOOK, *flags(folder, *words)) == 0
    rows = np.asarray(Image.open(tmp_path / "rows.png"))        # the same, one below the other
    height, width = 64 + 15 + 4, 64 + 4                         # pixels from one to the next
    for label in range(3):
        row, column = divmod(label, 2)
        found = sheet[row * height:, column * width:][:height, :width]
        assert np.array_equal(found, rows[label * height:][:height, :width])
    assert sheet.shape == (2 * height + 4, 2 * width + 4, 3)


def test_many_classes_go_to_several_sheets_and_are_sampled_in_batches(
        folder, tmp_path, monkeypatch, capsys, sheet):
    monkeypatch.setattr(sample_c2i, "SHEET_COLUMNS", 1)
    monkeypatch.setattr(sample_c2i, "SAMPLED_TOGETHER", 2)
    assert run_here(LOOK, *flags(folder, "--all-classes", "--output", tmp_path / "x.png")) == 0
    height, width = 64 + 15 + 4, 64 + 4
    for label in range(3):
        row, column = divmod(label, 2)
        page = np.asarray(Image.open(tmp_path / f"x-{label}-{label}.png"))
        assert np.array_equal(page[:height, :width],
                              sheet[row * height:, column * width:][:height, :width])
    assert not (tmp_path / "x.png").exists()
    assert "3 pictures in" in capsys.readouterr().out


def test_the_sheets_of_a_thousand_classes_are_ten_of_a_hundred():
    sheets = sample_c2i.sheets_of_all(Path("out/all.png"), 1000)
    assert [sheet.path.name for sheet in sheets[:2]] == ["all-000-099.png", "all-100-199.png"]
    shown = [label for sheet in sheets for label in range(1000)[sheet.rows]]
    assert shown == list(range(1000)) and {sheet.columns for sheet in sheets} == {10}
    assert sample_c2i.sheets_of_all(Path("a.png"), 1001)[-1].path.name == "a-1000-1000.png"


def test_preset_of_another_model_is_refused(folder, capsys):
    words = ("--preset", "IAR-L-384", "--cfg-scale", 3, "--gpt-ckpt", folder / "0000007.pt")
    assert run_here(SAMPLE, *words, "--cluster-size", 8, "--gpt-model", "GPT-L") == 2
    assert "asked for GPT-L" in capsys.readouterr().err
    assert run_here(SAMPLE, *words) == 2        # the file is of another model: nothing was given
    printed = capsys.readouterr()
    path = folder / "0000007.pt"
    assert f"--preset: expected --gpt-model GPT-tiny as in {path}, got GPT-L" in printed.err
    assert len(printed.err.strip().splitlines()) == 1 and not printed.out


def test_guidance_follows_the_recipe_of_the_checkpoint_unless_it_is_given(
        folder, tmp_path, capsys):
    trained = sample(folder, tmp_path / "trained", name="strong.pt")
    assert "trained by recipe strong, so: --cfg-scale 4.5 --cfg-schedule linear" in (
        capsys.readouterr().out)
    sample(folder, tmp_path / "preset", "--preset", "IAR-B-256", "--gpt-model", "GPT-tiny",
           name="strong.pt")
    printed = capsys.readouterr().out
    assert "IAR-B-256: --gpt-model GPT-tiny --image-size 16" in printed
    assert "published: nothing for GPT-tiny at 16 pixels" in printed
    assert "--preset IAR-B-256: the checkpoint was trained by recipe strong" in printed
    same = ("--cfg-scale", 4.5, "--cfg-schedule", "linear", "--cfg-start", 1)
    assert np.array_equal(sample(folder, tmp_path / "given", *same)["arr_0"], trained["arr_0"])
    constant = sample(folder, tmp_path / "constant", "--cfg-schedule", "constant", "--cfg-scale", 2,
                      name="strong.pt")
    plain = sample(folder, tmp_path / "plain", "--cfg-scale", 2)
    assert np.array_equal(constant["arr_0"], plain["arr_0"])


@pytest.mark.parametrize("given, cfg_scale", [(("--cfg-scale", 1.5), 1.5), ((), 2.25)])
def test_guidance_that_is_given_wins_over_the_preset_even_if_it_is_the_default(
        folder, monkeypatch, given, cfg_scale):
    used = []

    def stop(file, settings, sampler, vq_config, device):
        used.append((settings, sampler))
        raise ValueError("seen enough")

    monkeypatch.setattr(sample_c2i_ddp, "load_pipeline", stop)
    words = ("--preset", "IAR-B-384", "--gpt-model", "GPT-B", "--gpt-ckpt", folder / "bare.pt")
    assert run_here(SAMPLE, *words, *given) == 2
    (settings, sampler), = used
    assert sampler == Sampler(cfg_scale=cfg_scale, cluster_size=128)
    assert (settings.gpt_model, settings.image_size, settings.cluster_size) == ("GPT-B", 384, 128)


def test_flags_that_the_checkpoint_records_need_not_be_given(folder, tmp_path, expected):
    words = ("--gpt-ckpt", folder / "recorded.pt", "--vq-ckpt", folder / "vq.pt",
             "--vq-model", "VQ-4-small", "--image-size-eval", 16, "--precision", "none",
             "--sample-dir", tmp_path, "--num-fid-samples", 40)
    assert run_here(SAMPLE, *words, "--save-codes") == 0
    assert_equal(arrays_of(tmp_path), expected)
    settings = json.loads(str(arrays_of(tmp_path)["settings"]))
    assert settings["gpt_model"] == "GPT-tiny"
    assert settings["codebook_size"] == 64 and settings["downsample_size"] == 4


def test_peak_memory_does_not_depend_on_the_number_of_samples(folder, tmp_path):
    peaks = []
    for count in (400, 1600):
        settings = ("--num-fid-samples", count, "--per-proc-batch-size", 50,
                    "--image-size-eval", 128)
        done = run_forked(sample_and_say_peak, *ddp_flags(folder, tmp_path / str(count), *settings))
        assert done.returncode == 0, done.stderr
        peaks.append(int(re.findall(r"PEAK (\d+)", done.stdout)[0]))
    assert arrays_of(tmp_path / "1600")["arr_0"].shape == (1600, 128, 128, 3)       # 79 MB
    assert peaks[1] - peaks[0] < 20 * 1024


def sample_and_say_peak(*flags):
    code = run_here(SAMPLE, *flags)
    print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return code


def test_sweep_ends_with_a_table_by_guidance_and_a_plot(tmp_path, capsys):
    for scale, fid in ((2.0, 3.5), (1.0, 9.0), (3.0, 4.0)):
        record = {"numbers": {"FID": fid, "Recall": 0.5},
                  "samples": {"settings": {"cfg_scale": scale, "num_fid_samples": 10,
                                           "global_seed": 3}}}
        path = tmp_path / "10-samples" / f"cfg-scale-{scale}" / "samples.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(record))
    assert run_here("scripts/sweep_report.py", tmp_path) == 0
    assert "lowest FID of 10 samples of seed 3: 3.5000 at scale 2.0" in capsys.readouterr().out
    table = json.loads((tmp_path / "sweep.json").read_text())
    settings = {"num_fid_samples": 10, "cfg_scale": 1.0, "cfg_schedule": "constant", "top_p": 1.0,
                "cfg_scale_within": None, "cfg_start": 1.0, "cfg_power": 1.0, "beta": None,
                "global_seed": 3}
    assert table["scores"][0] == settings | {"FID": 9.0, "Recall": 0.5}
    assert (tmp_path / "sweep.png").stat().st_size > 5000
    assert run_here("scripts/sweep_report.py", tmp_path / "empty") == 2


def test_damaged_samples_at_the_name_of_a_run_are_a_clear_error(folder, tmp_path, capsys):
    sample(folder, tmp_path)
    path, = tmp_path.glob("*.npz")
    path.write_bytes(path.read_bytes()[:1000])
    assert run_here(SAMPLE, *ddp_flags(folder, tmp_path)) == 2
    assert "expected a whole npz, File is not a zip file" in capsys.readouterr().err
