"""The rules of the house: top level, floors and rooms, command lines, the original commands.

Floor 1 is autoregressive/runtime, which imports nothing of ours. Floor 2 are the rooms of the
libraries, which import their own folder and floor 1. Floor 3, autoregressive/pipeline.py and
decoder.py, puts them together. Floor 4 are the entry scripts, which may import all of these, and
which tests alone import.
"""

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys

import pytest
from torch.distributed.run import get_args_parser as torchrun_parser

from conftest import FIXTURES, ROOT

TOP_LEVEL = {"autoregressive", "tokenizer", "evaluations", "balance_k_means.py",
             "pretrained_models", "scripts", "requirements.txt", "README.md", "tests", "LICENSE"}
GROUND = "autoregressive/runtime"
TOGETHER = ("autoregressive/pipeline.py", "autoregressive/decoder.py")
ROOMS = ("autoregressive/models", "autoregressive/data", "autoregressive/train",
         "autoregressive/sample", "tokenizer", "evaluations", "scripts/benchmarks",
         "scripts/experiments", "scripts/pages")
SCRIPTS = {
    "autoregressive/train/extract_codes_c2i.py": {
        "--data-path": None, "--code-path": None, "--vq-model": "VQ-16", "--vq-ckpt": None,
        "--codebook-size": 16384, "--codebook-embed-dim": 8, "--dataset": "imagenet",
        "--image-size": 256, "--ten-crop": False, "--crop-range": 1.1, "--global-seed": 0,
        "--num-workers": 24, "--debug": False},
    "autoregressive/train/import_codes.py": {
        "--from": None, "--code-path": None, "--vq-model": "VQ-16", "--vq-ckpt": None,
        "--codebook-size": 16384, "--codebook-embed-dim": 8, "--image-size": 256,
        "--crop-range": 1.1, "--class-names": None},
    "autoregressive/train/check_codes.py": {
        "--code-path": None, "--data-path": None, "--dataset": "imagenet", "--vq-ckpt": None},
    "autoregressive/train/train_c2i.py": {
        "--code-path": None, "--results-dir": None, "--no-local-save": False,
        "--gpt-model": "GPT-B", "--gpt-ckpt": None, "--gpt-type": "c2i", "--vocab-size": 16384,
        "--ema": False, "--cls-token-num": 1, "--dropout-p": 0.1, "--token-dropout-p": 0.1,
        "--drop-path-rate": 0, "--no-compile": False, "--dataset": "imagenet_code",
        "--image-size": 256, "--downsample-size": 16, "--validation_step": 0,
        "--num-classes": 1000, "--epochs": 300, "--lr": 1e-4, "--weight-decay": 0.05,
        "--beta1": 0.9, "--beta2": 0.95, "--max-grad-norm": 1, "--mapping-path": None,
        "--global-batch-size": 256, "--global-seed": 0, "--num-workers": 24, "--log-every": 100,
        "--ckpt-every": 5, "--gradient-accumulation-steps": 1, "--mixed-precision": "bf16",
        "--vq-model": "VQ-16", "--vq-ckpt": None, "--codebook-size": 16384,
        "--codebook-embed-dim": 8, "--cluster-size": 128, "--lambda-cce": 1},
    "autoregressive/sample/sample_c2i_ddp.py": {
        "--gpt-model": "GPT-B", "--gpt-ckpt": None, "--gpt-type": "c2i", "--from-fsdp": False,
        "--cls-token-num": 1, "--precision": "bf16", "--compile": None, "--vq-model": "VQ-16",
        "--vq-ckpt": None, "--codebook-size": 16384, "--codebook-embed-dim": 8,
        "--image-size": 384, "--image-size-eval": 256, "--downsample-size": 16,
        "--num-classes": 1000, "--cfg-scale": 1.5, "--cfg-interval": -1,
        "--sample-dir": "samples", "--per-proc-batch-size": 32, "--num-fid-samples": 50000,
        "--global-seed": 0, "--top-k": 0, "--temperature": 1, "--top-p": 1,
        "--cluster-size": 128},
    "autoregressive/sample/export_c2i.py": {
        "run": None, "out": None, "--weights": "raw", "--vq-model": "VQ-16", "--vq-ckpt": None,
        "--codebook-size": 16384, "--codebook-embed-dim": 8, "--scores": None},
    "autoregressive/sample/sample_c2i.py": {
        "--gpt-model": "GPT-B", "--cfg-scale": 1.5, "--image-size": 384},
    "balance_k_means.py": {"--cluster-size": 128, "--seed": 42},
    "evaluations/c2i/evaluator.py": {},
    "evaluations/c2i/make_reference.py": {},
    "evaluations/c2i/train_classifier.py": {},
    "tokenizer/tokenizer_image/vq_train.py": {
        "--image-size": 256, "--global-batch-size": 128, "--lr": 1e-4, "--beta1": 0.9,
        "--beta2": 0.95, "--max-grad-norm": 1, "--epochs": 40, "--mixed-precision": "bf16",
        "--disc-start": 20000, "--disc-weight": 0.5, "--perceptual-weight": 1.0,
        "--disc-loss": "hinge", "--weight-decay": 0.0},
    "tokenizer/validation/val.py": {},
}
RUN = {"results_dir", "new_run", "no_local_save", "epochs", "max_steps", "log_every", "log",
       "val_every", "ckpt_every", "ckpt_steps", "ckpt_minutes", "keep_checkpoints",
       "gradient_accumulation_steps", "num_workers"}
