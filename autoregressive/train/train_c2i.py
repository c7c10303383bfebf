"""Main 2: trains a GPT on codes with the token loss and the cluster loss.

    torchrun --nnodes=1 --nproc_per_node=8 autoregressive/train/train_c2i.py \
        --code-path codes --results-dir results --image-size 384 --gpt-model GPT-B

On a CPU, after the digits of scripts/quickstart.sh were extracted:

    python autoregressive/train/train_c2i.py --code-path results/quickstart/codes \
        --results-dir results/quickstart/gpt --gpt-model GPT-tiny --global-batch-size 64 \
        --mixed-precision none --max-steps 100
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The repository root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import functools
from typing import Any

import torch

from autoregressive.data.codes import add_code_args
from autoregressive.data.opening import open_older_stores
from autoregressive.data.store_checks import verify_codes
from autoregressive.data.training_data import (
    DataSettings,
    TrainingData,
    add_data_args,
    open_codes_and_mapping,
    open_data,
)
from autoregressive.decoder import open_decoder, save_first_rows
from autoregressive.models.cluster_loss import check_cluster_size
from autoregressive.models.config import (
    GPTConfig,
    add_gpt_args,
    add_regularisation_args,
    gpt_config,
    grid_of,
)
from autoregressive.models.gpt import GPT
from autoregressive.models.guidance_free import embedding_of
from autoregressive.models.loading import GPTFile, read_gpt, sizes_of
from autoregressive.models.loss_settings import LossSettings, add_loss_args, build_head_loss
from autoregressive.models.patches import (
    StageSettings,
    add_stage_args,
    describe_stages,
    patch_at,
)
from autoregressive.models.recipes import add_recipe_arg, log_recipe, training_flags
from autoregressive.models.start import StartSettings, add_start_args, check_start, read_start
from autoregressive.pipeline import save_samples
from autoregressive.runtime.checkpoint import find_checkpoint, load_strictly
from autoregressive.runtime.compute import (
    PRECISIONS,
    BlockCompiler,
    add_compute_args,
    set_up_compiler,
    set_up_gpu,
)
from autoregressive.runtime.distributed import Session, seed_everything
from autoregressive.runtime.entry import Flags, Parser, at_least, checks, may_vary, on_main, run
from autoregressive.runtime.files import weights_sha256
from autoregressive.runtime.log import LOGGER, open_logger
from autoregressive.runtime.optim import ModelOptimizer, OptimSettings, add_optim_args, check_optim
from autoregressive.runtime.parallel import add_memory_args, device_to_build_on, wrap_for_training
from autoregressive.runtime.run_settings import (
    RunRequest,
    RunSettings,
    add_training_args,
    check_batch,
    open_run_folder,
)
from autoregressive.runtime.speed import Speedometer
from autoregressive.runtime.training import TrainingRun
from autoregressive.train.objective import CURVES, GPTTrainer, Objective
from tokenizer.tokenizer_image.vq_model import VQModel, add_vq_args

OF_FILES = ("mapping_path", "vq_ckpt", "vq_model", "codebook_embed_dim")
RESULT = ("token_loss", "cluster_loss", "val_token_loss", "val_cluster_loss")


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Train a GPT on codes with the token loss and the cluster loss.")
    add_code_args(parser, several=True)
    add_recipe_arg(parser)
    add_gpt_args(parser)
    add_vq_args(parser)
    add_optim_args(parser)
    add_training_args(parser)
    add_compute_args(parser)
    add_data_args(parser)
    may_vary(parser.add_argument("--validation_step", type=at_least(0), default=0,
                                 help="steps between sample pictures; 0: none"))
    group = parser.add_argument_group("loss and regularisation")
    add_loss_args(group)
    add_regularisation_args(group)
    group.add_argument("--guidance-free", action="store_true",
                       help="train a model that is sampled in one pass, the strength of guidance "
                            "being one of its inputs (GFT)")
    add_stage_args(group)
    add_start_args(group)
    add_memory_args(parser)
    return parser


def check_flags(args: Flags, session: Session) -> None:
    """Raises ValueError for flags that contradict each other."""
    check_batch(args.global_batch_size, args.gradient_accumulation_steps, session)
    check_optim(args.ema, args.ema_warmup)
    for settings in (LossSettings, RunSettings, StartSettings):
        settings(**args.pick(settings)).check()
    if args.parallel == "fsdp" and args.mixed_precision == "fp16":
        raise ValueError("--parallel fsdp: expected --mixed-precision bf16 or none, got fp16; its "
                         "scaler does not see shards")


def build_config(args: Flags) -> GPTConfig:
    """Returns the GPT that is asked for; raises ValueError if its sizes do not come out."""
    check_cluster_size(args.vocab_size, args.cluster_size)
    grid = grid_of(args.image_size, args.downsample_size)
    StageSettings(**args.pick(StageSettings)).check(grid)
    return gpt_config(args.gpt_model, grid=grid, vocab_size=args.vocab_size,
                      num_classes=args.num_classes, dropout=args.dropout_p,
                      token_dropout=args.token_dropout_p, drop_path=args.drop_path_rate,
                      guidance_free=args.guidance_free)


def run_name(args: Flags) -> str:
    """Returns what the name of the run's folder says after its number."""
    loss = LossSettings(**args.pick(LossSettings))
    kind = "-guidance-free" if args.guidance_free else ""
    if args.patch_level > 1:
        kind += f"-patch_level={args.patch_level}"
    return f"{args.gpt_model}-lambda={loss.lambda_text}{kind}-cluster_size={args.cluster_size}"


