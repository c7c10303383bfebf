"""A GPT and the VQ model that decodes its tokens, as one pipeline that draws; parts of different runs are refused.

The chain of hashes: the codes' manifest names the codebook they index (original order); the mapping's side file names
that codebook and the reordered one; a GPT checkpoint names the reordered one; the VQ checkpoint that decodes is hashed
when it is read. Published files carry no hashes: what is unknown is a warning, what differs is an error.

Letters: B pictures, T tokens, P pixels.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoregressive.models.config import add_gpt_args, gpt_config, grid_of
from autoregressive.models.generate import Steps, generate
from autoregressive.models.gpt import GPT
from autoregressive.models.loading import GPTFile, build_gpt
from autoregressive.models.packed import can_pack, pack_linears
from autoregressive.models.recorded import RecordedSteps, compile_decoding
from autoregressive.models.sampler import Sampler, add_sampler_args
from autoregressive.runtime.compute import PRECISIONS, add_compile_errors_arg, set_up_compiler, to_device
from autoregressive.runtime.entry import Parser, free, pixels
from autoregressive.runtime.files import weights_sha256
from autoregressive.runtime.identity import check_codebook, check_recorded
from autoregressive.sample.presets import PRESETS
from tokenizer.tokenizer_image.encoding import default_batch_size
from tokenizer.tokenizer_image.images import to_uint8
from tokenizer.tokenizer_image.loading import default_vq_path, load_vq
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel, add_vq_args

LARGEST_TILE = 32               # pictures decoded together


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
    vq_ckpt: str | None
    compile: bool
    compile_errors: str


@dataclass(frozen=True)
class Pipeline:
    """A GPT and the VQ model that decodes its tokens, ready to draw.

    Attributes:
        gpt, vq: on their device, in their precision.
        sampler: Sampler.
        image_size: side of the pictures in pixels, after the resize.
        antialias: whether the resize filters.
        tile: pictures decoded together, always so many: a picture then has the same bits in every batch.
        class_names: list of the names of all classes, or None if they are not known.
        hashes: dict of codebook_sha256, vq_sha256 and gpt_sha256.
        steps: how the decode steps run; None is one by one.
    """

    gpt: GPT
    vq: VQModel
    sampler: Sampler
    image_size: int
    antialias: bool
    tile: int
    class_names: list[str] | None
    hashes: dict[str, str]
    steps: Steps | None = None

    def draw_tokens(self, labels: np.ndarray, uniforms: np.ndarray) -> Tensor:
        """Returns tokens (B, T) int64 on the device, of labels (B,) and uniforms (B, T)."""
        device = self.gpt.norm.weight.device
        return generate(self.gpt, to_device(labels, device), to_device(uniforms, device), self.sampler, self.steps)

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> Tensor:
        """Returns the pictures (B, P, P, 3) uint8 of tokens (B, T) int64, both on the device, tile by tile."""
        pictures = []
        for tile in tokens.split(self.tile):
            missing = self.tile - len(tile)
            full = torch.cat([tile, tile[:1].expand(missing, -1)])
            images = self.vq.decode_codes(full, self.gpt.config.grid)               # (tile, 3, P, P)
            pictures.append(to_uint8(images, self.image_size, self.antialias)[:len(tile)])
        return torch.cat(pictures)

    def draw(self, labels: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """Returns the pictures (B, P, P, 3) uint8 of labels (B,) and uniforms (B, T)."""
        return self.decode(self.draw_tokens(labels, uniforms)).cpu().numpy()

    def label_names(self, labels: np.ndarray) -> list[str]:
        """Returns what to call the labels (B,): names where they are known."""
        return [self.class_names[label] if self.class_names else f"class {label}" for label in labels]


def add_pipeline_args(parser: Parser) -> None:
    """Declares the flags of drawing pictures with a GPT and a VQ model: shared by the sampling scripts."""
    add_gpt_args(parser)
    add_vq_args(parser)
    add_sampler_args(parser)
    group = parser.add_argument_group("drawing")
    group.add_argument("--weights", default="raw", choices=("raw", "ema"), help="of the GPT: as trained, or averaged")
    group.add_argument("--from-fsdp", action="store_true", help="the checkpoint is a bare state dict")
    group.add_argument("--precision", default="bf16", choices=tuple(PRECISIONS), help="of the GPT's weights and cache")
    group.add_argument("--vq-precision", choices=tuple(PRECISIONS),
                       help="of the VQ decoder; default: bf16 on a GPU, none on a CPU")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction,
                       help="compile the blocks of a decode step and, on a GPU, record it as graphs; "
                            "sample_c2i_ddp.py does so on a GPU")
    add_compile_errors_arg(group)
    group.add_argument("--image-size", type=pixels, default=384, help="pixels of a generated picture's side")
    group.add_argument("--image-size-eval", type=pixels, default=256, help="pixels of a stored picture's side")
    group.add_argument("--resize", default="bicubic", choices=("bicubic", "antialias"),
                       help="bicubic as published, or with antialiasing")
    free(parser.add_argument("--preset", choices=PRESETS, help="settings of a published row"))  # what is given wins


def device_flags(device: torch.device, defaults: dict[str, Any]) -> dict[str, Any]:
    """Returns the flags of add_pipeline_args whose default, None, stands for another one on each kind of device.

    Args:
        device: where pictures are drawn.
        defaults: of all flags of the script.
    """
    is_gpu = device.type == "cuda"
    # Pictures of bfloat16 differ from those of float32 by 55.6 dB, far more than a tokenizer's own 20 to 30 dB.
    values = {"compile": is_gpu, "vq_precision": "bf16" if is_gpu else "none"}
    return {name: value for name, value in values.items() if defaults[name] is None}


def load_decoder(path: str | Path, config: VQConfig, codebook_sha256: str | None,
                 source: str | Path) -> tuple[VQModel, dict[str, str]]:
    """Loads a VQ model, with its hashes; its codebook must be the one of `codebook_sha256`, which `source` records."""
    vq, hashes = load_vq(path, config)
    check_codebook(codebook_sha256, hashes["codebook_sha256"], source, path)
    return vq, hashes


def place_decoder(vq: VQModel, dtype: torch.dtype, device: torch.device, compiled: bool) -> None:
    """Moves a VQ model to a device, its decoder in a dtype, to be compiled or not; the codebook stays float32."""
    vq.to(device)
    for part in (vq.post_quant_conv, vq.decoder):
        part.to(dtype, memory_format=torch.channels_last)
    if compiled:
        vq.decoder.compile()


def load_pipeline(file: GPTFile, settings: PipelineSettings, sampler: Sampler, vq_config: VQConfig,
                  device: torch.device) -> Pipeline:
    """Loads what the settings describe, after comparing them with each other and with the files.

    Args:
        file: the GPT's.
        settings: PipelineSettings.
        sampler: Sampler.
        vq_config: VQConfig of the decoder; its codes are those of the GPT.
        device: where to draw.

    Raises:
        ValueError: a setting without a meaning, or parts that do not belong together.
    """
    sampler.check(vq_config.codebook_size)
    gpt = build_gpt(file, gpt_config(settings.gpt_model, grid=grid_of(settings.image_size, settings.downsample_size),
                                     vocab_size=vq_config.codebook_size, num_classes=settings.num_classes))
    check_recorded("--cluster-size", settings.cluster_size, file.settings.get("cluster_size"), file.path)
    class_names = file.settings.get("class_names")
    if class_names is not None and len(class_names) != settings.num_classes:
        raise ValueError(f"{file.path}: expected class_names of {settings.num_classes} classes, found "
                         f"{len(class_names)}; take another checkpoint of the run")
    if sampler.cfg_scale > 1 and file.settings.get("label_dropout") == 0:
        raise ValueError(f"--cfg-scale: expected at most 1 for {file.path}, which was trained without label dropout "
                         f"and knows no null label, got {sampler.cfg_scale}")
    vq, vq_hashes = load_decoder(settings.vq_ckpt or default_vq_path(settings.cluster_size), vq_config,
                                 file.settings.get("codebook_sha256"), file.path)
    check_recorded("--downsample-size", settings.downsample_size, vq.downsampling, vq_config.vq_model)
    hashes = {"codebook_sha256": vq_hashes["codebook_sha256"], "vq_sha256": vq_hashes["weights_sha256"],
              "gpt_sha256": weights_sha256(gpt.state_dict())}

    dtype, vq_dtype = PRECISIONS[settings.precision], PRECISIONS[settings.vq_precision]
    gpt = gpt.to(device).cast(dtype)
    steps = RecordedSteps(gpt) if settings.compile else None
    compiled = settings.compile and set_up_compiler(device, settings.compile_errors)
    if compiled:
        compile_decoding(gpt)
    elif can_pack(device, dtype):
        pack_linears(gpt)
    place_decoder(vq, vq_dtype, device, compiled)
    tile = min(LARGEST_TILE, default_batch_size(vq_config.vq_model, settings.image_size, vq_dtype, device))
    return Pipeline(gpt, vq, sampler, settings.image_size_eval, settings.resize == "antialias", tile,
                    class_names, hashes, steps)
