"""Which GPT is meant: its shape, the sizes that have a name, and the flags that choose among them.

Letters: T tokens, D width, V codes.
"""

import argparse
from dataclasses import dataclass
from typing import NamedTuple

from autoregressive.runtime.entry import at_least, fraction


@dataclass(frozen=True)
class GPTConfig:
    """Shape and regularisation of a GPT.

    Attributes:
        name: of the size, for messages.
        num_layers, num_heads, width: size of the transformer.
        grid: side of the picture in tokens.
        vocab_size: V.
        num_classes: labels 0 .. num_classes - 1; `num_classes` itself is the null label.
        num_kv_heads: key-value heads, a divisor of num_heads; None means num_heads.
        dropout: after the two projections of each block.
        token_dropout: on the input embeddings, the condition included.
        drop_path: rate of the last layer, to which it rises linearly from 0; above 0 it turns
            `dropout` off.
        guidance_free: whether beta is an input, as guidance_free.py says.
    """

    name: str
    num_layers: int
    num_heads: int
    width: int
    grid: int = 16
    vocab_size: int = 16384
    num_classes: int = 1000
    num_kv_heads: int | None = None
    dropout: float = 0.1
    token_dropout: float = 0.1
    drop_path: float = 0.0
    guidance_free: bool = False

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.width // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def num_tokens(self) -> int:
        """Tokens of a picture, T."""
        return self.grid * self.grid

    @property
    def hidden_width(self) -> int:
        """Width of the SwiGLU layer: 2/3 of 4 D, rounded up to a multiple of 256."""
        two_thirds = 2 * 4 * self.width // 3
        return -(-two_thirds // 256) * 256

    def flops_per_image(self, num_parameters: int, patch: int = 1) -> int:
        """Returns the floating-point operations of training on one image.

        For every position six for every weight that is multiplied (the token embedding is only
        looked up), and those of causal attention: 6 * layers * width * positions, half of the full
        matrix. A guidance-free model runs forward once more, which is a third; the embedding of
        beta counts as if it were multiplied at every position, below 1 %.

        Args:
            num_parameters: of the model.
            patch: side of a position in tokens.
        """
        looked_up = (self.vocab_size + self.num_classes + 1) * self.width
        positions = self.num_tokens // patch**2
        attention = 6 * self.num_layers * self.width * positions
        flops = positions * (6 * (num_parameters - looked_up) + attention)
        return 4 * flops // 3 if self.guidance_free else flops


class GPTSize(NamedTuple):
    """What tells the sizes of GPT_MODELS apart: layers, heads, D."""

    num_layers: int
    num_heads: int
    width: int


GPT_MODELS = {
    "GPT-tiny": GPTSize(num_layers=4, num_heads=4, width=96),
    "GPT-B": GPTSize(num_layers=12, num_heads=12, width=768),
    "GPT-L": GPTSize(num_layers=24, num_heads=16, width=1024),
    "GPT-XL": GPTSize(num_layers=36, num_heads=20, width=1280),
    "GPT-XXL": GPTSize(num_layers=48, num_heads=24, width=1536),
    "GPT-XXXL": GPTSize(num_layers=48, num_heads=40, width=2560),
    "GPT-1B": GPTSize(num_layers=22, num_heads=32, width=2048),
    "GPT-3B": GPTSize(num_layers=24, num_heads=32, width=3200),
    "GPT-7B": GPTSize(num_layers=32, num_heads=32, width=4096),
}


def gpt_config(name: str, **settings: int | float | None) -> GPTConfig:
    """Returns the GPTConfig of a size in GPT_MODELS; `settings` are further fields of GPTConfig."""
    return GPTConfig(name, **GPT_MODELS[name]._asdict(), **settings)


def add_gpt_args(parser: argparse.ArgumentParser) -> None:
    """Declares the flags that say which GPT is meant: shared by training and sampling."""
    group = parser.add_argument_group("GPT")
    group.add_argument("--gpt-model", default="GPT-B", choices=GPT_MODELS, help="size of the GPT")
    group.add_argument("--gpt-ckpt",
                       help="checkpoint of the GPT: a file, or a folder whose newest is taken")
    group.add_argument("--gpt-type", default="c2i", choices=("c2i",),
                       help="what the GPT is conditioned on: its class label; text is not "
                            "supported")
    group.add_argument("--cls-token-num", type=int, default=1, choices=(1,),
                       help="condition tokens in front: a class is one")
    group.add_argument("--num-classes", type=at_least(1), default=1000,
                       help="number of class labels")
    group.add_argument("--downsample-size", type=at_least(1), default=16,
                       help="pixels of a token's side")
    group.add_argument("--cluster-size", type=at_least(1), default=128,
                       help="codes per cluster of the reordered codebook")


def add_regularisation_args(group: argparse._ActionsContainer) -> None:
    """Declares the flags of a GPT's dropout, which matter in training only."""
    group.add_argument("--dropout-p", type=fraction, default=0.1,
                       help="dropout after the projections of a block")
    group.add_argument("--token-dropout-p", type=fraction, default=0.1,
                       help="dropout on the input embeddings")
    group.add_argument("--drop-path-rate", type=fraction, default=0.0,
                       help="drop path of the last layer; above 0 it replaces --dropout-p")


def grid_of(image_size: int, downsample_size: int) -> int:
    """Returns the side in tokens of pictures of `image_size` pixels.

    Raises:
        ValueError: it is no whole number.
    """
    if image_size % downsample_size:
        raise ValueError(f"--image-size: expected a multiple of --downsample-size "
                         f"{downsample_size}, got {image_size}")
    return image_size // downsample_size
