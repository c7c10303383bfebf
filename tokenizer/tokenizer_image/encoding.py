"""Many crops to codes: in pieces of constant shape, and any precision but that of the code search.

Letters: B pictures, T tokens, P pixels of a crop, W pixels of the centre crop that it is cut from,
n crops of a piece.
"""

import copy

import numpy as np
import torch
from torch import Tensor, nn

from autoregressive.runtime.compute import PRECISIONS
from tokenizer.tokenizer_image.images import cut_crops, to_float
from tokenizer.tokenizer_image.vq_model import VQ_MODELS, VQModel

CPU_BUDGET = 2**26              # bytes of the widest feature map: two crops of 256 pixels, which
                                # are 1.5 times as fast as ten
GPU_FRACTION = 2**-5            # of the memory; about eight feature maps of this size live at once
LARGEST_BATCH = 512             # crops; more than this no longer helps


def default_batch_size(vq_model: str, image_size: int, dtype: torch.dtype,
                       device: torch.device) -> int:
    """Returns how many crops to encode, or pictures to decode, together.

    It follows from the memory of a GPU, the caches of a CPU.

    Args:
        vq_model: size in VQ_MODELS.
        image_size: side of a crop in pixels.
        dtype: of the activations.
        device: torch device.
    """
    crop_bytes = VQ_MODELS[vq_model].channels * image_size**2 * dtype.itemsize
    budget = CPU_BUDGET
    if device.type == "cuda":
        budget = torch.cuda.get_device_properties(device).total_memory * GPU_FRACTION
    return max(1, min(LARGEST_BATCH, int(budget / crop_bytes)))


class CropEncoder:
    """Encodes crops of pictures with a tokenizer, `batch_size` crops at a time.

    Pieces are filled up to `batch_size`, so that every crop is computed in the same shape, whatever
    stands beside it.
    """

    def __init__(self, vq: VQModel, device: torch.device, precision: str, batch_size: int,
                 compiled: bool = False) -> None:
        """Converts a copy of a tokenizer's encoder.

        Args:
            vq: in float32; the model itself stays as it is.
            device: where to compute.
            precision: one of PRECISIONS, of the encoder; the search for the nearest code is in
                float32.
            batch_size: crops encoded together.
            compiled: whether to compile the encoder.
        """
        self._device = device
        self._dtype = PRECISIONS[precision]
        self._batch_size = batch_size
        self._quantize = vq.quantize.to(device)
        encoder = copy.deepcopy(nn.Sequential(vq.encoder, vq.quant_conv))
        self._encode = encoder.to(device, self._dtype, memory_format=torch.channels_last)
        if compiled:
            self._encode = torch.compile(self._encode)

    @torch.inference_mode()
    def codes(self, pictures: np.ndarray, size: int, names: list[str]) -> Tensor:
        """Returns the codes of the named crops of pictures.

        Args:
            pictures: (B, W, W, 3) uint8 numpy, centre crops.
            size: side of a crop in pixels, P <= W.
            names: some of images.crop_names.

        Returns:
            (B, len(names), T) int64 tensor on the device.
        """
        crops = cut_crops(torch.from_numpy(pictures).to(self._device), size, names)
        crops = crops.flatten(0, 1)                                             # (.., P, P, 3)
        codes = [self._encode_piece(piece) for piece in crops.split(self._batch_size)]
        return torch.cat(codes).unflatten(0, (len(pictures), len(names)))       # (B, names, T)

    def _encode_piece(self, crops: Tensor) -> Tensor:
        """Returns the codes (n, T) of crops (n, P, P, 3) uint8, n at most the batch size."""
        count = len(crops)
        if count < self._batch_size:
            filling = crops.new_zeros(self._batch_size - count, *crops.shape[1:])
            crops = torch.cat([crops, filling])
        images = to_float(crops).to(self._dtype, memory_format=torch.channels_last)
        return self._quantize.codes(self._encode(images))[:count]


def agreement(vq: VQModel, encoder: CropEncoder, pictures: np.ndarray, size: int, names: list[str],
              device: torch.device) -> float:
    """Returns the fraction of codes on which `encoder` and the same tokenizer in float32 agree.

    Args:
        vq: VQModel in float32.
        encoder: CropEncoder of the same model in another precision.
        pictures: (B, W, W, 3) uint8, as in CropEncoder.codes.
        size: side of a crop in pixels.
        names: of the crops.
        device: where to compute.
    """
    exact = CropEncoder(vq, device, "none", batch_size=len(names))
    expected = exact.codes(pictures, size, names)
    found = encoder.codes(pictures, size, names)
    return (expected == found).float().mean().item()
