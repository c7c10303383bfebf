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
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])      # the repository root instead of this folder

import torch

from autoregressive.assemble import check_same, default_vq_path, load_vq
from autoregressive.data.batches import TokenBatches
from autoregressive.data.codes import add_code_args, default_mapping_path, open_codes, read_mapping
from autoregressive.models.cluster_loss import check_cluster_size, token_and_cluster_loss
from autoregressive.models.gpt import GPT, add_gpt_args, check_gpt_args, gpt_config
from autoregressive.runtime.checkpoint import list_checkpoints, read_checkpoint, save_checkpoint
from autoregressive.runtime.distributed import seed_everything, wrap_for_training
from autoregressive.runtime.entry import Parser, checks, run
from autoregressive.runtime.log import (
    LOGGER,
    MetricsFile,
    draw_metrics,
    find_run_folder,
    open_logger,
    progress,
    read_metrics,
    start_run_folder,
)
from autoregressive.runtime.pictures import save_grid
from autoregressive.train.optim import add_optim_args, build_optimizer, learning_rate
from autoregressive.train.preflight import announce, check_store
from autoregressive.train.step import PRECISIONS, Objective, Trainer
from tokenizer.tokenizer_image.images import to_uint8
from tokenizer.tokenizer_image.vq_model import add_vq_args

LABEL_DROPOUT = 0.1                                 # classifier-free guidance learns the null label from these
NUM_SHOWN = 4                                       # rows of the training data in the picture of the preflight
FREE_TO_CHANGE = ("epochs", "max_updates", "num_workers", "log_every", "ckpt_every", "device", "debug", "results_dir",
                  "new_run")                        # between two starts of one run


def build_parser():
    """Returns the parser of this script's command line."""
    parser = Parser("Train a GPT on codes with the token loss and the cluster loss.")
    add_code_args(parser, several=True)
    add_gpt_args(parser)
    add_vq_args(parser)
    add_optim_args(parser)
    parser.add_argument("--results-dir", required=True, help="where run folders lie")
    parser.add_argument("--new-run", action="store_true", help="start anew even if a run could be continued")
    parser.add_argument("--no-local-save", action="store_true", help="write metrics, but no checkpoints")
    parser.add_argument("--vocab-size", type=int, default=16384, help="number of codes, V")
    parser.add_argument("--mapping-path", help="mapping of the codebook; default: the published one's")
    parser.add_argument("--lambda-cce", type=float, default=1.0, help="weight of the cluster loss; 0 is LlamaGen")
    parser.add_argument("--dataset", default="imagenet_code", choices=("imagenet_code",), help="a store of codes")
    parser.add_argument("--image-size", type=int, default=256, help="pixels of a picture's side")
    parser.add_argument("--dropout-p", type=float, default=0.1, help="dropout after the projections of a block")
    parser.add_argument("--token-dropout-p", type=float, default=0.1, help="dropout on the input embeddings")
    parser.add_argument("--drop-path-rate", type=float, default=0.0, help="drop path of the last layer; above 0 it "
                        "replaces --dropout-p")
    parser.add_argument("--epochs", type=int, default=300, help="length of the run")
    parser.add_argument("--max-updates", type=int, default=0, help="length of the run in updates; 0: by --epochs")
    parser.add_argument("--global-batch-size", type=int, default=256, help="images of an update, over all processes")
    parser.add_argument("--gradient-accumulation-steps", type=int, default=1, help="micro-batches of an update")
    parser.add_argument("--mixed-precision", default="bf16", choices=PRECISIONS, help="autocast of the forward pass")
    parser.add_argument("--no-compile", action="store_true", help="do not compile (a GPU compiles by default)")
    parser.add_argument("--ema", action="store_true", help="keep an exponential moving average of the weights")
    parser.add_argument("--validation_step", type=int, default=0, help="updates between sample pictures; 0: none")
    parser.add_argument("--log-every", type=int, default=100, help="updates between two lines of the log")
    parser.add_argument("--ckpt-every", type=int, default=5, help="epochs between two checkpoints")
    parser.add_argument("--num-workers", type=int, default=24, help="workers that read codes")
    parser.refuse_for_now("--gpt-ckpt", "--ema", "--validation_step", "--gradient-accumulation-steps", "--num-workers")
    return parser


