"""Linformer: keys and values shortened to n entries by learned projections along the tokens (Wang
et al. 2020).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mitaswap.mechanisms._base import MECHANISMS, Mechanism, Options
from mitaswap.mechanisms._card import Card, Cost, SiteShape
from mitaswap.operators.counting import attend_flops, product_flops
from mitaswap.operators.experts import Branch, attend
from mitaswap.operators.pool import pool_shape, pool_tokens
from mitaswap.operators.ranges import in_range
from mitaswap.operators.special import split
from mitaswap.spec import Value
from mitaswap.tokens import TokenLayout


@dataclass(frozen=True)
class LinformerOptions(Options):
    """Options of Linformer.

    Args:
        n: entries that the patches are projected to (k in the paper, 256 for its 512 to 4,096
            tokens). They start as windows of the grid, so n = a * b must fit it.
        sharing: `headwise` has one E and one F for all heads, `key-value` one E = F for all heads,
            `none` an E and an F for each head. (The paper's layerwise sharing needs all layers.)
    """

    n: int = 256
    sharing: Literal["none", "headwise", "key-value"] = "headwise"


@MECHANISMS.register("linformer")
class Linformer(Mechanism):
    """O = softmax(Q [K_S; E K_P]^T scale) [V_S; F V_P], with E, F [n, patches] learned.

    Subscripts P and S are patches and special tokens: a projection has one weight for each place
    of the grid, so special tokens stay entries of their own. Every query reads all entries.

    E = A + dE, where A averages over the windows of an a x b = n partition of the grid and dE is
    learned: the start is A, and A fits every grid. At another grid than the one it was built for,
    each row of dE is resized as an image, bilinearly, and keeps its sum. F likewise.

    Parameters:
        key_projection: dE, [1, n, patches] ([H, n, patches] without sharing), zero.
        value_projection: dF, the same; absent where E = F.
    """

    options_type = LinformerOptions
    options: LinformerOptions
    card = Card(
        strategy="compression",
        expert_type="MLP",
        expert_count="1 shared",
        construction="learnable projection",
        topology="all-to-one",
        source="Wang et al. 2020, arXiv 2006.04768, Eq. 7",
        cost="N n d",
        untrained="usable",
    )
    limits = (("linformer(n={patches})", "standard"),)
    samples = (
        {"n": 49},
        {"n": 9, "sharing": "none"},
        {"n": 6, "sharing": "key-value"},
    )
    traits = frozenset({"linear", "averages", "convex", "scaled", "heads", "special-set", "mirror"})
    needs = frozenset({"grid"})
    axes = (("N", "n"),)

    @classmethod
    def suggest(cls, layout: TokenLayout) -> dict[str, Value]:
        if min(layout.grid) >= 16 and layout.patches >= 2 * LinformerOptions.n:
            return {}
        rows, columns = (min(7, (side + 1) // 2) for side in layout.grid)
        return {"n": rows * columns}

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        if self.site is not None:  # built already: the projections follow any grid
            return
        n, patches = self.options.n, layout.patches
        in_range(self, "n", n, 1, patches, f"patches (tokens {layout})")
        pool_shape(n, layout.grid, asker=self, what="windows")

    def build(self, site: SiteShape) -> None:
        o, grid = self.options, site.layout.grid
        self.windows = pool_shape(o.n, grid)
        shape = (site.heads if o.sharing == "none" else 1, o.n, site.layout.patches)
        self.key_projection = nn.Parameter(torch.zeros(shape))
        if o.sharing != "key-value":
            self.value_projection = nn.Parameter(torch.zeros(shape))

    def cost(self, site: SiteShape) -> Cost:
        n, layout = self.options.n, site.layout
        d, dv = site.head_dim, site.value_dim
        entries = n + layout.tokens - layout.patches
        flops = product_flops(n, layout.patches, d + dv)
        flops += attend_flops(layout.tokens, entries, d, dv)
        return self._cost(site, flops, between=n * (d + dv))

    def branch(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Branch:
        e = self._on_grid(self.key_projection.to(q.dtype), layout)
        f = e
        if self.options.sharing != "key-value":
            f = self._on_grid(self.value_projection.to(q.dtype), layout)
        return attend(q, self._entries(k, e, layout), self._entries(v, f, layout), scale)

    def _on_grid(self, rows: Tensor, layout: TokenLayout) -> Tensor:
        """Rows [.., n, patches] of a learned part for the grid of `layout`, each with its sum."""
        assert self.site is not None
        built = self.site.layout
        if layout.grid == built.grid:
            return rows
        images = rows.unflatten(-1, built.grid)
        scaled = F.interpolate(images, size=layout.grid, mode="bilinear", align_corners=False)
        scaled = scaled.flatten(-2) * (built.patches / layout.patches)
        missing = rows.sum(dim=-1, keepdim=True) - scaled.sum(dim=-1, keepdim=True)
        return scaled + missing / layout.patches

    def _entries(self, x: Tensor, rows: Tensor, layout: TokenLayout) -> Tensor:
        """Special tokens of x [B, H, N, D] as they are, then its projected patches."""
        patches, special = split(x, layout)
        projected = pool_tokens(patches, 0, layout.grid, self.windows) + rows @ patches
        return torch.cat([special, projected], dim=2)
