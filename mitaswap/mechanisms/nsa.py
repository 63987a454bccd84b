"""Native sparse attention: averages of blocks for the whole, chosen blocks and a neighbourhood for
the detail, under learned gates (Yuan et al. 2025).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mitaswap.mechanisms._base import MECHANISMS, Mechanism, Options
from mitaswap.mechanisms._card import Card, Cost, Routing, SiteShape
from mitaswap.operators.blocks import expert_blocks
from mitaswap.operators.branch_maps import BranchMaps, branch_gates
from mitaswap.operators.compress import BlockMap
from mitaswap.operators.counting import attend_flops, product_flops
from mitaswap.operators.experts import Branch, attend, attend_experts, merge
from mitaswap.operators.importance import attend_and_pick
from mitaswap.operators.neighbourhood import attend_near, near_flops
from mitaswap.operators.precision import outside_autocast, working
from mitaswap.operators.ranges import in_range, odd
from mitaswap.operators.routed import special_flops, special_routing
from mitaswap.operators.select import best_with
from mitaswap.operators.spans import Spans, spans
from mitaswap.operators.special import join, split
from mitaswap.operators.windows import Windows, cut, ragged_size, runs
from mitaswap.spec import Value
from mitaswap.tokens import TokenLayout

#: for the 14 x 14 patches of a ViT, which the paper's sizes exceed
_SMALL: dict[str, Value] = {
    "block": 4, "k": 6, "span": 3, "stride": 2, "window": 5, "blocks": "windows",
}  # fmt: skip


@dataclass(frozen=True)
class NsaOptions(Options):
    """Options of native sparse attention. The defaults are the paper's sizes, as the sides of the
    nearest squares, for thousands of tokens. For a ViT's 14 x 14 patches there is
    `nsa(block=4,k=6,span=3,stride=2,window=5,blocks=windows)`, which nearly keeps the paper's
    proportions of compressed blocks, their distances and selected ones, 8 : 4 : 16: squares of 3 x
    3 patches, 2 apart along each axis, and of 4 x 4 are 9 : 4 : 16.

    Args:
        block: side of the selected blocks, of block * block patches, l' in the paper (64 tokens).
        k: blocks that each query selects.
        window: side of the neighbourhood around each query, an odd number (the paper's are the
            last 512 tokens; here 23 * 23, half of them behind).
        blocks: `raster`: runs of block * block patches in raster order, compressed ones of span *
            span, stride * stride apart, and a neighbourhood of window * window patches, before and
            behind; or all of them square `windows` of the grid.
        span: side of the blocks that are compressed, l (32 tokens: 6 * 6).
        stride: from one of these to the next, d (16 tokens: 4 * 4), along each axis of the grid
            with windows; equal to span, they do not overlap.
        compress: how a block becomes one key and one value: `mlp` adds a learned MLP with
            intra-block positions (the paper) to the average, `mean` is the average.
        first: number of initial blocks, row by row, that are always among the k of every query (1
            in the paper, the beginning of the text).
        local: number of local blocks that are always among them: 1 is the query's own, 2 (the
            paper) also the one before it, row by row, and so on. A block that is both initial and
            local counts once.
        choice: `per-head`; `shared` sums the importance of blocks over all heads, as the paper does
            in a group of heads that share their keys.
        projections: `branch`: each branch reads keys and values of its own (the paper), learned
            maps of the site's that start as identity; `site`: all read the site's, which are all
            that a trained network has, and saves six maps of all tokens.
    """

    block: int = 8
    k: int = 16
    window: int = 23
    blocks: Literal["raster", "windows"] = "raster"
    span: int = 6
    stride: int = 4
    compress: Literal["mlp", "mean"] = "mlp"
    first: int = 1
    local: int = 2
    choice: Literal["per-head", "shared"] = "per-head"
    projections: Literal["site", "branch"] = "branch"


@MECHANISMS.register("nsa")
class Nsa(Mechanism):
    """o = g_cmp Attn(q, K~cmp, V~cmp) + g_slc Attn(q, K~slc, V~slc) + g_win Attn(q, K~win, V~win).

    Compressed, phi makes one key and one value of each span of patches; spans overlap if their
    stride is smaller. Selected, a query reads all patches of k blocks, which tile the grid: `first`
    initial ones, `local` ones, and the most important others. The window holds the patches around
    the query. Gates are sigmoids of the module's input x, one for each query, head and branch, 1/3
    at the start. No gradient goes through the choice.

    The importance of a block is the weight of the spans in the compressed branch, each times the
    part of it that lies in the block. For d | l and d | l' that is d / l, in 2-D its square, times
    Eq. 9, p_slc[j] = sum_{m < l' / d} sum_{n < l / d} p_cmp[j l' / d - m - n], j counted from 1:
    p_cmp of a span counts once for each stride of patches that it shares with block j, here along
    both axes. For l = d = l' it is p_cmp itself. Where sizes do not divide a side, spans, and
    blocks, differ by a patch, so that every patch is in some.

    Special tokens as keys are in all three branches, uncompressed; as queries they attend to all N
    keys by plain softmax, without gates. Nothing is causal. Queries, and what special queries read,
    are the site's also with `projections=branch`.

    Parameters:
        gate_weight, gate_bias: [3 H, C] and [3 H], zero; g = sigmoid(x W^T + b - ln 2), row 3 h + c
            for head h and branch c (compressed, selected, window).
        key_map, value_map: phi of keys and of values, shared by all heads (`BlockMap`).
        key_projections, value_projections: of the three branches (`BranchMaps`), of H D and H Dv
            channels. Only with `projections=branch`.
    """

    options_type = NsaOptions
    options: NsaOptions
    card = Card(
        strategy="compression & routing",
        expert_type="block MLP",
        expert_count="N / block^2 (+2)",
        construction="locality prior",
        topology="N-to-blocks",
        source="Yuan et al. 2025, arXiv 2502.11089, Eq. 5-12",
        cost="N (N / stride^2 + k block^2 + window^2) d",
        untrained="usable",
    )
    samples = (
        {**_SMALL, "k": 4, "block": 3},
        {**_SMALL, "k": 5, "block": 2, "span": 2, "stride": 2},
        {**_SMALL, "k": 3, "block": 2, "span": 4, "first": 0, "local": 1, "projections": "site"},
        {**_SMALL, "block": 3, "k": 2, "window": 3, "blocks": "raster", "first": 0, "local": 0,
         "span": 2},
        {**_SMALL, "block": 3, "k": 4, "compress": "mean", "choice": "shared", "window": 7,
         "stride": 3},
        {**_SMALL, "block": 2, "k": 6, "first": 2, "local": 3, "blocks": "raster",
         "projections": "site", "span": 2, "stride": 1},
    )  # fmt: skip
    needs = frozenset({"grid", "x"})
    gate_weight: nn.Parameter
    gate_bias: nn.Parameter
    key_map: BlockMap
    value_map: BlockMap
    key_projections: BranchMaps
    value_projections: BranchMaps

    @property
    def routes(self) -> bool:
        return True

    @property
    def traits(self) -> frozenset[str]:  # type: ignore[override]
        held = {"linear", "averages", "convex", "scaled", "special-set"}
        return frozenset(held if self.options.choice == "shared" else held | {"heads"})

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        o = self.options
        if self.site is None:  # once they are built, blocks follow the grid
            self._check_blocks(layout)
        side = max(*layout.grid, *self._built(layout).grid)
        odd(self, "window", o.window, side, ", with the query in its middle")

    def _check_blocks(self, layout: TokenLayout) -> None:
        o, at, most = self.options, f"(tokens {layout})", max(layout.grid)
        if o.blocks == "raster":
            most = math.isqrt(layout.patches - 1) + 1
        fits = min(max(1, o.stride), most), most
        in_range(self, "span", o.span, 1, most, f"patches a side {at}", fits)
        in_range(self, "stride", o.stride, 1, o.span, "patches of a span, or some are in none")
        if not 1 <= o.block <= 4:  # the others are to blame where blocks are small
            # as many blocks as k, first and local ask for, if there can be that many
            need = max(1, o.k, o.first + o.local)
            need = need if need <= layout.patches else 1
            sides = range(1, most + 1)
            most = max(side for side in sides if math.prod(self._cut(layout, side)[1]) >= need)
            of = f"patches a side that leave {need} block{'s' * (need > 1)} {at}"
            in_range(self, "block", o.block, 1, most, of)
        count = math.prod(self._cut(layout)[1])
        read = min(o.k, count)  # local and first that are too many shall fit in
        fits = 0, max(0, read - o.first)
        in_range(self, "local", o.local, 0, count, f"blocks {at}", fits)
        of, fits = f"blocks beside the local ones {at}", (0, max(0, read - o.local))
        in_range(self, "first", o.first, 0, count - o.local, of, fits)
        of = f"blocks, and no fewer than first + local, which it counts {at}"
        in_range(self, "k", o.k, max(1, o.first + o.local), count, of)

    @classmethod
    def suggest(cls, layout: TokenLayout) -> dict[str, Value]:
        o = NsaOptions
        read = o.k * o.block**2 + o.window**2 + layout.patches // o.stride**2
        if layout.patches >= 2 * read:
            return {}
        # blocks of 4 x 4 and of 2 x 2 patches, for the 6 of them that _SMALL selects
        many, few = (math.prod(-(-n // side) for n in layout.grid) for side in (4, 2))
        if many > 6:
            return _SMALL
        least = {**_SMALL, "block": 2, "span": 2}
        if few < o.first + o.local:
            return {**least, "k": few, "first": 0, "local": 1}
        # on the smallest grids one that the query chooses
        return least if few > 6 else {**least, "k": min(few, o.first + o.local + 1)}

    def build(self, site: SiteShape) -> None:
        self.gate_weight = nn.Parameter(torch.zeros(3 * site.heads, site.width))
        self.gate_bias = nn.Parameter(torch.zeros(3 * site.heads))
        if self.options.compress == "mlp":
            side = self.options.span
            raster = (1, side**2) if self.options.blocks == "raster" else (side, side)
            self.key_map = BlockMap(raster, site.head_dim)
            self.value_map = BlockMap(raster, site.value_dim)
        if self.options.projections == "branch":
            self.key_projections = BranchMaps(3, site.heads * site.head_dim)
            self.value_projections = BranchMaps(3, site.heads * site.value_dim)

    def cost(self, site: SiteShape) -> Cost:
        o, layout, d, dv = self.options, site.layout, site.head_dim, site.value_dim
        patches, (grid, shape) = layout.patches, self._cut(layout)
        count, (size, ragged) = math.prod(shape), ragged_size(grid, shape)
        small, slots = (
            math.prod(n) for n in (self._spans(layout).shape, self._spans(layout).raster)
        )
        flops = product_flops(patches, site.width, 3)  # gates
        if o.compress == "mlp":
            flops += sum(product_flops(small, (slots + 1) * n, n) for n in (d, dv))
        flops += attend_flops(patches, small, d, dv) + special_flops(layout, d, dv)
        if o.projections == "branch":
            tokens = layout.tokens
            flops += 3 * site.heads * sum(product_flops(tokens, n, n) for n in (d, dv))
            flops += 2 * attend_flops(patches, tokens - patches, d, dv)  # not once for all branches
        # a block holds patches / count keys on average: which blocks are chosen decides the rest
        k = self._read(layout)[0]
        read = attend_flops(patches, patches * k, d, dv) // count
        blocks, block = expert_blocks(patches, count)
        padding = k * attend_flops(blocks * block, size, d + ragged, dv) - read
        near, beside = near_flops(grid, self._radius, d, dv)
        return self._cost(site, flops + read + near, small * (d + dv), padding + beside)

    def _read(self, layout: TokenLayout) -> tuple[int, int, int]:
        """Blocks that a query reads, and of these the initial and the local ones: as the options
        say, or fewer on later grids that have fewer.
        """
        o, count = self.options, math.prod(self._cut(layout)[1])
        k, local = min(o.k, count), min(o.local, count)
        return k, min(o.first, k - local), local

    @property
    def _radius(self) -> tuple[int, int]:
        side = self.options.window
        return (0, side * side // 2) if self.options.blocks == "raster" else (side // 2, side // 2)

    def _cut(self, layout: TokenLayout, side: int = 0) -> tuple[tuple[int, int], tuple[int, int]]:
        """The grid that is cut, and the shape of the cut into blocks of `side` (0: as the options
        say): a raster is a grid of one row.
        """
        side = side or self.options.block
        if self.options.blocks == "raster":
            return (1, layout.patches), (1, -(-layout.patches // side**2))
        return layout.grid, (-(-layout.grid[0] // side), -(-layout.grid[1] // side))

    def _windows(self, layout: TokenLayout, device: torch.device) -> Windows:
        a, b = self._cut(layout)[1]
        raster = self.options.blocks == "raster"
        return runs(layout, b, device) if raster else cut(layout, (a, b), device)

    def _spans(self, layout: TokenLayout) -> Spans:
        """The compressed blocks."""
        o, power = self.options, 2 if self.options.blocks == "raster" else 1
        return spans(self._cut(layout)[0], o.span**power, o.stride**power)

    def _branches(self, x: Tensor, part: Literal["key", "value"]) -> list[Tensor]:
        """Keys or values x [B, H, N, D] of the compressed, the selected and the window branch."""
        maps: BranchMaps | None = getattr(self, f"{part}_projections", None)
        return [x, x, x] if maps is None else maps(x)

    def _compress(self, x: Tensor, part: str, layout: TokenLayout) -> Tensor:
        """One token for each span of x [B, H, N, D]: [B, H, M, D]."""
        cut = self._spans(layout)
        slots = cut.slots(layout, x.device)
        if self.options.compress == "mean":
            return slots.means(x)
        learned: BlockMap = getattr(self, part)
        return learned(x, slots, cut.raster)

    def _probe(
        self, q: Tensor, keys: Tensor, values: Tensor, layout: TokenLayout, scale: float
    ) -> tuple[Branch, Tensor]:
        """The compressed branch of patch queries [B, H, P, D], and the blocks that they choose,
        best first: [B, H, P, k].
        """
        small, shape = self._spans(layout), self._cut(layout)[1]
        k, first, local = self._read(layout)
        fixed = self._windows(layout, q.device).fixed(first, local)

        def pick(rows: slice, weights: Tensor) -> Tensor:
            if self.options.choice == "shared":
                weights = weights.sum(dim=1, keepdim=True)
            importance = small.shared_out(weights, shape)
            return best_with(importance, fixed[rows], k).expand(-1, q.shape[1], -1, -1)

        return attend_and_pick(q, keys, values, scale, pick)

    @outside_autocast
    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Tensor:
        dtype = q.dtype
        q, k, v = (x.contiguous() for x in working(q, k, v))
        windows = self._windows(layout, q.device)
        queries, special = split(q, layout)
        keys, values = self._branches(k, "key"), self._branches(v, "value")

        small = self._compress(keys[0], "key_map", layout)
        small_values = self._compress(values[0], "value_map", layout)
        whole, chosen = self._probe(queries, small, small_values, layout, scale)
        rows, blocks = windows.flag(queries, windows.split(keys[1]))
        held = windows.split(values[1])
        picked = [attend_experts(rows, blocks, held, index, scale) for index in chosen.unbind(-1)]
        near_keys, near_values = split(keys[2], layout)[0], split(values[2], layout)[0]
        grid, radius = self._cut(layout)[0], self._radius
        near = attend_near(queries, near_keys, near_values, grid, radius, scale)

        x = split(extra["x"], layout)[0].to(q.dtype)
        gates = branch_gates(x, self.gate_weight, self.gate_bias, 3)  # [B, H, P, 3]
        out = torch.zeros_like(near[0])
        seen: list[Branch] = []
        for number, branches in enumerate(([whole], picked, [near])):
            if special.shape[2] and (number == 0 or self.options.projections == "branch"):
                own, held = (split(x[number], layout)[1] for x in (keys, values))
                seen = [attend(queries, own, held, scale)]
            out = out + gates[..., number, None] * merge([*branches, *seen])[0]
        return join(out, attend(special, k, v, scale)[0], layout).to(dtype)

    @outside_autocast
    def route(self, q: Tensor, k: Tensor, *, layout: TokenLayout, scale: float) -> Routing | None:
        if self.site is None:
            return self._twin(q, layout).route(q, k, layout=layout, scale=scale)
        q, k = (x.contiguous() for x in working(q, k))
        windows = self._windows(layout, q.device)
        small = self._compress(self._branches(k, "key")[0], "key_map", layout)
        _, chosen = self._probe(split(q, layout)[0], small, small, layout, scale)
        members = windows.index.masked_fill(~windows.inside, -1).expand(*q.shape[:2], -1, -1)
        return Routing(*special_routing(members, chosen, layout))
