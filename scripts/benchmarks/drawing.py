"""A GPT and a VQ model of random weights, in published sizes, set up to draw as the sampling scripts do."""

import torch

from autoregressive.models.gpt import GPT, GPTConfig
from autoregressive.models.recorded import RecordedSteps
from autoregressive.models.sampler import Sampler
from autoregressive.pipeline import LARGEST_TILE, Pipeline, place_decoder
from tokenizer.tokenizer_image.encoding import default_batch_size
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel

SAMPLER = Sampler(cfg_scale=2.0)
VQ = "VQ-16"
DOWNSAMPLING = 16                                   # pixels of a token's side


def make_model(config: GPTConfig, dtype: torch.dtype, device: torch.device) -> GPT:
    """Returns a GPT of random weights that can only be run."""
    torch.manual_seed(0)
    with device:                                    # a large one takes long to fill on a CPU
        model = GPT(config).eval().requires_grad_(False)
    torch.nn.init.normal_(model.output.weight, std=0.02)
    return model.to(device).cast(dtype)


def make_decoding(model: GPT, steps: RecordedSteps | None, tile: int, dtype: torch.dtype, compiled: bool) -> Pipeline:
    """Returns a pipeline whose VQ model of random weights decodes the tokens of `model`."""
    vq = VQModel(VQConfig(VQ)).eval().requires_grad_(False)
    place_decoder(vq, dtype, model.norm.weight.device, compiled)
    grid = model.config.grid
    return Pipeline(gpt=model, vq=vq, sampler=SAMPLER, image_size=grid * DOWNSAMPLING, antialias=False,
                    tile=tile, class_names=None, hashes={}, steps=steps)


def decoder_tile(grid: int, batch_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Returns how many pictures the VQ decoder takes together."""
    return min(batch_size, LARGEST_TILE, default_batch_size(VQ, grid * DOWNSAMPLING, dtype, device))
