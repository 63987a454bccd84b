"""Learned tables with one entry for each patch: where they start, and how they follow the grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def down_and_up(
    grid: tuple[int, int], shape: tuple[int, int], special: int, tied: bool
) -> dict[str, Tensor]:
    """Tables, on the CPU, that take tokens to the A x B windows that cut the grid, and back.

    Args:
        grid: of the patches.
        shape: A x B.
        special: number of special tokens; 0 leaves their tables away.
        tied: one table for both ways: `up` with rows that are divided by their sums.

    Returns:
        down [A * B, patches], means over the windows; up, how near each patch is to each window, a
        Gaussian of half a window's width that sums to one over the windows; for special tokens
        down_special [A * B, special], zero, and up_special, one.
    """
    windows, patches = shape[0] * shape[1], grid[0] * grid[1]
    rows, columns = (_nearness(*side) for side in zip(grid, shape, strict=True))
    up = (rows[:, None, :, None] * columns[None, :, None, :]).reshape(windows, patches).float()
    ones = torch.ones(windows, special, device="cpu")
    if tied:
        total = up.sum(dim=1, keepdim=True) + special
        tables = {"down": up / total, "down_special": ones / total}
    else:
        # side by side: no patches x patches matrix
        rows, columns = (_mean(*side) for side in zip(grid, shape, strict=True))
        down = rows[:, None, :, None] * columns[None, :, None, :]
        down = down.reshape(windows, patches).float().contiguous()
        tables = {"down": down, "up": up, "down_special": 0 * ones, "up_special": ones}
    return {name: table for name, table in tables.items() if table.numel()}


def _mean(length: int, windows: int) -> Tensor:
    """Weight of each of `length` positions in the mean of each of the windows that cut a side:
    [windows, length].
    """
    each = torch.eye(length, device="cpu", dtype=torch.float64)[:, None]
    return F.adaptive_avg_pool1d(each, windows)[:, 0].T


def _nearness(length: int, windows: int) -> Tensor:
    """How near each of `length` positions is to each of the windows that cut a side: [windows,
    length].
    """
    position = (torch.arange(length, device="cpu", dtype=torch.float64) + 0.5) * windows / length
    distance = position - 0.5 - torch.arange(windows, device="cpu")[:, None]
    return (-2 * distance.square()).softmax(dim=0)


def on_grid(table: Tensor, built: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """A table [rows, patches] of the grid `built` as one of `grid`: each row an image, resized
    bilinearly.
    """
    if grid == built:
        return table
    images = table.unflatten(1, (1, *built))
    images = F.interpolate(images, grid, mode="bilinear", align_corners=False)
    return images.flatten(1)
