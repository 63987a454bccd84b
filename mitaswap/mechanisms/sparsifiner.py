"""Sparsifiner: a low-rank prediction of the attention map decides which keys each query reads (Wei
et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mitaswap.mechanisms._base import MECHANISMS, Mechanism, Options
from mitaswap.mechanisms._card import Card, Cost, Routing, SiteShape
from mitaswap.operators.chosen import attend_chosen, chunks, keep_top, own_choice
from mitaswap.operators.counting import attend_flops, product_flops
from mitaswap.operators.experts import Branch
from mitaswap.operators.orthogonal import orthogonal
from mitaswap.operators.pool import pool_shape
from mitaswap.operators.precision import outside_autocast, working
from mitaswap.operators.ranges import at_least, in_range
from mitaswap.operators.routed import special_flops, with_special
from mitaswap.operators.select import top_indices
from mitaswap.operators.special import join, split
from mitaswap.spec import Value
from mitaswap.tokens import TokenLayout


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
        mask_scale: factor of the logits of the coefficients, which decide the mask. `site`: the
            site's own, 1 / sqrt(d) (the paper). `heads`: H^-0.5 for H heads, as in the released
            code. The attention over the mask keeps the site's.
    """

    k: int = 49
    n: int = 25
    pool: str = "auto"
    coefficients: int = 8
    channels: int = 0
    threshold: float = 0.0
    mask_scale: Literal["site", "heads"] = "site"


