"""The VQ tokenizers: images to codes and back, with the published architecture and state-dict keys.

    model = VQModel(VQConfig("VQ-16", codebook_size=16384, codebook_embed_dim=8))
    codes = model.quantize.codes(model.encode(images))  # (B, 3, P, P) in [-1, 1] -> (B, T) int64
    images = model.decode_codes(codes, grid)            # and back

Letters: B batch, T tokens, V codes, E code dimension, P pixels, C channels, h and w sides of a
feature map. Attributes that appear in state-dict keys (conv_blocks, res, attn, nin_shortcut, ...)
keep their published names.
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
    multipliers: tuple[int, ...]
    z_channels: int


VQ_MODELS = {
    "VQ-16": VQSize(channels=128, multipliers=(1, 1, 2, 2, 4), z_channels=256),
    "VQ-8": VQSize(channels=128, multipliers=(1, 2, 2, 4), z_channels=256),
    "VQ-4-small": VQSize(channels=32, multipliers=(1, 1, 2), z_channels=32),
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

    def __post_init__(self) -> None:
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
        names = [field.name for field in fields(cls) if field.name in record]
        return cls(**{name: record[name] for name in names})


def downsampling(name: str) -> int:
    """Returns the side in pixels of one token of model `name`: grid = image_size // that."""
    return 2 ** (len(VQ_MODELS[name].multipliers) - 1)


def check_image_size(image_size: int, name: str) -> None:
    """Raises ValueError unless pictures of `image_size` pixels, at least 1, are whole tokens."""
    step = downsampling(name)
    if image_size % step:
        raise ValueError(f"--image-size: expected a multiple of {step} for {name}, "
                         f"got {image_size}")


def add_vq_args(parser: Parser, ckpt_required: bool = False) -> None:
    """Declares the flags of a tokenizer: those of VQConfig and --vq-ckpt."""
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--vq-model", default="VQ-16", choices=tuple(VQ_MODELS),
                       help="size of the tokenizer")
    group.add_argument("--codebook-size", type=at_least(1), default=16384, help="number of codes")
    group.add_argument("--codebook-embed-dim", type=at_least(1), default=8,
                       help="dimensions of a code")
    group.add_argument("--vq-ckpt", required=ckpt_required, help="checkpoint of the tokenizer")


class VQModel(nn.Module):
    """An autoencoder whose latents are looked up in a codebook."""

    def __init__(self, config: VQConfig) -> None:
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
        """Returns the latents (B, E, h, w) of images (B, 3, P, P) float in [-1, 1].

        h = w = P // downsampling.
        """
        features = self.encoder(images)             # (B, z_channels, h, w)
        return self.quant_conv(features)            # (B, E, h, w)

    def decode(self, z_q: Tensor) -> Tensor:
        """Returns the images (B, 3, P, P), about in [-1, 1], of quantised latents (B, E, h, w)."""
        z_q = z_q.type_as(self.post_quant_conv.weight)
        features = self.post_quant_conv(z_q)        # (B, z_channels, h, w)
        return self.decoder(features)               # (B, 3, P, P)

    def decode_codes(self, codes: Tensor, grid: int) -> Tensor:
        """Returns the images (B, 3, P, P), about in [-1, 1], of codes.

        Args:
            codes: (B, T) int64, T = grid * grid in raster order.
            grid: side of the pictures in tokens.
        """
        z_q = self.quantize.vectors(codes, grid, grid)      # (B, E, grid, grid)
        return self.decode(z_q)                             # (B, 3, P, P)

    def forward(self, images: Tensor,
                entropy_ratio: float = 0.0) -> tuple[Tensor, QuantizerLosses, Tensor]:
        """Reconstructs images, with what training needs.

        Args:
            images: (B, 3, P, P) float in [-1, 1].
            entropy_ratio: weight of the entropy loss.

        Returns:
            reconstruction (B, 3, P, P), QuantizerLosses, codes (B, T) int64.
        """
        latents = self.encode(images)                                   # (B, E, h, w)
        z_q, losses, codes = self.quantize(latents, entropy_ratio)      # z_q (B, E, h, w)
        return self.decode(z_q), losses, codes                          # (B, 3, P, P), .., (B, T)


def named(**modules: nn.Module) -> nn.Sequential:
    """Returns modules that are applied one after the other, under these names in the state dict."""
    return nn.Sequential(OrderedDict(modules))


