"""Kills at any moment, and two starts at one moment.

The result is that of a run that nobody disturbed.
"""

import random
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from autoregressive.runtime.checkpoint import save_checkpoint
from processes import (
    ENVIRONMENT,
    Pause,
    command,
    contents,
    run_forked,
    run_here,
    start,
    start_and_kill,
)
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel

SUFFIX = "kmeans+nearest-cluster_size=8.pt"
VQ = "--vq-model VQ-4-small --codebook-size 64"
GPT = "--gpt-model GPT-tiny --num-classes 10 --image-size 16 --downsample-size 4 --cluster-size 8"
DIGITS = "--dataset digits --data-path train --image-size 16 --num-workers 0"
RUN = "000-GPT-tiny-lambda=1-cluster_size=8"
# Flags of each script, to be started in a folder beside the folder `in`.
TRAIN = (f"{GPT} {VQ} --vocab-size 64 --code-path ../in/codes "
         f"--mapping-path ../in/mapping-{SUFFIX} --vq-ckpt ../in/vq-reorder-{SUFFIX} "
         "--results-dir gpt --mixed-precision none --global-batch-size 64 --max-steps 40 "
         "--log-every 1 --ckpt-steps 5 --val-every 12 --val-share 0.1 --ema --num-workers 0")
EXTRACT = f"{VQ} {DIGITS} --vq-ckpt ../in/vq.pt --code-path codes --batch-size 100"
SAMPLE = (f"{GPT} {VQ} --vq-ckpt ../in/vq-reorder-{SUFFIX} --gpt-ckpt ../in/gpt/{RUN} "
          "--image-size-eval 16 --precision none --num-fid-samples 300 --per-proc-batch-size 10 "
          "--sample-dir samples --save-codes")
TOKENIZER = (f"{VQ} {DIGITS} --val-path val --mixed-precision none --global-batch-size 16 "
             "--perceptual-weight 0 --disc-weight 0 --results-dir runs --max-steps 24 "
             "--ckpt-steps 4 --val-every 8 --log-every 1 --revive-every 5 --output vq.pt")
BALANCE = "--vq-ckpt ../in/vq.pt --cluster-size 8 --output-dir . --restarts 3"
BEGUN = [("os.rename", "config.json", 1), ("open", "log.txt", 1), ("open", "metrics.jsonl", 1)]


@dataclass(frozen=True)
class Series:
    """Kills of one command, one after the other.

    Attributes:
        script, flags, processes: the command.
        aims: moments by name: an event, the name of its file, and which of these events it is.
        num_random: kills at random moments of the whole command.
    """

    script: str
    flags: str
    processes: int
    aims: list[tuple[str, str, int]]
    num_random: int

    def words(self) -> tuple[str, ...]:
        return (self.script, *self.flags.split())

    def finish(self, folder: Path) -> None:
        """Runs the command to its end in a folder."""
        done = start(*self.words(), processes=self.processes, cwd=folder)
        assert done.returncode == 0, done.stderr

    def kill(self, folder: Path, moment: float | tuple[str, str, int], scratch: Path) -> bool:
        """Starts the command and kills it after some seconds, or at an aim.

        Returns:
            Whether it came to that.
        """
        pause = None
        if isinstance(moment, tuple):
            pause = Pause(*moment, mark=scratch / "paused")
            pause.mark.unlink(missing_ok=True)
            is_now = pause.mark.exists
        else:
            end = time.monotonic() + moment

            def is_now():
                return time.monotonic() >= end

        status = start_and_kill(*self.words(), processes=self.processes, when=is_now,
                                cwd=folder, pause=pause)
        assert status in (0, -9)
        return status == -9


