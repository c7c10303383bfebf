"""Shows that this tree computes bit for bit what another commit computed.

    python tests/compare_commits.py [--base COMMIT] [--work DIR] [--new TREE] [--only PART ...]

runs one small pipeline on the digits of scikit-learn with the code of both, two commands at a time
on the CPU, and compares whatever numbers, tensors and pixels they leave. The results of the base
stay in the work folder for the next call. A table ends it, and exit code 1 if anything differs. It
is no test: it takes two minutes a side.
"""

import argparse
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from autoregressive.models import config, gpt  # noqa: E402

# What the new side calls otherwise: words of a command, and parts of paths and of keys.
RENAMED = {
    "--max-updates": "--max-steps",
    "--ema": "--ema --ema-warmup",
    "--ckpt-updates": "--ckpt-steps",
    "--eval-every": "--val-every",
    "--eval-share": "--val-share",
    "heldout": "val",
    "heldout_psnr": "val_psnr",
    "heldout_usage": "val_usage",
    "heldout_token_loss": "val_token_loss",
    "heldout_cluster_loss": "val_cluster_loss",
    "heldout_cluster_accuracy": "val_cluster_accuracy",
    "updates": "steps",
    "Held-out accuracy of the classifier": "Validation accuracy of the classifier",
    "samples": "pictures",
}

# The jobs whose files the new side names by their method.
GREEDY = ("kmeans-greedy", "kmeans-best")

# The commands by name. Each job runs in a folder of its name; ../NAME/... waits for the job NAME, a
# * stands for the one path that fits, && begins another command, torchrun starts two processes, and
# ../images and ../original are there before all of them.
DIGITS = "--dataset digits --data-path train"
IMAGES = "--dataset imagenet --data-path ../images"
VQ = "--vq-model VQ-4-small --codebook-size 512"
GPT = "--gpt-model GPT-tiny --num-classes 10 --image-size 16 --downsample-size 4 --cluster-size 16"
REORDERED = "--vq-ckpt ../kmeans/*reorder*.pt"
TRAIN_VQ = f"tokenizer/tokenizer_image/vq_train.py {DIGITS} {VQ} --perceptual-weight 0 \
    --mixed-precision none --global-batch-size 32 --lr 1.5e-3 --lr-schedule linear --warmup 30 \
    --num-workers 0 --log-every 5 --max-updates 20 --results-dir . --output tokenizer.pt"
WHOLE = "--image-size 16 --disc-weight 0 --no-flip --smallest-crop 1"
EXTRACT = f"autoregressive/train/extract_codes_c2i.py {VQ} --vq-ckpt ../vq/tokenizer.pt \
    --image-size 16 --num-workers 0 --code-path ."
CHECK = "autoregressive/train/check_codes.py --vq-ckpt ../vq/tokenizer.pt --output check.png"
REORDER = "balance_k_means.py --vq-ckpt ../vq/tokenizer.pt --cluster-size 16 --output-dir ."
TRAIN_GPT = f"autoregressive/train/train_c2i.py {GPT} {VQ} {REORDERED} --vocab-size 512 \
    --mapping-path ../kmeans/mapping*.pt --code-path ../codes --mixed-precision none --lr 3e-3 \
    --global-batch-size 64 --log-every 5 --max-updates 20 --results-dir ."