def build_encoder(size: VQSize) -> nn.Sequential:
    """Returns images (B, 3, P, P) -> features (B, z_channels, h, w), highest resolution first."""
    conv_in = nn.Conv2d(3, size.channels, 3, padding=1)
    widths = [size.channels * multiplier for multiplier in size.multipliers]
    last = len(widths) - 1
    levels = []
    for level, (width_in, width) in enumerate(pairwise([size.channels, *widths])):
        is_last = level == last
        levels.append(Level(width_in, width, num_blocks=2, has_attention=is_last,
                            downsample=None if is_last else halve_sides(width)))
    return named(
        conv_in=conv_in,
        conv_blocks=nn.Sequential(*levels),
        mid=build_middle(widths[last]),
        norm_out=group_norm(widths[last]),
        activation=nn.SiLU(),
        conv_out=nn.Conv2d(widths[last], size.z_channels, 3, padding=1))


def build_decoder(size: VQSize) -> nn.Sequential:
    """Returns features (B, z_channels, h, w) -> images (B, 3, P, P), lowest resolution first.

    It is the encoder mirrored, with a block more at each resolution.
    """
    widths = [size.channels * multiplier for multiplier in reversed(size.multipliers)]
    last = len(widths) - 1
    conv_in = nn.Conv2d(size.z_channels, widths[0], 3, padding=1)
    mid = build_middle(widths[0])
    levels = []
    for level, (width_in, width) in enumerate(pairwise([widths[0], *widths])):
        is_last = level == last
        levels.append(Level(width_in, width, num_blocks=3, has_attention=level == 0,
                            upsample=None if is_last else double_sides(width)))
    return named(
        conv_in=conv_in,
        mid=mid,
        conv_blocks=nn.Sequential(*levels),
        norm_out=group_norm(widths[last]),
        activation=nn.SiLU(),
        conv_out=nn.Conv2d(widths[last], 3, 3, padding=1))


def halve_sides(channels: int) -> nn.Sequential:
    """Returns a convolution that halves the sides; the padding is right and bottom only."""
    return named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(channels, channels, 3, stride=2))


def double_sides(channels: int) -> nn.Sequential:
    """Returns a convolution of the features at twice the sides."""
    return named(enlarge=nn.Upsample(scale_factor=2),
                 conv=nn.Conv2d(channels, channels, 3, padding=1))


def build_middle(channels: int) -> nn.Sequential:
    """Returns block, attention, block at the lowest resolution."""
    return nn.Sequential(ResBlock(channels, channels), Attention(channels),
                         ResBlock(channels, channels))


class Level(nn.Module):
    """The blocks of one resolution, with or without attention after each, and a change of sides."""

    def __init__(self, channels_in: int, channels: int, num_blocks: int, has_attention: bool,
                 downsample: nn.Module | None = None,
                 upsample: nn.Module | None = None) -> None:
        """Builds the level.

        Args:
            channels_in: width of what comes in.
            channels: width of what goes out.
            num_blocks: number of residual blocks.
            has_attention: whether attention follows each block.
            downsample: what halves the sides at the end, or None.
            upsample: what doubles the sides at the end, or None.
        """
        super().__init__()
        widths_in = [channels_in] + [channels] * (num_blocks - 1)
        self.res = nn.ModuleList(ResBlock(width_in, channels) for width_in in widths_in)
        self.attn = nn.ModuleList(Attention(channels) if has_attention else nn.Identity()
                                  for _ in range(num_blocks))
        self.downsample = downsample or nn.Identity()
        self.upsample = upsample or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, channels, h', w') of x (B, channels_in, h, w); h' = h / 2, h or 2 h."""
        for res, attn in zip(self.res, self.attn, strict=True):
            x = attn(res(x))                                                        # (B, C, h, w)
        return self.upsample(self.downsample(x))


def group_norm(channels: int) -> nn.GroupNorm:
    """Returns the published 32 groups, fewer in narrow models: a group needs a few channels."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two normalised convolutions beside a shortcut."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm2 = group_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        is_same_width = channels_in == channels
        self.nin_shortcut = nn.Identity() if is_same_width else nn.Conv2d(channels_in, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, channels, h, w) of x (B, channels_in, h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class Attention(nn.Module):
    """Self-attention of one head over all positions of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, C, h, w) of x (B, C, h, w)."""
        normed = self.norm(x)                                                       # (B, C, h, w)
        q = _positions(self.q(normed))                                              # (B, 1, h*w, C)
        k = _positions(self.k(normed))
        v = _positions(self.v(normed))
        mixed = F.scaled_dot_product_attention(q, k, v)                             # (B, 1, h*w, C)
        mixed = mixed.squeeze(1).transpose(1, 2).reshape(x.shape)                   # (B, C, h, w)
        return x + self.proj_out(mixed)


def _positions(features: Tensor) -> Tensor:
    """Returns a feature map (B, C, h, w) as attention of one head takes it, (B, 1, h*w, C)."""
    return features.flatten(2).transpose(1, 2).unsqueeze(1)
