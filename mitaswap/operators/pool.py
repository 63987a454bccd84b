"""Landmark pooling: averages of patch tokens over the windows of an a x b partition of the grid."""

from __future__ import annotations

import re

import torch.nn.functional as F
from torch import Tensor

from mitaswap.errors import MitaswapError
from mitaswap.tokens import TokenLayout


def pool_shape(count: int, grid: tuple[int, int], pool: str = "auto") -> tuple[int, int]:
    """Rows and columns of windows that partition `grid` into `count` windows.

    Args:
        count: number of windows, one landmark each.
        grid: rows and columns of patches.
        pool: `auto` takes, of all a x b = count that fit, the one whose windows are the most square
            (sqrt(count) squared on a square grid, as in the paper), of two such the one with
            fewer rows; `AxB` asks for that shape.

    Raises:
        MitaswapError: no such partition; names the nearest count that works.
    """
    height, width = grid
    if pool != "auto":
        shape = re.fullmatch(r"(\d+)x(\d+)", pool)
        if not shape or int(shape[1]) * int(shape[2]) != count:
            raise MitaswapError(
                f"pool={pool} must be 'auto' or AxB with A * B = {count}, for instance "
                f"pool=1x{count}"
            )
        a, b = int(shape[1]), int(shape[2])
        if not (1 <= a <= height and 1 <= b <= width):
            raise MitaswapError(
                f"pool={pool} has more windows than the {height}x{width} grid has rows or columns"
            )
        return a, b
    fitting = [(a, count // a) for a in range(1, min(count, height) + 1) if _fits(count, a, width)]
    if not fitting:
        raise MitaswapError(
            f"{count} landmarks do not fit a {height}x{width} grid as a x b windows; "
            f"the nearest count that does is {_nearest(count, grid)}"
        )
    return min(fitting, key=lambda ab: _elongation(height * ab[1], width * ab[0]))


def _elongation(rows: int, columns: int) -> float:
    # one division, rounded the same way everywhere: 2x5 and 5x2 tie, and the first of them wins
    return max(rows, columns) / min(rows, columns)


def _fits(count: int, rows: int, width: int) -> bool:
    return count % rows == 0 and count // rows <= width


def _nearest(count: int, grid: tuple[int, int]) -> int:
    sizes = {a * b for a in range(1, grid[0] + 1) for b in range(1, grid[1] + 1)}
    return min(sizes, key=lambda size: (abs(size - count), size))


def pool_tokens(x: Tensor, first: int, grid: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Average `x` [B, H, N, D] over windows of the grid that starts at token `first`: [B, H, a * b,
    D].
    """
    batch, heads, _, dim = x.shape
    height, width = grid
    patches = x[:, :, first : first + height * width]
    # adaptive pooling wants channels first; heads fold into the batch
    image = patches.reshape(batch * heads, height, width, dim).permute(0, 3, 1, 2)
    pooled = F.adaptive_avg_pool2d(image, shape)
    return pooled.flatten(2).transpose(1, 2).reshape(batch, heads, shape[0] * shape[1], dim)


def landmarks(q: Tensor, layout: TokenLayout, count: int, pool: str = "auto") -> Tensor:
    """`count` landmark queries: averages of the patch queries (never of prefix tokens), [B, H,
    count, D].
    """
    return pool_tokens(q, layout.prefix, layout.grid, pool_shape(count, layout.grid, pool))
