"""Sparsifiner: a low-rank prediction of the attention map decides which keys each query reads (Wei
et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mitaswap.errors import MitaswapError
from mitaswap.mechanisms._base import MECHANISMS, Mechanism, Options
from mitaswap.mechanisms._card import Card, Cost, Routing, SiteShape
from mitaswap.operators.chosen import attend_chosen, chunks, keep_top, own_choice, sparse
from mitaswap.operators.counting import attend_flops, product_flops
from mitaswap.operators.experts import Branch, attend
from mitaswap.operators.orthogonal import orthogonal
from mitaswap.operators.pool import nearest_count, pool_shape
from mitaswap.operators.precision import outside_autocast, working
from mitaswap.operators.ranges import at_least, in_range
from mitaswap.operators.routed import join_special, members_of_each, special_flops, with_special
from mitaswap.operators.select import top_indices
from mitaswap.operators.special import join, split
from mitaswap.operators.tables import down_and_up, on_grid
from mitaswap.spec import Value
from mitaswap.tokens import TokenLayout

#: channels of its own that the prediction may have where heads are narrower
CHANNELS = 128


@dataclass(frozen=True)
class SparsifinerOptions(Options):
    """Options of Sparsifiner.

    Args:
        k: patches that each patch reads; 49 of 196 are the paper's quarter.
        n: rank of the prediction; it starts from n windows of the patch grid. The released code
            takes an eighth to a sixth of the tokens.
        pool: these windows as `AxB`; `auto` chooses the most square ones.
        coefficients: how many of its n coefficients a query keeps, the largest (8 in the released
            code).
        channels: width of queries and keys that the prediction projects for itself; 0 takes them as
            they are, the released code's are half as wide.
        threshold: entries of the basis that are no larger count as zero (0.02 in the released
            code).
        coefficient_threshold: coefficients that are no larger count as zero, too; the released code
            can have this alone (coefficients equal to n).
        mask_scale: factor of the logits of the coefficients, which decide the mask. `site`: the
            site's own, 1 / sqrt(d) (the paper). `heads`: H^-0.5 for H heads, as in the released
            code. The attention over the mask keeps the site's.
        tied: W_up is W_down, as the released code can have it.
        magnitude: |W_up| is the basis, as in the released code wherever the mask is in use.
        special: `apart`: special tokens are read besides the k patches. `inside`: they have a place
            in W_down and W_up, as the released code's class token, and k counts them.
    """

    k: int = 49
    n: int = 25
    pool: str = "auto"
    coefficients: int = 8
    channels: int = 0
    threshold: float = 0.0
    coefficient_threshold: float = 0.0
    mask_scale: Literal["site", "heads"] = "site"
    tied: bool = False
    magnitude: bool = False
    special: Literal["apart", "inside"] = "apart"


@MECHANISMS.register("sparsifiner")
class Sparsifiner(Mechanism):
    """Softmax attention of every patch to the k patches with the largest predicted attention:

    A = top(softmax(Q (W_down K)^T / sqrt(d))) W_up, where top keeps the largest coefficients of a
    row and sets the others to zero. W_down [n, patches] and the basis W_up [n, patches] are learned
    and shared by the heads.

    Special tokens are no part of the prediction, unless special=inside: every query reads them. As
    queries they read all keys (as the class token does in the released code).

    The paper trains the prediction to reconstruct the attention map. Here A, computed from queries
    and keys that are cut from the graph, gets the gradient that it would have as a term of the
    logits.

    Parameters, for a grid of P patches and S special tokens:
        down [n, P]: averages over the windows. up [n, P]: how near each patch is to each window, a
            Gaussian of half a window's width, summing to one over windows. At another grid both are
            resized bilinearly, as n images; as W_down it keeps the sums of its rows.
        down_special [n, S]: 0. up_special [n, S]: 1, so that special tokens come first. Both only
            with special=inside; S is the same at every grid.
        With tied=true there are no `up` and `up_special`: those starts, with rows divided by their
            sums, are `down` and `down_special`.
        channel_q, channel_k [c, D]: the same random matrix with orthonormal rows (or columns, if c
            > D); channel_q_bias, channel_k_bias [c]: 0. Only with c = channels > 0.
    """

    options_type = SparsifinerOptions
    options: SparsifinerOptions
    card = Card(
        strategy="routing",
        expert_type="MLP",
        expert_count="N",
        construction="light-weight skim",
        topology="N times one-to-one",
        source="Wei et al. 2023, arXiv 2303.13755, Sec. 3 (cited by section)",
        cost="N^2 + N (n + k) d",
        untrained="usable",
    )
    limits = (
        ("sparsifiner(k={patches})", "standard"),
        ("sparsifiner(k={patches},mask_scale=heads)", "standard"),
        ("sparsifiner(k={tokens},special=inside,tied=true)", "standard"),
    )
    samples = (
        {"k": 14, "n": 9, "coefficients": 9},
        {"k": 9, "n": 8, "pool": "2x4", "coefficients": 8, "channels": 3},
        {"k": 11, "n": 6, "coefficients": 3, "threshold": 0.02},
        {"k": 12, "n": 9, "coefficients": 9, "mask_scale": "heads"},
        {"k": 10, "n": 9, "coefficients": 1, "mask_scale": "heads"},
        {"k": 11, "n": 6, "coefficients": 6, "coefficient_threshold": 0.17},
        {"k": 13, "n": 9, "coefficients": 9, "tied": True, "magnitude": True},
        {"k": 14, "n": 6, "coefficients": 6, "channels": 4, "special": "inside"},
        {"k": 12, "n": 9, "coefficients": 9, "special": "inside", "tied": True},
    )
    needs = frozenset({"grid"})
    axes = (("K", "k"),)

    @property
    def traits(self) -> frozenset[str]:  # type: ignore[override]
        o = self.options
        held = {"linear", "averages", "convex", "scaled", "routed-softmax", "every-pair"}
        # inside, a threshold can make their scores those of patches, and so does a single window
        if o.special == "apart" or (o.threshold == 0 and o.n > 1):
            held |= {"special-set"}
        # the other factor depends on the number of heads; it does not change a single entry's order
        if o.mask_scale == "site" or (o.coefficients == 1 and o.coefficient_threshold == 0):
            held |= {"heads"}
        # patches on either side of a window's centre tie where only that window's coefficient is
        # kept, and of equals the first are read
        if o.coefficients == o.n and o.threshold == o.coefficient_threshold == 0:
            held |= {"mirror"}
        return frozenset(held)

    @property
    def routes(self) -> bool:
        return True

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        o, special = self.options, layout.tokens - layout.patches
        inside = o.special == "inside"
        if self.site is None:  # once it is built, k follows the grid
            of = ", and no fewer than the special ones, which it counts" if inside else ""
            kind, least = ("tokens", max(1, special)) if inside else ("patches", 1)
            most = layout.tokens if inside else layout.patches
            in_range(self, "k", o.k, least, most, f"{kind}{of} (tokens {layout})")
        limit = "or as many as a head has"
        at_least(self, "channels", o.channels, 0, most=max(head_dim, CHANNELS), limit=limit)
        for name in ("threshold", "coefficient_threshold"):
            at_least(self, name, getattr(o, name), 0, most=1, limit="as weights sum to one")
        built = self._built(layout)
        if inside and special != (held := built.tokens - built.patches):
            raise MitaswapError(
                f"{self.spec} was built for {held} special tokens, which special=inside makes part "
                f"of its tables, not for {special} (tokens {layout}); use special=apart"
            )
        # windows are only where the tables start: once they are built they follow any grid
        grid, kept = built.grid, o.coefficients
        fits = (nearest_count(kept, grid, kept), built.patches) if o.n < 1 else None
        in_range(self, "n", o.n, 1, built.patches, f"patches (tokens {built})", fits)
        pool_shape(o.n, grid, o.pool, asker=self, what="windows", least=kept)
        in_range(self, "coefficients", kept, 1, o.n, f"of the basis (n) (tokens {built})")

    @classmethod
    def suggest(cls, layout: TokenLayout) -> dict[str, Value]:
        o, (height, width) = SparsifinerOptions, layout.grid
        found: dict[str, Value] = {}
        if o.k > layout.patches:
            found["k"] = (layout.patches + 3) // 4
        if min(height, width) < 5:
            found["n"] = min(5, height) * min(5, width)
        return found

    def build(self, site: SiteShape) -> None:
        o, layout = self.options, site.layout
        special = layout.tokens - layout.patches if o.special == "inside" else 0
        shape = pool_shape(o.n, layout.grid, o.pool)
        for name, table in down_and_up(layout.grid, shape, special, o.tied).items():
            self.register_parameter(name, nn.Parameter(table))
        if o.channels:
            generator = torch.Generator("cpu").manual_seed(0)
            start = orthogonal(o.channels, site.head_dim, generator)
            for part, table in (("", start), ("_bias", torch.zeros(o.channels))):
                for name in ("channel_q", "channel_k"):
                    self.register_parameter(f"{name}{part}", nn.Parameter(table.clone()))

    def _k(self, layout: TokenLayout) -> int:
        """Keys that each patch reads, of those that it chooses among."""
        inside = self.options.special == "inside"
        return min(self.options.k, layout.tokens if inside else layout.patches)

    def cost(self, site: SiteShape) -> Cost:
        o, layout, d, dv = self.options, site.layout, site.head_dim, site.value_dim
        patches, c, k = layout.patches, o.channels or d, self._k(layout)
        keys = layout.tokens if o.special == "inside" else patches
        flops = product_flops(o.n, keys, c) + product_flops(patches, c, o.n)
        flops += product_flops(patches, o.coefficients, keys) + attend_flops(patches, k, d, dv)
        if o.channels:
            flops += product_flops(patches + keys, d, c)
        if o.special == "inside":
            flops += attend_flops(layout.tokens - patches, layout.tokens, d, dv)
        else:
            flops += special_flops(layout, d, dv)
        # the reference makes whole rows of coefficients and of scores
        padding = product_flops(patches, o.n - o.coefficients, keys)
        padding += attend_flops(patches, keys - k, d, dv)
        return self._cost(site, flops, o.n * c, padding)

    def _coefficients(self, q: Tensor, k: Tensor, layout: TokenLayout, scale: float) -> Tensor:
        """Kept coefficients of the patches' predicted attention, [B, H, patches, n]."""
        o = self.options
        q = split(q, layout)[0].detach()
        k = (k if o.special == "inside" else split(k, layout)[0]).detach()
        if o.channels:
            q, k = self._projected(q, "channel_q"), self._projected(k, "channel_k")
        factor = scale if o.mask_scale == "site" else q.shape[1] ** -0.5
        logits = (q * factor) @ (self._table("down", layout, q.dtype) @ k).transpose(-1, -2)
        return sparse(logits.softmax(dim=-1), o.coefficients, o.coefficient_threshold)

    def _projected(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.get_parameter(name), self.get_parameter(f"{name}_bias")
        return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))

    def _table(self, name: str, layout: TokenLayout, dtype: torch.dtype) -> Tensor:
        """W_down or W_up, `name`, at the grid of `layout`: [n, patches], or [n, N] if special
        tokens are inside.
        """
        assert self.site is not None
        held, built = "down" if self.options.tied else name, self.site.layout
        table = on_grid(self.get_parameter(held).to(dtype), built.grid, layout.grid)
        if name == "down":
            table = table * (built.patches / layout.patches)
        if self.options.special == "apart" or layout.tokens == layout.patches:
            return table
        special = self.get_parameter(f"{held}_special").to(dtype)
        return join(table.T, special.T, layout).T

    def _basis(self, layout: TokenLayout, dtype: torch.dtype) -> Tensor:
        basis = self._table("up", layout, dtype)
        basis = basis.abs() if self.options.magnitude else basis
        return sparse(basis, basis.shape[-1], self.options.threshold)

    def branch(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Branch:
        coefficients = self._coefficients(q, k, layout, scale)
        basis, inside = self._basis(layout, q.dtype), self.options.special == "inside"

        def choose(rows: slice, logits: Tensor) -> Tensor:
            return keep_top(logits, coefficients[:, :, rows] @ basis, self._k(layout))

        queries, special = split(q, layout)
        keys, values = (k, v) if inside else (split(x, layout)[0] for x in (k, v))
        branch = attend_chosen(queries, keys, values, scale, choose)
        if not inside:
            return with_special(q, k, v, [branch], layout, scale)
        return join_special(branch, attend(special, k, v, scale), layout)

    @outside_autocast
    def route(self, q: Tensor, k: Tensor, *, layout: TokenLayout, scale: float) -> Routing | None:
        if self.site is None:
            return self._twin(q, layout).route(q, k, layout=layout, scale=scale)
        q, k = working(q, k)
        coefficients = self._coefficients(q, k, layout, scale)
        basis = self._basis(layout, q.dtype)
        scores = (coefficients[:, :, rows] @ basis for rows in chunks(layout.patches))
        kept = torch.cat([top_indices(x, self._k(layout)) for x in scores], dim=2)
        members = members_of_each(kept, layout, apart=self.options.special == "apart")
        return Routing(members, own_choice(members))