SERIES = {
    "training": Series("autoregressive/train/train_c2i.py", TRAIN, 0, [
        *BEGUN,
        ("os.rename", "0000005.pt", 1),
        ("os.rename", "0000025.pt", 1),
        ("open", ".0000020.pt.*", 1),
        ("os.rename", "0000040.pt", 1),
        ("os.rename", "curves.png", 1),
        ("os.rename", "finished.json", 1)], 6),
    "training by two": Series("autoregressive/train/train_c2i.py", TRAIN, 2, [
        ("os.rename", "config.json", 1),
        ("os.rename", "0000015.pt", 1),
        ("open", ".0000030.pt.*", 1),
        ("os.rename", "finished.json", 1)], 4),
    "extraction": Series("autoregressive/train/extract_codes_c2i.py", EXTRACT, 0, [
        ("os.rename", "manifest.json", 1),
        ("os.rename", "codes.npy", 1),
        ("os.rename", "status.npy", 1),
        ("open", "status.npy", 9),
        ("open", "codes.npy", 20),
        ("os.rename", "manifest.json", 2),
        ("os.remove", "status.npy", 1)], 4),
    "sampling": Series("autoregressive/sample/sample_c2i_ddp.py", SAMPLE, 0, [
        ("os.rename", "identity.json", 1),
        ("os.rename", "arr_0.npy", 1),
        ("open", "status.npy", 20),
        ("os.rename", "*.png", 1),
        ("open", "*.npz*", 1),
        ("os.rename", "*.npz", 1),
        ("os.remove", "status.npy", 1),
        ("os.remove", "arr_0.npy", 1),
        ("os.remove", "identity.json", 1)], 4),
    "tokenizer": Series("tokenizer/tokenizer_image/vq_train.py", TOKENIZER, 0, [
        ("os.rename", "config.json", 1),
        ("os.rename", "0000008.pt", 1),
        ("os.rename", "vq.pt", 1),
        ("os.rename", "vq.json", 1),
        ("os.rename", "finished.json", 1)], 3),
    "clustering": Series("balance_k_means.py", BALANCE, 0, [
        ("os.rename", f"mapping-{SUFFIX}", 1),
        ("os.rename", f"mapping-{SUFFIX}.json", 1),
        ("os.rename", f"vq-reorder-{SUFFIX}", 1)], 2),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with `in`: a tokenizer of random weights, and what is made of it.

    That goes up to a GPT of few steps.
    """
    folder = tmp_path_factory.mktemp("kills")
    work = folder / "in"
    work.mkdir()
    torch.manual_seed(0)
    model = VQModel(VQConfig("VQ-4-small", 64, 8))
    save_checkpoint(work / "vq.pt", {"model": model.state_dict()})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        for name in ("extraction", "clustering", "training"):
            series = SERIES[name]
            assert run_here(series.script, *series.flags.split(), "--debug") == 0
    return folder


def folders(inputs, name):
    """Yields new folders, beside the folder `in`."""
    for number in range(100):
        folder = inputs / f"{name}-{number}"
        folder.mkdir()
        yield folder


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name


def test_sixty_kills():
    assert sum(len(series.aims) + series.num_random for series in SERIES.values()) == 60


@pytest.mark.long
@pytest.mark.parametrize("name", SERIES)
def test_killed_at_any_moment_the_same_command_ends_bit_for_bit_like_a_straight_run(
        inputs, tmp_path, name):
    series = SERIES[name]
    new_folders = folders(inputs, name)
    straight = next(new_folders)
    run_forked(int)                     # starts the server of forks, which takes seconds once
    began = time.monotonic()
    series.finish(straight)
    seconds = time.monotonic() - began
    expected = contents(straight)
    choose = random.Random(name)
    moments = [*series.aims, *(choose.uniform(0, 0.9 * seconds) for _ in range(series.num_random))]
    choose.shuffle(moments)
    folder = next(new_folders)
    for moment in moments:
        if series.kill(folder, moment, tmp_path):
            continue
        assert_same(contents(folder), expected)  # it came to its end before this moment
        folder = next(new_folders)
        while not series.kill(folder, moment, tmp_path):
            assert not isinstance(moment, tuple), f"{moment} never comes"
            moment /= 2                 # faster than the straight run was
            folder = next(new_folders)
    series.finish(folder)
    assert_same(contents(folder), expected)


@pytest.mark.long
@pytest.mark.parametrize("name", [
    "training", "training by two", "extraction", "sampling", "tokenizer"])
def test_of_two_starts_at_one_moment_one_works_and_one_leaves(inputs, name):
    series = SERIES[name]
    new_folders = folders(inputs, f"two starts of {name}")
    straight = next(new_folders)
    series.finish(straight)
    expected = contents(straight)
    refused_status = 1 if series.processes else 2  # of torchrun, or of the script itself
    for _ in range(10):
        folder = next(new_folders)
        words = command(*series.words(), processes=series.processes)
        pair = [subprocess.Popen(words, env=ENVIRONMENT, cwd=folder, text=True,
                                 stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
                for _ in range(2)]
        errors = [process.communicate()[1] for process in pair]
        statuses = [process.returncode for process in pair]
        assert sorted(statuses) == [0, refused_status], "\n".join(errors)
        error = errors[statuses.index(refused_status)]
        lines = [line for line in error.splitlines() if ": error: " in line]
        assert len(lines) == 1 and "expected to be the only one" in lines[0], error
        if series.processes:
            assert "exitcode  : 2" in error
            assert "Traceback (most recent call last):\n  File \"autoreg" not in error
        else:
            assert error.splitlines() == lines
        assert_same(contents(folder), expected)
