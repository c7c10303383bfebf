"""Main 2: trains a GPT on codes with the token loss and the cluster loss.

    torchrun --nnodes=1 --nproc_per_node=8 autoregressive/train/train_c2i.py --code-path codes --results-dir results \
        --image-size 384 --gpt-model GPT-B

On a CPU, after the digits of scripts/quickstart.sh were extracted:

    python autoregressive/train/train_c2i.py --code-path results/quickstart/codes --results-dir results/quickstart/gpt \
        --mapping-path results/quickstart/mapping-kmeans+nearest-cluster_size=16.pt --cluster-size 16 --vocab-size 512 \
        --codebook-size 512 --num-classes 10 --image-size 16 --downsample-size 4 --gpt-model GPT-tiny \
        --global-batch-size 64 --mixed-precision none --max-updates 100
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])      # the repository root instead of this folder

import functools

import torch

from autoregressive.assemble import check_same, default_vq_path, load_vq
from autoregressive.data.batches import TokenBatches, split_store
from autoregressive.data.codes import add_code_args, default_mapping_path, open_codes, read_mapping
from autoregressive.models.cluster_loss import check_cluster_size, fused_head_loss, plain_head_loss
from autoregressive.models.generate import Sampler, generate, random_numbers
from autoregressive.models.gpt import GPT, add_gpt_args, check_gpt_args, describe_gpt, gpt_config
from autoregressive.runtime.checkpoint import find_checkpoint, load_strictly, read_checkpoint
from autoregressive.runtime.compiling import can_compile
from autoregressive.runtime.distributed import (
    cores_per_process,
    gather_state,
    seed_everything,
    whole_tensor,
    wrap_for_training,
)
from autoregressive.runtime.entry import Parser, checks, run
from autoregressive.runtime.log import (
    LOGGER,
    cut_log,
    find_run_folder,
    open_logger,
    start_run_folder,
)
from autoregressive.runtime.pictures import save_grid
from autoregressive.train.flags import FREE_TO_CHANGE, add_train_args, check_train_args
from autoregressive.train.journal import Journal, SaveSchedule
from autoregressive.train.monitor import Speedometer, flops_per_token
from autoregressive.train.optim import add_optim_args, build_optimizer, learning_rate
from autoregressive.train.preflight import announce, check_store
from autoregressive.train.state import load_state, resume, save_state, weights_to_start_from
from autoregressive.train.step import PRECISIONS, MovingAverage, Objective, Trainer
from tokenizer.tokenizer_image.images import to_uint8
from tokenizer.tokenizer_image.vq_model import add_vq_args

LABEL_DROPOUT = 0.1                                 # classifier-free guidance learns the null label from these
NUM_SHOWN = 4                                       # rows of the training data in the picture of the preflight
NUM_SAMPLED, SHOWN_GUIDANCE = 8, 2.0                # pictures of --validation_step
CPU_LOSS_MIB, GPU_LOSS_MIB = 16, 512                # a chunk of logits: what stays in the caches; what fills a GPU


def build_parser():
    """Returns the parser of this script's command line."""
    parser = Parser("Train a GPT on codes with the token loss and the cluster loss.")
    add_code_args(parser, several=True)
    add_gpt_args(parser)
    add_vq_args(parser)
    add_optim_args(parser)
    add_train_args(parser)
    return parser


