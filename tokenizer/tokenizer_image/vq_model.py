"""The VQ tokenizers: images to codes and back, with the architecture and the state-dict keys of the published files.

    model = VQModel("VQ-16", codebook_size=16384, codebook_embed_dim=8)
    codes = model.quantize.codes(model.encode(images))          # (B, 3, P, P) in [-1, 1] -> (B, T) int64
    images = model.decode_codes(codes, grid)                    # and back

Letters: B batch, T tokens, V codes, E code dimension, P pixels, C channels, h and w sides of a feature map.
Attributes that appear in state-dict keys (conv_blocks, res, attn, nin_shortcut, ...) keep their published names.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import nn

from tokenizer.tokenizer_image.quantizer import Quantizer


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

    @property
    def downsampling(self):
        return 2 ** (len(self.multipliers) - 1)


VQ_MODELS = {
    "VQ-16": VQSize(128, (1, 1, 2, 2, 4), 256),
    "VQ-8": VQSize(128, (1, 2, 2, 4), 256),
    "VQ-4-small": VQSize(32, (1, 1, 2), 32),
}


def downsampling(name):
    """Returns how many pixels a side one token of model `name` stands for: grid = image_size // downsampling(name)."""
    return VQ_MODELS[name].downsampling


def check_image_size(image_size, name):
    """Raises ValueError unless pictures of `image_size` pixels are whole tokens of model `name`."""
    step = downsampling(name)
    if image_size < step or image_size % step:
        raise ValueError(f"--image-size: expected a multiple of {step} for {name}, got {image_size}")


def add_vq_size_args(parser):
    """Declares the flags that say which tokenizer: --vq-model, --codebook-size, --codebook-embed-dim."""
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--vq-model", default="VQ-16", choices=tuple(VQ_MODELS), help="size of the tokenizer")
    group.add_argument("--codebook-size", type=int, default=16384, help="number of codes")
    group.add_argument("--codebook-embed-dim", type=int, default=8, help="dimensions of a code")
    return group


def add_vq_args(parser, ckpt_required=False):
    """Declares the flags of a trained tokenizer: those of add_vq_size_args and --vq-ckpt."""
    group = add_vq_size_args(parser)
    group.add_argument("--vq-ckpt", required=ckpt_required, help="checkpoint of the tokenizer")


class VQModel(nn.Module):
    """An autoencoder whose latents are looked up in a codebook.

    Args:
        name: a key of VQ_MODELS.
        codebook_size: V, number of codes.
        codebook_embed_dim: E, dimensions of a code.
    """

    def __init__(self, name, codebook_size=16384, codebook_embed_dim=8):
        super().__init__()
        size = VQ_MODELS[name]
        self.downsampling = size.downsampling
        self.encoder = Encoder(size)
        self.decoder = Decoder(size)
        self.quantize = Quantizer(codebook_size, codebook_embed_dim)
        self.quant_conv = nn.Conv2d(size.z_channels, codebook_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(codebook_embed_dim, size.z_channels, 1)

    def encode(self, images):
        """Returns the latents (B, E, h, w) of images (B, 3, P, P) float in [-1, 1]; h = w = P // downsampling."""
        return self.quant_conv(self.encoder(images))

    def decode(self, z_q):
        """Returns the images (B, 3, P, P), about in [-1, 1], of quantised latents (B, E, h, w)."""
        return self.decoder(self.post_quant_conv(z_q.type_as(self.post_quant_conv.weight)))

    def decode_codes(self, codes, grid):
        """Returns the images (B, 3, P, P), about in [-1, 1], of codes (B, T) int64 in raster order, T = grid * grid."""
        return self.decode(self.quantize.vectors(codes, grid, grid))

    def forward(self, images, entropy_ratio=0.0):
        """Reconstructs images, with what training needs.

        Args:
            images: (B, 3, P, P) float in [-1, 1].
            entropy_ratio: weight of the entropy loss.

        Returns:
            reconstruction (B, 3, P, P), QuantizerLosses, codes (B, T) int64.
        """
        z_q, losses, codes = self.quantize(self.encode(images), entropy_ratio)
        return self.decode(z_q), losses, codes


class Encoder(nn.Module):
    """Images (B, 3, P, P) -> features (B, z_channels, h, w), highest resolution first."""

    def __init__(self, size):
        super().__init__()
        widths = [size.channels * multiplier for multiplier in size.multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, size.channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(width_in, width, num_blocks=2, has_attention=level == last,
                  downsample=Downsample(width) if level < last else None)
            for level, (width_in, width) in enumerate(pairwise([size.channels, *widths])))
        self.mid = Middle(widths[last])
        self.norm_out = GroupNorm(widths[last])
        self.conv_out = nn.Conv2d(widths[last], size.z_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Features (B, z_channels, h, w) -> images (B, 3, P, P): the encoder mirrored, lowest resolution first."""

    def __init__(self, size):
        super().__init__()
        widths = [size.channels * multiplier for multiplier in reversed(size.multipliers)]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(size.z_channels, widths[0], 3, padding=1)
        self.mid = Middle(widths[0])
        self.conv_blocks = nn.ModuleList(
            Level(width_in, width, num_blocks=3, has_attention=level == 0,
                  upsample=Upsample(width) if level < last else None)
            for level, (width_in, width) in enumerate(pairwise([widths[0], *widths])))
        self.norm_out = GroupNorm(widths[last])
        self.conv_out = nn.Conv2d(widths[last], 3, 3, padding=1)

    def forward(self, z):
        x = self.mid(self.conv_in(z))
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention where there is some, and the way to the next one."""

    def __init__(self, channels_in, channels, num_blocks, has_attention, downsample=None, upsample=None):
        super().__init__()
        self.res = nn.ModuleList(ResBlock(channels if block else channels_in, channels) for block in range(num_blocks))
        self.attn = nn.ModuleList(Attention(channels) if has_attention else nn.Identity() for _ in range(num_blocks))
        self.downsample = downsample
        self.upsample = upsample

    def forward(self, x):
        for res, attn in zip(self.res, self.attn, strict=True):
            x = attn(res(x))
        for resample in (self.downsample, self.upsample):
            if resample is not None:
                x = resample(x)
        return x


class Middle(nn.Sequential):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels):
        super().__init__(ResBlock(channels, channels), Attention(channels), ResBlock(channels, channels))


class GroupNorm(nn.GroupNorm):
    """Group normalisation: the published 32 groups, fewer in narrow models, which need a few channels in each."""

    def __init__(self, channels):
        super().__init__(min(32, channels // 4), channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two normalised convolutions beside a shortcut."""

    def __init__(self, channels_in, channels):
        super().__init__()
        self.norm1 = GroupNorm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm2 = GroupNorm(channels)
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
        self.norm = GroupNorm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        normed = self.norm(x)
        q, k, v = (conv(normed).flatten(2).transpose(1, 2).unsqueeze(1)            # (B, 1, h*w, C)
                   for conv in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)                             # (B, 1, h*w, C)
        return x + self.proj_out(mixed.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halves the sides; the padding is right and bottom only."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the sides."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
