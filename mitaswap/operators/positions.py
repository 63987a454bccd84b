"""Learned positional encodings: one vector per patch of the grid they were made for, resized to any
other.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mitaswap.tokens import TokenLayout


def with_positions(x: Tensor, table: Tensor, layout: TokenLayout) -> Tensor:
    """x [B, H, N, D] plus each patch's entry of `table` [H, D, h, w]; special tokens as they are.

    On a grid other than h x w the table is resized bilinearly, as an image.
    """
    table = table.to(x.dtype)
    if table.shape[-2:] != layout.grid:
        table = F.interpolate(table, size=layout.grid, mode="bilinear", align_corners=False)
    rows = table.flatten(2).transpose(1, 2)  # [H, patches, D]
    return x + F.pad(rows, (0, 0, layout.prefix, layout.suffix))
