"""Bilinear sampling of maps at real-valued positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bilinear(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Values of `maps` at positions between their cells; outside a map everything is zero.

    Args:
        maps: [L, C, h, w].
        rows, columns: positions [L, A, B], in cells: 0 is the centre of the first row (column).

    Returns:
        [L, C, A, B].
    """
    height, width = maps.shape[-2:]
    # grid_sample's own units, in which -1 and 1 are the outer edges of the first and last cell
    at = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], dim=-1)
    return F.grid_sample(maps, at, mode="bilinear", padding_mode="zeros", align_corners=False)


def raster(grid: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of every cell of a grid in raster order: two [h * w], in `like`'s dtype."""
    height, width = grid
    cells = torch.arange(height * width, device=like.device)
    rows = cells.div(width, rounding_mode="floor")
    return rows.to(like.dtype), (cells - rows * width).to(like.dtype)