def build_identity(args: Flags, data: TrainingData, start: GPTFile | None,
                   stage_ends: tuple[int, ...]) -> dict[str, Any]:
    """Returns all that the run depends on."""
    identity = args.identity() | data.identity()
    for name in OF_FILES:                           # the hashes say which files these are
        del identity[name]
    if len(stage_ends) > 1:                         # a longer run would go back to patches
        identity["stage_ends"] = list(stage_ends)
    # Weights alone are part of the identity. A checkpoint to go on from is not: its run may have a
    # newer one when the same command is given again.
    if start and not start.continues:
        identity["start_sha256"] = weights_sha256(start.state)
    return identity


def checkpoint_settings(args: Flags, data: TrainingData) -> dict[str, Any]:
    """Returns what a reader of a checkpoint must know of it."""
    names = ("gpt_model", "vocab_size", "num_classes", "image_size", "cluster_size", "lambda_cce",
             "lambda_schedule", "lambda_end", "recipe", "guidance_free", "patch_level",
             "global_batch_size", "ema", "ema_warmup")
    return {name: getattr(args, name) for name in names} | data.checkpoint_settings()


def build_trainer(args: Flags, config: GPTConfig, stage_ends: tuple[int, ...], *,
                  start: GPTFile | None, data: TrainingData, vq: VQModel | None,
                  session: Session) -> GPTTrainer:
    """Builds the model and everything that trains it."""
    device = session.device

    # The same weights on every process: those of the start, or drawn from the seed. With FSDP those
    # of rank 0 count.
    seed_everything(args.global_seed)
    place = device_to_build_on(session, args.parallel)
    with place:
        model = GPT(config)
    if start and place.type != "meta":
        # An ordinary GPT has no embedding of beta: that of the new model stays.
        load_strictly(model, embedding_of(model.state_dict()) | start.state, start.path)

    # Compile what takes the time: every block, and the loss.
    loss = LossSettings(**args.pick(LossSettings))
    head_loss = build_head_loss(loss, device)
    for layer in model.layers:
        layer.recomputes = args.checkpoint_activations
    compiler = None
    wants_compiled = device.type == "cuda" and not args.no_compile
    if wants_compiled and set_up_compiler(device, args.compile_errors):
        head_loss = torch.compile(head_loss, dynamic=False)
        compiler = BlockCompiler(model.layers)

    # Divide the work among processes; from here on the model is on its device.
    objective = Objective(model, head_loss, loss.lambda_over(stage_ends[-1]),
                          functools.partial(patch_at, ends=stage_ends))
    wrapped = wrap_for_training(objective, session, args.parallel, model.layers,
                                PRECISIONS[args.mixed_precision])
    optimizer = ModelOptimizer(model, OptimSettings(**args.pick(OptimSettings)), device,
                               uses_scaler=args.mixed_precision == "fp16")
    seed_everything(args.global_seed, 1 + session.rank)     # dropout differs between processes
    save = None
    if vq is not None:
        save = functools.partial(save_samples, config=config, vq=vq, device=device,
                                 seed=args.global_seed, class_names=data.class_names)
    return GPTTrainer(wrapped, optimizer, session, precision=args.mixed_precision,
                      accumulation=args.gradient_accumulation_steps, val_batches=data.val_batches,
                      save_samples=save, compiler=compiler)


