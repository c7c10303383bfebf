"""Tokens to pictures: where and in which precision a VQ model decodes, and how many at a time."""

import torch

from tokenizer.tokenizer_image.encoding import default_batch_size
from tokenizer.tokenizer_image.vq_model import VQModel

MOST_DECODED = 32               # pictures decoded together


def place_decoder(vq: VQModel, dtype: torch.dtype, device: torch.device, compiled: bool) -> None:
    """Moves a VQ model to a device, its decoder in a dtype; the codebook stays float32.

    Args:
        vq: VQModel, in place.
        dtype: of the decoder.
        device: where to decode.
        compiled: whether the decoder is to be compiled.
    """
    vq.to(device)
    for part in (vq.post_quant_conv, vq.decoder):
        part.to(dtype, memory_format=torch.channels_last)
    if compiled:
        vq.decoder.compile()


def decoder_batch_size(vq_model: str, image_size: int, dtype: torch.dtype,
                       device: torch.device) -> int:
    """Returns how many pictures of `image_size` pixels a VQ decoder is given together."""
    return min(MOST_DECODED, default_batch_size(vq_model, image_size, dtype, device))
