"""Main 2: trains a GPT on codes with the token loss and the cluster loss.

    torchrun --nnodes=1 --nproc_per_node=8 autoregressive/train/train_c2i.py --code-path codes --results-dir results \
        --image-size 384 --gpt-model GPT-B

On a CPU, after the digits of scripts/quickstart.sh were extracted:

    python autoregressive/train/train_c2i.py --code-path results/quickstart/codes --results-dir results/quickstart/gpt \
        --mapping-path results/quickstart/mapping-kmeans+nearest-cluster_size=16.pt --cluster-size 16 --vocab-size 512 \
        --codebook-size 512 --num-classes 10 --image-size 16 --downsample-size 4 --gpt-model GPT-tiny \
        --global-batch-size 64 --mixed-precision none --max-steps 100
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])      # the repository root instead of this folder

import dataclasses
import functools
import math

import torch
from torch import Tensor

from autoregressive.data.batches import TokenBatches, split_store
from autoregressive.data.codes import CodeStore, add_code_args, open_codes
from autoregressive.data.mapping import Mapping, default_mapping_path, read_mapping
from autoregressive.data.store_checks import ExpectedCodes, check_store, verify_codes
from autoregressive.models.cluster_loss import check_cluster_size, fused_head_loss, plain_head_loss
from autoregressive.models.config import GPTConfig, add_gpt_args, gpt_config, grid_of
from autoregressive.models.generate import random_numbers
from autoregressive.models.gpt import GPT
from autoregressive.models.loading import GPTFile, build_gpt
from autoregressive.models.sampler import Sampler
from autoregressive.models.start import check_start, read_start
from autoregressive.pipeline import Pipeline, load_decoder
from autoregressive.runtime.checkpoint import find_checkpoint, load_strictly
from autoregressive.runtime.compute import PRECISIONS, BlockCompiler, add_compute_args, set_up_compiler, set_up_gpu
from autoregressive.runtime.distributed import Session, seed_everything
from autoregressive.runtime.entry import Flags, Parser, at_least, checks, flag_of, free, on_main, pixels, run, share
from autoregressive.runtime.files import weights_sha256
from autoregressive.runtime.log import LOGGER, open_logger
from autoregressive.runtime.optim import ModelOptimizer, OptimSettings, add_optim_args, check_optim
from autoregressive.runtime.parallel import PARALLEL, device_to_build_on, wrap_for_training
from autoregressive.runtime.pictures import save_grid
from autoregressive.runtime.run_settings import RunSettings, add_training_args, check_batch, open_run_folder
from autoregressive.runtime.speed import Speedometer
from autoregressive.runtime.training import TrainingRun
from autoregressive.train.objective import GPTTrainer, Objective
from tokenizer.tokenizer_image.images import to_uint8
from tokenizer.tokenizer_image.loading import default_vq_path
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel, add_vq_args

LABEL_DROPOUT = 0.1                                 # classifier-free guidance learns the null label from these
NUM_SHOWN = 4                                       # rows of the training data in data.png
NUM_SAMPLED, SHOWN_GUIDANCE = 8, 2.0                # pictures of --validation_step
CPU_LOSS_MIB, GPU_LOSS_MIB = 16, 128                # a chunk of logits: what stays in the caches; what fills a GPU
RESULT = ("token_loss", "cluster_loss", "val_token_loss", "val_cluster_loss")


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Train a GPT on codes with the token loss and the cluster loss.")
    add_code_args(parser, several=True)
    add_gpt_args(parser)
    add_vq_args(parser)
    add_optim_args(parser)
    add_training_args(parser)
    add_compute_args(parser)
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="imagenet_code", choices=("imagenet_code",), help="a store of codes")
    group.add_argument("--image-size", type=pixels, default=256, help="pixels of a picture's side")
    group.add_argument("--vocab-size", type=at_least(1), default=16384, help="number of codes, V")
    group.add_argument("--mapping-path", help="mapping of the codebook; default: the published one's")
    group.add_argument("--val-share", type=share, default=0.01, help="share of the images that --val-every holds out")
    free(group.add_argument("--validation_step", type=at_least(0), default=0,
                            help="steps between sample pictures; 0: none"))
    group = parser.add_argument_group("loss and regularisation")
    group.add_argument("--lambda-cce", type=at_least(0.0), default=1.0,
                       help="weight of the cluster loss; 0 is LlamaGen")
    group.add_argument("--dropout-p", type=share, default=0.1, help="dropout after the projections of a block")
    group.add_argument("--token-dropout-p", type=share, default=0.1, help="dropout on the input embeddings")
    group.add_argument("--drop-path-rate", type=share, default=0.0, help="drop path of the last layer; above 0 it "
                       "replaces --dropout-p")
    group.add_argument("--weights-only", action="store_true", help="start from the weights of --gpt-ckpt, whatever "
                       "else it holds")
    group.add_argument("--init-from-original", action="store_true", help="--gpt-ckpt is a GPT over codes in their "
                       "original order, such as LlamaGen's: move its rows to their tokens")
    group = parser.add_argument_group("memory")
    free(group.add_argument("--parallel", default="ddp", choices=PARALLEL,
                            help="ddp: every process holds all weights; fsdp: shards them, for XL and larger"))
    free(group.add_argument("--checkpoint-activations", action="store_true",
                            help="compute each block's activations again in the backward pass: slower, less memory"))
    group.add_argument("--no-fused-loss", action="store_true", help="compute the loss from all logits at once")
    free(group.add_argument("--loss-mib", type=at_least(0), default=0, help="memory of a chunk of logits in the fused "
                            "loss, MiB; 0: 16 on a CPU, 128 on a GPU"))
    return parser


def check_flags(args: Flags, session: Session) -> None:
    """Raises ValueError for flags that contradict each other."""
    grid_of(args.image_size, args.downsample_size)
    check_cluster_size(args.vocab_size, args.cluster_size)
    check_batch(args.global_batch_size, args.gradient_accumulation_steps, session)
    check_optim(args.ema, args.ema_warmup)
    if args.val_every and not args.val_share:
        raise ValueError("--val-share: expected more than 0 with --val-every, got 0")
    for name in ("init_from_original", "weights_only"):
        if getattr(args, name) and not args.gpt_ckpt:
            raise ValueError(f"{flag_of(name)}: expected --gpt-ckpt, the GPT to start from, got none")
    if args.parallel == "fsdp" and args.mixed_precision == "fp16":
        raise ValueError("--parallel fsdp: expected --mixed-precision bf16 or none, got fp16; its scaler does not see "
                         "shards")


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What a GPT is trained on.

    Attributes:
        store: all codes.
        mapping: code -> token.
        batches: of the images to train on.
        val_batches: of the images to validate with, or None.
    """

    store: CodeStore
    mapping: Mapping
    batches: TokenBatches
    val_batches: TokenBatches | None

    def identity(self) -> dict:
        """Returns the hashes of codes and mapping, and how many images are trained on."""
        manifest = self.store.manifest                          # an older layout does not tell all of them
        return {name: manifest.get(name) for name in ("images_sha256", "tokenizer_sha256", "codes_sha256",
                                                      "labels_sha256")} | {
            "mapping_sha256": self.mapping.hashes["mapping_sha256"],
            "num_training_images": len(self.batches.store.rows)}


