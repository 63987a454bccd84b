"""Mixture of block attention: each query reads the blocks of keys whose means it scores highest (Lu
et al. 2025).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mitaswap.errors import MitaswapError
from mitaswap.mechanisms._base import MECHANISMS, Mechanism, Options
from mitaswap.mechanisms._card import Card, Cost, Routing, SiteShape
from mitaswap.operators.blocks import expert_blocks
from mitaswap.operators.counting import attend_flops, product_flops
from mitaswap.operators.experts import Branch, attend_experts
from mitaswap.operators.pool import nearest_count, pool_shape
from mitaswap.operators.precision import outside_autocast, working
from mitaswap.operators.ranges import in_range
from mitaswap.operators.routed import special_flops, special_routing, with_special
from mitaswap.operators.select import best_with
from mitaswap.operators.windows import Windows, cut, ragged_size, runs
from mitaswap.spec import Value
from mitaswap.tokens import TokenLayout


@dataclass(frozen=True)
class MobaOptions(Options):
    """Options of MoBA.

    Args:
        n: number of blocks; 16 are the 8,192 tokens of the paper's first models in blocks of 512.
        k: blocks that each query reads; 3 are those models'.
        blocks: `raster` cuts the sequence of patches into runs (the paper); `windows` cuts their
            grid.
        pool: windows as `AxB`; `auto` chooses the most square ones.
        own: whether the block that holds a query is always among its k, as in the paper, for the
            sake of causality and of the local context. `false` leaves all k to the scores of
            pretrained queries and keys.
    """

    n: int = 16
    k: int = 3
    blocks: Literal["raster", "windows"] = "raster"
    pool: str = "auto"
    own: bool = True


@MECHANISMS.register("moba")
class Moba(Mechanism):
    """s_i = q . mean(K_i), o(q) = softmax over the keys of q's own block and the k - 1 others of
    largest s_i.

    Without causality: a query may read any block. Blocks are disjoint, of sizes as equal as
    possible. No gradient goes through the choice. Special tokens are in no block: as keys they are
    in every query's softmax, as queries they read all keys. The output is softmax attention at k =
    n.
    """

    options_type = MobaOptions
    options: MobaOptions
    card = Card(
        strategy="routing",
        expert_type="block MLP",
        expert_count="n",
        construction="locality prior",
        topology="N-to-blocks",
        source="Lu et al. 2025, arXiv 2502.13189, Eq. 2-6",
        cost="N n d + N (N / n) k d",
        untrained="usable",
    )
    limits = (
        ("moba(n=4,k=4)", "standard"),
        ("moba(n=4,k=4,blocks=windows)", "standard"),
    )
    samples = (
        {"n": 8, "k": 4, "own": False},
        {"n": 9, "k": 5},
        {"n": 12, "k": 6, "blocks": "windows", "own": False},
        {"n": 20, "k": 9, "blocks": "windows", "pool": "5x4"},
    )
    needs = frozenset({"grid"})
    axes = (("N", "n"),)

    @property
    def routes(self) -> bool:
        return True

    @property
    def traits(self) -> frozenset[str]:  # type: ignore[override]
        held = {"linear", "averages", "convex", "scaled", "heads", "special-set", "routed-softmax"}
        return frozenset(held)

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        o, patches = self.options, layout.patches
        grid = layout.grid if o.blocks == "windows" else (1, patches)
        # too few for k as well
        fits = (nearest_count(o.k, grid, o.k), patches) if o.n < 1 else None
        in_range(self, "n", o.n, 1, patches, f"patches (tokens {layout})", fits)
        if o.blocks == "windows":
            pool_shape(o.n, grid, o.pool, asker=self, what="windows", least=o.k)
        elif o.pool != "auto":
            raise MitaswapError(
                f"{self.spec}: pool={o.pool} is a shape of windows; use pool=auto, or "
                "blocks=windows and pool=AxB with A * B = n"
            )
        in_range(self, "k", o.k, 1, o.n, f"blocks (n) (tokens {layout})")

    @classmethod
    def suggest(cls, layout: TokenLayout) -> dict[str, Value]:
        if layout.patches >= MobaOptions.n:
            return {}
        return {"n": layout.patches, "k": min(MobaOptions.k, layout.patches)}

    def _cut(self, layout: TokenLayout) -> tuple[tuple[int, int], tuple[int, int]]:
        """The grid that is cut, and the shape of the cut: a raster is a grid of one row."""
        o = self.options
        if o.blocks == "raster":
            return (1, layout.patches), (1, o.n)
        return layout.grid, pool_shape(o.n, layout.grid, o.pool)

    def cost(self, site: SiteShape) -> Cost:
        o, layout, d, dv = self.options, site.layout, site.head_dim, site.value_dim
        patches = layout.patches
        size, ragged = ragged_size(*self._cut(layout))
        routing, special = product_flops(patches, d, o.n), special_flops(layout, d, dv)
        # a block holds patches / n keys on average: which blocks are read decides the rest
        read = attend_flops(patches, patches * o.k, d, dv) // o.n
        blocks, block = expert_blocks(patches, o.n)
        spent = o.k * attend_flops(blocks * block, size, d + ragged, dv)
        return self._cost(site, routing + read + special, o.n * d, padding=spent - read)

    def _windows(self, layout: TokenLayout, device: torch.device) -> Windows:
        if self.options.blocks == "raster":
            return runs(layout, self.options.n, device)
        return cut(layout, self._cut(layout)[1], device)

    def _choice(self, q: Tensor, k: Tensor, layout: TokenLayout, windows: Windows) -> Tensor:
        """The k blocks that each patch reads, best first: [B, H, patches, k]."""
        means = windows.means(k.detach())
        scores = q[:, :, layout.patch_slice].detach() @ means.transpose(-1, -2)
        return best_with(scores, windows.fixed(0, int(self.options.own)), self.options.k)

    def branch(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Branch:
        windows = self._windows(layout, q.device)
        choice = self._choice(q, k, layout, windows)
        queries, keys = windows.flag(q[:, :, layout.patch_slice], windows.split(k))
        values = windows.split(v)
        branches = [
            attend_experts(queries, keys, values, choice[..., j], scale)
            for j in range(self.options.k)
        ]
        return with_special(q, k, v, branches, layout, scale)

    @outside_autocast
    def route(self, q: Tensor, k: Tensor, *, layout: TokenLayout, scale: float) -> Routing | None:
        q, k = (x.contiguous() for x in working(q, k))
        windows = self._windows(layout, q.device)
        members = windows.index.masked_fill(~windows.inside, -1).expand(*q.shape[:2], -1, -1)
        choice = self._choice(q, k, layout, windows)
        return Routing(*special_routing(members, choice, layout))
