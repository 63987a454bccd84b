"""Rotary positions: pairs of channels turned by angles that grow with a token's place, on the grid
or in a sequence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mitaswap.operators.sampling import raster
from mitaswap.tokens import TokenLayout


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """x [..., N, D] whose channels (2 i, 2 i + 1) are turned by `angles` [N, P], P <= D / 2; the
    channels after 2 P stay.
    """
    pairs = angles.shape[1]
    one, other = x[..., : 2 * pairs].unflatten(-1, (pairs, 2)).unbind(-1)
    cosine, sine = angles.cos(), angles.sin()
    both = torch.stack([one * cosine - other * sine, one * sine + other * cosine], dim=-1)
    return torch.cat([both.flatten(-2), x[..., 2 * pairs :]], dim=-1)


def axial_angles(layout: TokenLayout, pairs: int, like: Tensor, base: float) -> Tensor:
    """Angles of every token on the grid, [N, 2 * pairs], in `like`'s dtype and on its device.

    Pair i of the first `pairs` turns by row * base^(-i / pairs), pair i of the others by column *
    base^(-i / pairs). Special tokens have no place: their angles are zero.
    """
    steps = torch.arange(pairs, device=like.device).to(like.dtype) / max(pairs, 1)
    rows, columns = raster(layout.grid, like)
    angles = torch.cat([rows[:, None] * base**-steps, columns[:, None] * base**-steps], dim=1)
    return F.pad(angles, (0, 0, layout.prefix, layout.suffix))


def turned_on_grid(x: Tensor, layout: TokenLayout, base: float = 10000.0) -> Tensor:
    """x [B, H, N, D], channels of its heads side by side, turned in pairs by `axial_angles`: half
    of the pairs by row, half by column; channels that make no two equal halves stay.
    """
    heads = x.shape[1]
    side_by_side = x.transpose(1, 2).flatten(2)  # [B, N, H D]
    angles = axial_angles(layout, side_by_side.shape[2] // 4, x, base)
    return turned(side_by_side, angles).unflatten(2, (heads, -1)).transpose(1, 2)


def turned_in_sequence(x: Tensor, places: Tensor, base: float = 10000.0) -> Tensor:
    """x [..., N, D] whose channels (2 i, 2 i + 1) are turned by places[t] * base^(-2 i / D) at
    token t; where D is odd the last channel stays.
    """
    pairs = torch.arange(x.shape[-1] // 2, device=x.device).to(x.dtype)
    return turned(x, places.to(x.dtype)[:, None] * base ** (pairs * (-2.0 / x.shape[-1])))
