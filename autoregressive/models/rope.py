"""Two-dimensional rotary position embedding.

Letters: B batch, T tokens (the condition token included), H heads.
"""

import torch
from torch import Tensor

BASE = 10000.0          # wavelengths go from 2 pi up to nearly 2 pi BASE


def rotary_table(grid: int, head_dim: int) -> Tensor:
    """Builds the cosines and sines that turn queries and keys by the cell a token stands in.

    The first half of the pairs turns by row * f_i, the second by column * f_i,
    f_i = BASE^(-2i / (head_dim / 2)). The condition token's row is cos = sin = 0: not "no
    rotation", it makes a query or key the zero vector, so every later token scores the condition 0.
    The published weights were trained so.

    Args:
        grid: side of the grid in tokens; codes are in raster order.
        head_dim: width of a head, a multiple of 4.

    Returns:
        (1 + grid * grid, head_dim / 2, 2) float32: cosine and sine.

    Raises:
        ValueError: head_dim is not a multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"head_dim: expected a multiple of 4, got {head_dim}")
    half = head_dim // 2
    frequencies = 1.0 / BASE ** (torch.arange(0, half, 2).float() / half)   # (head_dim / 4,)
    angles = torch.outer(torch.arange(grid).float(), frequencies)           # (grid, head_dim / 4)
    by_row = angles[:, None, :].expand(grid, grid, -1)
    by_column = angles[None, :, :].expand(grid, grid, -1)
    angles = torch.cat([by_row, by_column], dim=-1)                 # (grid, grid, head_dim / 2)
    angles = angles.flatten(0, 1)                                   # (grid * grid, head_dim / 2)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([torch.zeros(1, half, 2), table])


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Turns adjacent pairs of dimensions: (a, b) -> (a cos - b sin, b cos + a sin), in float32.

    Args:
        x: (B, T, H, head_dim), any float dtype.
        table: (T, head_dim / 2, 2) float32.

    Returns:
        (B, T, H, head_dim) in the dtype of `x`.
    """
    pairs = x.float().unflatten(-1, (-1, 2))                        # (B, T, H, head_dim / 2, 2)
    cos, sin = table[:, None].unbind(-1)                            # (T, 1, head_dim / 2)
    a, b = pairs.unbind(-1)                                         # (B, T, H, head_dim / 2)
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return turned.flatten(-2).type_as(x)                            # (B, T, H, head_dim)
