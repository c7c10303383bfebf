"""The VQ tokenizers: images to codes and back, with the architecture and the state-dict keys of the published files.

    model = VQModel(VQConfig("VQ-16", codebook_size=16384, codebook_embed_dim=8))
    codes = model.quantize.codes(model.encode(images))          # (B, 3, P, P) in [-1, 1] -> (B, T) int64
    images = model.decode_codes(codes, grid)                    # and back

Letters: B batch, T tokens, V codes, E code dimension, P pixels, C channels, h and w sides of a feature map.
Attributes that appear in state-dict keys (conv_blocks, res, attn, nin_shortcut, ...) keep their published names.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.runtime.entry import Parser, at_least
from tokenizer.tokenizer_image.quantizer import Quantizer, QuantizerLosses


@dataclass(frozen=True)
class VQSize:
    """One line of the size table.

    Attributes:
        channels: width at full resolution.
        multipliers: of `channels`, one a level; each level but the last halves the side.
        z_channels: width between encoder and quantiser.
    """

    channels: int
    multipliers: tuple
    z_channels: int


VQ_MODELS = {
    "VQ-16": VQSize(128, (1, 1, 2, 2, 4), 256),
    "VQ-8": VQSize(128, (1, 2, 2, 4), 256),
    "VQ-4-small": VQSize(32, (1, 1, 2), 32),
}
MOST_CODEBOOK_WEIGHTS = 2**31                       # 8 GiB


@dataclass(frozen=True)
class VQConfig:
    """What a tokenizer is: the flags of add_vq_args that say so, under their names.

    Attributes:
        vq_model: a key of VQ_MODELS.
        codebook_size: V, number of codes.
        codebook_embed_dim: E, dimensions of a code.
    """

    vq_model: str = "VQ-16"
    codebook_size: int = 16384
    codebook_embed_dim: int = 8

    def __post_init__(self):
        """Raises ValueError if there is no such model, or none of this size."""
        if self.vq_model not in VQ_MODELS:
            raise ValueError(f"--vq-model: expected {' or '.join(VQ_MODELS)}, got {self.vq_model}")
        sizes = (self.codebook_size, self.codebook_embed_dim)
        if min(sizes) < 1 or math.prod(sizes) > MOST_CODEBOOK_WEIGHTS:
            raise ValueError(f"--codebook-size x --codebook-embed-dim: expected 1 to "
                             f"{MOST_CODEBOOK_WEIGHTS}, got {' x '.join(map(str, sizes))}")

    @classmethod
    def recorded_in(cls, record: dict[str, Any]) -> "VQConfig":
        """Returns the config that a record holds, such as a manifest of codes."""
        return cls(**{field.name: record[field.name] for field in fields(cls) if field.name in record})


def downsampling(name: str) -> int:
    """Returns how many pixels a side one token of model `name` stands for: grid = image_size // downsampling(name)."""
    return 2 ** (len(VQ_MODELS[name].multipliers) - 1)


def check_image_size(image_size: int, name: str) -> None:
    """Raises ValueError unless pictures of `image_size` pixels, at least 1, are whole tokens of model `name`."""
    step = downsampling(name)
    if image_size % step:
        raise ValueError(f"--image-size: expected a multiple of {step} for {name}, got {image_size}")


def add_vq_args(parser: Parser, ckpt_required: bool = False) -> None:
    """Declares the flags of a tokenizer: --vq-model, --codebook-size, --codebook-embed-dim, --vq-ckpt."""
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--vq-model", default="VQ-16", choices=tuple(VQ_MODELS), help="size of the tokenizer")
    group.add_argument("--codebook-size", type=at_least(1), default=16384, help="number of codes")
    group.add_argument("--codebook-embed-dim", type=at_least(1), default=8, help="dimensions of a code")
    group.add_argument("--vq-ckpt", required=ckpt_required, help="checkpoint of the tokenizer")


class VQModel(nn.Module):
    """An autoencoder whose latents are looked up in a codebook."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        size = VQ_MODELS[config.vq_model]
        self.downsampling = downsampling(config.vq_model)
        self.encoder = build_encoder(size)
        self.decoder = build_decoder(size)
        self.quantize = Quantizer(config.codebook_size, config.codebook_embed_dim)
        self.quant_conv = nn.Conv2d(size.z_channels, config.codebook_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_embed_dim, size.z_channels, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Returns the latents (B, E, h, w) of images (B, 3, P, P) float in [-1, 1]; h = w = P // downsampling."""
        return self.quant_conv(self.encoder(images))

    def decode(self, z_q: Tensor) -> Tensor:
        """Returns the images (B, 3, P, P), about in [-1, 1], of quantised latents (B, E, h, w)."""
        return self.decoder(self.post_quant_conv(z_q.type_as(self.post_quant_conv.weight)))

    def decode_codes(self, codes: Tensor, grid: int) -> Tensor:
        """Returns the images (B, 3, P, P), about in [-1, 1], of codes (B, T) int64 in raster order, T = grid * grid."""
        return self.decode(self.quantize.vectors(codes, grid, grid))

    def forward(self, images: Tensor, entropy_ratio: float = 0.0) -> tuple[Tensor, QuantizerLosses, Tensor]:
        """Reconstructs images, with what training needs.

        Args:
            images: (B, 3, P, P) float in [-1, 1].
            entropy_ratio: weight of the entropy loss.

        Returns:
            reconstruction (B, 3, P, P), QuantizerLosses, codes (B, T) int64.
        """
        z_q, losses, codes = self.quantize(self.encode(images), entropy_ratio)
        return self.decode(z_q), losses, codes


