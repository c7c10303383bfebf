"""Builds and loads GPT, VQ model and mapping together, and refuses parts that come from different runs.

The chain of hashes: the codes' manifest names the codebook they index (original order); the mapping's side file names
that codebook and the reordered one; a GPT checkpoint names the reordered one; the VQ checkpoint that decodes is hashed
when it is read. Published files carry no hashes: what is unknown is a warning, what differs is an error.
"""

import argparse
from dataclasses import dataclass

import torch

from autoregressive.models.generate import CompiledSteps, Sampler, add_sampler_args, generate, sampler_from
from autoregressive.models.gpt import GPT, add_gpt_args, check_gpt_args, describe_gpt, gpt_config
from autoregressive.models.packed import can_pack, pack_linears
from autoregressive.runtime.checkpoint import find_checkpoint, load_strictly, model_state, read_checkpoint
from autoregressive.runtime.files import codebook_sha256, weights_sha256
from autoregressive.runtime.log import LOGGER
from autoregressive.sample.presets import add_preset_arg, describe_preset
from tokenizer.tokenizer_image.encoding import default_batch_size
from tokenizer.tokenizer_image.images import to_uint8
from tokenizer.tokenizer_image.vq_model import VQModel, add_vq_args

PRECISIONS = {"none": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LARGEST_TILE = 32               # pictures decoded together
VQ_HINT = "name a tokenizer with --vq-ckpt; pretrained_models/README.md says where the published ones come from"


def default_vq_path(cluster_size):
    """Returns where balance_k_means.py puts the published VQ checkpoint with its codebook reordered."""
    return f"pretrained_models/vq_ds16_c2i-reorder-kmeans+nearest-cluster_size={cluster_size}.pt"


def load_vq(path, name, codebook_size, codebook_embed_dim):
    """Loads a VQ model for inference.

    Args:
        path: checkpoint of any layout that runtime.checkpoint reads.
        name: size in VQ_MODELS.
        codebook_size: V.
        codebook_embed_dim: E.

    Returns:
        (model on the CPU in evaluation mode, dict with codebook_sha256 and weights_sha256).

    Raises:
        ValueError: unreadable, or weights of another model.
    """
    state = model_state(read_checkpoint(path, VQ_HINT), path)
    with torch.device("meta"):
        model = VQModel(name, codebook_size, codebook_embed_dim)
    load_strictly(model, state, path, "check --vq-model, --codebook-size and --codebook-embed-dim")
    hashes = {"codebook_sha256": codebook_sha256(model.quantize.embedding.weight),
              "weights_sha256": weights_sha256(state)}
    return model.eval().requires_grad_(False), hashes


def load_gpt(path, name, weights="raw", bare=False, **settings):
    """Loads a GPT for sampling.

    Args:
        path: checkpoint, or a folder whose newest is taken.
        name: size in GPT_MODELS.
        weights: "raw", or "ema" for their moving average.
        bare: whether the file must be a bare state dict, as --from-fsdp promises.
        settings: fields of GPTConfig: grid, vocab_size, num_classes.

    Returns:
        (model on the CPU in evaluation mode, path of the file, dict of the settings it was saved with: empty for
        published files).

    Raises:
        ValueError: unreadable, weights of another model, or trained for another grid.
    """
    path = find_checkpoint(path)
    payload = read_checkpoint(path)
    if bare and not (isinstance(payload, dict) and all(torch.is_tensor(value) for value in payload.values())):
        raise ValueError(f"{path}: expected a bare state dict for --from-fsdp, found {', '.join(map(str, payload))}; "
                         "leave the flag out")
    if weights == "ema" and not (isinstance(payload, dict) and payload.get("ema")):
        raise ValueError(f"{path}: expected an average of the weights for --weights ema, found none; train with --ema")
    state = model_state({"model": payload["ema"]} if weights == "ema" else payload, path)
    record = payload.get("settings", {}) if isinstance(payload.get("model"), dict) else {}
    with torch.device("meta"):
        model = GPT(gpt_config(name, **settings))
    load_strictly(model, state, path, f"{describe_gpt(state)}; asked for {name} with {settings['vocab_size']} codes "
                  f"and {settings['num_classes']} classes")
    trained_grid = record.get("grid", settings["grid"])
    if trained_grid != settings["grid"]:
        raise ValueError(f"{path}: expected weights trained on a grid of {settings['grid']}, got {trained_grid}; "
                         "give the --image-size and --downsample-size of the training")
    if "grid" not in record:
        LOGGER.warning("%s: names no grid; %d x %d tokens are assumed", path, settings["grid"], settings["grid"])
    return model.eval().requires_grad_(False), path, record


def check_same(what, expected, found, expected_source, found_source):
    """Compares two hashes of one thing: differing ones are an error, unknown ones a warning.

    Raises:
        ValueError: both are known and differ.
    """
    if expected is None or found is None:
        unknown = expected_source if expected is None else found_source
        LOGGER.warning("%s: carries no hash of its %s, so it cannot be checked", unknown, what)
    elif expected != found:
        raise ValueError(f"{found_source}: expected the {what} {expected[:12]} of {expected_source}, got {found[:12]}; "
                         "these files come from different runs of balance_k_means.py, take both from one")


@dataclass
class Painter:
    """A GPT and the VQ model that decodes its tokens, ready to draw.

    Attributes:
        gpt, vq: on their device, in their precision.
        sampler: Sampler.
        image_size: side of the pictures in pixels, after the resize.
        antialias: whether the resize filters.
        tile: pictures decoded together, always so many: a picture then has the same bits in every batch.
        steps: CompiledSteps or None.
    """

    gpt: GPT
    vq: VQModel
    sampler: Sampler
    image_size: int
    antialias: bool
    tile: int
    steps: CompiledSteps | None = None

    @torch.inference_mode()
    def tokens(self, labels, uniforms):
        """Returns tokens (B, T) int64 on the device, of labels (B,) and uniforms (B, T) as numpy arrays."""
        device = self.gpt.norm.weight.device
        return generate(self.gpt, torch.from_numpy(labels).to(device), torch.from_numpy(uniforms).to(device),
                        self.sampler, self.steps)

    @torch.inference_mode()
    def pictures(self, tokens):
        """Returns the pictures (B, P, P, 3) uint8 of tokens (B, T) int64, tile by tile, on the device."""
        pictures = []
        for tile in tokens.split(self.tile):
            missing = self.tile - len(tile)
            full = torch.cat([tile, tile[:1].expand(missing, -1)]) if missing else tile
            images = self.vq.decode_codes(full, self.gpt.config.grid)               # (tile, 3, P, P)
            pictures.append(to_uint8(images, self.image_size, self.antialias)[:len(tile)])
        return torch.cat(pictures)


def add_painter_args(parser):
    """Declares the flags of drawing pictures with a GPT and a VQ model: shared by the sampling scripts."""
    add_gpt_args(parser)
    add_vq_args(parser)
    add_sampler_args(parser)
    group = parser.add_argument_group("drawing")
    group.add_argument("--weights", default="raw", choices=("raw", "ema"), help="of the GPT: as trained, or averaged")
    group.add_argument("--from-fsdp", action="store_true", help="the checkpoint is a bare state dict")
    group.add_argument("--precision", default="bf16", choices=tuple(PRECISIONS), help="of the GPT's weights and cache")
    group.add_argument("--vq-precision", default="none", choices=tuple(PRECISIONS), help="of the VQ decoder")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                       help="compile the decode step, as CUDA graphs on a GPU (minutes at the start)")
    group.add_argument("--image-size", type=int, default=384, help="pixels of a generated picture's side")
    group.add_argument("--image-size-eval", type=int, default=256, help="pixels of a stored picture's side")
    group.add_argument("--resize", default="bicubic", choices=("bicubic", "antialias"),
                       help="bicubic as published, or with antialiasing")
    add_preset_arg(parser)


