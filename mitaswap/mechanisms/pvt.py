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
from mitaswap.operators.ranges import in_range
from mitaswap.operators.special import split
from mitaswap.tokens import TokenLayout


@dataclass(frozen=True)
class PvtOptions(Options):
    """Options of spatial-reduction attention.

    Args:
        reduction: `conv` reduces windows of r x r patches by a learned strided convolution (PVT);
            `pool` averages the grid to size x size entries, without parameters (PVTv2's linear
            attention, as its paper has it); `pool-conv` maps the averages by a learned 1 x 1
            convolution, norms them and takes the GELU (its released code).
        r: side of the windows of `conv`; 2 as in PVT's stage of 14 x 14 patches.
        size: side of the pooled map of `pool` and `pool-conv`.
        mix: `width` reduces the channels of all heads together, as the paper; `head` each head's
            among themselves, at 1 / H of the parameters and operations.
        norm: layer norm of what `conv` and `pool-conv` map, over the channels that `mix` takes
            together: the paper's Norm in SR. `false` serves pretrained weights, whose scores and
            values it would all change. Bare averages (`pool`) have none.
    """

    reduction: Literal["conv", "pool", "pool-conv"] = "conv"
    r: int = 2
    size: int = 7
    mix: Literal["width", "head"] = "width"
    norm: bool = True


