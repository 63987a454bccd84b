"""Softmax attention of every patch to the patches around it, cut off at the edges of the grid.

Patches are taken in tiles, and each tile reads one frame of keys that holds the neighbourhoods of
all its patches: a few matrix products instead of a copy of the neighbours of every patch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mitaswap.operators.counting import attend_flops
from mitaswap.operators.experts import Branch
from mitaswap.operators.masked import attend_masked


def attend_near(
    q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], radius: tuple[int, int], scale: float
) -> Branch:
    """Attention to the patches at most `radius` rows and columns away, itself among them.

    Args:
        q, k, v: patches in raster order, [B, H, h * w, D].
        grid: (h, w).
        radius: largest distance in rows and in columns; a raster is a grid of one row.
        scale: factor of q k^T.
    """
    (height, width), (tall, wide) = grid, radius
    rows, row_keys, row_near = _tiles(height, tall, q.device)
    columns, column_keys, column_near = _tiles(width, wide, q.device)

    def index(down: Tensor, across: Tensor) -> Tensor:  # [tiles, patches of a tile]
        place = down[:, None, :, None] * width + across[None, :, None, :]
        return place.flatten(2).flatten(0, 1)

    near = row_near[:, None, :, None, :, None] & column_near[None, :, None, :, None, :]
    near = near.flatten(4, 5).flatten(2, 3).flatten(0, 1)
    tiles, frames = index(rows, columns), index(row_keys, column_keys)

    queries, keys, values = (
        x.index_select(2, at.flatten()).unflatten(2, at.shape)
        for x, at in ((q, tiles), (k, frames), (v, frames))
    )
    branch = attend_masked(queries, keys, values, near, scale)
    # tiles overhang the grid at its end: the first slot of each patch is its own
    side = rows.shape[1], columns.shape[1]
    down, across = (torch.arange(n, device=q.device) for n in grid)
    tile = down[:, None] // side[0] * columns.shape[0] + across // side[1]
    slot = tile * (side[0] * side[1]) + down[:, None] % side[0] * side[1] + across % side[1]
    out, lse = (x.flatten(2, 3).index_select(2, slot.flatten()) for x in branch)
    return out, lse


def near_flops(
    grid: tuple[int, int], radius: tuple[int, int], dim: int, value_dim: int
) -> tuple[int, int]:
    """FLOPs per head of the pairs in all neighbourhoods, and those that tiles spend on top."""
    pairs, spent = 1, 1
    for length, reach in zip(grid, radius, strict=True):
        pairs *= sum(min(i + reach, length - 1) - max(i - reach, 0) + 1 for i in range(length))
        side, reach = _side(length, reach)
        spent *= -(-length // side) * side * (side + 2 * reach)
    flops = attend_flops(1, pairs, dim, value_dim)
    return flops, attend_flops(1, spent, dim, value_dim) - flops


def _side(length: int, reach: int) -> tuple[int, int]:
    """Side of a tile, and how far it reads beyond: sides that keep frames and waste small."""
    reach = min(reach, length - 1)
    return reach + 1, reach


def _tiles(length: int, reach: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """One side of the grid in tiles: positions [tiles, side], positions of the keys that they read
    [tiles, frame], and which of these are near [tiles, side, frame].
    """
    side, reach = _side(length, reach)
    start = torch.arange(-(-length // side), device=device)[:, None] * side
    own = start + torch.arange(side, device=device)
    frame = start - reach + torch.arange(side + 2 * reach, device=device)
    near = (frame[:, None, :] - own[:, :, None]).abs() <= reach
    near = near & ((frame >= 0) & (frame < length))[:, None, :]
    return own.clamp(max=length - 1), frame.clamp(0, length - 1), near