SAMPLING = f"{GPT} {VQ} {REORDERED} --image-size-eval 16 --precision none"
SAMPLE = f"autoregressive/sample/sample_c2i_ddp.py {SAMPLING} --num-fid-samples 100 --sample-dir ."
GUIDED = "--gpt-ckpt ../gpt/*GPT* --cfg-scale 2 --top-p 0.9"
CLASSIFIER = "--classifier ../classifier/classifier.pt"
REFERENCE = "evaluations/c2i/make_reference.py --image-size 16 --output reference.npz"
SCORE = f"evaluations/c2i/evaluator.py {CLASSIFIER} --output scores.json"
JOBS = {
    "vq": f"python {TRAIN_VQ} {WHOLE} --val-path heldout --max-updates 60",
    "classifier": f"python evaluations/c2i/train_classifier.py {DIGITS} --val-path heldout \
        --image-size 16 --max-updates 40 --output classifier.pt",
    "codes": f"python {EXTRACT} {DIGITS} --no-flip",
    "kmeans": f"python {REORDER}",
    "gpt-ema": f"python {TRAIN_GPT} --ema --gradient-accumulation-steps 2 --drop-path-rate 0.1 \
        --eval-every 10 --eval-share 0.1 --validation_step 10",
    "gpt": f"python {TRAIN_GPT}",
    "codes-ten": f"torchrun {EXTRACT} {DIGITS} --ten-crop",
    # The same as "codes": stores of unequal size are chosen from otherwise.
    "codes-again": f"python {EXTRACT} {DIGITS} --no-flip",
    "codes-half": f"python {EXTRACT} --dataset digits --data-path heldout --precision bf16",
    "codes-images": f"python {EXTRACT} {IMAGES}",
    "check": f"python {CHECK} {DIGITS} --code-path ../codes",
    "check-images": f"python {CHECK} {IMAGES} --code-path ../codes-images",
    "kmeans-greedy": f"python {REORDER} --method greedy",
    "kmeans-best": f"python {REORDER} --method greedy --keep-best --restarts 1",
    "gpt-two": f"torchrun {TRAIN_GPT}",
    "gpt-fsdp": f"torchrun {TRAIN_GPT} --parallel fsdp",
    "gpt-token": f"python {TRAIN_GPT} --lambda-cce 0 --no-fused-loss",
    "gpt-stores": f"python {TRAIN_GPT} --code-path ../codes-again --lr-schedule cosine --warmup 5",
    "gpt-original": f"python {TRAIN_GPT} --gpt-ckpt ../original/gpt.pt --init-from-original",
    "gpt-onward": f"python {TRAIN_GPT} --gpt-ckpt ../gpt/*GPT* --max-updates 26",
    "gpt-resume": f"python {TRAIN_GPT} --ckpt-updates 4 --max-updates 12 \
        && python {TRAIN_GPT} --ckpt-updates 4 --max-updates 20",
    "gpt-spread": f"python {TRAIN_GPT} --ema --max-updates 12 \
        && torchrun {TRAIN_GPT} --ema --parallel fsdp",
    "gpt-half": f"python {TRAIN_GPT} --mixed-precision bf16 --checkpoint-activations",
    "sample": f"python {SAMPLE} {GUIDED}",
    "sample-two": f"torchrun {SAMPLE} {GUIDED} --per-proc-batch-size 16",
    "sample-ema": f"python {SAMPLE} --gpt-ckpt ../gpt-ema/*GPT* --weights ema --labels balanced \
        --save-codes",
    "sample-half": f"python {SAMPLE} --gpt-ckpt ../gpt/*GPT* --top-k 50 --temperature 0.9 \
        --cfg-interval 5 --precision bf16 --vq-precision bf16",
    "sample-greedy": f"python {SAMPLE} --gpt-ckpt ../gpt/*GPT* --greedy --labels 3,7 \
        --resize antialias --image-size-eval 24",
    "sample-classes": f"python autoregressive/sample/sample_c2i.py {SAMPLING} {GUIDED} \
        --class-ids 3,7 --output classes.png",
    "reference": f"python {REFERENCE} {DIGITS}",
    "reference-classifier": f"python {REFERENCE} {DIGITS} {CLASSIFIER}",
    "reference-rfid": f"python {REFERENCE} --dataset digits --data-path heldout --kind rfid",
    "reference-images": f"python {REFERENCE} {IMAGES} --num-images 30",
    "val": f"python tokenizer/validation/val.py --dataset digits --data-path heldout {VQ} \
        --image-size 16 --num-workers 0 --vq-ckpt ../vq/tokenizer.pt --output val.npz",
    "score": f"python {SCORE} ../reference/reference.npz ../sample/*.npz",
    "score-ready": f"python {SCORE} ../reference-classifier/reference.npz ../sample-ema/*.npz",
    "score-rfid": f"python {SCORE} ../reference-rfid/reference.npz ../val/val.npz",
    "vq-ema": f"python {TRAIN_VQ} {WHOLE} --val-path heldout --eval-every 10 --ckpt-updates 10 \
        --ema --gradient-accumulation-steps 2 --revive-every 5",
    "vq-two": f"torchrun {TRAIN_VQ} {WHOLE} --ema",
    "vq-gan": f"python {TRAIN_VQ} --image-size 32 --smallest-crop 0.8 --disc-weight 0.5 \
        --disc-start 5",
    "vq-tuned": f"python {TRAIN_VQ} {IMAGES} --image-size 32 --disc-start 5 --disc-adaptive-weight \
        --vq-ckpt ../vq/tokenizer.pt --mixed-precision bf16 --entropy-ratio 0.1 --num-workers 1",
}