def check_flags(args, session):
    """Raises ValueError for flags that contradict each other."""
    check_gpt_args(args)
    check_cluster_size(args.vocab_size, args.cluster_size)
    if args.epochs < 1 or args.max_updates < 0 or args.log_every < 1 or args.ckpt_every < 1:
        raise ValueError(f"expected --epochs, --log-every, --ckpt-every of at least 1 and --max-updates of at least 0, "
                         f"got {args.epochs}, {args.log_every}, {args.ckpt_every}, {args.max_updates}")
    if args.global_batch_size < 1 or args.global_batch_size % session.world_size:
        raise ValueError(f"--global-batch-size: expected a multiple of the {session.world_size} processes, "
                         f"got {args.global_batch_size}")


def load_reordered_vq(args, mapping):
    """Loads the VQ model with the reordered codebook and compares it with the mapping.

    Training needs it for pictures only: None if --vq-ckpt is not given and there is none at its default place.
    """
    path = Path(args.vq_ckpt or default_vq_path(args.cluster_size))
    if not args.vq_ckpt and not path.exists():
        LOGGER.warning("%s: not there, so no picture of the training data is made; name it with --vq-ckpt", path)
        return None
    vq, hashes = load_vq(path, args.vq_model, args.codebook_size, args.codebook_embed_dim)
    check_same("codebook", mapping.hashes.get("codebook_sha256"), hashes["codebook_sha256"], mapping.path, path)
    return vq


@torch.inference_mode()
def save_first_rows(path, vq, batches):
    """Saves what the first rows of the training data look like when their tokens are decoded."""
    tokens, labels = batches.batch(0, range(min(NUM_SHOWN, batches.batch_size)))
    class_names = batches.store.manifest["class_names"] or [f"class {label}" for label in range(batches.num_classes)]
    captions = [*class_names, "no label"]
    pictures = to_uint8(vq.decode_codes(tokens, batches.store.grid))
    save_grid(path, pictures, columns=4, captions=[captions[label] for label in labels])


def save(path, trainer, objective, update, args, store, mapping, session):
    """Saves everything that training continues from; the GPT's settings travel with it."""
    rng_states = session.gather(torch.get_rng_state())
    if session.is_main:
        manifest = store.manifest
        settings = {"gpt_model": args.gpt_model, "vocab_size": args.vocab_size, "num_classes": args.num_classes,
                    "class_names": manifest["class_names"], "grid": store.grid, "image_size": args.image_size,
                    "cluster_size": args.cluster_size, "lambda_cce": args.lambda_cce, "label_dropout": LABEL_DROPOUT,
                    "codebook_sha256": mapping.hashes.get("codebook_sha256"),
                    "mapping_sha256": mapping.hashes["mapping_sha256"],
                    "tokenizer_sha256": manifest["tokenizer_sha256"]}
        save_checkpoint(path, {"model": objective.model.state_dict(), "optimizer": trainer.optimizer.state_dict(),
                               "scaler": trainer.scaler.state_dict(), "steps": update, "rng_states": rng_states,
                               "settings": settings})


def resume(folder, trainer, objective, session):
    """Continues from the newest checkpoint of the folder; returns its number of updates, 0 if there is none."""
    found = list_checkpoints(folder.checkpoints)
    if not found:
        return 0
    payload = read_checkpoint(found[-1])
    objective.model.load_state_dict(payload["model"])
    trainer.optimizer.load_state_dict(payload["optimizer"])
    trainer.scaler.load_state_dict(payload["scaler"])
    if len(payload["rng_states"]) == session.world_size:
        torch.set_rng_state(payload["rng_states"][session.rank])
    return payload["steps"]


