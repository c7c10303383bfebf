"""Linear layers for decoding on a CPU: weights in the order that oneDNN's kernels read them.

A decode step reads every weight once for a few rows, so it is bound by memory: the packed kernel is
faster at 1 to 32 rows (GPT-B, 4 rows: half the time in float32 and in bfloat16). In float32 it
gives the same bits for a row whatever rows stand beside it, which BLAS, choosing kernels by shape,
does for multiples of 8 rows only.
"""

import torch
from torch import Tensor, nn

from autoregressive.models.gpt import GPT


class PackedLinear(nn.Module):
    """A linear layer without bias whose weight (out, in) is held in packed form only."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (..., out) from x (..., in), on a CPU and in the dtype of the weight."""
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Says whether weights of a dtype on a device can be packed."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:         # not every processor has instructions for it
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def pack_linears(model: GPT) -> GPT:
    """Replaces every linear layer of a model by its packed form, in place.

    The model can only decode from then on.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child.weight))
    return model
