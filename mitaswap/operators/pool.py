"""Landmark pooling: averages of patch tokens over the windows of an a x b partition of the grid."""

from __future__ import annotations

import math
import re

import torch.nn.functional as F
from torch import Tensor

from mitaswap.errors import MitaswapError
from mitaswap.operators.ranges import Asker
from mitaswap.tokens import TokenLayout


def pool_shape(
    count: int,
    grid: tuple[int, int],
    pool: str = "auto",
    *,
    asker: Asker | None = None,
    what: str = "landmarks",
    least: int = 1,
) -> tuple[int, int]:
    """Rows and columns of windows that partition `grid` into `count` windows.

    Args:
        count: number of windows, one landmark each.
        grid: rows and columns of patches.
        pool: `auto` takes, of all a x b = count that fit, the one whose windows are the most square
            (sqrt(count) squared on a square grid, as in the paper), of two such the one with
            fewer rows; `AxB` asks for that shape.
        asker, what: whose windows these are and what it calls them, for the error.
        least: windows that other options need, for the count that the error names.

    Raises:
        MitaswapError: no such partition; names the nearest count, or a shape, that works.
    """
    height, width = grid
    fitting = [(a, count // a) for a in range(1, min(count, height) + 1) if _fits(count, a, width)]
    if not fitting:
        front = f"{asker.spec}: " if asker else ""
        raise MitaswapError(
            f"{front}{count} {what} do not fit a {height}x{width} grid as a x b windows; "
            f"the nearest count that does is {nearest_count(count, grid, least)}"
        )
    best = fitting[0]
    for a, b in fitting:  # not min(key=...), which torch 2.11 cannot trace at sizes that vary
        if _elongation(height * b, width * a) < _elongation(height * best[1], width * best[0]):
            best = (a, b)
    if pool == "auto":
        return best
    asked = re.fullmatch(r"([0-9]+)x([0-9]+)", pool)
    shape = (int(asked[1]), int(asked[2])) if asked else (0, 0)
    if shape in fitting:
        return shape
    if math.prod(shape) == count:
        problem = f"has more windows than the {height}x{width} grid has rows or columns"
    else:
        problem = f"must be 'auto' or AxB with A * B = {count}"
    front = f"{asker.spec}: " if asker else ""
    raise MitaswapError(f"{front}pool={pool} {problem}; use pool={best[0]}x{best[1]}")


def _elongation(rows: int, columns: int) -> float:
    # one division, rounded the same way everywhere: 2x5 and 5x2 tie, and the first of them wins
    return max(rows, columns) / min(rows, columns)


def _fits(count: int, rows: int, width: int) -> bool:
    return count % rows == 0 and count // rows <= width


def nearest_count(count: int, grid: tuple[int, int], least: int = 1) -> int:
    """The count nearest to `count` of windows that fit the grid, `least` or more if any does."""
    sizes = {a * b for a in range(1, grid[0] + 1) for b in range(1, grid[1] + 1)}
    sizes = {size for size in sizes if size >= least} or sizes
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