# No result depends on these, nor on device and debug; every other flag counts.
MAY_VARY = {
    "autoregressive/train/extract_codes_c2i.py": {
        "batch_size", "num_workers", "no_compile", "compile_errors", "max_failures", "overwrite"},
    "autoregressive/train/import_codes.py": {"max_failures", "overwrite"},
    "autoregressive/train/train_c2i.py": RUN | {
        "validation_step", "parallel", "no_compile", "compile_errors", "cudnn_attention",
        "checkpoint_activations", "loss_mib"},
    "autoregressive/sample/sample_c2i_ddp.py": {"preset", "sample_dir", "compile_errors"},
    "autoregressive/sample/export_c2i.py": {"out"},
    "autoregressive/sample/sample_c2i.py": {"preset", "compile_errors"},
    "tokenizer/tokenizer_image/vq_train.py": RUN | {"max_failures", "output"},
    "tokenizer/validation/val.py": {"max_failures"},
    "balance_k_means.py": {"overwrite"},
    "evaluations/c2i/make_reference.py": {"max_failures"},
    "evaluations/c2i/train_classifier.py": {"max_failures"},
}


def tracked(pattern="."):
    listed = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, check=True,
                            capture_output=True, text=True)
    return listed.stdout.split("\n")[:-1]


def is_entry(path):
    return re.search(r'^if __name__ == "__main__":', (ROOT / path).read_text(), re.M) is not None