class Parts:
    """The parts of one training run, put together from the flags before the work begins."""

    def __init__(self, args, session):
        """Reads and compares everything the run needs.

        Raises:
            ValueError: something is wrong or does not fit.
        """
        check_gpt_args(args)
        check_cluster_size(args.vocab_size, args.cluster_size)
        check_train_args(args, session)
        self.args, self.session = args, session
        self.store = open_codes(*args.code_path)
        self.mapping = read_mapping(args.mapping_path or default_mapping_path(args.cluster_size), args.vocab_size)
        check_store(args, self.store, self.mapping)
        training, held_out = split_store(self.store, args.eval_share if args.eval_every else 0, args.global_seed)
        make_batches = functools.partial(TokenBatches, mapping=self.mapping.tokens, seed=args.global_seed,
                                         num_classes=args.num_classes)
        self.batches = make_batches(training, batch_size=args.global_batch_size, label_dropout=LABEL_DROPOUT)
        self.held_out = None
        if args.eval_every:
            largest = args.global_batch_size // args.gradient_accumulation_steps
            size = min(largest, len(held_out.rows)) // session.world_size * session.world_size
            self.held_out = make_batches(held_out, batch_size=max(size, session.world_size), label_dropout=0)
        self.vq = self._load_vq()
        self.start = self._read_start()
        name = f"{args.gpt_model}-lambda={args.lambda_cce:g}-cluster_size={args.cluster_size}"
        self.folder = find_run_folder(args.results_dir, name, vars(args), FREE_TO_CHANGE, args.new_run)
        self.num_updates = args.max_updates or args.epochs * self.batches.per_epoch

    def _load_vq(self):
        # Training needs the VQ model, with the reordered codebook, for pictures only.
        args = self.args
        path = Path(args.vq_ckpt or default_vq_path(args.cluster_size))
        if not args.vq_ckpt and not path.exists():
            LOGGER.warning("%s: not there, so no pictures are made; name it with --vq-ckpt", path)
            return None
        vq, hashes = load_vq(path, args.vq_model, args.codebook_size, args.codebook_embed_dim)
        check_same("codebook", self.mapping.hashes.get("codebook_sha256"), hashes["codebook_sha256"],
                   self.mapping.path, path)
        return vq

    def _read_start(self):
        # --gpt-ckpt: with the optimizer's state the run goes on from it, with weights alone it starts from them.
        if not self.args.gpt_ckpt:
            return None
        path = find_checkpoint(self.args.gpt_ckpt)
        payload = read_checkpoint(path)
        mapping = self.mapping.tokens if self.args.init_from_original else None
        weights = weights_to_start_from(path, payload, mapping)
        with torch.device("meta"):
            load_strictly(GPT(self.config), weights, path, describe_gpt(weights))
        return path, payload, weights

    @property
    def config(self):
        args = self.args
        return gpt_config(args.gpt_model, grid=self.store.grid, vocab_size=args.vocab_size,
                          num_classes=args.num_classes, dropout=args.dropout_p, token_dropout=args.token_dropout_p,
                          drop_path=args.drop_path_rate)

    def settings(self):
        """Returns what a reader of a checkpoint must know of it."""
        args, manifest = self.args, self.store.manifest
        return {"gpt_model": args.gpt_model, "vocab_size": args.vocab_size, "num_classes": args.num_classes,
                "class_names": manifest["class_names"], "grid": self.store.grid, "image_size": args.image_size,
                "cluster_size": args.cluster_size, "lambda_cce": args.lambda_cce, "label_dropout": LABEL_DROPOUT,
                "global_batch_size": args.global_batch_size,
                "codebook_sha256": self.mapping.hashes.get("codebook_sha256"),
                "mapping_sha256": self.mapping.hashes["mapping_sha256"],
                "tokenizer_sha256": manifest["tokenizer_sha256"]}

    def class_names(self):
        return self.store.manifest["class_names"] or [f"class {label}" for label in range(self.args.num_classes)]