def main(args, session):
    logger = open_logger(session)
    with checks(session):
        check_flags(args, session)
        store = open_codes(*args.code_path)
        mapping = read_mapping(args.mapping_path or default_mapping_path(args.cluster_size), args.vocab_size)
        check_store(args, store, mapping)
        batches = TokenBatches(store, mapping.tokens, args.global_batch_size, args.global_seed, args.num_classes,
                               LABEL_DROPOUT)
        vq = load_reordered_vq(args, mapping)
        name = f"{args.gpt_model}-lambda={args.lambda_cce:g}-cluster_size={args.cluster_size}"
        folder = find_run_folder(args.results_dir, name, vars(args), FREE_TO_CHANGE, args.new_run)
    num_updates = args.max_updates or args.epochs * batches.per_epoch
    if folder.result and folder.result["updates"] >= num_updates:
        logger.info("%s is finished: %s", folder.path, folder.result)
        return
    if session.is_main:
        start_run_folder(folder, vars(args))
    session.barrier()
    logger = open_logger(session, folder.path / "log.txt")

    seed_everything(args.global_seed)               # the same weights on every process
    model = GPT(gpt_config(args.gpt_model, grid=store.grid, vocab_size=args.vocab_size, num_classes=args.num_classes,
                           dropout=args.dropout_p, token_dropout=args.token_dropout_p,
                           drop_path=args.drop_path_rate)).to(session.device)
    objective = Objective(model, partial(token_and_cluster_loss, cluster_size=args.cluster_size), args.lambda_cce)
    optimizer = build_optimizer(model, args.lr, (args.beta1, args.beta2), args.weight_decay)
    compiled = torch.compile(objective) if session.device.type == "cuda" and not args.no_compile else objective
    trainer = Trainer(wrap_for_training(compiled, session), optimizer, session.device, args.mixed_precision,
                      args.max_grad_norm)
    seed_everything(args.global_seed, 1 + session.rank)          # dropout differs between processes
    first = resume(folder, trainer, objective, session)
    if session.is_main and vq:
        save_first_rows(folder.path / "data.png", vq, batches)
    announce(args, store, sum(p.numel() for p in model.parameters()), num_updates)
    train(trainer, objective, batches, range(first, num_updates), args, store, mapping, folder, session)


def train(trainer, objective, batches, updates, args, store, mapping, folder, session):
    """Runs the updates, with log, curves and checkpoints."""
    metrics = MetricsFile(folder.path / "metrics.jsonl", updates.start) if session.is_main else None
    part, num_updates = session.share_of(args.global_batch_size), updates.stop
    checkpoint_interval = args.ckpt_every * batches.per_epoch
    with progress(session, num_updates * args.global_batch_size, folder.path.name, "image",
                  initial=updates.start * args.global_batch_size) as bar:
        for update in updates:
            lr = learning_rate(update, num_updates, args.lr, args.warmup, args.lr_schedule)
            trainer.update(*batches.batch(update, part), lr)
            done, at_end = update + 1, update + 1 == num_updates
            bar.update(args.global_batch_size)
            if done % args.log_every == 0 or at_end:
                values = trainer.drain(session)
                if session.is_main:
                    metrics.write(done, **values, lr=lr)
                    bar.set_postfix(token=f"{values['token_loss']:.3f}", cluster=f"{values['cluster_loss']:.3f}")
            if (done % checkpoint_interval == 0 or at_end) and not args.no_local_save:
                save(folder.checkpoints / f"{done:07d}.pt", trainer, objective, done, args, store, mapping, session)
    if session.is_main:
        draw_metrics(folder.path / "curves.png", {folder.path.name: folder.path / "metrics.jsonl"})
        last = read_metrics(folder.path / "metrics.jsonl")[-1]      # of an earlier start, if it only lacked its end
        folder.mark_finished({"updates": num_updates, "token_loss": last["token_loss"],
                              "cluster_loss": last["cluster_loss"]})
        LOGGER.info("token loss %.3f, cluster loss %.3f; checkpoints in %s", last["token_loss"], last["cluster_loss"],
                    folder.checkpoints)


if __name__ == "__main__":
    run(main, build_parser())