def imports_of(path):
    """Yields the files of ours that a file imports."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            file = name.replace(".", "/") + ".py"
            if (ROOT / file).is_file():
                yield file


def room_of(path):
    return next((room for room in (GROUND, *ROOMS) if path.startswith(room + "/")), path)


def floor_of(path):
    """Returns the floor 1 .. 4 of a file; None if it lies on none."""
    if room_of(path) == GROUND:
        return 1
    if is_entry(path):
        return 4
    return 3 if path in TOGETHER else 2 if room_of(path) in ROOMS else None


def house():
    """Returns the files of the house, without tests and empty files that make folders packages."""
    return [path for path in tracked("*.py") if not path.startswith("tests/")
            and (ROOT / path).stat().st_size]


def imports_between(first, second):
    """Returns what files of floor `first` import of floor `second`, as pairs of files."""
    return [(path, target) for path in house() if floor_of(path) == first
            for target in imports_of(path) if floor_of(target) == second]


def parser_of(script):
    return importlib.import_module(script.removesuffix(".py").replace("/", ".")).build_parser()


def flags_of(script):
    return {action.option_strings[0] if action.option_strings else action.dest: action.default
            for action in parser_of(script)._actions if action.dest != "help"}


def test_top_level_is_as_the_owner_fixed_it():
    found = {path.split("/")[0] for path in tracked() if not path.startswith(".")}
    assert found <= TOP_LEVEL, f"does not belong there: {sorted(found - TOP_LEVEL)}"


def test_no_file_name_says_nothing():
    empty = {"utils.py", "common.py", "misc.py", "helpers.py"}
    assert not [path for path in tracked("*.py") if path.rsplit("/", 1)[-1] in empty]


def test_every_file_lies_on_a_floor():
    assert {path: floor_of(path) for path in house() if floor_of(path) is None} == {}
    assert {floor_of(path) for path in house()} == {1, 2, 3, 4}


def test_ground_floor_imports_nothing_of_ours():
    offenders = [f"{path} imports {target}" for path in house() if floor_of(path) == 1
                 for target in imports_of(path) if floor_of(target) != 1]
    assert not offenders


def test_libraries_import_only_their_own_folder_and_the_ground_floor():
    offenders = [f"{path} imports {target}" for path in house() if floor_of(path) == 2
                 for target in imports_of(path) if room_of(target) not in (room_of(path), GROUND)]
    assert not offenders


def test_pipeline_puts_libraries_together_and_no_library_imports_it():
    assert imports_between(3, 2) and imports_between(4, 3)
    assert not [*imports_between(3, 4), *imports_between(2, 3), *imports_between(1, 3)]


def test_only_tests_import_entry_scripts():
    assert not [pair for floor in (1, 2, 3, 4) for pair in imports_between(floor, 4)]
    assert is_entry("balance_k_means.py")


def test_ranks_are_known_in_the_ground_floor_only():
    words = re.compile(
        r"\bdist\.|torch\.distributed|\"RANK\"|\.cuda\(|weights_only=False|allow_pickle=True|"
        r"load_state_dict\(.*strict=False")
    allowed = ("autoregressive/runtime/distributed.py", "autoregressive/runtime/parallel.py",
               "tests/")
    offenders = [f"{path}: {match.group()}"
                 for path in tracked("*.py") if not path.startswith(allowed)
                 for match in words.finditer((ROOT / path).read_text())]
    assert not offenders


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_and_defaults_are_as_published(script):
    flags = flags_of(script)
    assert {flag: flags.get(flag, "no such flag") for flag in SCRIPTS[script]} == SCRIPTS[script]


@pytest.mark.parametrize("script", SCRIPTS)
def test_command_line_is_frozen(script):
    frozen = json.loads((FIXTURES / "flags.json").read_text())
    assert json.loads(json.dumps(flags_of(script))) == frozen[script], \
        "if the change is meant: python tests/test_rules.py"


def test_every_entry_script_is_frozen():
    entries = [path for path in tracked("*.py")
               if is_entry(path) and not path.startswith(("tests/", "scripts/"))]
    assert sorted(entries) == sorted(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_pass_torchrun(script):
    # It takes a flag behind the script for its own where that begins several of its own.
    flags = [flag for flag in flags_of(script) if flag.startswith("--")]
    given = torchrun_parser().parse_args([script, *flags])
    assert given.training_script_args == flags


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_help(script):
    assert not [action.dest for action in parser_of(script)._actions if not action.help]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_printed(script):
    assert all(flag in parser_of(script).format_help() for flag in SCRIPTS[script])


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_part_of_the_identity_unless_it_may_vary(script):
    actions = [action for action in parser_of(script)._actions if action.dest != "help"]
    words = []
    for action in actions:
        if action.required:
            words += [*action.option_strings[:1], "x"]
    identity = parser_of(script).parse_args(words).identity()
    varying = {action.dest for action in actions} - set(identity)
    assert varying == MAY_VARY.get(script, set()) | {"device", "debug"}


def original_commands():
    text = (FIXTURES / "ORIGINAL_README.md").read_text()
    blocks = re.findall(r"```\n(.*?)```", text, re.S)
    return [block.strip().replace("\\\n", " ") for block in blocks if ".py" in block]


# Of each original command: the file it misses first.
MISSING = [
    "/path/to/imagenet/train: expected a folder",
    "pretrained_models/vq_ds16_c2i.pt: expected a file",
    "/path/to/output/codes: expected a code store",
    "results/your_model_directory/checkpoints: expected a file",
    "evaluations/VIRTUAL_imagenet256_labeled.npz: expected a file",
]


@pytest.mark.parametrize("command, missing",
                         list(zip(original_commands(), MISSING, strict=True)))
def test_original_commands_are_accepted_up_to_the_first_missing_file(command, missing, tmp_path):
    words = shlex.split(command)
    script = next(index for index, word in enumerate(words) if word.endswith(".py"))
    done = subprocess.run([sys.executable, ROOT / words[script], *words[script + 1:]],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and missing in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


def test_under_torchrun_rank_0_alone_prints_the_error(tmp_path):
    command = original_commands()[2].replace("PYTHONPATH=$PYTHONPATH:./ torchrun", "")
    words = shlex.split(command.replace("=8", "=2"))
    script = next(index for index, word in enumerate(words) if word.endswith(".py"))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           *words[1:script], ROOT / words[script], *words[script + 1:]],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    error = "train_c2i.py: error: /path/to/output/codes: expected a code store"
    assert done.stderr.count(error) == 1
    assert "exitcode  : 2" in done.stderr
    before_torchruns_report = done.stderr.split("ChildFailedError")[0]
    assert "Traceback" not in before_torchruns_report.split("error: /path")[0]


if __name__ == "__main__":
    content = json.dumps({script: flags_of(script) for script in SCRIPTS}, indent=1)
    (FIXTURES / "flags.json").write_text(content + "\n")
