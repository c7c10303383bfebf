"""What a training of a tokenizer is given: its settings, its networks and its data."""

from dataclasses import dataclass

from tokenizer.tokenizer_image.crops import TrainingCrops
from tokenizer.tokenizer_image.discriminator import PatchDiscriminator
from tokenizer.tokenizer_image.lpips import LPIPS
from tokenizer.tokenizer_image.vq_model import VQModel
from tokenizer.validation.reconstruction import Validation


@dataclass(frozen=True)
class TokenizerSettings:
    """What a step of training does: flags of vq_train.py, under their names.

    Attributes:
        reconstruction_loss: "l2" or "l1".
        reconstruction_weight: weight of the pixels' loss.
        perceptual_weight: weight of LPIPS.
        disc_weight: weight of the adversarial loss.
        entropy_ratio: weight of the entropy term.
        disc_loss: one of GAN_LOSSES.
        disc_start: steps before the discriminator begins.
        disc_adaptive_weight: whether the weight of G follows the gradients at the last layer.
        revive_every: steps after which codes that nothing used move to present latents; 0: never.
        global_seed: of the run; it decides which latents unused codes move to.
        mixed_precision: one of PRECISIONS, of the forward pass.
        gradient_accumulation_steps: micro-batches of a step.
    """

    reconstruction_loss: str
    reconstruction_weight: float
    perceptual_weight: float
    disc_weight: float
    entropy_ratio: float
    disc_loss: str
    disc_start: int
    disc_adaptive_weight: bool
    revive_every: int
    global_seed: int
    mixed_precision: str
    gradient_accumulation_steps: int


@dataclass(frozen=True)
class Networks:
    """What a training of a tokenizer is made of, all in float32.

    Attributes:
        model: the VQ model.
        discriminator: its adversary, or None for no adversarial loss.
        perceptual: the perceptual distance, or None for none.
    """

    model: VQModel
    discriminator: PatchDiscriminator | None = None
    perceptual: LPIPS | None = None


@dataclass(frozen=True)
class TokenizerData:
    """What a tokenizer is trained on and judged by.

    Attributes:
        crops: what the batches are made of.
        validation: the pictures to validate with, or None.
    """

    crops: TrainingCrops
    validation: Validation | None
