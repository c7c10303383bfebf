"""How a training run is asked for: its flags, what they must agree with, the folder it is in."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoregressive.runtime.checkpoint import list_checkpoints
from autoregressive.runtime.compute import PRECISIONS
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import Parser, at_least, flag_of, may_vary, on_main
from autoregressive.runtime.event_files import check_tensorboard
from autoregressive.runtime.files import check_writable_folder
from autoregressive.runtime.identity import RunFolder, find_run_folder
from autoregressive.runtime.lock import hold
from autoregressive.runtime.schedules import LearningRate, StagedRate, whole_steps

FIND_SECONDS = 60               # that a start waits for another one that looks for its run folder


def add_training_args(parser: Parser, results_dir: str | None = None,
                      precisions: Iterable[str] = tuple(PRECISIONS)) -> None:
    """Declares the flags of a training run.

    Args:
        parser: the parser.
        results_dir: default of --results-dir; without one the flag is required.
        precisions: those that the model can be trained in.
    """
    group = parser.add_argument_group("run")
    may_vary(group.add_argument("--results-dir", default=results_dir, required=results_dir is None,
                                help="where run folders lie"))
    may_vary(group.add_argument("--new-run", action="store_true",
                                help="start anew even if a run could be continued"))
    may_vary(group.add_argument("--no-local-save", action="store_true",
                                help="write metrics, but no checkpoints"))
    may_vary(group.add_argument("--epochs", type=at_least(1), default=300,
                                help="length of the run"))
    may_vary(group.add_argument("--max-steps", type=at_least(0), default=0,
                                help="length of the run in steps; 0: by --epochs"))
    may_vary(group.add_argument("--log-every", type=at_least(1), default=100,
                                help="steps between two lines of the log"))
    may_vary(group.add_argument("--log-to", "--log", dest="log", default="files",
                                choices=("files", "tensorboard"),
                                help="files: log.txt, metrics.jsonl and curves.png; tensorboard: "
                                     "event files beside them"))
    may_vary(group.add_argument("--ckpt-every", type=at_least(0), default=5,
                                help="epochs between two checkpoints; 0: off"))
    may_vary(group.add_argument("--ckpt-steps", type=at_least(0), default=0,
                                help="steps between two checkpoints; 0: off"))
    may_vary(group.add_argument("--ckpt-minutes", type=at_least(0.0), default=0.0,
                                help="minutes between two checkpoints; 0: off"))
    may_vary(group.add_argument("--keep-checkpoints", type=at_least(0), default=0,
                                help="newest checkpoints to keep; 0 keeps all"))
    may_vary(group.add_argument("--val-every", type=at_least(0), default=0,
                                help="steps between two validations; 0: off, but a tokenizer with "
                                     "--val-path is validated at its end"))
    group.add_argument("--global-batch-size", type=at_least(1), default=256,
                       help="images of a step, over all processes")
    may_vary(group.add_argument("--gradient-accumulation-steps", type=at_least(1), default=1,
                                help="micro-batches of a step: global batch = processes x "
                                     "micro-batch x this"))
    may_vary(group.add_argument("--num-workers", type=at_least(0), default=24,
                                help="processes that read batches ahead, at most as many as there "
                                     "are cores; 0: none, for small sets"))
    group.add_argument("--mixed-precision", default="bf16", choices=tuple(precisions),
                       help="of the forward pass")


def check_batch(global_batch_size: int, accumulation: int, session: Session) -> None:
    """Raises ValueError unless a batch can be divided among processes and micro-batches."""
    parts = session.world_size * accumulation
    if global_batch_size % parts:
        below = global_batch_size // parts * parts
        fitting = f"{below} or {below + parts}" if below else parts
        raise ValueError(f"--global-batch-size: expected a multiple of {parts} "
                         f"({session.world_size} processes x {accumulation} micro-batches), for "
                         f"example {fitting}, got {global_batch_size}")


@dataclass(frozen=True)
class RunSettings:
    """How long a run is, its learning rate, and when something happens in it.

    Its fields are flags of add_training_args and add_optim_args, whose help says what they mean.
    """

    global_batch_size: int
    lr: float
    lr_schedule: str
    lr_decay_from: float
    min_lr: float
    warmup: int
    warmup_epochs: float
    epochs: int
    max_steps: int
    log_every: int
    log: str
    val_every: int
    ckpt_every: int
    ckpt_steps: int
    ckpt_minutes: float
    keep_checkpoints: int
    no_local_save: bool
    num_workers: int

    def check(self) -> None:
        """Raises ValueError for flags that contradict each other, or lack their package."""
        if self.log == "tensorboard":
            check_tensorboard()
        for name in ("min_lr", "lr_decay_from"):
            if getattr(self, name) and self.lr_schedule == "constant":
                raise ValueError(f"{flag_of(name)}: expected --lr-schedule cosine or linear, got "
                                 "constant, which never falls; leave one of them out")
        if self.min_lr > self.lr:
            raise ValueError(f"--min-lr: expected at most --lr {self.lr:g}, got {self.min_lr:g}; "
                             "lower it, or raise --lr")
        if self.warmup and self.warmup_epochs:
            raise ValueError(f"--warmup-epochs: expected no --warmup beside it, got {self.warmup} "
                             f"steps and {self.warmup_epochs:g} epochs; give one of them, and 0 "
                             "for the other")

    def num_steps(self, steps_per_epoch: int) -> int:
        """Returns the length of the run."""
        return self.max_steps or self.epochs * steps_per_epoch

    def learning_rate(self, steps_per_epoch: int,
                      stage_ends: Sequence[int] = ()) -> LearningRate | StagedRate:
        """Returns the learning rate over the run.

        Args:
            steps_per_epoch: of the data.
            stage_ends: the step before which each stage of the run ends, if it has several; the
                rate then begins anew with each, warm-up and fall included.

        Raises:
            ValueError: the warm-up is not over when a stage ends.
        """
        warmup = self.warmup or whole_steps(self.warmup_epochs, steps_per_epoch)
        ends = tuple(stage_ends) or (self.num_steps(steps_per_epoch),)
        rates = []
        for first, end in zip((0, *ends), ends, strict=False):
            if len(ends) > 1 and warmup >= end - first:
                raise ValueError(f"--warmup: expected fewer steps than each stage of the run has, "
                                 f"got {warmup} for one of {end - first}; lower it, or lengthen "
                                 "the run")
            rates.append(LearningRate(self.lr, self.lr_schedule, end - first, warmup,
                                      decay_from=self.lr_decay_from, least=self.min_lr))
        return rates[0] if len(rates) == 1 else StagedRate(tuple(rates), ends)


@dataclass(frozen=True)
class RunRequest:
    """The run that a command asks for.

    Attributes:
        results_dir: where run folders lie.
        name: what follows the index in the folder's name.
        identity: all that the run depends on.
        config: what config.json records: the identity and whatever else the command says.
        defaults: of every flag; they stand for flags that an older config.json does not know.
        new_run: whether to begin a new run even if one could be continued.
    """

    results_dir: str | Path
    name: str
    identity: dict[str, Any]
    config: dict[str, Any]
    defaults: dict[str, Any]
    new_run: bool = False

    def find(self) -> RunFolder:
        """Returns the run folder to continue, or a new one."""
        return find_run_folder(self.results_dir, self.name, self.identity, self.defaults,
                               new_run=self.new_run)


def open_run_folder(session: Session, request: RunRequest, num_steps: int,
                    check_start: Callable[[], None] | None = None) -> RunFolder:
    """Finds the run folder that a command continues, or makes a new one, and holds it.

    It is held until the session ends. Commands that are started together take turns, so that no two
    runs choose the same new folder. A run that is finished is left as it is.

    Args:
        session: Session.
        request: the run.
        num_steps: its length.
        check_start: raises ValueError if a run that has no checkpoint yet cannot begin.
    """
    def find() -> RunFolder:
        check_writable_folder(request.results_dir)
        with hold(Path(request.results_dir) / request.name, patience=FIND_SECONDS):
            folder = request.find()
            session.hold(folder.path)
            is_new = not list_checkpoints(folder.checkpoints)
            if is_new and check_start:
                check_start()
            if not folder.is_finished(num_steps):
                folder.start(request.config)
        return folder

    return on_main(session, find)