def build_trainer(parts):
    """Builds the model and everything that updates it; returns the Trainer."""
    args, session = parts.args, parts.session
    device = session.device
    seed_everything(args.global_seed)               # the same weights on every process
    model = GPT(parts.config)
    if parts.start and (args.init_from_original or "optimizer" not in parts.start[1]):
        load_strictly(model, parts.start[2], parts.start[0])
    model.to(device)
    if args.no_fused_loss:
        head_loss = functools.partial(plain_head_loss, cluster_size=args.cluster_size, lambda_cce=args.lambda_cce)
    else:
        chunk_bytes = (args.loss_mib or (CPU_LOSS_MIB if device.type == "cpu" else GPU_LOSS_MIB)) * 2**20
        head_loss = functools.partial(fused_head_loss, cluster_size=args.cluster_size, lambda_cce=args.lambda_cce,
                                      rows_at_once=max(1, chunk_bytes // (4 * args.vocab_size)))
    if can_compile(device, not args.no_compile):
        head_loss = torch.compile(head_loss)
        for layer in model.layers:
            layer.compile()                         # one block is compiled once and used by all
    if args.checkpoint_activations:
        for layer in model.layers:
            layer.forward = functools.partial(torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False)
    objective = Objective(model, head_loss)
    wrapped = wrap_for_training(objective, session, args.parallel, model.layers, PRECISIONS[args.mixed_precision])
    optimizer = build_optimizer(model, args.lr, (args.beta1, args.beta2), args.weight_decay)
    seed_everything(args.global_seed, 1 + session.rank)          # dropout differs between processes
    return Trainer(objective, wrapped, optimizer, device, args.mixed_precision, args.max_grad_norm,
                   args.gradient_accumulation_steps, MovingAverage(model) if args.ema else None)


@torch.inference_mode()
def save_first_rows(parts):
    """Saves what the first rows of the training data look like when their tokens are decoded."""
    tokens, labels = parts.batches.batch(0, range(min(NUM_SHOWN, parts.batches.batch_size)))
    captions = [*parts.class_names(), "no label"]
    pictures = to_uint8(parts.vq.decode_codes(tokens, parts.store.grid))
    save_grid(parts.folder.path / "data.png", pictures, columns=4, captions=[captions[label] for label in labels])


def save_samples(parts, trainer, done):
    """Draws a few pictures with the present weights, the averaged ones if there are any, on rank 0."""
    weights, _ = gather_state(trainer.objective.model, trainer.optimizer)
    if trainer.ema:
        weights |= {name: whole_tensor(weight) for name, weight in trainer.ema.weights.items()}
    if not parts.session.is_main or parts.vq is None:
        return
    device = parts.session.device
    with torch.device("meta"), torch.inference_mode():           # draws no random numbers that training would miss
        model = GPT(parts.config)
    load_strictly(model, {name: weight.clone() for name, weight in weights.items()}, "the weights in training")
    labels, uniforms = random_numbers(parts.args.global_seed, range(NUM_SAMPLED), parts.args.num_classes,
                                      model.config.num_tokens)
    tokens = generate(model.eval().to(device), torch.from_numpy(labels).to(device),
                      torch.from_numpy(uniforms).to(device), Sampler(cfg_scale=SHOWN_GUIDANCE))
    with torch.inference_mode():
        pictures = to_uint8(parts.vq.to(device).decode_codes(tokens, parts.store.grid)).cpu()
    save_grid(parts.folder.path / "samples" / f"{done:07d}.png", pictures, columns=4,
              captions=[parts.class_names()[label] for label in labels])


def count_parameters(trainer):
    return sum(parameter.numel() for parameter in trainer.objective.model.parameters())


def main(args, session):
    open_logger(session)
    with checks(session):
        parts = Parts(args, session)
    if parts.folder.result and parts.folder.result["updates"] >= parts.num_updates:
        LOGGER.info("%s is finished: %s", parts.folder.path, parts.folder.result)
        return
    if session.is_main:
        start_run_folder(parts.folder, vars(args))
    session.barrier()
    trainer = build_trainer(parts)
    first = resume(parts.folder.checkpoints, trainer, session)
    if not first and parts.start and "optimizer" in parts.start[1] and not args.init_from_original:
        load_state(*parts.start[:2], trainer, session)
        first = parts.start[1]["steps"]
    if session.is_main:
        cut_log(parts.folder.path / "log.txt", first)
    open_logger(session, parts.folder.path / "log.txt")
    if session.is_main and parts.vq:
        save_first_rows(parts)
    announce(args, parts.store, count_parameters(trainer), parts.num_updates)
    train(parts, trainer, first)


def train(parts, trainer, first):
    """Runs the updates from `first` on, with log, curves, pictures and checkpoints."""
    args, session, folder = parts.args, parts.session, parts.folder
    updates = range(first, parts.num_updates)
    speed = Speedometer(session.device, session.world_size, parts.config.num_tokens,
                        flops_per_token(parts.config, count_parameters(trainer)))
    journal = Journal(folder, trainer, parts.batches, parts.held_out, speed, updates, args.log_every, args.eval_every,
                      session)
    schedule = SaveSchedule((args.ckpt_every * parts.batches.per_epoch, args.ckpt_updates), args.ckpt_minutes,
                            parts.num_updates, session)
    batches = parts.batches.ahead(updates, session.share_of(args.global_batch_size),
                                  min(args.num_workers, cores_per_process()))
    for update, batch in zip(updates, batches, strict=True):
        lr = learning_rate(update, parts.num_updates, args.lr, args.warmup, args.lr_schedule)
        trainer.update(update, *batch, lr)
        done = update + 1
        journal.after(done, lr)
        if args.validation_step and done % args.validation_step == 0:
            save_samples(parts, trainer, done)
        is_due, received = schedule.after(done)
        if is_due and not args.no_local_save:
            save_state(folder.checkpoints, trainer, done, parts.settings(), args.keep_checkpoints, session)
        if received:
            LOGGER.info("signal %d after update %d: the same command continues", received, done)
            raise SystemExit(128 + received)
    journal.close()


if __name__ == "__main__":
    run(main, build_parser())