# What is not compared: settings, times, plots of matplotlib; and all texts, hashes among them.
UNCOMPARED_FILES = ("config.json", "manifest.json", "curves.png", "codebook-*.png", "check.png")
UNCOMPARED_KEYS = set("images_per_second tokens_per_second memory_mib mfu seconds cpu_seconds "
                      "settings versions samples reference feature_network param_groups".split())
CHECKPOINT_PARTS = ("model", "ema", "optimizer", "discriminator", "discriminator_optimizer")
SLOTS = 2                       # jobs at a time
TAIL_LINES = 30                 # of the log of a command that failed
PATH_WIDTH = 62                 # of the table's first column
NAMES_SHOWN = 3                 # of the keys that differ or are missing


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of this script's command line."""
    parser = argparse.ArgumentParser(description="Compare this tree's results with a commit's.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--base", default="fa9bbd5", help="the commit to compare with")
    parser.add_argument("--new", type=Path, default=ROOT, help="the tree to test")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "compare-commits"),
                        help="folder of the code and the results; the base's are used again")
    parser.add_argument("--only", nargs="+", metavar="PART", default=[""],
                        help=f"jobs that begin like this, and what they need: {', '.join(JOBS)}")
    parser.add_argument("--same-names", action="store_true", help="nothing is renamed")
    return parser


@dataclass(frozen=True)
class Side:
    """One of the two that are compared.

    Attributes:
        name: for messages.
        tree: the root of its code.
        results: the folder of its jobs' folders.
        renamed: what it calls otherwise than the table of jobs does.
    """

    name: str
    tree: Path
    results: Path
    renamed: dict[str, str]


def git(tree: Path, *words: str) -> str:
    """Returns what a git command prints in a tree."""
    command = ["git", "-C", tree, *words]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def clone_base(commit: str, tree: Path) -> None:
    """Puts a clone of this repository at a commit into `tree`, unless it is there."""
    if not tree.exists():
        unfinished = tree.with_suffix(".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        git(ROOT, "clone", "--quiet", "--no-checkout", str(ROOT), str(unfinished))
        git(unfinished, "checkout", "--quiet", "--detach", commit)
        unfinished.rename(tree)


def copy_new(source: Path, tree: Path) -> None:
    """Copies the Python files of a tree, so that edits during the run do no harm."""
    listed = git(source, "ls-files", "--cached", "--others", "--exclude-standard", "-z", "*.py")
    for path in filter(None, listed.split("\0")):
        if (source / path).is_file():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, tree / path)


def make_images(folder: Path) -> None:
    """Makes 40 pictures of random sizes, smooth and noisy ones, in four class folders."""
    random = np.random.default_rng(0)
    for number in range(40):
        coarse = random.integers(256, size=(4 + number % 8, 4 + number % 5, 3), dtype=np.uint8)
        size = tuple(random.integers(12, 90, size=2).tolist())
        path = folder / f"class{number % 4}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)


def make_original(folder: Path) -> None:
    """Makes a GPT over codes in their original order: weights alone, which know of no tokens."""
    torch.manual_seed(0)
    model = gpt.GPT(config.gpt_config("GPT-tiny", grid=4, vocab_size=512, num_classes=10))
    folder.mkdir(exist_ok=True)
    torch.save(model.state_dict(), folder / "gpt.pt")


def needs(name: str) -> set[str]:
    """Returns the jobs whose results a job reads."""
    return {part for part in re.findall(r"\.\./([\w-]+)", JOBS[name]) if part in JOBS}


def with_needs(names: set[str]) -> set[str]:
    """Returns jobs together with all that they build upon."""
    further = set().union(*map(needs, names)) - names
    return with_needs(names | further) if further else names


def expand(word: str, folder: Path) -> str:
    """Returns a word of a command with its * replaced by what fits, seen from `folder`."""
    found = glob.glob(word, root_dir=folder) if "*" in word else [word]
    if len(found) != 1:
        raise SystemExit(f"{folder / word}: expected one, found {len(found)}")
    return found[0]


