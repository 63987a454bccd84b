"""Spatial-reduction attention of the Pyramid Vision Transformer: keys and values of r x r patches
become one (Wang et al. 2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mitaswap.mechanisms._base import MECHANISMS, Mechanism, Options
from mitaswap.mechanisms._card import Card, Cost, SiteShape
from mitaswap.operators.chosen import attend_all
from mitaswap.operators.counting import attend_flops, product_flops
from mitaswap.operators.experts import Branch
from mitaswap.operators.pool import pool_tokens
from mitaswap.operators.ranges import at_least, in_range
from mitaswap.operators.special import split
from mitaswap.tokens import TokenLayout


@dataclass(frozen=True)
class PvtOptions(Options):
    """Options of spatial-reduction attention.

    Args:
        reduction: `conv` reduces windows of r x r patches by a learned strided convolution (PVT);
            `pool` averages the grid to size x size entries, without parameters (as PVTv2's linear
            attention, whose 1 x 1 convolution, norm and GELU are not part of it here).
        r: side of the windows of `conv`; 2 as in PVT's stage of 14 x 14 patches.
        size: side of the pooled map of `pool`.
        mix: `width` reduces the channels of all heads together, as the paper; `head` each head's
            among themselves, at 1 / H of the parameters and operations.
    """

    reduction: Literal["conv", "pool"] = "conv"
    r: int = 2
    size: int = 7
    mix: Literal["width", "head"] = "width"


@MECHANISMS.register("pvt")
class Pvt(Mechanism):
    """O = softmax(Q [K_S; SR(K_P)]^T scale) [V_S; SR'(V_P)], SR(X) = Reshape(X, r) W / cells.

    Reshape lays the r x r patches of a window (row by row) and their channels, the last index, in
    one row of r r D numbers. The paper reduces the module's input, norms it, and projects it to
    keys and values afterwards; a mechanism is handed the projections, so here the reduction follows
    them: K and V have a W each, and there is no norm.

    Where r does not divide a side, windows at the bottom and right edge are smaller: their missing
    patches count as zeros, and `cells`, r^2 elsewhere, is the number of those that are there.
    Special tokens (subscript S) are entries of their own, and every query reads all entries.

    Parameters (conv; W / r^2 are the weights of a strided convolution):
        key_reduction: W, [1, r r H D, H D], or [H, r r D, D] for mix=head; an identity for each
            patch of the window, so that SR starts as the average.
        value_reduction: the same for values.
    """

    options_type = PvtOptions
    options: PvtOptions
    card = Card(
        strategy="compression",
        expert_type="MLP",
        expert_count="1 shared",
        construction="learnable projection",
        topology="all-to-one",
        source="Wang et al. 2021, arXiv 2102.12122, Eq. 2-3",
        cost="N^2 d / r^2",
        untrained="usable",
    )
    limits = (("pvt(r=1)", "standard"),)
    samples = (
        {"r": 3},
        {"r": 4, "mix": "head"},
        {"reduction": "pool", "size": 4},
    )
    needs = frozenset({"grid"})

    @property
    def traits(self) -> frozenset[str]:  # type: ignore[override]
        held = {"linear", "averages", "convex", "scaled", "heads", "special-set"}
        if self.options.reduction == "pool":
            held |= {"mirror"}
        elif self.options.r == 1:  # softmax attention, until it is trained
            held |= {"mirror", "key-set", "pointwise", "every-pair"}
        return frozenset(held)

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        o, side = self.options, min(layout.grid)
        if o.reduction == "conv":
            of = f"patches along the grid's smaller side (tokens {layout})"
            in_range(self, "r", o.r, 1, side, of)
        else:
            at_least(self, "size", o.size, 1)

    def build(self, site: SiteShape) -> None:
        if self.options.reduction == "pool":
            return
        self.key_reduction = self._start(site.heads, site.head_dim)
        self.value_reduction = self._start(site.heads, site.value_dim)

    def _start(self, heads: int, dim: int) -> nn.Parameter:
        groups, channels = (heads, dim) if self.options.mix == "head" else (1, heads * dim)
        return nn.Parameter(torch.eye(channels).repeat(groups, self.options.r**2, 1))

    def _windows(self, layout: TokenLayout) -> tuple[int, int]:
        """Rows and columns of windows, so of reduced entries."""
        height, width = layout.grid
        o = self.options
        if o.reduction == "pool":
            return min(o.size, height), min(o.size, width)
        return -(-height // o.r), -(-width // o.r)

    def cost(self, site: SiteShape) -> Cost:
        o, layout, d, dv = self.options, site.layout, site.head_dim, site.value_dim
        rows, columns = self._windows(layout)
        reduced = rows * columns
        entries = reduced + layout.tokens - layout.patches
        flops, padding = attend_flops(layout.tokens, entries, d, dv), 0
        if o.reduction == "conv":
            inner = site.heads if o.mix == "width" else 1
            each = inner * (product_flops(1, d, d) + product_flops(1, dv, dv))
            flops += layout.patches * each
            padding = (reduced * o.r**2 - layout.patches) * each
        return self._cost(site, flops, between=reduced * (d + dv), padding=padding)

    def branch(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Branch:
        keys, values = self._entries(k, "key", layout), self._entries(v, "value", layout)
        # there may be N / r^2 entries: all scores at once would be too many on large grids
        return attend_all(q, keys, values, scale)

    def _entries(self, x: Tensor, part: Literal["key", "value"], layout: TokenLayout) -> Tensor:
        """Special tokens of x [B, H, N, D] as they are, then its reduced patches."""
        patches, special = split(x, layout)
        if self.options.reduction == "pool":
            reduced = pool_tokens(patches, 0, layout.grid, self._windows(layout))
        else:
            weight = self.key_reduction if part == "key" else self.value_reduction
            reduced = self._reduced(patches, weight.to(x.dtype), layout)
        return torch.cat([special, reduced], dim=2)

    def _reduced(self, patches: Tensor, weight: Tensor, layout: TokenLayout) -> Tensor:
        """Patches [B, H, h w, D], each window times `weight`: [B, H, windows, D].

        A convolution whose stride is its kernel is a matrix product: exact in the working
        precision also where convolutions are not.
        """
        r, heads, dim = self.options.r, patches.shape[1], patches.shape[3]
        (height, width), (rows, columns) = layout.grid, self._windows(layout)
        image = patches.unflatten(2, (height, width))
        image = F.pad(image, (0, 0, 0, columns * r - width, 0, rows * r - height))
        cells = image.unflatten(3, (columns, r)).unflatten(2, (rows, r))  # [B, H, a, r, b, r, D]
        if self.options.mix == "head":
            reduced = cells.permute(0, 1, 2, 4, 3, 5, 6).flatten(4).flatten(2, 3) @ weight
        else:
            reduced = cells.permute(0, 2, 4, 3, 5, 1, 6).flatten(3).flatten(1, 2) @ weight[0]
            reduced = reduced.unflatten(2, (heads, dim)).transpose(1, 2)
        down, across = (
            (side - r * torch.arange(count, device=weight.device)).clamp(max=r).to(weight.dtype)
            for side, count in ((height, rows), (width, columns))
        )
        return reduced / (down[:, None] * across).view(-1, 1)
