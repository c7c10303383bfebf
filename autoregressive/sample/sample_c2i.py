"""A look at a model: a few pictures of chosen classes as one PNG.

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

import numpy as np

from autoregressive.models.loading import read_gpt
from autoregressive.models.random_numbers import random_numbers
from autoregressive.models.recipes import log_sampling
from autoregressive.models.sampler import Sampler
from autoregressive.pipeline import (
    PipelineSettings,
    add_pipeline_args,
    load_pipeline,
    settle_flags,
)
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import Flags, Parser, between, check_one_process, checks, run
from autoregressive.runtime.files import check_output
from autoregressive.runtime.log import LOGGER, open_logger
from autoregressive.runtime.pictures import save_grid
from tokenizer.tokenizer_image.vq_model import VQConfig

IMAGENET_CLASSES = 1000
NUM_SHOWN = 8                           # classes, if none are named


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Sample a few pictures of chosen classes.")
    add_pipeline_args(parser)
    parser.set_defaults(compile=False)              # compiling takes longer than a few pictures
    parser.add_argument("--class-ids", default="207,360,387,974,88,979,417,279",
                        help="classes, by index or by the name that travels in the checkpoint, "
                             "with commas between; the default is that of 1000 classes, of others "
                             "the first eight")
    parser.add_argument("--num-per-class", type=between(1, 1000), default=4,
                        help="pictures of each class, a row of the grid")
    parser.add_argument("--output", default="samples/classes.png", help="the PNG")
    return parser


def classes_to_show(args: Flags) -> str:
    """Returns --class-ids; the first classes if it is not given and its default does not fit."""
    if args.is_given("class_ids") or args.num_classes == IMAGENET_CLASSES:
        return args.class_ids
    return ",".join(map(str, range(min(NUM_SHOWN, args.num_classes))))


def read_classes(text: str, num_classes: int, class_names: list[str] | None) -> list[int]:
    """Returns the class indices of a comma-separated list of indices and names.

    Args:
        text: such as "207,tench".
        num_classes: indices are below it.
        class_names: list of all names, or None if they are not known.

    Raises:
        ValueError: an index out of range, a name that is not known.
    """
    classes = []
    for word in text.split(","):
        word = word.strip()
        if class_names and word in class_names:     # a name first: digits are called "0" to "9"
            classes.append(class_names.index(word))
        elif word.isdigit() and int(word) < num_classes:
            classes.append(int(word))
        else:
            known = "; the checkpoint carries no names"
            if class_names:
                known = f", or one of {', '.join(class_names[:5])}, ..."
            raise ValueError(f"--class-ids: expected indices in 0 .. {num_classes - 1}{known}, "
                             f"got {word!r}")
    return classes


def main(args: Flags, session: Session) -> None:
    """Samples a row of pictures for each class into one PNG."""
    open_logger(session)
    with checks(session):
        check_one_process(session)

        # What the checkpoint and a preset say about flags that were not given.
        gpt_file = read_gpt(args.gpt_ckpt, args.weights, args.from_fsdp)
        settle_flags(args, gpt_file, session.device)

        # Load the parts, which must belong together, and reserve the place of the PNG.
        pipeline = load_pipeline(gpt_file, PipelineSettings(**args.pick(PipelineSettings)),
                                 Sampler(**args.pick(Sampler)), VQConfig(**args.pick(VQConfig)),
                                 session.device)
        classes = read_classes(classes_to_show(args), args.num_classes, pipeline.class_names)
        check_output(args.output)
        session.hold(args.output)
    log_sampling(args.preset, gpt_file.settings, args.plain())

    labels = np.repeat(classes, args.num_per_class)
    _, uniforms = random_numbers(args.global_seed, range(len(labels)), args.num_classes,
                                 pipeline.gpt.config.num_tokens)
    save_grid(args.output, pipeline.sample(labels, uniforms), columns=args.num_per_class,
              captions=pipeline.label_names(labels))
    LOGGER.info("%d pictures in %s", len(labels), args.output)


if __name__ == "__main__":
    run(main, build_parser())