def open_data(args: Flags, session: Session) -> TrainingData:
    """Opens codes and mapping, and compares them with each other and with the flags."""
    store = open_codes(*args.code_path)
    mapping = read_mapping(args.mapping_path or default_mapping_path(args.cluster_size), args.vocab_size)
    grid = grid_of(args.image_size, args.downsample_size)
    check_store(store, mapping, ExpectedCodes(args.vocab_size, args.codebook_size, args.num_classes, args.image_size,
                                              grid, args.cluster_size))
    training, val = split_store(store, args.val_share if args.val_every else 0, args.global_seed)
    batches = TokenBatches(training, mapping.tokens, args.global_batch_size, args.global_seed, args.num_classes,
                           LABEL_DROPOUT)
    val_batches = None
    if args.val_every:
        largest = args.global_batch_size // args.gradient_accumulation_steps
        size = min(largest, len(val.rows)) // session.world_size * session.world_size
        val_batches = TokenBatches(val, mapping.tokens, max(size, session.world_size), args.global_seed,
                                   args.num_classes, label_dropout=0)
    return TrainingData(store, mapping, batches, val_batches)


def open_vq(args: Flags, mapping: Mapping) -> VQModel | None:
    """Returns the VQ model with the reordered codebook; training needs it for pictures only."""
    path = args.vq_ckpt or default_vq_path(args.cluster_size)
    if not args.vq_ckpt and not Path(path).exists():
        LOGGER.warning("%s: not there, so no pictures are made; name it with --vq-ckpt", path)
        return None
    vq, _ = load_decoder(path, VQConfig(**args.pick(VQConfig)), mapping.hashes.get("codebook_sha256"), mapping.path)
    return vq


