"""The tokenizer that decodes a GPT's tokens: found by the hash of its codebook, and compared."""

from pathlib import Path

import torch

from autoregressive.data.class_names import names_to_show
from autoregressive.data.mapping import Mapping
from autoregressive.data.training_data import TrainingData
from autoregressive.models.loading import GPTFile
from autoregressive.runtime.entry import Flags
from autoregressive.runtime.identity import check_codebook
from autoregressive.runtime.log import LOGGER
from autoregressive.runtime.nearby import folders_near
from autoregressive.runtime.pictures import save_grid
from tokenizer.tokenizer_image.images import to_uint8
from tokenizer.tokenizer_image.loading import (
    EXPORTED_VQ,
    default_vq_path,
    find_vq,
    load_vq,
    open_vq,
)
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel

NUM_SHOWN = 4                   # rows of the training data in data.png
RUN_LEVELS = 3                  # from a checkpoint's folder: the run, --results-dir, what holds it


def find_decoder(vq_ckpt: str | None, codebook_sha256: str | None, cluster_size: int,
                 folders: list[Path]) -> str | Path:
    """Returns the file of the tokenizer that decodes: that of --vq-ckpt, else one that fits.

    Args:
        vq_ckpt: --vq-ckpt, or None.
        codebook_sha256: of the reordered codebook; None is unknown.
        cluster_size: of the published codebook, whose file is meant if no other fits.
        folders: where to look for others.

    Raises:
        ValueError: several fit.
    """
    return vq_ckpt or find_vq(folders, codebook_sha256) or default_vq_path(cluster_size)


def find_decoder_of(file: GPTFile, vq_ckpt: str | None, cluster_size: int) -> str | Path:
    """Returns the file of the tokenizer that decodes a GPT's tokens, as find_decoder does.

    It is looked for beside an exported GPT, and around the run of a checkpoint.
    """
    exported = file.path.with_name(EXPORTED_VQ)
    if vq_ckpt is None and exported.is_file():
        return exported
    return find_decoder(vq_ckpt, file.settings.get("codebook_sha256"), cluster_size,
                        folders_near(file.path.parent, levels=RUN_LEVELS))


def load_decoder(path: str | Path, config: VQConfig, codebook_sha256: str | None,
                 source: str | Path) -> tuple[VQModel, dict[str, str]]:
    """Loads a VQ model and its hashes, codebook_sha256 and weights_sha256.

    Args:
        path: its checkpoint.
        config: VQConfig.
        codebook_sha256: of the codebook that it must have; None is unknown.
        source: the file that records this hash, named in errors.

    Raises:
        ValueError: the file is unreadable, or of another codebook.
    """
    vq, hashes = load_vq(path, config)
    check_codebook(codebook_sha256, hashes["codebook_sha256"], source, path)
    return vq, hashes


def open_decoder(args: Flags, mapping: Mapping) -> VQModel | None:
    """Returns the VQ model whose codebook a mapping has reordered; warns and returns None without.

    Args:
        args: flags of a training, those of VQConfig among them: set as open_vq says.
        mapping: of the run.

    Raises:
        ValueError: the file is unreadable, of another codebook or not what the flags say.
    """
    wanted = mapping.hashes.get("codebook_sha256")
    path = find_decoder(args.vq_ckpt, wanted, args.cluster_size,
                        folders_near(mapping.path.parent, *args.code_path))
    if not args.vq_ckpt and not Path(path).exists():
        LOGGER.warning("%s: not there, so no pictures are made; name it with --vq-ckpt", path)
        return None
    vq, hashes = open_vq(args, path)
    check_codebook(wanted, hashes["codebook_sha256"], mapping.path, path)
    expected = (args.vocab_size, args.downsample_size)
    found = (vq.config.codebook_size, vq.downsampling)
    if found != expected:
        raise ValueError(f"{path}: expected a tokenizer of {expected[0]} codes and {expected[1]} "
                         f"pixels a token, found one of {found[0]} and {found[1]}; name that of "
                         "the codes, reordered, with --vq-ckpt")
    return vq


@torch.inference_mode()
def save_first_rows(path: Path, data: TrainingData, vq: VQModel) -> None:
    """Saves what the first batch of the training data looks like when its tokens are decoded."""
    batches = data.batches
    tokens, labels, *_ = batches[0, range(min(NUM_SHOWN, batches.batch_size))]
    names = [*names_to_show(data.class_names, batches.num_classes), "no label"]     # the null label
    save_grid(path, to_uint8(vq.decode_codes(tokens, data.store.grid)), columns=4,
              captions=[names[label] for label in labels])
