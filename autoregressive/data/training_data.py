"""What a GPT is trained on: codes and a mapping that belong together, as batches."""

from dataclasses import dataclass
from typing import Any

from autoregressive.data.batches import TokenBatches, split_store
from autoregressive.data.codes import CodeStore
from autoregressive.data.mapping import (
    Mapping,
    default_mapping_path,
    find_mapping,
    read_mapping,
)
from autoregressive.data.opening import open_codes
from autoregressive.data.store_checks import check_store, recorded_flags
from autoregressive.runtime.entry import Flags, Parser, at_least, fraction, pixels
from autoregressive.runtime.nearby import folders_near

LABEL_DROPOUT = 0.1             # classifier-free guidance learns the null label from these


def add_data_args(parser: Parser) -> None:
    """Declares the flags of the data, beside those of add_code_args."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="imagenet_code", choices=("imagenet_code",),
                       help="a store of codes")
    group.add_argument("--image-size", type=pixels, default=256,
                       help="pixels of a picture's side")
    group.add_argument("--vocab-size", type=at_least(1), default=16384, help="number of codes, V")
    group.add_argument("--mapping-path",
                       help="mapping of the codebook; default: the one that belongs to the codes, "
                            "in their folder, its parent or pretrained_models")
    group.add_argument("--val-share", type=fraction, default=0.01,
                       help="fraction of the images that --val-every holds out")


@dataclass(frozen=True)
class DataSettings:
    """The flags that say what a GPT is trained on, under their names.

    Attributes:
        num_classes: number of class labels.
        global_batch_size: images of a step, over all processes and micro-batches.
        gradient_accumulation_steps: micro-batches of a step.
        val_every: steps between two validations; 0 holds out nothing.
        val_share: fraction of the images to validate with.
        global_seed: the run's seed.
        guidance_free: whether batches hold betas.
    """

    num_classes: int
    global_batch_size: int
    gradient_accumulation_steps: int
    val_every: int
    val_share: float
    global_seed: int
    guidance_free: bool


@dataclass(frozen=True)
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

    @property
    def class_names(self) -> list[str] | None:
        """Names of all classes; None if they are not known."""
        return self.store.manifest["class_names"]

    @property
    def num_crops(self) -> list[int]:
        """Crops of an image in each of the stores."""
        codes = self.store.codes
        return getattr(codes, "num_crops", [codes.shape[1]])

    def describe(self) -> str:
        """Returns what there is to train on, for the log."""
        _, num_crops, num_tokens = self.store.codes.shape
        return (f"{self.store.path}: {len(self.store.rows)} images, {num_crops} crops of "
                f"{num_tokens} tokens, {self.batches.num_classes} classes")

    def identity(self) -> dict[str, Any]:
        """Returns the hashes of codes and mapping, and how many images are trained on."""
        names = ("images_sha256", "tokenizer_sha256", "codes_sha256", "labels_sha256")
        manifest = self.store.manifest                  # an older layout does not tell all of them
        return {name: manifest.get(name) for name in names} | {
            "mapping_sha256": self.mapping.hashes["mapping_sha256"],
            "num_training_images": len(self.batches.store.rows)}

    def checkpoint_settings(self) -> dict[str, Any]:
        """Returns what a checkpoint says of the data that it was trained on."""
        return {"class_names": self.class_names, "grid": self.store.grid,
                "label_dropout": self.batches.label_dropout,
                "codebook_sha256": self.mapping.hashes.get("codebook_sha256"),
                "mapping_sha256": self.mapping.hashes["mapping_sha256"],
                "tokenizer_sha256": self.store.manifest["tokenizer_sha256"]}


def open_codes_and_mapping(args: Flags, older: dict[str, CodeStore]) -> tuple[CodeStore, Mapping]:
    """Opens the codes and the mapping that belongs to them.

    Args:
        args: flags of add_code_args, add_data_args, add_gpt_args and add_vq_args; those that were
            not given are set to what the files record, those that were are compared with it.
        older: of opening.open_older_stores, so that one process alone had to open them.

    Raises:
        ValueError: files are missing or damaged, or contradict flags that were given.
    """
    store = open_codes(*args.code_path, opened=older)
    args.take(recorded_flags(store), store.path)
    path = args.mapping_path or find_mapping(
        folders_near(*args.code_path), store.manifest["codebook_sha256"], args.cluster_size,
        args.is_given("cluster_size"))
    mapping = read_mapping(path or default_mapping_path(args.cluster_size), args.vocab_size)
    args.take({"cluster_size": mapping.hashes.get("cluster_size")}, mapping.path)
    return store, mapping


def open_data(settings: DataSettings, store: CodeStore, mapping: Mapping, grid: int,
              world_size: int) -> TrainingData:
    """Makes batches of codes, after comparing these with their mapping and the flags.

    Args:
        settings: DataSettings.
        store, mapping: what open_codes_and_mapping returned.
        grid: side of a picture in tokens.
        world_size: number of processes; it divides a micro-batch.

    Raises:
        ValueError: they do not fit each other or the flags.
    """
    if settings.val_every and not settings.val_share:
        raise ValueError("--val-share: expected more than 0 with --val-every, got 0")
    check_store(store, mapping, grid)
    val_share = settings.val_share if settings.val_every else 0
    training, val = split_store(store, val_share, settings.global_seed)
    common = {"seed": settings.global_seed, "num_classes": settings.num_classes}
    batches = TokenBatches(training, mapping.tokens, settings.global_batch_size,
                           label_dropout=LABEL_DROPOUT, draws_betas=settings.guidance_free,
                           **common)
    val_batches = None
    if settings.val_every:
        batch_size = _val_batch_size(settings, len(val.rows), world_size)
        val_batches = TokenBatches(val, mapping.tokens, batch_size, label_dropout=0, **common)
    return TrainingData(store, mapping, batches, val_batches)


def _val_batch_size(settings: DataSettings, num_images: int, world_size: int) -> int:
    """Returns the size of validation batches, a multiple of the number of processes.

    It is that of a training micro-batch, which fits the memory, unless there are fewer images.

    Raises:
        ValueError: there are fewer images than processes.
    """
    if num_images < world_size:
        raise ValueError(f"--val-share: expected at least one validation image for each of "
                         f"{world_size} processes, found {num_images}; raise it")
    micro_batch = settings.global_batch_size // settings.gradient_accumulation_steps
    return min(micro_batch, num_images) // world_size * world_size