def named(**modules: nn.Module) -> nn.Sequential:
    """Returns modules that are applied one after the other; the state dict calls them as the arguments do."""
    return nn.Sequential(OrderedDict(modules))


def build_encoder(size: VQSize) -> nn.Sequential:
    """Returns images (B, 3, P, P) -> features (B, z_channels, h, w), highest resolution first."""
    widths = [size.channels * multiplier for multiplier in size.multipliers]
    last = len(widths) - 1
    return named(
        conv_in=nn.Conv2d(3, size.channels, 3, padding=1),
        conv_blocks=nn.Sequential(*(
            Level(width_in, width, num_blocks=2, has_attention=level == last,
                  downsample=halve_sides(width) if level < last else None)
            for level, (width_in, width) in enumerate(pairwise([size.channels, *widths])))),
        mid=build_middle(widths[last]),
        norm_out=group_norm(widths[last]),
        activation=nn.SiLU(),
        conv_out=nn.Conv2d(widths[last], size.z_channels, 3, padding=1))


def build_decoder(size: VQSize) -> nn.Sequential:
    """Returns features (B, z_channels, h, w) -> images (B, 3, P, P): the encoder mirrored, lowest resolution first."""
    widths = [size.channels * multiplier for multiplier in reversed(size.multipliers)]
    last = len(widths) - 1
    return named(
        conv_in=nn.Conv2d(size.z_channels, widths[0], 3, padding=1),
        mid=build_middle(widths[0]),
        conv_blocks=nn.Sequential(*(
            Level(width_in, width, num_blocks=3, has_attention=level == 0,
                  upsample=double_sides(width) if level < last else None)
            for level, (width_in, width) in enumerate(pairwise([widths[0], *widths])))),
        norm_out=group_norm(widths[last]),
        activation=nn.SiLU(),
        conv_out=nn.Conv2d(widths[last], 3, 3, padding=1))


def halve_sides(channels: int) -> nn.Sequential:
    """Returns a convolution that halves the sides; the padding is right and bottom only."""
    return named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(channels, channels, 3, stride=2))


def double_sides(channels: int) -> nn.Sequential:
    """Returns a convolution of the features at twice the sides."""
    return named(enlarge=nn.Upsample(scale_factor=2), conv=nn.Conv2d(channels, channels, 3, padding=1))


def build_middle(channels: int) -> nn.Sequential:
    """Returns block, attention, block at the lowest resolution."""
    return nn.Sequential(ResBlock(channels, channels), Attention(channels), ResBlock(channels, channels))


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention where there is some, and the way to the next one."""

    def __init__(self, channels_in, channels, num_blocks, has_attention, downsample=None, upsample=None):
        super().__init__()
        self.res = nn.ModuleList(ResBlock(channels if block else channels_in, channels) for block in range(num_blocks))
        self.attn = nn.ModuleList(Attention(channels) if has_attention else nn.Identity() for _ in range(num_blocks))
        self.downsample = downsample or nn.Identity()
        self.upsample = upsample or nn.Identity()

    def forward(self, x):
        for res, attn in zip(self.res, self.attn, strict=True):
            x = attn(res(x))
        return self.upsample(self.downsample(x))


def group_norm(channels: int) -> nn.GroupNorm:
    """Returns the published 32 groups, fewer in narrow models, which need a few channels in each."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two normalised convolutions beside a shortcut."""

    def __init__(self, channels_in, channels):
        super().__init__()
        self.norm1 = group_norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm2 = group_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class Attention(nn.Module):
    """Self-attention of one head over all positions of a feature map."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        normed = self.norm(x)
        q, k, v = (conv(normed).flatten(2).transpose(1, 2).unsqueeze(1)            # (B, 1, h*w, C)
                   for conv in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)                             # (B, 1, h*w, C)
        return x + self.proj_out(mixed.squeeze(1).transpose(1, 2).reshape(x.shape))