@MECHANISMS.register("sparsifiner")
class Sparsifiner(Mechanism):
    """Softmax attention of every patch to the k patches with the largest predicted attention:

    A = top(softmax(Q (W_down K)^T / sqrt(d))) W_up, where top keeps the largest coefficients of a
    row and sets the others to zero. W_down [n, patches] and the basis W_up [n, patches] are learned
    and shared by the heads.

    Special tokens are no part of the prediction: every query reads them, and as queries they read
    all keys (as the class token does in the released code).

    The paper trains the prediction to reconstruct the attention map. Here A, computed from queries
    and keys that are cut from the graph, gets the gradient that it would have as a term of the
    logits.

    Parameters, for a grid of P patches:
        down [n, P]: averages over the windows. up [n, P]: how near each patch is to each window, a
            Gaussian of half a window's width, summing to one over windows. At another grid both are
            resized bilinearly, as n images; down keeps the sums of its rows.
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
        source="Wei et al. 2023, arXiv 2303.13755, Sec. 3",
        cost="N^2 + N (n + k) d",
        untrained="usable",
    )
    limits = (
        ("sparsifiner(k={patches})", "standard"),
        ("sparsifiner(k={patches},mask_scale=heads)", "standard"),
    )
    samples = (
        {"k": 14, "n": 9, "coefficients": 9},
        {"k": 9, "n": 8, "pool": "2x4", "coefficients": 8, "channels": 3},
        {"k": 11, "n": 6, "coefficients": 3, "threshold": 0.02},
        {"k": 12, "n": 9, "coefficients": 9, "mask_scale": "heads"},
        {"k": 10, "n": 9, "coefficients": 1, "mask_scale": "heads"},
    )
    needs = frozenset({"grid"})
    axes = (("K", "k"),)

    @property
    def traits(self) -> frozenset[str]:  # type: ignore[override]
        o = self.options
        held = {"linear", "averages", "convex", "scaled", "special-set", "routed-softmax"}
        # the other factor depends on the number of heads; it does not change a single entry's order
        held |= {"heads"} if o.mask_scale == "site" or o.coefficients == 1 else set()
        # patches on either side of a window's centre tie where only that window's coefficient is
        # kept, and of equals the first are read
        if o.coefficients == o.n and o.threshold == 0:
            held |= {"mirror"}
        return frozenset(held | {"every-pair"})

    @property
    def routes(self) -> bool:
        return True

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        o = self.options
        for name, value, most, of in (
            ("k", o.k, layout.patches, "patches"),
            ("n", o.n, layout.patches, "patches"),
            ("coefficients", o.coefficients, o.n, "of the basis (n)"),
        ):
            in_range(self, name, value, 1, most, f"{of} (tokens {layout})")
        at_least(self, "channels", o.channels, 0)
        at_least(self, "threshold", o.threshold, 0)
        pool_shape(o.n, layout.grid, o.pool, asker=self, what="windows")

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
        shape = pool_shape(o.n, layout.grid, o.pool)
        each = torch.eye(layout.patches, device="cpu").unflatten(1, (1, *layout.grid))
        self.down = nn.Parameter(F.adaptive_avg_pool2d(each, shape).flatten(1).T.contiguous())
        rows, columns = (_nearness(*side) for side in zip(layout.grid, shape, strict=True))
        up = rows[:, None, :, None] * columns[None, :, None, :]
        self.up = nn.Parameter(up.reshape(o.n, layout.patches).float())
        if o.channels:
            generator = torch.Generator("cpu").manual_seed(0)
            start = orthogonal(o.channels, site.head_dim, generator)
            self.channel_q = nn.Parameter(start)
            self.channel_k = nn.Parameter(start.clone())
            self.channel_q_bias = nn.Parameter(torch.zeros(o.channels))
            self.channel_k_bias = nn.Parameter(torch.zeros(o.channels))

    def cost(self, site: SiteShape) -> Cost:
        o, layout, d, dv = self.options, site.layout, site.head_dim, site.value_dim
        patches, c = layout.patches, o.channels or d
        flops = product_flops(o.n, patches, c) + product_flops(patches, c, o.n)
        flops += product_flops(patches, o.coefficients, patches) + attend_flops(patches, o.k, d, dv)
        if o.channels:
            flops += 2 * product_flops(patches, d, c)
        # the reference makes whole rows of coefficients and of scores
        padding = product_flops(patches, o.n - o.coefficients, patches)
        padding += attend_flops(patches, patches - o.k, d, dv)
        return self._cost(site, flops + special_flops(layout, d, dv), o.n * c, padding)

    def _resized(self, table: Tensor, layout: TokenLayout, dtype: torch.dtype) -> Tensor:
        """A table [n, patches] of the grid at build as one of the grid of `layout`."""
        assert self.site is not None
        grid, table = self.site.layout.grid, table.to(dtype)
        if layout.grid == grid:
            return table
        images = table.unflatten(1, (1, *grid))
        images = F.interpolate(images, layout.grid, mode="bilinear", align_corners=False)
        return images.flatten(1)

    def _coefficients(self, q: Tensor, k: Tensor, layout: TokenLayout, scale: float) -> Tensor:
        """Kept coefficients of the patches' predicted attention, [B, H, patches, n]."""
        assert self.site is not None
        o, dtype = self.options, q.dtype
        q, k = (split(x, layout)[0].detach() for x in (q, k))
        if o.channels:
            q = F.linear(q, self.channel_q.to(dtype), self.channel_q_bias.to(dtype))
            k = F.linear(k, self.channel_k.to(dtype), self.channel_k_bias.to(dtype))
        down = self._resized(self.down, layout, dtype)
        down = down * (self.site.layout.patches / layout.patches)
        factor = scale if o.mask_scale == "site" else q.shape[1] ** -0.5
        logits = (q * factor) @ (down @ k).transpose(-1, -2)
        weights = logits.softmax(dim=-1)
        if o.coefficients == o.n:
            return weights
        kept = top_indices(weights, o.coefficients)
        return weights * torch.zeros_like(weights).scatter(-1, kept, 1.0)

    def _basis(self, layout: TokenLayout, dtype: torch.dtype) -> Tensor:
        basis = self._resized(self.up, layout, dtype)
        if self.options.threshold > 0:
            basis = basis * (basis.detach().abs() > self.options.threshold)
        return basis

    def branch(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Branch:
        coefficients = self._coefficients(q, k, layout, scale)
        basis = self._basis(layout, q.dtype)

        def choose(rows: slice, logits: Tensor) -> Tensor:
            return keep_top(logits, coefficients[:, :, rows] @ basis, self.options.k)

        queries, keys, values = (split(x, layout)[0] for x in (q, k, v))
        branch = attend_chosen(queries, keys, values, scale, choose)
        return with_special(q, k, v, [branch], layout, scale)

    @outside_autocast
    def route(self, q: Tensor, k: Tensor, *, layout: TokenLayout, scale: float) -> Routing | None:
        if self.site is None:
            return self._twin(q, layout).route(q, k, layout=layout, scale=scale)
        q, k = working(q, k)
        coefficients = self._coefficients(q, k, layout, scale)
        basis = self._basis(layout, q.dtype)
        scores = (coefficients[:, :, rows] @ basis for rows in chunks(layout.patches))
        kept = torch.cat([top_indices(x, self.options.k) for x in scores], dim=2) + layout.prefix
        # a special query holds all keys; a patch its own and the special ones, then empty slots
        every = torch.arange(layout.tokens, device=q.device)
        special = split(every[:, None], layout)[1].flatten()
        if not special.numel():
            return Routing(kept, own_choice(kept))
        of_patches = torch.cat([kept, special.expand(*kept.shape[:3], -1)], dim=-1)
        of_patches = F.pad(of_patches, (0, layout.tokens - of_patches.shape[-1]), value=-1)
        of_special = every.expand(*kept.shape[:2], special.numel(), -1)
        members = join(of_patches, of_special, layout)
        return Routing(members, own_choice(members))


def _nearness(length: int, windows: int) -> Tensor:
    """How near each of `length` positions is to each of the windows that cut a side: [windows,
    length], summing to one over the windows.
    """
    position = (torch.arange(length, device="cpu", dtype=torch.float64) + 0.5) * windows / length
    distance = position - 0.5 - torch.arange(windows, device="cpu")[:, None]
    return (-2 * distance.square()).softmax(dim=0)
