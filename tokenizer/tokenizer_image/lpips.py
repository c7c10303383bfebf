"""LPIPS: distance of two images in the features of VGG16, weighted by people's judgement.

It is that of Zhang et al. 2018. Letters: B batch, P pixels, h and w sides of a feature map.
"""

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from autoregressive.runtime.checkpoint import load_strictly, model_state, read_checkpoint
from autoregressive.runtime.entry import Parser

SHIFT = (-0.030, -0.088, -0.188)        # mean and deviation of red, green and blue in [-1, 1]
SCALE = (0.458, 0.448, 0.450)
STAGES = (0, 4, 9, 16, 23, 30)          # of VGG16: they end at relu1_2, 2_2, 3_3, 4_3, 5_3
WIDTHS = (64, 128, 256, 512, 512)       # channels of the stages
EPSILON = 1e-10


def add_lpips_args(parser: Parser) -> None:
    """Declares where the weights of LPIPS lie."""
    group = parser.add_argument_group("LPIPS")
    group.add_argument("--vgg-path", default="pretrained_models/vgg16-397923af.pth",
                       help="torchvision's VGG16")
    group.add_argument("--lpips-path", default="pretrained_models/vgg.pth",
                       help="the linear layers of LPIPS")


class LPIPS(nn.Module):
    """The distance; its weights never change."""

    def __init__(self) -> None:
        # Its import takes two seconds, which only those pay who use LPIPS.
        from torchvision.models import vgg16

        super().__init__()
        self.features = vgg16(weights=None).features[:STAGES[-1]]
        self.weights = nn.ParameterList(torch.ones(1, width, 1, 1) for width in WIDTHS)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Returns the distances (B,) of images and others, both (B, 3, P, P) in [-1, 1]."""
        x = (images - self.shift) / self.scale
        y = (others - self.shift) / self.scale
        total = 0
        for (start, stop), weight in zip(pairwise(STAGES), self.weights, strict=True):
            stage = self.features[start:stop]
            x = stage(x)                                            # (B, channels, h, w)
            y = stage(y)
            difference = (_unit(x) - _unit(y)).square()             # (B, channels, h, w)
            weighted = (difference * weight).sum(1)                 # (B, h, w): a 1x1 convolution
            total = total + weighted.mean((1, 2))                   # (B,)
        return total


def _unit(features: Tensor) -> Tensor:
    """Returns features (B, channels, h, w) of length 1 at every place."""
    return features / (features.square().sum(1, keepdim=True).sqrt() + EPSILON)


def load_lpips(vgg_path: str | Path, linear_path: str | Path) -> LPIPS:
    """Loads LPIPS from torchvision's VGG16 weights and the published linear layers.

    Args:
        vgg_path: state dict with features.{i}.{weight,bias}; its classifier is left out.
        linear_path: state dict with lin{0..4}.model.1.weight (1, channels, 1, 1).

    Raises:
        ValueError: a file is missing or holds other weights; the message says how to go on without.
    """
    hint = "see pretrained_models/README.md, or train without LPIPS: --perceptual-weight 0"
    features = model_state(read_checkpoint(vgg_path, hint), vgg_path)
    linear = model_state(read_checkpoint(linear_path, hint), linear_path)
    state = {name: value for name, value in features.items() if name.startswith("features.")}
    for number in range(len(WIDTHS)):
        name = f"lin{number}.model.1.weight"
        if name not in linear:
            raise ValueError(f"{linear_path}: expected {name}, found "
                             f"{', '.join(list(linear)[:4])}; {hint}")
        state[f"weights.{number}"] = linear[name]
    model = LPIPS()
    load_strictly(model, state, vgg_path, hint)
    return model
