"""Writes a trained GPT and its tokenizer as a folder for a hub of models.

    python autoregressive/sample/export_c2i.py results/000-GPT-B-lambda=1-cluster_size=128 export \
        --scores samples/your_generated_samples.json

The folder holds model.safetensors (the GPT), vq.safetensors (the reordered tokenizer), config.json,
samples.png and README.md, the model card. The sampling scripts take it as --gpt-ckpt and need no
other flag. Nothing is uploaded; the hub's own client does that: hf upload USER/NAME export

On a CPU, after scripts/quickstart.sh:

    python autoregressive/sample/export_c2i.py \
        results/quickstart/gpt-lambda1/000-GPT-tiny-lambda=1-cluster_size=16 results/export
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The repository root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import dataclasses
import json
from typing import Any

import torch

from autoregressive.decoder import find_decoder_of
from autoregressive.models.config import GPTConfig, gpt_config
from autoregressive.models.gpt import GPT
from autoregressive.models.guidance_free import fold_beta, is_guidance_free
from autoregressive.models.loading import (
    SIZES,
    GPTFile,
    add_weights_arg,
    check_fitting,
    describe_gpt,
    read_gpt,
)
from autoregressive.pipeline import save_samples
from autoregressive.runtime.checkpoint import (
    EXPORTED,
    check_weights,
    model_state,
    read_checkpoint,
    save_checkpoint,
)
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import Flags, Parser, check_one_process, checks, may_vary, run
from autoregressive.runtime.files import (
    atomic_write,
    check_kinds,
    check_output,
    read_json,
    weights_sha256,
    write_json,
)
from autoregressive.runtime.identity import check_codebook, find_difference
from autoregressive.runtime.log import LOGGER, open_logger
from autoregressive.sample.model_card import MANIFEST_KINDS, Facts, read_scores, write_card
from tokenizer.tokenizer_image.loading import EXPORTED_VQ, open_vq
from tokenizer.tokenizer_image.vq_model import VQModel, add_vq_args

CONFIG = "config.json"
PICTURE = "samples.png"
CARD = "README.md"
FILES = (CONFIG, EXPORTED, EXPORTED_VQ, PICTURE, CARD)      # the order in which they are written
# Flags that the config.json of a run may record.
RUN_KINDS = {"vq_ckpt": (str, type(None)), "code_path": (str, list)}
OWN_KINDS = {"run": str, "settings": dict, "training": dict}    # of the config.json of an export


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """The VQ model that decodes the tokens of a GPT.

    Attributes:
        model: on the CPU.
        payload: what its file is to hold.
        hashes: codebook_sha256 and weights_sha256.
    """

    model: VQModel
    payload: dict[str, Any]
    hashes: dict[str, str]


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Write a trained GPT and its tokenizer as a folder for a hub of models.")
    parser.add_argument("run", help="run folder of the training, or one of its checkpoints")
    may_vary(parser.add_argument("out", help="the folder to write"))
    add_weights_arg(parser)
    add_vq_args(parser)
    parser.add_argument("--scores", help="JSON of the evaluator, for the model card")
    return parser


def read_run(checkpoint: Path) -> tuple[str, dict[str, Any]]:
    """Returns the name of the run folder that a checkpoint lies in, and its config.json.

    Both are empty for a checkpoint that lies elsewhere.
    """
    for folder in checkpoint.resolve().parents[:2]:
        path = folder / CONFIG
        if path.is_file():
            config = read_json(path)
            known = {name: kind for name, kind in RUN_KINDS.items() if name in config}
            check_kinds(config, known, path)
            return folder.name, config
    return "", {}


def check_gpt(file: GPTFile) -> GPTConfig:
    """Returns what GPT a checkpoint holds.

    Raises:
        ValueError: it does not say so, or its weights are of another one.
    """
    settings = file.settings
    if not settings:
        raise ValueError(f"{file.path}: expected a checkpoint of train_c2i.py, found one without "
                         "settings; name a run folder")
    check_kinds(settings, dict.fromkeys(SIZES, int) | {"gpt_model": str}, file.path)
    config = gpt_config(settings["gpt_model"], grid=settings["grid"],
                        vocab_size=settings["vocab_size"], num_classes=settings["num_classes"],
                        guidance_free=is_guidance_free(file.state))
    with torch.device("meta"):
        check_weights(GPT(config), file.state, file.path, describe_gpt(file.state))
    check_fitting(file, settings["cluster_size"], settings["num_classes"], is_guided=False)
    return config


def gpt_payload(file: GPTFile, weights: str) -> dict[str, Any]:
    """Returns what the file of the GPT is to hold.

    Raises:
        ValueError: the checkpoint holds something else than plain data beside its weights.
    """
    known = {name: file.payload[name] for name in ("steps", "patch") if name in file.payload}
    check_kinds(known, dict.fromkeys(known, int), file.path)
    record = {"settings": file.settings, "weights": weights} | known
    try:
        record = json.loads(json.dumps(record))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{file.path}: expected plain settings, found others ({error}); take "
                         "another checkpoint") from None
    return record | {"model": file.state}


def load_tokenizer(args: Flags, file: GPTFile) -> Tokenizer:
    """Loads the VQ model that belongs to a GPT.

    Raises:
        ValueError: it is unreadable, or another one.
    """
    settings = file.settings
    path = find_decoder_of(file, args.vq_ckpt, settings["cluster_size"])
    model, hashes = open_vq(args, path)
    check_codebook(settings.get("codebook_sha256"), hashes["codebook_sha256"], file.path, path)
    pixels_of_a_token = settings["image_size"] // settings["grid"]
    if model.downsampling != pixels_of_a_token:
        raise ValueError(f"--vq-model: expected one of {pixels_of_a_token} pixels a token, as in "
                         f"{file.path}, got {model.config.vq_model} of {model.downsampling}")
    payload = read_checkpoint(path)
    state = model_state(payload, path)
    record = {"settings": dataclasses.asdict(model.config), **hashes}
    reordering = payload.get("reordering", {})
    check_kinds({"reordering": reordering}, {"reordering": dict}, path)
    for name in ("original_codebook_sha256", "mapping_sha256"):
        if name in reordering:
            check_kinds(reordering, {name: str}, path)
            record[name] = reordering[name]
    expected = settings.get("mapping_sha256")
    found = record.get("mapping_sha256")
    if None not in (expected, found) and expected != found:
        raise ValueError(f"{path}: expected a tokenizer of the mapping {expected} of {file.path}, "
                         f"got {found}; name that of the run with --vq-ckpt")
    return Tokenizer(model, record | {"model": state}, hashes)


def check_scores(scores: dict[str, Any], path: str, file: GPTFile, hashes: dict[str, str]) -> None:
    """Raises ValueError if the scores of `path` are of other weights than those to export."""
    settings = scores["samples"]["settings"]
    expected = dict(hashes)
    if is_guidance_free(file.state):                # it was sampled as the ordinary one that it is
        sampled = fold_beta(file.state, settings.get("beta") or 1)
        expected["gpt_sha256"] = weights_sha256(sampled)
    if difference := find_difference(expected, settings, expected):
        raise ValueError(f"{path}: expected scores of samples with {difference}; name those of the "
                         "exported weights with --scores")


def find_manifest(config: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the manifest of the codes of a run; None, with a message, where it is not there."""
    paths = config.get("code_path") or ["the codes of its run"]     # an older one recorded a text
    path = Path(paths if isinstance(paths, str) else str(paths[0])) / "manifest.json"
    if not path.is_file():
        LOGGER.info("%s: not there, so the model card says nothing of the data", path)
        return None
    manifest = read_json(path, MANIFEST_KINDS)
    if manifest.get("images_sha256") != config.get("images_sha256"):
        LOGGER.warning("%s: of other images than the run's, so the model card leaves it out", path)
        return None
    return manifest