def describe(args: Flags, data: TrainingData) -> dict:
    """Returns what a reader of a checkpoint must know of it."""
    names = ("gpt_model", "vocab_size", "num_classes", "image_size", "cluster_size", "lambda_cce",
             "global_batch_size", "ema", "ema_warmup")
    manifest = data.store.manifest
    return {name: getattr(args, name) for name in names} | {
        "class_names": manifest["class_names"], "grid": data.store.grid, "label_dropout": LABEL_DROPOUT,
        "codebook_sha256": data.mapping.hashes.get("codebook_sha256"),
        "mapping_sha256": data.mapping.hashes["mapping_sha256"], "tokenizer_sha256": manifest["tokenizer_sha256"]}


def build_trainer(args: Flags, config: GPTConfig, start: GPTFile | None, data: TrainingData, vq: VQModel | None,
                  session: Session) -> GPTTrainer:
    """Builds the model and everything that trains it."""
    device = session.device
    seed_everything(args.global_seed)               # the same weights on every process
    place = device_to_build_on(session, args.parallel)
    with place:
        model = GPT(config)
    if start and place.type != "meta":
        load_strictly(model, start.state, start.path)
    head_loss = plain_head_loss
    if not args.no_fused_loss:
        chunk_bytes = (args.loss_mib or (CPU_LOSS_MIB if device.type == "cpu" else GPU_LOSS_MIB)) * 2**20
        head_loss = functools.partial(fused_head_loss, rows_at_once=max(1, chunk_bytes // (4 * args.vocab_size)))
    head_loss = functools.partial(head_loss, cluster_size=args.cluster_size, lambda_cce=args.lambda_cce)
    for layer in model.layers:
        layer.recomputes = args.checkpoint_activations
    compiler = None
    if device.type == "cuda" and not args.no_compile and set_up_compiler(device, args.compile_errors):
        head_loss = torch.compile(head_loss)
        compiler = BlockCompiler(model.layers)
    wrapped = wrap_for_training(Objective(model, head_loss), session, args.parallel, model.layers,
                                PRECISIONS[args.mixed_precision])
    optimizer = ModelOptimizer(model, OptimSettings(**args.pick(OptimSettings)), device,
                               uses_scaler=args.mixed_precision == "fp16")
    seed_everything(args.global_seed, 1 + session.rank)          # dropout differs between processes
    draw = None
    if vq is not None:
        draw = functools.partial(save_samples, config=config, vq=vq, device=device, seed=args.global_seed,
                                 class_names=data.store.manifest["class_names"])
    return GPTTrainer(wrapped, optimizer, session, args.mixed_precision, args.gradient_accumulation_steps,
                      data.val_batches, draw, compiler)


@torch.inference_mode()
def save_first_rows(path: Path, data: TrainingData, vq: VQModel, num_classes: int) -> None:
    """Saves what the first rows of the training data look like when their tokens are decoded."""
    tokens, labels = data.batches[0, range(min(NUM_SHOWN, data.batches.batch_size))]
    names = [*(data.store.manifest["class_names"] or [f"class {label}" for label in range(num_classes)]), "no label"]
    pictures = to_uint8(vq.decode_codes(tokens, data.store.grid))
    save_grid(path, pictures, columns=4, captions=[names[label] for label in labels])


def save_samples(path: Path, weights: dict[str, Tensor], *, config: GPTConfig, vq: VQModel, device: torch.device,
                 seed: int, class_names: list[str] | None) -> None:
    """Saves a few pictures drawn with given weights."""
    gpt = build_gpt(GPTFile(path, weights, {"grid": config.grid}, {}), config).to(device)
    pipeline = Pipeline(gpt, vq.to(device), Sampler(cfg_scale=SHOWN_GUIDANCE), image_size=config.grid * vq.downsampling,
                        antialias=False, tile=NUM_SAMPLED, class_names=class_names, hashes={})
    labels, uniforms = random_numbers(seed, range(NUM_SAMPLED), config.num_classes, config.num_tokens)
    save_grid(path, pipeline.draw(labels, uniforms), columns=4, captions=pipeline.label_names(labels))


def main(args: Flags, session: Session) -> None:
    open_logger(session)
    start_path = on_main(session, find_checkpoint, args.gpt_ckpt) if args.gpt_ckpt else None
    with checks(session):
        check_flags(args, session)
        data = open_data(args, session)
        vq = open_vq(args, data.mapping)
        config = gpt_config(args.gpt_model, grid=data.store.grid, vocab_size=args.vocab_size,
                            num_classes=args.num_classes, dropout=args.dropout_p, token_dropout=args.token_dropout_p,
                            drop_path=args.drop_path_rate)
        settings = RunSettings(**args.pick(RunSettings))
        num_steps = settings.num_steps(data.batches.per_epoch)
        mapping = data.mapping
        start = read_start(start_path, config, tokens=mapping.tokens, mapping_path=mapping.path,
                           mapping_sha256=mapping.hashes["mapping_sha256"], weights_only=args.weights_only,
                           init_from_original=args.init_from_original)
        identity = args.identity() | data.identity()
        if start and not start.payload:             # a checkpoint to go on from may grow meanwhile
            identity["start_sha256"] = weights_sha256(start.state)
        name = f"{args.gpt_model}-lambda={args.lambda_cce:g}-cluster_size={args.cluster_size}"
    can_start = functools.partial(check_start, start, num_steps, needs_ema=args.ema,
                                  needs_scaler=args.mixed_precision == "fp16")
    folder = open_run_folder(args, session, name, identity, num_steps, can_start)
    if folder.is_finished(num_steps):
        LOGGER.info("%s is finished: %s", folder.path, folder.result)
        return

    set_up_gpu(args.tf32, args.cudnn_attention)
    trainer = build_trainer(args, config, start, data, vq, session)
    num_parameters = sum(parameter.numel() for parameter in trainer.optimizer.model.parameters())
    speed = Speedometer(session.device, session.world_size, config.num_tokens, config.flops_per_token(num_parameters))
    training = TrainingRun(folder, trainer, data.batches, settings, session, record=describe(args, data), speed=speed,
                           curves=trainer.meter.names, result=RESULT, draw_every=args.validation_step)
    with checks(session):
        training.verify_data(functools.partial(verify_codes, args.code_path))
    training.resume(start)
    if session.is_main and vq:
        save_first_rows(folder.path / "data.png", data, vq, args.num_classes)
    store = data.store
    LOGGER.info("%s, %.1fM parameters; %s: %d images, %d crops of %d tokens, %d classes", config.name,
                num_parameters / 1e6, store.path, len(store.rows), *store.codes.shape[1:], config.num_classes)
    if failed := len(store.labels) - len(store.rows):
        LOGGER.warning("%d images of %s could not be read and are left out", failed, store.path)
    if config.vocab_size == 16384:
        LOGGER.info("ImageNet models end with a token loss of 7 to 8: that is healthy, not broken")
    LOGGER.info("%d steps of %d images, lambda %g; token loss begins at ln V = %.2f, cluster loss at ln K = %.2f",
                num_steps, args.global_batch_size, args.lambda_cce, math.log(args.vocab_size),
                math.log(args.vocab_size // args.cluster_size))
    training.train()
    training.finish()


if __name__ == "__main__":
    run(main, build_parser())