def load_painter(args, device):
    """Loads what the flags of add_painter_args describe, after comparing them with each other and with the files.

    Args:
        args: the parsed flags.
        device: where to draw.

    Returns:
        (Painter, path of the GPT's file, what is recorded in it, dict of codebook_sha256 and gpt_sha256)

    Raises:
        ValueError: a flag without a meaning, or parts that do not belong together.
    """
    if args.preset:
        LOGGER.info("%s", describe_preset(args.preset))
    check_gpt_args(args)
    sampler = sampler_from(args)
    sampler.check(args.codebook_size)
    if args.image_size_eval < 1:
        raise ValueError(f"--image-size-eval: expected at least 1, got {args.image_size_eval}")
    if args.gpt_ckpt is None:
        raise ValueError("--gpt-ckpt: expected a checkpoint of the GPT or its folder, got none")
    gpt, path, record = load_gpt(args.gpt_ckpt, args.gpt_model, args.weights, args.from_fsdp,
                                 grid=args.image_size // args.downsample_size, vocab_size=args.codebook_size,
                                 num_classes=args.num_classes)
    if record.get("cluster_size", args.cluster_size) != args.cluster_size:
        raise ValueError(f"--cluster-size: expected {record['cluster_size']} as in {path}, got {args.cluster_size}")
    if sampler.cfg_scale > 1 and record.get("label_dropout") == 0:
        raise ValueError(f"--cfg-scale: expected at most 1 for {path}, which was trained without label dropout and "
                         f"knows no null label, got {sampler.cfg_scale}")
    vq_path = args.vq_ckpt or default_vq_path(args.cluster_size)
    vq, vq_hashes = load_vq(vq_path, args.vq_model, args.codebook_size, args.codebook_embed_dim)
    if vq.downsampling != args.downsample_size:
        raise ValueError(f"--downsample-size: expected {vq.downsampling} for {args.vq_model}, "
                         f"got {args.downsample_size}")
    check_same("codebook", record.get("codebook_sha256"), vq_hashes["codebook_sha256"], path, vq_path)
    hashes = {"codebook_sha256": vq_hashes["codebook_sha256"], "gpt_sha256": weights_sha256(gpt.state_dict())}

    dtype = PRECISIONS[args.precision]
    gpt = gpt.to(device).cast(dtype)
    if can_pack(device, dtype) and not args.compile:
        pack_linears(gpt)
    vq.to(device)
    for part in (vq.post_quant_conv, vq.decoder):                # the codebook stays float32
        part.to(PRECISIONS[args.vq_precision], memory_format=torch.channels_last)
    tile = min(LARGEST_TILE, default_batch_size(args.vq_model, args.image_size, PRECISIONS[args.vq_precision], device))
    steps = CompiledSteps(gpt) if args.compile else None
    painter = Painter(gpt, vq, sampler, args.image_size_eval, args.resize == "antialias", tile, steps)
    return painter, path, record, hashes