def command_line(text: str, side: Side, folder: Path) -> list[str]:
    """Returns a command of the table as a side calls it, ready to be run in `folder`."""
    renamed = " ".join(side.renamed.get(word, word) for word in text.split())
    launcher, script, *words = renamed.split()
    start = [sys.executable]
    if launcher == "torchrun":
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return [*start, str(side.tree / script), *(expand(word, folder) for word in words)]


def run_job(name: str, side: Side) -> None:
    """Runs the commands of a job; what one that fails has printed ends this script."""
    folder = side.results / name
    log = side.results / "logs" / f"{name}.log"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment = inherited | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(log, "w") as file:
        for text in JOBS[name].split("&&"):
            command = command_line(text, side, folder)
            print(*command, file=file, flush=True)
            done = subprocess.run(command, cwd=folder, env=environment, stdout=file, stderr=file)
            if done.returncode:
                tail = "\n".join(log.read_text().splitlines()[-TAIL_LINES:])
                raise SystemExit(f"{tail}\n{side.name}: {name} ended with exit code "
                                 f"{done.returncode}; its log is {log}")
    (side.results / f"{name}.done").touch()


def run_jobs(names: set[str], side: Side) -> None:
    """Runs the jobs that are not finished, SLOTS at a time, each after those that it needs."""
    started = time.perf_counter()
    (side.results / "logs").mkdir(parents=True, exist_ok=True)
    make_images(side.results / "images")
    make_original(side.results / "original")
    finished = {name for name in names if (side.results / f"{name}.done").exists()}
    waiting = [name for name in JOBS if name in names - finished]
    running = {}
    print(f"{side.name}: {len(waiting)} jobs to run, {len(finished)} are there", flush=True)
    with ThreadPoolExecutor(SLOTS) as pool:
        while waiting or running:
            ready = [name for name in waiting if needs(name) <= finished]
            for name in ready[:SLOTS - len(running)]:
                waiting.remove(name)
                running[pool.submit(run_job, name, side)] = name
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                finished.add(running.pop(future))
    print(f"{side.name}: {time.perf_counter() - started:.0f} s", flush=True)


def flatten(content: object, path: tuple = ()) -> Iterator[tuple[tuple, np.ndarray]]:
    """Yields the numbers and arrays in nested containers, each with its path of keys."""
    if isinstance(content, list):
        content = dict(enumerate(content))
    if isinstance(content, dict):
        for key, value in content.items():
            if key not in UNCOMPARED_KEYS:
                yield from flatten(value, (*path, str(key)))
    elif torch.is_tensor(content):
        widened = content.float() if content.dtype == torch.bfloat16 else content
        yield path, widened.numpy()
    elif isinstance(content, np.ndarray) and content.dtype.kind in "biuf":
        yield path, content
    elif isinstance(content, int | float):
        yield path, np.float64(content)


def read_metrics(path: Path) -> dict[int, dict]:
    """Returns the rows of a metrics.jsonl, those of one step put together."""
    steps: dict[int, dict] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        steps.setdefault(row.pop("step"), {}).update(row)
    return steps


def read_tensors(path: Path) -> object:
    """Returns a bare tensor, or the parts of a checkpoint that hold weights and moments."""
    payload = torch.load(path, map_location="cpu", weights_only=True)
    if torch.is_tensor(payload):
        return payload
    discriminator = payload.get("discriminator", {})
    if "model" in discriminator:            # the new side keeps its two parts together
        payload["discriminator"] = discriminator["model"]
        payload["discriminator_optimizer"] = discriminator["optimizer"]
    return {part: payload[part] for part in CHECKPOINT_PARTS if part in payload}


def read_json(path: Path) -> dict:
    """Returns the content of a JSON file; the end of a tokenizer's run by the new side's names."""
    content = json.loads(path.read_text())
    if path.name == "finished.json" and "psnr" in content:
        names = ("psnr", "codes_used", "usage", "perplexity")
        validation = {f"val_{name}": content[name] for name in names}
        content = {name: content[name] for name in ("updates", "reconstruction")} | validation
    return content


READERS = {
    ".jsonl": read_metrics,
    ".json": read_json,
    ".pt": read_tensors,
    ".npy": np.load,
    ".npz": lambda path: dict(np.load(path)),
    ".png": lambda path: np.asarray(Image.open(path)),
}


