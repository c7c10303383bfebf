"""A GPT and the VQ model that decodes its tokens, as one pipeline that samples.

Parts of different runs are refused, by a chain of hashes: the codes' manifest names the codebook
they index (original order); the mapping's side file names that codebook and the reordered one; a
GPT checkpoint names the reordered one; the VQ checkpoint that decodes is hashed when it is read.
Published files carry no hashes: what is unknown is a warning, what differs is an error.

Letters: B pictures, T tokens, P pixels, M pictures decoded together, b <= M of them wanted.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autoregressive.data.class_names import names_to_show
from autoregressive.decoder import find_decoder_of, load_decoder
from autoregressive.models.captured import CapturedSteps, compile_decoding
from autoregressive.models.config import GPTConfig, add_gpt_args, gpt_config, grid_of
from autoregressive.models.generate import Steps, generate
from autoregressive.models.gpt import GPT
from autoregressive.models.guidance_free import choose_beta, fold_beta, is_guidance_free
from autoregressive.models.loading import (
    GPTFile,
    add_weights_arg,
    build_gpt,
    check_fitting,
    describe_gpt,
)
from autoregressive.models.packed import can_pack, pack_linears
from autoregressive.models.random_numbers import random_numbers
from autoregressive.models.recipes import add_preset_arg, sampling_flags
from autoregressive.models.sampler import Sampler, add_sampler_args
from autoregressive.runtime.checkpoint import check_weights
from autoregressive.runtime.compute import (
    PRECISIONS,
    add_compile_errors_arg,
    set_up_compiler,
    to_device,
)
from autoregressive.runtime.entry import Flags, Parser, fraction_above_0, pixels
from autoregressive.runtime.files import weights_sha256
from autoregressive.runtime.identity import check_recorded
from autoregressive.runtime.pictures import save_grid
from tokenizer.tokenizer_image.decoding import decoder_batch_size, place_decoder
from tokenizer.tokenizer_image.images import to_uint8
from tokenizer.tokenizer_image.loading import recorded_flags
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel, add_vq_args

NUM_SAMPLED = 8                 # pictures that a training samples from its model
SHOWN_GUIDANCE = 2.0            # strength of the guidance of these


@dataclass(frozen=True)
class PipelineSettings:
    """The flags of add_pipeline_args that a Pipeline is built from, under their names."""

    gpt_model: str
    num_classes: int
    cluster_size: int
    downsample_size: int
    image_size: int
    image_size_eval: int
    resize: str
    precision: str
    vq_precision: str
    vq_ckpt: str | Path
    compile: bool
    compile_errors: str
    beta: float | None


@dataclass(frozen=True)
class Pipeline:
    """A GPT and the VQ model that decodes its tokens, ready to sample.

    Attributes:
        gpt, vq: on their device, in their precision.
        sampler: Sampler.
        image_size: side of the pictures in pixels, after the resize.
        decode_batch_size: pictures decoded together, always so many: a picture then has the same
            bits whatever stands beside it.
        antialias: whether the resize filters.
        class_names: list of the names of all classes as the GPT's file records them, or None.
        hashes: dict of codebook_sha256, vq_sha256 and gpt_sha256.
        steps: how the decode steps run; None is one by one.
    """

    gpt: GPT
    vq: VQModel
    sampler: Sampler
    image_size: int
    decode_batch_size: int
    antialias: bool = False
    class_names: list[str] | None = None
    hashes: dict[str, str] = field(default_factory=dict)
    steps: Steps | None = None

    def sample_tokens(self, labels: np.ndarray, uniforms: np.ndarray) -> Tensor:
        """Returns tokens (B, T) int64 on the device, of labels (B,) and uniforms (B, T)."""
        device = self.gpt.norm.weight.device
        return generate(self.gpt, to_device(labels, device), to_device(uniforms, device),
                        self.sampler, self.steps)

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> Tensor:
        """Returns the pictures (B, P, P, 3) uint8 of tokens (B, T) int64, both on the device."""
        pictures = []
        for part in tokens.split(self.decode_batch_size):                   # (b, T)
            num_missing = self.decode_batch_size - len(part)
            full = torch.cat([part, part[:1].expand(num_missing, -1)])      # (M, T)
            images = self.vq.decode_codes(full, self.gpt.config.grid)       # (M, 3, P, P)
            decoded = to_uint8(images, self.image_size, self.antialias)     # (M, P, P, 3)
            pictures.append(decoded[:len(part)])
        return torch.cat(pictures)

    def sample(self, labels: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """Returns the pictures (B, P, P, 3) uint8 of labels (B,) and uniforms (B, T)."""
        return self.decode(self.sample_tokens(labels, uniforms)).cpu().numpy()

    def label_names(self, labels: Sequence[int] | np.ndarray) -> list[str]:
        """Returns what to call the labels (B,): names where they are known."""
        names = names_to_show(self.class_names, self.gpt.config.num_classes)
        return [names[label] for label in labels]


def add_pipeline_args(parser: Parser) -> None:
    """Declares the flags of sampling with a GPT and a VQ model: shared by the sampling scripts."""
    add_gpt_args(parser)
    add_vq_args(parser)
    add_sampler_args(parser)
    group = parser.add_argument_group("sampling")
    add_weights_arg(group)
    group.add_argument("--from-fsdp", action="store_true",
                       help="the checkpoint is a bare state dict")
    group.add_argument("--precision", default="bf16", choices=tuple(PRECISIONS),
                       help="of the GPT's weights and cache")
    group.add_argument("--vq-precision", choices=tuple(PRECISIONS),
                       help="of the VQ decoder; default: bf16 on a GPU, none on a CPU")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction,
                       help="compile the blocks of a decode step and, on a GPU, capture it as "
                            "graphs; sample_c2i_ddp.py does so on a GPU")
    add_compile_errors_arg(group)
    group.add_argument("--image-size", type=pixels, default=384,
                       help="pixels of a generated picture's side")
    group.add_argument("--image-size-eval", type=pixels, default=256,
                       help="pixels of a stored picture's side")
    group.add_argument("--resize", default="bicubic", choices=("bicubic", "antialias"),
                       help="bicubic as published, or with antialiasing")
    group.add_argument("--beta", type=fraction_above_0,
                       help="strength of guidance of a GPT trained guidance-free, 1 being none; "
                            "default: 1 / --cfg-scale")
    add_preset_arg(parser)


def device_flags(device: torch.device, defaults: dict[str, object]) -> dict[str, object]:
    """Returns the flags of add_pipeline_args whose default, None, stands for one by device.

    Args:
        device: where pictures are sampled.
        defaults: of all flags of the script.
    """
    is_gpu = device.type == "cuda"
    # Pictures decoded in bfloat16 match those of float32 at a PSNR of 55.6 dB, where a tokenizer
    # matches its images at 20 to 30 dB.
    values = {"compile": is_gpu, "vq_precision": "bf16" if is_gpu else "none"}
    return {name: value for name, value in values.items() if defaults[name] is None}


def settle_flags(args: Flags, file: GPTFile, device: torch.device) -> None:
    """Sets flags of add_pipeline_args that were not given: by the checkpoint, a preset, the device.

    Args:
        args: in place.
        file: the GPT's.
        device: where pictures are sampled.

    Raises:
        ValueError: the preset is of another model, or the guidance does not fit the GPT.
    """
    is_free = is_guidance_free(file.state)
    if is_free and args.is_given("beta") and args.is_given("cfg_scale"):
        raise ValueError("--beta: expected no --cfg-scale beside it, which stands for 1 / beta; "
                         "give one of them")
    if is_free and args.preset:
        raise ValueError(f"--preset: expected none for a GPT trained guidance-free, got "
                         f"{args.preset}, whose guidance is that of an ordinary one; give --beta")
    preset = sampling_flags(args.preset, {} if is_free else file.settings)
    recorded = file.flags()
    args.resolve(recorded, file.path, device_flags(device, args.defaults()) | preset)
    if not args.is_given("image_size_eval"):        # which makes pictures smaller, never larger
        args.image_size_eval = min(args.image_size_eval, args.image_size)
    args.vq_ckpt = find_decoder_of(file, args.vq_ckpt, args.cluster_size)
    of_tokenizer = recorded_flags(args.vq_ckpt) if Path(args.vq_ckpt).is_file() else {}
    args.take({name: value for name, value in of_tokenizer.items() if name not in recorded},
              args.vq_ckpt)
    args.beta = choose_beta(args.beta, is_free, Sampler(**args.pick(Sampler)))
    if is_free:
        args.cfg_scale = round(1 / args.beta, 12)   # what it stands for


def load_pipeline(file: GPTFile, settings: PipelineSettings, sampler: Sampler, vq_config: VQConfig,
                  device: torch.device) -> Pipeline:
    """Loads what the settings describe, after comparing them with each other and with the files.

    Args:
        file: the GPT's.
        settings: PipelineSettings.
        sampler: Sampler.
        vq_config: VQConfig of the decoder; its codes are those of the GPT.
        device: where to sample.

    Raises:
        ValueError: a setting without a meaning, or parts that do not belong together.
    """
    # Read and compare all parts.
    sampler.check(vq_config.codebook_size)
    config = gpt_config(settings.gpt_model,
                        grid=grid_of(settings.image_size, settings.downsample_size),
                        vocab_size=vq_config.codebook_size, num_classes=settings.num_classes)
    if settings.beta is not None:
        with torch.device("meta"):
            free = GPT(replace(config, guidance_free=True))
        check_weights(free, file.state, file.path, describe_gpt(file.state))
        file = replace(file, state=fold_beta(file.state, settings.beta))
        sampler = replace(sampler, cfg_scale=1.0)
    gpt = build_gpt(file, config)
    check_fitting(file, settings.cluster_size, settings.num_classes,
                  is_guided=sampler.num_guided(config.num_tokens) > 0)
    vq, vq_hashes = load_decoder(settings.vq_ckpt, vq_config, file.settings.get("codebook_sha256"),
                                 file.path)
    check_recorded("--downsample-size", settings.downsample_size, vq.downsampling,
                   vq_config.vq_model)
    hashes = {"codebook_sha256": vq_hashes["codebook_sha256"],
              "vq_sha256": vq_hashes["weights_sha256"],
              "gpt_sha256": weights_sha256(gpt.state_dict())}

    # Put them where they compute, in the fastest form that the device has.
    dtype = PRECISIONS[settings.precision]
    vq_dtype = PRECISIONS[settings.vq_precision]
    gpt = gpt.to(device).cast(dtype)
    steps = CapturedSteps(gpt) if settings.compile else None
    compiled = settings.compile and set_up_compiler(device, settings.compile_errors)
    if compiled:
        compile_decoding(gpt)
    elif can_pack(device, dtype):
        pack_linears(gpt)
    place_decoder(vq, vq_dtype, device, compiled)
    batch_size = decoder_batch_size(vq_config.vq_model, settings.image_size, vq_dtype, device)
    return Pipeline(gpt, vq, sampler, image_size=settings.image_size_eval,
                    antialias=settings.resize == "antialias", decode_batch_size=batch_size,
                    class_names=file.settings.get("class_names"), hashes=hashes, steps=steps)


def save_samples(path: Path, weights: dict[str, Tensor], *, config: GPTConfig, vq: VQModel,
                 device: torch.device, seed: int, class_names: list[str] | None) -> None:
    """Saves a few pictures sampled with given weights as one PNG: what a training has learned.

    Args:
        path: the PNG.
        weights: state dict of the GPT.
        config: of the GPT.
        vq: VQModel with the reordered codebook.
        device: where to sample.
        seed: of labels and uniforms.
        class_names: list of the names of all classes, or None.
    """
    sampler = Sampler(cfg_scale=1.0 if config.guidance_free else SHOWN_GUIDANCE)
    weights = fold_beta(weights, 1 / SHOWN_GUIDANCE)
    config = replace(config, guidance_free=False)
    gpt = build_gpt(GPTFile(path, weights, {"grid": config.grid}, {}), config).to(device)
    pipeline = Pipeline(gpt, vq.to(device), sampler, image_size=config.grid * vq.downsampling,
                        decode_batch_size=NUM_SAMPLED, class_names=class_names)
    labels, uniforms = random_numbers(seed, range(NUM_SAMPLED), config.num_classes,
                                      config.num_tokens)
    save_grid(path, pipeline.sample(labels, uniforms), columns=4,
              captions=pipeline.label_names(labels))
