"""The benchmarks: a report that loses no row, what fits a GPU, the published way, and gpu.sh."""

import json
import subprocess
import time

import pytest
import torch

from autoregressive.models.config import GPTConfig, gpt_config
from autoregressive.models.gpt import GPT
from conftest import ROOT
from processes import ENVIRONMENT
from scripts.benchmarks import gpu
from scripts.benchmarks.sampling import (
    PublishedWay,
    cache_bytes,
    check_fits,
    temporary_bytes,
    weight_bytes,
)
from scripts.benchmarks.turns import SKIPPED_FOR_TIME, DoesNotFit, Report

GPU_SH = ("bash", ROOT / "scripts/benchmarks/gpu.sh", "--device", "cpu", "--smoke")


def fail_with(error):
    raise error


def rows_of(folder):
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return {row["row"]: row for row in rows}


def test_an_error_is_that_of_its_row_alone(tmp_path, capsys):
    report = Report("part", tmp_path)
    out_of_memory = torch.OutOfMemoryError("CUDA out of memory. Tried it.")
    report.measure("too large", lambda: fail_with(DoesNotFit("2 + 3 = 5 GiB, free are 4 GiB")))
    report.measure("larger than thought", lambda: fail_with(out_of_memory))
    report.measure("wrong", lambda: fail_with(TypeError("a list\nof many lines")))
    right = {"published": {"images/s": 2.0}, "ours": {"images/s": 3.0}, "more": {"images/s": 9.0}}
    report.measure("right", lambda: right)
    rows = rows_of(tmp_path)
    table = (tmp_path / "results.md").read_text()
    assert rows["too large"]["note"] == "does not fit: 2 + 3 = 5 GiB, free are 4 GiB"
    assert rows["larger than thought"]["note"] == "out of memory: CUDA out of memory"
    assert rows["wrong"]["note"] == "failed: TypeError: a list"
    assert "Traceback" in capsys.readouterr().err
    assert "| part | right | images/s | 2 | 3 | 1.5 | more 9 |" in table
    with pytest.raises(SystemExit):
        report.finish()


def test_a_row_that_would_not_end_in_time_is_not_begun(tmp_path):
    report = Report("part", tmp_path, minutes=0.15 / 60)
    report.measure("first", lambda: time.sleep(0.1) or {})
    report.measure("second", lambda: fail_with(AssertionError))
    assert rows_of(tmp_path)["second"]["note"] == SKIPPED_FOR_TIME and not report.num_failed


@pytest.mark.parametrize("batch_size, fits", [(128, True), (512, False)])
def test_gpt_xl_of_576_tokens_fits_into_80_gib_up_to_a_batch(batch_size, fits):
    config = gpt_config("GPT-XL", grid=24)
    with torch.device("meta"):
        model = GPT(config)
    parts = {"weights": weight_bytes(model, torch.bfloat16),
             "cache": cache_bytes(config, batch_size, torch.bfloat16)}
    temporaries = temporary_bytes(config, batch_size, torch.bfloat16)["published"]
    if fits:
        check_fits(80 * 2**30, **parts, temporaries=temporaries)
        return
    message = r"weights 1\.4 \+ cache 101\.2 \+ temporaries .* GiB, free are 80\.0 GiB"
    with pytest.raises(DoesNotFit, match=message):
        check_fits(80 * 2**30, **parts, temporaries=temporaries)


def test_the_published_way_computes_the_logits_of_the_model():
    torch.manual_seed(0)
    config = GPTConfig("small", 2, 4, 16, grid=3, vocab_size=20, num_classes=1000, num_kv_heads=2)
    model = GPT(config).eval()
    torch.nn.init.normal_(model.output.weight)
    way = PublishedWay(model.requires_grad_(False), batch_size=2, compiled=False)
    labels = torch.tensor([3, 5])
    tokens = way.generate(labels)
    expected = model(tokens[:, :-1].repeat(2, 1), torch.tensor([3, 5, 1000, 1000]))
    assert torch.allclose(way.logits, expected[:, -1], atol=1e-5)       # of the last step


@pytest.mark.long
def test_gpu_sh_fills_every_section_in_tiny_sizes(tmp_path):
    words = [*GPU_SH, "--out", "there", "--minutes", "60"]
    done = subprocess.run(words, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "there" / "results.json").read_text())
    assert {row["section"] for row in results["rows"]} == {section.name for section in gpu.SECTIONS}
    assert all(row["values"] and not row["note"] for row in results["rows"]), results
    assert (tmp_path / "there" / "results.md").read_text() in done.stdout


def test_gpu_sh_does_not_mix_two_runs(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    words = [*GPU_SH, "--out", tmp_path]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2 and "expected a folder without results" in done.stderr