def step_flops(config: GPTConfig, num_parameters: int, stage_ends: tuple[int, ...],
               step: int) -> int:
    """Returns the floating-point operations of a step, from 0, for one image."""
    return config.flops_per_image(num_parameters, patch_at(step, stage_ends))


def log_start(args: Flags, data: TrainingData, num_parameters: int,
              stage_ends: tuple[int, ...]) -> None:
    """Says in the log what is trained, on what, for how long, and where its losses begin."""
    log_recipe(args.recipe, args.plain(), data.num_crops)
    store = data.store
    loss = LossSettings(**args.pick(LossSettings))
    LOGGER.info("%s, %.1fM parameters; %s", args.gpt_model, num_parameters / 1e6, data.describe())
    num_failed = len(store.labels) - len(store.rows)
    if num_failed:
        LOGGER.warning("%d images of %s could not be read and are left out", num_failed, store.path)
    if loss.vocab_size == 16384:
        LOGGER.info("ImageNet models end with a token loss of 7 to 8, which is normal")
    LOGGER.info("%d steps of %d images, %s", stage_ends[-1], data.batches.batch_size,
                loss.describe())
    if len(stage_ends) > 1:
        LOGGER.info("stages: %s", describe_stages(stage_ends))


def main(args: Flags, session: Session) -> None:
    """Trains a GPT, or continues the run that the same command began."""
    open_logger(session)
    args.resolve({}, "", training_flags(args.recipe))
    with checks(session):               # before an older layout, which takes minutes to open
        check_flags(args, session)
    start_path = on_main(session, find_checkpoint, args.gpt_ckpt) if args.gpt_ckpt else None
    older = on_main(session, open_older_stores, args.code_path, session)

    # Open and compare all that the run depends on, before any work.
    with checks(session):
        store, mapping = open_codes_and_mapping(args, older)
        start_file = read_gpt(start_path) if start_path else None
        if start_file:
            args.take({"gpt_model": sizes_of(start_file.state).get("gpt_model")}, start_path)
        config = build_config(args)
        data = open_data(DataSettings(**args.pick(DataSettings)), store, mapping, config.grid,
                         session.world_size)
        vq = open_decoder(args, mapping)
        start = read_start(start_file, config, StartSettings(**args.pick(StartSettings)),
                           tokens=mapping.tokens, mapping_path=mapping.path,
                           mapping_sha256=mapping.hashes["mapping_sha256"])
        settings = RunSettings(**args.pick(RunSettings))
        stage_ends = StageSettings(**args.pick(StageSettings)).ends(
            args.epochs, args.max_steps, data.batches.per_epoch)
        settings.learning_rate(data.batches.per_epoch, stage_ends)      # ends in every stage
        identity = build_identity(args, data, start, stage_ends)

    # Find the run that this command continues, or begin one.
    can_start = functools.partial(check_start, start, stage_ends[-1], needs_ema=args.ema,
                                  needs_scaler=args.mixed_precision == "fp16")
    request = RunRequest(args.results_dir, run_name(args), identity, args.plain() | identity,
                         defaults=args.defaults(), new_run=args.new_run)
    folder = open_run_folder(session, request, stage_ends[-1], can_start)
    if folder.is_finished(stage_ends[-1]):
        LOGGER.info("%s is finished: %s", folder.path, folder.result)
        return

    # Build what is trained, and the loop that trains it.
    set_up_gpu(args.tf32, args.cudnn_attention)
    trainer = build_trainer(args, config, stage_ends, start=start, data=data, vq=vq,
                            session=session)
    num_parameters = sum(parameter.numel() for parameter in trainer.optimizer.model.parameters())
    flops_at = functools.partial(step_flops, config, num_parameters, stage_ends)
    speed = Speedometer(session.device, session.world_size, config.num_tokens, flops_at)
    training = TrainingRun(folder, trainer, data.batches, settings, session, speed=speed,
                           checkpoint_settings=checkpoint_settings(args, data), result=RESULT,
                           curves=CURVES, pictures_every=args.validation_step,
                           stage_ends=stage_ends)

    # Look at the data once more, load the newest checkpoint, and train.
    with checks(session):
        training.verify_data(functools.partial(verify_codes, args.code_path))
    training.resume(start, can_start)
    if session.is_main and vq:
        save_first_rows(folder.path / "data.png", data, vq)
    log_start(args, data, num_parameters, stage_ends)
    training.train()
    training.finish()


if __name__ == "__main__":
    run(main, build_parser())
