"""Disjoint windows of the patches: an a x b cut of the grid, or runs of its raster, ragged where
the sides do not divide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mitaswap.tokens import TokenLayout


@dataclass(frozen=True)
class Slots:
    """M windows of at most L patches each, which may overlap.

    A window smaller than the largest has fillers among its L slots: they repeat one of its own
    patches and are marked as not `inside`.

    Args:
        index: token position of every slot, int64 [M, L].
        inside: whether a slot is a patch of its window and no filler, bool [M, L].
        ragged: whether there are fillers at all.
    """

    index: Tensor
    inside: Tensor
    ragged: bool

    @property
    def count(self) -> int:
        """Number of windows, M."""
        return self.index.shape[0]

    @property
    def width(self) -> int:
        """Slots in each window, L."""
        return self.index.shape[1]

    def split(self, x: Tensor) -> Tensor:
        """The windows' rows of x [B, H, N, D], fillers among them: [B, H, M, L, D]."""
        return x.index_select(2, self.index.flatten()).unflatten(2, self.index.shape)

    def means(self, x: Tensor) -> Tensor:
        """Average of each window's patches of x [B, H, N, D]: [B, H, M, D]."""
        rows = self.split(x)
        if not self.ragged:
            return rows.mean(dim=3)
        inside = self.inside.to(x.dtype)
        return (rows * inside[..., None]).sum(dim=3) / inside.sum(dim=1)[:, None]

    def flag(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [..., D] and split keys [B, H, M, L, D] such that no query gives a filler weight.

        One more feature does it, 1 for queries, and for keys 0 or, on fillers, a large negative
        number: it works through any softmax of q k^T and leaves other scores as they are. Without
        fillers q and k come back unchanged.
        """
        if not self.ragged:
            return q, k
        # far below any score, even times a small scale, and far from overflow
        lowest = -(torch.finfo(k.dtype).max ** 0.5)
        column = torch.zeros_like(self.inside, dtype=k.dtype).masked_fill(~self.inside, lowest)
        column = column[..., None].expand(*k.shape[:-1], 1)
        return torch.cat([q, torch.ones_like(q[..., :1])], -1), torch.cat([k, column], -1)


@dataclass(frozen=True)
class Windows(Slots):
    """Windows that together hold every patch exactly once.

    Args:
        owner: window of every patch, in raster order, int64 [patches].
        slot: where every patch sits among the M * L slots, int64 [patches].
    """

    owner: Tensor
    slot: Tensor

    def fixed(self, initial: int, local: int) -> Tensor:
        """Windows that every patch reads whatever its scores: the `initial` first ones, its own and
        the local - 1 before it (the first one again where there are none): int64 [patches, initial
        + local], the same window perhaps twice.
        """
        first = torch.arange(initial, device=self.owner.device)
        back = torch.arange(local, device=self.owner.device)
        own = (self.owner[:, None] - back).clamp(min=0)
        return torch.cat([first.expand(own.shape[0], -1), own], dim=-1)

    def join(self, x: Tensor) -> Tensor:
        """The patches of x [B, H, M, L, D] in raster order, without fillers: [B, H, patches, D]."""
        return x.flatten(2, 3).index_select(2, self.slot)


def cut(layout: TokenLayout, shape: tuple[int, int], device: torch.device) -> Windows:
    """The a x b windows of the grid, numbered and read row by row.

    Band i of a spans rows floor(i h / a) up to floor((i + 1) h / a): sizes differ by one at most.

    Args:
        layout: token layout; special tokens are in no window.
        shape: (a, b), rows and columns of windows, at most as many as the grid has.
        device: of the index tensors.
    """
    return _cut(layout, layout.grid, shape, device)


def runs(layout: TokenLayout, count: int, device: torch.device) -> Windows:
    """`count` runs of consecutive patches of the raster; run i spans patches floor(i P / count) up
    to floor((i + 1) P / count) of P.
    """
    return _cut(layout, (1, layout.patches), (1, count), device)


def ragged_size(grid: tuple[int, int], shape: tuple[int, int]) -> tuple[int, bool]:
    """Slots L of each window of a cut, and whether there are fillers: what costs depend on."""
    (height, width), (a, b) = grid, shape
    size = -(-height // a) * -(-width // b)
    return size, size * a * b != height * width


def _cut(
    layout: TokenLayout, grid: tuple[int, int], shape: tuple[int, int], device: torch.device
) -> Windows:
    (height, width), (a, b) = grid, shape
    rows, row_inside, band, row_slot = _bands(height, a, device)
    columns, column_inside, stripe, column_slot = _bands(width, b, device)
    tall, wide = rows.shape[1], columns.shape[1]
    index, inside = crossed(layout.prefix, width, (rows, row_inside), (columns, column_inside))
    owner = band[:, None] * b + stripe
    slot = owner * (tall * wide) + row_slot[:, None] * wide + column_slot
    ragged = bool(height % a or width % b)
    return Windows(index, inside, ragged, owner.flatten(), slot.flatten())


def places(start: Tensor, end: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Positions [bands, most] of every band from `start` up to `end`, and which of them are no
    fillers.
    """
    place = torch.arange(most, device=start.device)
    inside = place < (end - start)[:, None]
    return torch.minimum(start[:, None] + place, end[:, None] - 1), inside


def crossed(
    prefix: int, width: int, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """`index` and `inside` of the windows where bands of rows and of columns cross, each given by
    its `places`, on a grid of `width` columns behind `prefix` tokens.
    """
    index = prefix + rows[0][:, None, :, None] * width + columns[0][None, :, None, :]
    inside = rows[1][:, None, :, None] & columns[1][None, :, None, :]
    return index.flatten(2).flatten(0, 1), inside.flatten(2).flatten(0, 1)


def _bands(length: int, parts: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cut one side: positions [parts, most] of every band, which of them are no fillers, and for
    every position its band and its place there.
    """
    number = torch.arange(parts, device=device)
    start, end = number * length // parts, (number + 1) * length // parts
    position, inside = places(start, end, -(-length // parts))
    each = torch.arange(length, device=device)
    band = ((each + 1) * parts - 1) // length  # the last band that starts at or before it
    return position, inside, band, each - band * length // parts
