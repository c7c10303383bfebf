"""The flags of training that no other script shares, and what they may be."""

from autoregressive.runtime.distributed import PARALLEL
from autoregressive.train.step import PRECISIONS

# What may change between two starts of one run.
FREE_TO_CHANGE = ("epochs", "max_updates", "num_workers", "log_every", "ckpt_every", "ckpt_updates", "ckpt_minutes",
                  "keep_checkpoints", "validation_step", "device", "debug", "results_dir", "new_run", "parallel",
                  "gradient_accumulation_steps", "checkpoint_activations", "loss_mib", "no_compile")


def add_train_args(parser):
    """Declares the flags of a training run."""
    group = parser.add_argument_group("run")
    group.add_argument("--results-dir", required=True, help="where run folders lie")
    group.add_argument("--new-run", action="store_true", help="start anew even if a run could be continued")
    group.add_argument("--no-local-save", action="store_true", help="write metrics, but no checkpoints")
    group.add_argument("--epochs", type=int, default=300, help="length of the run")
    group.add_argument("--max-updates", type=int, default=0, help="length of the run in updates; 0: by --epochs")
    group.add_argument("--log-every", type=int, default=100, help="updates between two lines of the log")
    group.add_argument("--ckpt-every", type=int, default=5, help="epochs between two checkpoints")
    group.add_argument("--ckpt-updates", type=int, default=0, help="updates between two checkpoints; 0: off")
    group.add_argument("--ckpt-minutes", type=float, default=0, help="minutes between two checkpoints; 0: off")
    group.add_argument("--keep-checkpoints", type=int, default=0, help="newest checkpoints to keep; 0 keeps all")
    group.add_argument("--eval-every", type=int, default=0, help="updates between two held-out losses; 0: off")
    group.add_argument("--eval-share", type=float, default=0.01, help="share of the images held out by --eval-every")
    group.add_argument("--validation_step", type=int, default=0, help="updates between sample pictures; 0: none")

    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="imagenet_code", choices=("imagenet_code",), help="a store of codes")
    group.add_argument("--image-size", type=int, default=256, help="pixels of a picture's side")
    group.add_argument("--vocab-size", type=int, default=16384, help="number of codes, V")
    group.add_argument("--mapping-path", help="mapping of the codebook; default: the published one's")
    group.add_argument("--global-batch-size", type=int, default=256, help="images of an update, over all processes")
    group.add_argument("--gradient-accumulation-steps", type=int, default=1,
                       help="micro-batches of an update: global batch = processes x micro-batch x this")
    group.add_argument("--num-workers", type=int, default=24,
                       help="batches read ahead by threads, at most as many as there are cores; 0: none")

    group = parser.add_argument_group("loss and regularisation")
    group.add_argument("--lambda-cce", type=float, default=1.0, help="weight of the cluster loss; 0 is LlamaGen")
    group.add_argument("--dropout-p", type=float, default=0.1, help="dropout after the projections of a block")
    group.add_argument("--token-dropout-p", type=float, default=0.1, help="dropout on the input embeddings")
    group.add_argument("--drop-path-rate", type=float, default=0.0, help="drop path of the last layer; above 0 it "
                       "replaces --dropout-p")
    group.add_argument("--ema", action="store_true", help="keep an exponential moving average of the weights")
    group.add_argument("--init-from-original", action="store_true", help="--gpt-ckpt is a GPT over codes in their "
                       "original order, such as LlamaGen's: move its rows to their tokens")

    group = parser.add_argument_group("computing")
    group.add_argument("--parallel", default="ddp", choices=PARALLEL,
                       help="ddp: every process holds all weights; fsdp: shards them, for XL and larger")
    group.add_argument("--mixed-precision", default="bf16", choices=tuple(PRECISIONS), help="of the forward pass")
    group.add_argument("--no-compile", action="store_true", help="do not compile (a GPU compiles by default)")
    group.add_argument("--checkpoint-activations", action="store_true",
                       help="compute each block's activations again in the backward pass: slower, less memory")
    group.add_argument("--no-fused-loss", action="store_true", help="compute the loss from all logits at once")
    group.add_argument("--loss-mib", type=int, default=0,
                       help="memory of a chunk of logits in the fused loss, MiB; 0: 16 on a CPU, 512 on a GPU")


def check_train_args(args, session):
    """Raises ValueError for flags out of range or that contradict each other."""
    least = {"epochs": 1, "max_updates": 0, "log_every": 1, "ckpt_every": 1, "ckpt_updates": 0, "ckpt_minutes": 0,
             "keep_checkpoints": 0, "eval_every": 0, "validation_step": 0, "global_batch_size": 1, "num_workers": 0,
             "gradient_accumulation_steps": 1, "lambda_cce": 0, "warmup": 0, "loss_mib": 0, "lr": 0,
             "weight_decay": 0, "max_grad_norm": 0}
    for name, bound in least.items():
        if not getattr(args, name) >= bound:
            flag = name if name == "validation_step" else name.replace("_", "-")
            raise ValueError(f"--{flag}: expected at least {bound}, got {getattr(args, name)}")
    for name in ("dropout_p", "token_dropout_p", "drop_path_rate", "eval_share"):
        if not 0 <= getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected 0 to below 1, got {getattr(args, name)}")
    parts = session.world_size * args.gradient_accumulation_steps
    if args.global_batch_size % parts:
        below = args.global_batch_size // parts * parts
        fitting = f"{below} or {below + parts}" if below else parts
        raise ValueError(f"--global-batch-size: expected a multiple of {parts} ({session.world_size} processes x "
                         f"{args.gradient_accumulation_steps} micro-batches), for example {fitting}, "
                         f"got {args.global_batch_size}")
    if args.eval_every and not args.eval_share:
        raise ValueError("--eval-share: expected more than 0 with --eval-every, got 0")
    if args.init_from_original and not args.gpt_ckpt:
        raise ValueError("--init-from-original: expected --gpt-ckpt, the GPT to start from, got none")
    if args.parallel == "fsdp" and args.mixed_precision == "fp16":
        raise ValueError("--parallel fsdp: expected --mixed-precision bf16 or none, got fp16; its scaler does not see "
                         "shards")
