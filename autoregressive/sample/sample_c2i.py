"""A look at a model: a few pictures of chosen classes as one PNG, or one of every class.

Takes seconds on a GPU, a minute on a CPU.

    python autoregressive/sample/sample_c2i.py --gpt-model GPT-B --image-size 384 --cfg-scale 4 \
        --gpt-ckpt results/000-GPT-B-lambda=1-cluster_size=128/checkpoints --class-ids 207,360

A folder of export_c2i.py needs no flag but --gpt-ckpt.

On a CPU, after scripts/quickstart.sh:

    python autoregressive/sample/sample_c2i.py --precision none --class-ids 3,7 \
        --gpt-ckpt results/quickstart/gpt-lambda1/000-GPT-tiny-lambda=1-cluster_size=16
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The repository root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import math
from dataclasses import dataclass

import numpy as np

from autoregressive.data.class_names import NUM_IMAGENET_CLASSES, read_classes
from autoregressive.models.loading import read_gpt
from autoregressive.models.random_numbers import random_numbers
from autoregressive.models.recipes import log_sampling
from autoregressive.models.sampler import Sampler
from autoregressive.pipeline import (
    Pipeline,
    PipelineSettings,
    add_pipeline_args,
    load_pipeline,
    settle_flags,
)
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import (
    Flags,
    Parser,
    between,
    check_one_process,
    checks,
    flag_of,
    run,
)
from autoregressive.runtime.files import check_output
from autoregressive.runtime.log import LOGGER, open_logger, progress
from autoregressive.runtime.pictures import save_grid
from autoregressive.sample.labels import labels_in_turn
from tokenizer.tokenizer_image.vq_model import VQConfig

NUM_SHOWN = 8                           # classes, if none are named
SAMPLED_TOGETHER = 32                   # pictures at most
SHEET_COLUMNS = 10                      # of a sheet of all classes, and as many rows


@dataclass(frozen=True)
class Sheet:
    """One PNG.

    Attributes:
        path: where it goes.
        rows: places of its pictures among all that are sampled.
        columns: pictures in a row.
    """

    path: Path
    rows: slice
    columns: int


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Sample a few pictures of chosen classes.")
    add_pipeline_args(parser)
    parser.set_defaults(compile=False)              # compiling takes longer than a few pictures
    parser.add_argument("--class-ids", default="207,360,387,974,88,979,417,279",
                        help="classes, by index or by name (that which travels in the checkpoint, "
                             "or ImageNet's), with commas between; the default is that of 1000 "
                             "classes, of others the first eight")
    parser.add_argument("--all-classes", action="store_true",
                        help="one picture of every class; more than 100 go to several PNGs, whose "
                             "names say which classes they show")
    parser.add_argument("--num-per-class", type=between(1, 1000), default=4,
                        help="pictures of each class, a row of the grid")
    parser.add_argument("--output", default="samples/classes.png", help="the PNG")
    return parser


def classes_to_show(args: Flags, class_names: list[str] | None) -> list[int]:
    """Returns --class-ids; the first classes if it is not given and its default does not fit."""
    if args.is_given("class_ids") or args.num_classes == NUM_IMAGENET_CLASSES:
        return read_classes(args.class_ids, class_names, args.num_classes)
    return list(range(min(NUM_SHOWN, args.num_classes)))


def check_flags(args: Flags) -> None:
    """Raises ValueError for flags that contradict each other."""
    for name in ("class_ids", "num_per_class"):
        if args.all_classes and args.is_given(name):
            raise ValueError(f"{flag_of(name)}: expected no --all-classes beside it, which takes "
                             "one picture of every class; give one of them")


def sheets_of_all(output: Path, num_classes: int) -> list[Sheet]:
    """Returns the sheets of one picture of every class: one, or several of 100 pictures."""
    columns = min(SHEET_COLUMNS, math.ceil(math.sqrt(num_classes)))
    size = SHEET_COLUMNS * SHEET_COLUMNS
    if num_classes <= size:
        return [Sheet(output, slice(None), columns)]
    sheets = []
    digits = len(str(num_classes - 1))
    for first in range(0, num_classes, size):
        last = min(first + size, num_classes) - 1
        name = f"{output.stem}-{first:0{digits}}-{last:0{digits}}{output.suffix}"
        sheets.append(Sheet(output.with_name(name), slice(first, last + 1), columns))
    return sheets


def sample_pictures(pipeline: Pipeline, labels: np.ndarray, seed: int,
                    session: Session) -> np.ndarray:
    """Returns one picture (N, P, P, 3) uint8 of each of the labels (N,), sampled in batches."""
    config = pipeline.gpt.config
    batch_size = min(len(labels), SAMPLED_TOGETHER)
    batches = []
    with progress(session, len(labels), "sample", "image") as bar:
        for first in range(0, len(labels), batch_size):
            indices = np.arange(first, first + batch_size)      # past the end: the first once more
            _, uniforms = random_numbers(seed, indices, config.num_classes, config.num_tokens)
            batches.append(pipeline.sample(labels_in_turn(labels, indices), uniforms))
            bar.update(min(batch_size, len(labels) - first))
    return np.concatenate(batches)[:len(labels)]


def main(args: Flags, session: Session) -> None:
    """Samples pictures of chosen classes, a row of each, or one of every class."""
    open_logger(session)
    with checks(session):
        check_one_process(session)
        check_flags(args)

        # What the checkpoint and a preset say about flags that were not given.
        gpt_file = read_gpt(args.gpt_ckpt, args.weights, args.from_fsdp)
        settle_flags(args, gpt_file, session.device)

        # Load the parts, which must belong together, and reserve the places of the PNGs.
        pipeline = load_pipeline(gpt_file, PipelineSettings(**args.pick(PipelineSettings)),
                                 Sampler(**args.pick(Sampler)), VQConfig(**args.pick(VQConfig)),
                                 session.device)
        if args.all_classes:
            labels = np.arange(args.num_classes)
            sheets = sheets_of_all(Path(args.output), args.num_classes)
        else:
            labels = np.repeat(classes_to_show(args, pipeline.class_names), args.num_per_class)
            sheets = [Sheet(Path(args.output), slice(None), args.num_per_class)]
        for sheet in sheets:
            check_output(sheet.path)
            session.hold(sheet.path)
    log_sampling(args.preset, gpt_file.settings, args.plain())

    pictures = sample_pictures(pipeline, labels, args.global_seed, session)
    captions = pipeline.label_names(labels)
    for sheet in sheets:
        save_grid(sheet.path, pictures[sheet.rows], columns=sheet.columns,
                  captions=captions[sheet.rows])
    LOGGER.info("%d pictures in %s", len(labels), ", ".join(str(sheet.path) for sheet in sheets))


if __name__ == "__main__":
    run(main, build_parser())
