"""MHLA: linear attention with one summary per block of tokens, mixed anew for each block of queries
(Zhang et al. 2026).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mitaswap.errors import MitaswapError
from mitaswap.mechanisms._base import MECHANISMS, Mechanism, Options
from mitaswap.mechanisms._card import Card, Cost, SiteShape
from mitaswap.operators.counting import product_flops
from mitaswap.operators.pool import pool_shape
from mitaswap.operators.precision import outside_autocast, working
from mitaswap.operators.ranges import EPS, at_least, in_range
from mitaswap.operators.special import join, split
from mitaswap.operators.windows import cut, ragged_size
from mitaswap.tokens import TokenLayout


@dataclass(frozen=True)
class MhlaOptions(Options):
    """Options of MHLA.

    Args:
        m: number of blocks that the patch grid is cut into, one summary each; the paper keeps m^2
            below the number of tokens.
        pool: blocks as `AxB`, A rows of B blocks; `auto` chooses the most square ones.
        feature: `relu` (the released code's) or `elu`, elu(x) + 1; the paper leaves it open.
        start: coefficients before training. `paper`: falling linearly with the distance of two
            blocks, zero for the farthest; `released`: the default of the authors' code, falling
            like a cosine to 0.7 of the nearest; `uniform`: all the same, as in linear attention.
            The authors' other choices, for distances r in blocks and their largest, R: `linear`,
            1 - r / R; `exp`, e^(-r / 3); `gaussian`, e^(-9 r^2 / 2 R^2); `local`, the same for r <=
            1.5 (a block and the eight around it), zero beyond.
        normaliser: `paper`: that of Eq. 4, each query's own; `released`: the authors' code mixes
            those of all blocks.
        eps: added to the normaliser of the sum of all summaries, so eps / m to that of their mean;
            with the released normaliser eps itself, and to every feature phi(q), phi(k) as well.
    """

    m: int = 16
    pool: str = "auto"
    feature: Literal["relu", "elu"] = "relu"
    start: Literal["paper", "released", "linear", "exp", "gaussian", "local", "uniform"] = "paper"
    normaliser: Literal["paper", "released"] = "paper"
    eps: float = 1e-6


@MECHANISMS.register("mhla")
class Mhla(Mechanism):
    """o(q) = phi(q) [sum_j c_ij S_j] / ( phi(q) [sum_j c_ij z_j] ) for a query of block i, where
    S_j = sum_t phi(k_t)^T v_t and z_j = sum_t phi(k_t) over the tokens t of block j: N d^2 + m^2
    d^2.

    The coefficients c, learned and kept within [0, 1], are shared by all heads. Blocks are cut as
    evenly as the grid allows (the paper pads its images until they divide). Special tokens are in
    no block. Their summary joins every mixture with weight 1 / m, the mean coefficient, and they
    read all summaries with weight 1 / m, as linear attention does.

    With normaliser=released the query at place w of block i is divided by sum_j c_ij phi(q_jw) z_j:
    as in the authors' code, each block's summary meets the query of its own block at that place.
    Weights then do not sum to one. A block that is too small to have the place lends its nearest
    patch (the authors' grids divide). Special tokens have no place: their z meets the query
    itself, and they are divided as in Eq. 4. The authors' module is
    mhla(start=released,normaliser=released)+dwc(kernel=5).

    Parameters:
        mixing: [m, m], row i the coefficients of query block i; starts as `start` says. Its rows
            sum to one there, or its columns, as in the authors' code; `gaussian` is no such sum
            there, and here divided by one number that makes the mean 1 / m (which up to eps changes
            nothing but the part of special tokens). On a grid whose blocks form another A x B it is
            resized bilinearly, in each of the four axes. Where m blocks do not fit, there are as
            many rows and columns of them as patches, and the mean is one over their number.
    """

    options_type = MhlaOptions
    options: MhlaOptions
    card = Card(
        strategy="compression",
        expert_type="linear layer",
        expert_count="m",
        construction="local prior & kernelization",
        topology="several-to-one",
        source="Zhang et al. 2026, arXiv 2601.07832, Eq. 3-5",
        cost="N d^2 + m^2 d^2",
        untrained="needs finetuning",
    )
    limits = (
        ("mhla(m=8,start=uniform,feature=relu)", "linear(feature=relu)"),
        ("mhla(m=1,feature=elu,normaliser=released,eps=0.0)", "linear(eps=0.0)"),
    )
    samples = (
        {},
        {"m": 4, "feature": "elu"},
        {"m": 6, "pool": "2x3", "start": "released"},
        {"m": 8, "start": "uniform"},
        {"m": 9, "start": "released", "normaliser": "released"},
        {"m": 9, "start": "linear"},
        {"m": 6, "start": "exp", "feature": "elu"},
        {"m": 6, "start": "gaussian", "normaliser": "released"},
        {"m": 9, "start": "local"},
        {"m": 4, "pool": "2x2", "start": "local"},
    )
    needs = frozenset({"grid"})
    axes = (("N", "m"),)
    mixing: nn.Parameter

    @property
    def traits(self) -> frozenset[str]:  # type: ignore[override]
        held = {"linear", "heads", "special-set"}
        if self.options.feature == "elu":  # relu's normaliser undoes any scale
            held |= {"scaled"}
        if self.options.m == 1 or self.options.normaliser == "paper":
            held |= {"averages", "convex"}
            if self._uniform:
                held |= {"key-set", "pointwise", "mirror"}
        return frozenset(held)

    @property
    def _uniform(self) -> bool:
        o = self.options  # a block and the eight around it are all blocks of 2 x 2
        near = o.start == "local" and (o.m == 2 or o.pool == "2x2")
        return o.start == "uniform" or o.m == 1 or near

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        o, patches = self.options, layout.patches
        at_least(self, "eps", o.eps, 0, most=EPS)
        if self.site is None:  # once built, blocks follow the grid
            in_range(self, "m", o.m, 1, patches, f"patches (tokens {layout})")
            self._shape(layout)

    def _shape(self, layout: TokenLayout) -> tuple[int, int]:
        """Rows and columns of blocks: m of them where they fit, else as many of each as there are
        patches.
        """
        o = self.options
        try:
            return pool_shape(o.m, layout.grid, o.pool, asker=self, what="windows")
        except MitaswapError:
            if self.site is None:
                raise
        built, grid = self._shape(self.site.layout), layout.grid
        return min(built[0], grid[0]), min(built[1], grid[1])

    def build(self, site: SiteShape) -> None:
        shape = self._shape(site.layout)
        place = torch.cartesian_prod(*(torch.arange(float(side)) for side in shape))
        distance = torch.linalg.vector_norm(place[:, None] - place, dim=-1)
        start, far = self.options.start, distance.max()
        if self._uniform:
            mixing = torch.ones_like(distance)
        elif start == "released":
            mixing = torch.cos(distance / far * (math.pi / 4))
        elif start == "linear":
            mixing = 1.0 - distance / far
        elif start == "exp":
            mixing = torch.exp(-distance / 3)
        elif start == "gaussian":
            mixing = torch.exp(-4.5 * (distance / far).square())
        elif start == "local":
            mixing = (distance <= 1.5).float()
        else:
            mixing = 1.0 - distance / distance.amax(dim=1, keepdim=True)
        if start == "gaussian":
            total = mixing.mean() * len(mixing)
        else:  # the authors' code normalises columns
            total = mixing.sum(dim=int(start == "paper"), keepdim=True)
        self.mixing = nn.Parameter(mixing / total)

    def cost(self, site: SiteShape) -> Cost:
        n, d, columns = site.layout.tokens, site.head_dim, site.value_dim + 1
        shape = self._shape(site.layout)
        m = math.prod(shape)
        size, patches = ragged_size(site.layout.grid, shape)[0], site.layout.patches
        slots = m * size - patches
        flops = 2 * product_flops(n, d, columns) + product_flops(m, m, d * columns)
        between, padding = m * d * columns, 2 * product_flops(slots, d, columns)
        if self.options.normaliser == "released":  # besides Eq. 4's, which special tokens keep
            flops += product_flops(patches, d, 2) + product_flops(m, m, patches) // m
            padding += product_flops(slots, d, 2) + product_flops(m, m, slots) // m
        return self._cost(site, flops, between, padding)

    @outside_autocast
    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Tensor:
        dtype = q.dtype
        q, k, v = working(q, k, v)
        q, k = self._features(q * (scale * math.sqrt(q.shape[-1]))), self._features(k)
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)  # the last column sums to z
        blocks = cut(layout, self._shape(layout), q.device)
        coefficients = self._coefficients(layout, q)
        count = len(coefficients)

        keys = blocks.split(k) * blocks.inside[..., None].to(k.dtype)  # fillers count for nothing
        summaries = keys.transpose(-1, -2) @ blocks.split(v)  # [B, H, m, D, Dv + 1]
        queries, keys, values = (split(x, layout)[1] for x in (q, k, v))
        apart = keys.transpose(-1, -2) @ values / count

        mixed = (coefficients @ summaries.flatten(3)).view_as(summaries) + apart[:, :, None]
        asked = blocks.split(q)
        patches = asked @ mixed
        eps = self.options.eps / count
        if self.options.normaliser == "released":
            own = asked @ summaries[..., -1:]  # phi(q_b) z_b: [B, H, m, L, 1]
            below = coefficients @ own.squeeze(-1)
            special = asked @ apart[:, :, None, :, -1:]
            patches = torch.cat([patches[..., :-1], below[..., None] + special], dim=-1)
            eps = self.options.eps
        rows = queries @ (summaries.mean(dim=2) + apart)
        out = join(blocks.join(patches), rows, layout)
        return (out[..., :-1] / (out[..., -1:] + eps)).to(dtype)

    def _features(self, x: Tensor) -> Tensor:
        x = F.relu(x) if self.options.feature == "relu" else F.elu(x) + 1
        return x + self.options.eps if self.options.normaliser == "released" else x

    def _coefficients(self, layout: TokenLayout, like: Tensor) -> Tensor:
        assert self.site is not None
        mixing = self.mixing.to(like.dtype)
        # clipped as the paper does on every update: the gradient passes, and can lead back inside
        mixing = mixing + (mixing.clamp(0.0, 1.0) - mixing).detach()
        shape, built = self._shape(layout), self._shape(self.site.layout)
        if shape == built:
            return mixing
        for _ in range(2):  # the last axis each time: key blocks first, then query blocks
            table = mixing.unflatten(1, built)[:, None]
            table = F.interpolate(table, shape, mode="bilinear", align_corners=False)
            mixing = table.flatten(1).t()
        return mixing * (self.options.m / len(mixing))  # the mean coefficient is one over the count
