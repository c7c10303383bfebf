"""The patch discriminator: one logit for every patch of a picture, real or reconstructed (pix2pix, Isola et al. 2017).

Letters: B batch, P pixels.
"""

from torch import Tensor, nn

NORMS = ("group", "batch")
SMALLEST_IMAGE = 24     # pixels
GROUPS = 32


class PatchDiscriminator(nn.Module):
    """Five 4x4 convolutions: 64, 128, 256 channels at stride 2, 512 and 1 at stride 1; norm on the middle three.

    Args:
        norm: "group", which treats every picture alone, or "batch", which is the published recipe's.
    """

    def __init__(self, norm="group") -> None:
        super().__init__()
        layers, width = [nn.Conv2d(3, 64, 4, 2, padding=1), nn.LeakyReLU(0.2)], 64
        for channels, stride in ((128, 2), (256, 2), (512, 1)):
            normalise = nn.GroupNorm(GROUPS, channels) if norm == "group" else nn.BatchNorm2d(channels)
            layers += [nn.Conv2d(width, channels, 4, stride, padding=1, bias=False), normalise, nn.LeakyReLU(0.2)]
            width = channels
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, padding=1))
        for module in self.modules():
            if hasattr(module, "weight"):
                nn.init.normal_(module.weight, mean=0.0 if isinstance(module, nn.Conv2d) else 1.0, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (B, 1, h, w), positive for real, of images (B, 3, P, P) in [-1, 1]; P is at least 24."""
        return self.main(images)
