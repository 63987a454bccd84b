"""Windows of the patches that may overlap, and how much of each lies in the windows of a cut."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mitaswap.operators.windows import Slots, crossed, places
from mitaswap.tokens import TokenLayout


@dataclass(frozen=True)
class Axis:
    """Spans of `side` places along one side of a grid, starting `stride` apart.

    Where that does not come out even they are as equal as a cut's windows: all but side - stride
    places are cut into bands, and each span reads that much beyond its band. With stride = side
    they are a cut's windows. Where there are fewer than `side` places, one span holds all.
    """

    length: int
    side: int
    stride: int

    @property
    def beyond(self) -> int:
        """Places that spans read beyond their bands."""
        return min(self.side - self.stride, self.length - 1)

    @property
    def count(self) -> int:
        """Number of spans."""
        return -(-(self.length - self.beyond) // self.stride)

    @property
    def longest(self) -> int:
        """Places of the longest span."""
        return -(-(self.length - self.beyond) // self.count) + self.beyond

    def ends(self, number: Tensor) -> tuple[Tensor, Tensor]:
        """The first place of the spans of these numbers, and the first behind them."""
        band, count = self.length - self.beyond, self.count
        return number * band // count, (number + 1) * band // count + self.beyond

    def places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Places of all spans [count, longest], and which of them are no fillers."""
        return places(*self.ends(torch.arange(self.count, device=device)), self.longest)

    def shares(self, parts: int, like: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For every band of a cut into `parts`, a span that it meets and which part of the span
        lies in it, two [parts]; as often as a band may meet spans, the part being 0 where it meets
        fewer.
        """
        band, count = self.length - self.beyond, self.count
        number = torch.arange(parts, device=like.device)
        start, end = number * self.length // parts, (number + 1) * self.length // parts
        # the first span that ends behind the band's start; spans start band // count apart or more
        first = (-((self.beyond - start - 1) * count // band) - 1).clamp(min=0)
        reach = -(-self.length // parts) + self.longest - 1
        found = []
        for i in range(min(count, -(-reach // (band // count)))):
            index = (first + i).clamp(max=count - 1)
            low, high = self.ends(index)
            part = (torch.minimum(high, end) - torch.maximum(low, start)).clamp(min=0)
            part = part * (first + i < count)
            found.append((index, part.to(like.dtype) / (high - low)))
        return found


@dataclass(frozen=True)
class Spans:
    """Spans of a grid, side x side patches stride x stride apart, numbered row by row."""

    rows: Axis
    columns: Axis

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of spans."""
        return self.rows.count, self.columns.count

    @property
    def raster(self) -> tuple[int, int]:
        """Rows and columns of slots in each."""
        return self.rows.longest, self.columns.longest

    def slots(self, layout: TokenLayout, device: torch.device) -> Slots:
        """Their patches; special tokens are in none."""
        rows, columns = self.rows.places(device), self.columns.places(device)
        ragged = any(
            bool((axis.length - axis.beyond) % axis.count) for axis in (self.rows, self.columns)
        )
        return Slots(*crossed(layout.prefix, self.columns.length, rows, columns), ragged=ragged)

    def shared_out(self, weights: Tensor, shape: tuple[int, int]) -> Tensor:
        """Weights of the spans, [..., spans], as weights of the windows of a cut, [..., windows]:
        each span's is spread evenly over its patches, and a window gets the sum of its own.

        Args:
            weights: of the spans.
            shape: rows and columns of windows of the cut.
        """
        whole = weights.unflatten(-1, self.shape)
        rows, columns = (
            axis.shares(parts, weights)
            for axis, parts in zip((self.rows, self.columns), shape, strict=True)
        )
        zero = torch.zeros((), dtype=weights.dtype, device=weights.device)
        whole = sum((whole.index_select(-1, at) * share for at, share in columns), zero)
        pieces = (whole.index_select(-2, at) * share[:, None] for at, share in rows)
        return sum(pieces, zero).flatten(-2)


def spans(grid: tuple[int, int], side: int, stride: int) -> Spans:
    """Spans of a grid of h x w patches; a grid of one row has spans along it alone.

    Args:
        grid: (h, w).
        side, stride: in patches, 1 <= stride <= side.
    """
    height, width = grid
    return Spans(Axis(height, side, stride), Axis(width, side, stride))