def read_values(path: Path | None, renamed: dict[str, str]) -> dict[str, np.ndarray]:
    """Returns what is compared of a file, by keys in the new side's names; nothing of no file."""
    content = READERS[path.suffix](path) if path else {}
    return {"/".join(renamed.get(key, key) for key in keys) or "values": value
            for keys, value in flatten(content)}


def find_results(folder: Path, names: set[str], renamed: dict[str, str]) -> dict[str, Path]:
    """Returns the files of jobs by the new side's paths, with one name for all runs and samples."""
    found = {}
    for name in (name for name in JOBS if name in names):
        for path in sorted((folder / name).rglob("*")):
            if path.suffix in READERS and not any(map(path.match, UNCOMPARED_FILES)):
                parts = (renamed.get(part, part) for part in path.relative_to(folder).parts)
                short = re.sub(r"/\d{3}-[^/]*", "/run", "/".join(parts))
                if renamed and name in GREEDY:
                    short = short.replace("cluster_size=16", "cluster_size=16-greedy")
                found[re.sub(r"/GPT-[^/]*(\.\w+)$", r"/samples\1", short)] = path
    return found


def largest_gap(base: np.ndarray, new: np.ndarray) -> float:
    """Returns the largest absolute difference of two arrays; 0 only if they are the same."""
    if base.dtype != new.dtype or base.shape != new.shape:
        return float("inf")
    if np.array_equal(base, new, equal_nan=True):
        return 0.0
    gap = np.abs(base.astype(np.float64) - new.astype(np.float64))
    return float(np.nanmax(gap, initial=0)) or float("inf")


def shorten(keys: list[str]) -> str:
    """Returns the first few of some keys as text."""
    more = f" and {len(keys) - NAMES_SHOWN} more" if len(keys) > NAMES_SHOWN else ""
    return ", ".join(keys[:NAMES_SHOWN]) + more


def compare(base: Side, new: Side, names: set[str]) -> int:
    """Prints the table; returns how many files differ."""
    before = find_results(base.results, names, new.renamed)
    after = find_results(new.results, names, {})
    only_new = [path for path in after if path not in before]
    num_different = 0
    for path in before:
        expected = read_values(before[path], new.renamed)
        found = read_values(after.get(path), {})
        gaps = {key: largest_gap(expected[key], found[key]) for key in expected if key in found}
        different = [key for key, gap in gaps.items() if gap]
        missing = [key for key in expected if key not in found]
        extra = [key for key in found if key not in expected]
        verdict = "DIFFERENT" if different or missing else "equal"
        if different:
            verdict += f" by up to {max(gaps.values()):.3g} in {shorten(different)}"
        if missing:
            verdict += f"; only in the base: {shorten(missing)}"
        if extra:
            only_new.append(f"{path}: {shorten(extra)}")
        num_different += verdict != "equal"
        print(f"{path:{PATH_WIDTH}} {len(expected):5} {verdict}")
    for name in only_new:
        print(f"only in the new: {name}")
    return num_different


def main() -> None:
    """Runs both sides and compares them."""
    args = build_parser().parse_args()
    chosen = {name for name in JOBS if name.startswith(tuple(args.only))}
    if not chosen:
        raise SystemExit(f"--only: expected beginnings of {', '.join(JOBS)}")
    names = with_needs(chosen)
    commit = git(ROOT, "rev-parse", "--short", f"{args.base}^{{commit}}")
    table = json.dumps([JOBS, torch.__version__, np.__version__])
    digest = hashlib.sha256(table.encode()).hexdigest()[:8]
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"{work}: in use by another comparison; name another --work") from None
        shutil.rmtree(work / "new", ignore_errors=True)
        base = Side(f"base {commit}", work / commit / "tree", work / commit / digest, {})
        renamed = {} if args.same_names else RENAMED
        new = Side("new", work / "new" / "tree", work / "new" / "results", renamed)
        clone_base(commit, base.tree)
        copy_new(args.new.resolve(), new.tree)
        run_jobs(names, base)
        run_jobs(names, new)
        num_different = compare(base, new, names)
    print(f"{num_different} items differ" if num_different else "all equal")
    raise SystemExit(1 if num_different else 0)


if __name__ == "__main__":
    main()
