"""The patch discriminator: one logit for every patch of a picture (pix2pix, Isola et al. 2017).

Letters: B batch, P pixels, h and w sides in patches.
"""

from torch import Tensor, nn

NORMS = ("group", "batch")
SMALLEST_IMAGE = 24     # pixels
GROUPS = 32


class PatchDiscriminator(nn.Module):
    """Five 4x4 convolutions: 64, 128, 256 channels at stride 2, 512 and 1 at stride 1.

    A norm follows each of the middle three.
    """

    def __init__(self, norm: str = "group") -> None:
        """Builds the network with its published initial weights.

        Args:
            norm: "group", which treats every picture alone, or "batch", as in the published recipe.
        """
        super().__init__()
        layers = [nn.Conv2d(3, 64, 4, 2, padding=1), nn.LeakyReLU(0.2)]
        width = 64
        for channels, stride in ((128, 2), (256, 2), (512, 1)):
            layers.append(nn.Conv2d(width, channels, 4, stride, padding=1, bias=False))
            layers.append(nn.GroupNorm(GROUPS, channels) if norm == "group"
                          else nn.BatchNorm2d(channels))
            layers.append(nn.LeakyReLU(0.2))
            width = channels
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, padding=1))
        for module in self.modules():
            if hasattr(module, "weight"):
                mean = 0.0 if isinstance(module, nn.Conv2d) else 1.0
                nn.init.normal_(module.weight, mean=mean, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (B, 1, h, w), positive for real.

        Args:
            images: (B, 3, P, P) float in [-1, 1], P at least SMALLEST_IMAGE.
        """
        return self.main(images)