def check_owner(out: Path, config: dict[str, Any]) -> None:
    """Raises ValueError if anything but an export of the same run lies in a folder."""
    is_empty = not out.is_dir() or all(path.name.startswith(".") for path in out.iterdir())
    if is_empty:
        return
    path = out / CONFIG
    found = read_json(path) if path.is_file() else {}
    try:
        check_kinds(found, OWN_KINDS, path)
    except ValueError:
        raise ValueError(f"{out}: expected an export, found other files; name another "
                         "folder") from None
    identities = [{"run": each["run"]} | each["training"] | each["settings"]
                  for each in (config, found)]
    if difference := find_difference(*identities):
        raise ValueError(f"{out}: expected an export with {difference}; name another folder, or "
                         "remove this one")


def main(args: Flags, session: Session) -> None:
    """Checks that everything belongs together, and writes the folder."""
    open_logger(session)
    with checks(session):
        check_one_process(session)

        # The GPT, and the tokenizer that its run names, if it is still there.
        file = read_gpt(args.run, args.weights)
        gpt = check_gpt(file)
        payload = gpt_payload(file, args.weights)
        run_name, run_config = read_run(file.path)
        recorded = run_config.get("vq_ckpt")
        if recorded and Path(recorded).is_file():
            args.resolve({"vq_ckpt": recorded}, file.path, {})

        # The tokenizer and the scores, which must belong to it.
        tokenizer = load_tokenizer(args, file)
        hashes = {"codebook_sha256": tokenizer.hashes["codebook_sha256"],
                  "vq_sha256": tokenizer.hashes["weights_sha256"],
                  "gpt_sha256": weights_sha256(file.state)}
        scores = read_scores(args.scores) if args.scores else None
        if scores:
            check_scores(scores, args.scores, file, hashes)

        # The folder: new, or an export of this run, which is written again.
        vq = tokenizer.payload["settings"]
        training = {name: value for name, value in run_config.items()
                    if name.endswith("sha256") or name == "global_seed"}
        config = {name: value for name, value in payload.items() if name != "model"}
        config |= {"run": run_name, "training": training, "vq": vq, "hashes": hashes}
        out = Path(args.out)
        check_owner(out, config)
        manifest = find_manifest(run_config)
        for name in FILES:
            check_output(out / name)
        session.hold(out, *(out / name for name in FILES))

    # What says whose folder this is comes first, what says which weights lie in it last.
    write_json(out / CONFIG, {name: config[name] for name in OWN_KINDS})
    save_checkpoint(out / EXPORTED, payload)
    save_checkpoint(out / EXPORTED_VQ, tokenizer.payload)
    save_samples(out / PICTURE, file.state, config=gpt, vq=tokenizer.model, device=session.device,
                 seed=args.global_seed, class_names=file.settings.get("class_names"))
    card = write_card(Facts(payload["settings"], args.weights, payload.get("steps"), vq, hashes,
                            picture=PICTURE, manifest=manifest, scores=scores))
    with atomic_write(out / CARD) as stream:
        stream.write(card.encode())
    write_json(out / CONFIG, config)
    LOGGER.info("%s: sample from it by --gpt-ckpt %s, publish it by hf upload USER/NAME %s", out,
                out, out)


if __name__ == "__main__":
    run(main, build_parser())