@MECHANISMS.register("pvt")
class Pvt(Mechanism):
    """O = softmax(Q [K_S; SR(K_P)]^T scale) [V_S; SR'(V_P)], SR(X) = Norm(Reshape(X, r) W / cells).

    Reshape lays the r x r patches of a window (row by row) and their channels, the last index, in
    one row of r r D numbers. The paper reduces the module's input and projects it to keys and
    values afterwards; a mechanism is handed the projections, so here the reduction follows them,
    and K and V have a W and a Norm each. Behind the projections Norm changes every score and every
    value of a pretrained network; norm=false leaves it out.

    With pooling SR(X) is the average of each adaptive window, or, as PVTv2's code has it,
    GELU(Norm(average W)).

    Where r does not divide a side, windows at the bottom and right edge are smaller: their missing
    patches count as zeros, and `cells`, r^2 elsewhere, is the number of those that are there.
    Special tokens (subscript S) are entries of their own, never normed, and every query reads all
    entries.

    Parameters (W / r^2 are the weights of a strided convolution):
        key_reduction: W, [1, r r H D, H D], or [H, r r D, D] for mix=head; an identity for each
            patch of the window, so that SR starts as the average. pool-conv has r = 1, pool none.
        key_norm_weight, key_norm_bias: of Norm, [1, H D], or [H, D] for mix=head; 1 and 0. Not
            with norm=false or reduction=pool.
        value_reduction, value_norm_weight, value_norm_bias: the same for values.
    """

    options_type = PvtOptions
    options: PvtOptions
    card = Card(
        strategy="compression",
        expert_type="MLP",
        expert_count="1 shared",
        construction="learnable projection",
        topology="all-to-one",
        source="Wang et al. 2021, arXiv 2102.12122, Eq. 2-3; PVTv2: arXiv 2106.13797",
        cost="N^2 d / r^2",
        untrained="needs finetuning",
    )
    limits = (
        ("pvt(r=1,norm=false)", "standard"),
        ("pvt(reduction=pool,size=7)", "linformer(n=49)"),
    )
    samples = (
        {"r": 3},
        {"r": 3, "norm": False},
        {"r": 4, "mix": "head", "norm": False},
        {"reduction": "pool", "size": 4},
        {"reduction": "pool-conv", "size": 4, "mix": "head"},
    )
    needs = frozenset({"grid"})

    @property
    def traits(self) -> frozenset[str]:  # type: ignore[override]
        o, held = self.options, {"scaled", "special-set"}
        if not self._norms and o.reduction != "pool-conv":
            held |= {"linear", "averages", "convex"}
        if not self._norms or o.mix == "head":
            held |= {"heads"}
        if o.reduction != "conv":
            held |= {"mirror"}
        elif o.r == 1:  # softmax attention, until it is trained
            held |= {"mirror", "every-pair"} | (set() if self._norms else {"key-set", "pointwise"})
        return frozenset(held)

    @property
    def _norms(self) -> bool:
        return self.options.norm and self.options.reduction != "pool"

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        o, side = self.options, min(layout.grid)
        if self.site is None:  # once it is built, windows follow the grid
            # the option that is not in use may be the default on any grid
            conv, of = o.reduction == "conv", f"(tokens {layout})"
            small = side if conv else max(side, PvtOptions.r)
            in_range(self, "r", o.r, 1, small, f"patches along the grid's smaller side {of}")
            large, least = max(*layout.grid, PvtOptions.size), PvtOptions.size
            of = f"patches along the grid's longer side, or {least} on smaller grids {of}"
            in_range(self, "size", o.size, 1, large, of)

    def build(self, site: SiteShape) -> None:
        o, heads = self.options, site.heads
        for part, dim in (("key", site.head_dim), ("value", site.value_dim)):
            groups, channels = (heads, dim) if o.mix == "head" else (1, heads * dim)
            start = {}
            if o.reduction != "pool":
                cells = o.r**2 if o.reduction == "conv" else 1
                start["reduction"] = torch.eye(channels).repeat(groups, cells, 1)
            if self._norms:
                start["norm_weight"] = torch.ones(groups, channels)
                start["norm_bias"] = torch.zeros(groups, channels)
            for name, value in start.items():
                self.register_parameter(f"{part}_{name}", nn.Parameter(value))

    def _windows(self, layout: TokenLayout) -> tuple[int, int]:
        """Rows and columns of windows, so of reduced entries."""
        height, width = layout.grid
        o = self.options
        if o.reduction != "conv":
            return min(o.size, height), min(o.size, width)
        return -(-height // o.r), -(-width // o.r)

    def cost(self, site: SiteShape) -> Cost:
        o, layout, d, dv = self.options, site.layout, site.head_dim, site.value_dim
        rows, columns = self._windows(layout)
        reduced = rows * columns
        entries = reduced + layout.tokens - layout.patches
        flops, padding = attend_flops(layout.tokens, entries, d, dv), 0
        if o.reduction != "pool":
            inner = site.heads if o.mix == "width" else 1
            each = inner * (product_flops(1, d, d) + product_flops(1, dv, dv))
            mapped, slots = reduced, reduced
            if o.reduction == "conv":
                mapped, slots = layout.patches, reduced * o.r**2
            flops += mapped * each
            padding = (slots - mapped) * each
        return self._cost(site, flops, between=reduced * (d + dv), padding=padding)

    def branch(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Branch:
        keys, values = self._entries(k, "key", layout), self._entries(v, "value", layout)
        # there may be N / r^2 entries: all scores at once would be too many on large grids
        return attend_all(q, keys, values, scale)

    def _entries(self, x: Tensor, part: Literal["key", "value"], layout: TokenLayout) -> Tensor:
        """Special tokens of x [B, H, N, D] as they are, then its reduced patches."""
        o, heads = self.options, x.shape[1]
        patches, special = split(x, layout)
        rows = self._cells(patches, layout)
        if o.reduction != "pool":
            weight = getattr(self, f"{part}_reduction").to(x.dtype)
            # one group: a single product of all images' rows, not a batch of them
            rows = rows @ weight if o.mix == "head" else (rows[:, 0] @ weight[0])[:, None]
        if o.reduction == "conv":
            rows = rows / self._counts(layout, x)
        if self._norms:
            gain, bias = (getattr(self, f"{part}_norm_{y}").to(x.dtype) for y in ("weight", "bias"))
            rows = F.layer_norm(rows, rows.shape[-1:]) * gain[:, None] + bias[:, None]
        if o.reduction == "pool-conv":
            rows = F.gelu(rows)
        if o.mix == "width":
            rows = rows[:, 0].unflatten(2, (heads, -1)).transpose(1, 2)
        return torch.cat([special, rows], dim=2)

    def _cells(self, patches: Tensor, layout: TokenLayout) -> Tensor:
        """What becomes an entry each, of patches [B, H, h w, D]: averages, or for `conv` all
        patches of a window beside each other. [B, 1, windows, cells H D], all heads together, or
        [B, H, windows, cells D] for mix=head.
        """
        o, windows = self.options, self._windows(layout)
        if o.reduction != "conv":
            pooled = pool_tokens(patches, 0, layout.grid, windows)
            return pooled if o.mix == "head" else pooled.transpose(1, 2).flatten(2)[:, None]
        # a convolution whose stride is its kernel is a matrix product: exact in the working
        # precision also where convolutions are not
        r, (height, width), (rows, columns) = o.r, layout.grid, windows
        image = patches.unflatten(2, (height, width))
        image = F.pad(image, (0, 0, 0, columns * r - width, 0, rows * r - height))
        cells = image.unflatten(3, (columns, r)).unflatten(2, (rows, r))  # [B, H, a, r, b, r, D]
        if o.mix == "head":
            return cells.permute(0, 1, 2, 4, 3, 5, 6).flatten(4).flatten(2, 3)
        return cells.permute(0, 2, 4, 3, 5, 1, 6).flatten(3).flatten(1, 2)[:, None]

    def _counts(self, layout: TokenLayout, like: Tensor) -> Tensor:
        """Patches in each window of `conv`, [windows, 1]."""
        down, across = (
            (side - self.options.r * torch.arange(count, device=like.device))
            .clamp(max=self.options.r)
            .to(like.dtype)
            for side, count in zip(layout.grid, self._windows(layout), strict=True)
        )
        return (down[:, None] * across).view(-1, 1)
