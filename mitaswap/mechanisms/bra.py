"""Bi-level routing attention: regions of the image choose regions, and their patches read all
patches of those (BiFormer, Zhu et al. 2023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mitaswap.mechanisms._base import MECHANISMS, Mechanism, Options
from mitaswap.mechanisms._card import Card, Cost, Routing, SiteShape
from mitaswap.operators.counting import attend_flops, product_flops
from mitaswap.operators.experts import Branch, attend_blocks
from mitaswap.operators.pool import nearest_count, pool_shape
from mitaswap.operators.precision import outside_autocast, working
from mitaswap.operators.ranges import in_range
from mitaswap.operators.routed import special_flops, special_routing, with_special
from mitaswap.operators.select import best_indices
from mitaswap.operators.windows import Windows, cut, ragged_size
from mitaswap.spec import Value
from mitaswap.tokens import TokenLayout


@dataclass(frozen=True)
class BraOptions(Options):
    """Options of bi-level routing attention; the defaults are those of BiFormer's third stage,
    whose grid is a ViT's 14 x 14.

    Args:
        n: number of regions (the paper's S^2).
        k: regions that each region reads.
        pool: regions as `AxB`; `auto` chooses the most square ones.
        graph: `shared` routes all heads alike, by the affinity over the full width (the paper);
            `per-head` gives every head its own choice of regions.
        scale: `site` scales logits as the site does, by 1 / sqrt(d) of one head's width (the
            paper); `width` divides that by sqrt(H): 1 / sqrt(C) of the width C = H d of all heads,
            as in the released code.
    """

    n: int = 49
    k: int = 16
    pool: str = "auto"
    graph: Literal["shared", "per-head"] = "shared"
    scale: Literal["site", "width"] = "site"


@MECHANISMS.register("bra")
class Bra(Mechanism):
    """A^r = Q^r K^r^T over region means, I^r = top-k of its rows, o(q) = softmax over the keys of
    the k regions that q's own region chose.

    Regions are disjoint windows, one row or column smaller than others where the grid does not
    divide. No gradient goes through the choice. Special tokens are in no region: as keys they are
    in every query's softmax, as queries they read all keys. The output is softmax attention at k =
    n. The paper's module is bra+dwc(kernel=5), that of the released code
    bra(scale=width)+dwc(kernel=5).
    """

    options_type = BraOptions
    options: BraOptions
    card = Card(
        strategy="routing",
        expert_type="block MLP",
        expert_count="n",
        construction="locality prior",
        topology="N-to-blocks",
        source="Zhu et al. 2023 (BiFormer), arXiv 2303.08810, Eq. 3-7",
        cost="n^2 d + N (N / n) k d",
        untrained="usable",
    )
    limits = (("bra(n=9,k=9)", "standard"),)
    paper = "bra+dwc(kernel=5)"
    samples = (
        {"n": 16, "k": 3},
        {"n": 12, "k": 2, "graph": "per-head"},
        {"n": 20, "k": 3, "pool": "4x5"},
        {"n": 16, "k": 2, "graph": "per-head", "scale": "width"},
        {"n": 9, "k": 9},
    )
    needs = frozenset({"grid"})
    axes = (("N", "n"),)

    @property
    def routes(self) -> bool:
        return True

    @property
    def traits(self) -> frozenset[str]:  # type: ignore[override]
        held = {"linear", "averages", "convex", "scaled", "special-set"}
        every = self.options.k == self.options.n  # all regions are read: softmax attention
        if every:
            held |= {"key-set", "pointwise", "mirror", "every-pair"}
        if self.options.scale == "site":  # the other one depends on the number of heads
            held |= {"routed-softmax"}
            held |= {"heads"} if every or self.options.graph == "per-head" else set()
        return frozenset(held)

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        o, grid, patches = self.options, layout.grid, layout.patches
        # too few for k as well
        fits = (nearest_count(o.k, grid, o.k), patches) if o.n < 1 else None
        in_range(self, "n", o.n, 1, patches, f"patches (tokens {layout})", fits)
        pool_shape(o.n, grid, o.pool, asker=self, what="windows", least=o.k)
        in_range(self, "k", o.k, 1, o.n, f"regions (n) (tokens {layout})")

    @classmethod
    def suggest(cls, layout: TokenLayout) -> dict[str, Value]:
        height, width = layout.grid
        if min(height, width) >= 7:
            return {}
        n = min(height, 7) * min(width, 7)
        return {"n": n, "k": -(-n * BraOptions.k // BraOptions.n)}

    def cost(self, site: SiteShape) -> Cost:
        o, layout, d, dv = self.options, site.layout, site.head_dim, site.value_dim
        size, ragged = ragged_size(layout.grid, pool_shape(o.n, layout.grid, o.pool))
        routing, special = product_flops(o.n, d, o.n), special_flops(layout, d, dv)
        # a region holds patches / n keys on average: which regions are read decides the rest
        read = attend_flops(layout.patches, layout.patches * o.k, d, dv) // o.n
        spent = o.n * attend_flops(size, o.k * size, d + ragged, dv)
        between = 2 * o.n * d
        return self._cost(site, routing + read + special, between, padding=spent - read)

    def _windows(self, layout: TokenLayout, device: torch.device) -> Windows:
        shape = pool_shape(self.options.n, layout.grid, self.options.pool)
        return cut(layout, shape, device)

    def _graph(self, q: Tensor, k: Tensor, windows: Windows) -> Tensor:
        """The k regions that each region reads, best first: [B, H, n, k]."""
        regions = (windows.means(x.detach()) for x in (q, k))
        queries, keys = regions
        affinity = queries @ keys.transpose(-1, -2)
        if self.options.graph == "shared":  # the inner product over all heads' features
            affinity = affinity.sum(dim=1, keepdim=True)
        chosen = best_indices(affinity, self.options.k)
        return chosen.expand(-1, q.shape[1], -1, -1)

    def branch(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Branch:
        if self.options.scale == "width":
            scale = scale / math.sqrt(q.shape[1])
        windows = self._windows(layout, q.device)
        chosen = self._graph(q, k, windows)
        queries, keys = windows.flag(windows.split(q), windows.split(k))
        out, lse = attend_blocks(queries, keys, windows.split(v), chosen, scale)
        branch = windows.join(out), windows.join(lse)
        return with_special(q, k, v, [branch], layout, scale)

    @outside_autocast
    def route(self, q: Tensor, k: Tensor, *, layout: TokenLayout, scale: float) -> Routing | None:
        q, k = (x.contiguous() for x in working(q, k))
        windows = self._windows(layout, q.device)
        members = windows.index.masked_fill(~windows.inside, -1).expand(*q.shape[:2], -1, -1)
        choice = self._graph(q, k, windows).index_select(2, windows.owner)
        return Routing(*special_routing(members, choice, layout))
