"""MiTA, a Mixture of Top-k Activations (Wen et al., arXiv 2602.01219, Eq. 5 to 12).

Landmark queries probe all keys. Each one's k strongest keys become a routed expert; what it reads
becomes one entry of a shared expert. A query attends to the shared expert and to the s routed
experts whose landmarks it is closest to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from mitaswap.kernels import unfit
from mitaswap.mechanisms._base import MECHANISMS, Mechanism, Options
from mitaswap.mechanisms._card import Card, Cost, Routing, SiteShape
from mitaswap.operators.blocks import expert_blocks
from mitaswap.operators.counting import attend_flops, product_flops
from mitaswap.operators.experts import Branch, attend, attend_experts, merge, take
from mitaswap.operators.pool import landmarks, pool_shape, pool_tokens
from mitaswap.operators.precision import outside_autocast, working
from mitaswap.operators.ranges import in_range
from mitaswap.operators.select import best_indices, top_indices
from mitaswap.spec import Value
from mitaswap.tokens import TokenLayout


@dataclass(frozen=True)
class MitaOptions(Options):
    """Options of MiTA.

    Args:
        m: number of landmark queries = routed experts = entries of the shared expert.
        k: keys per routed expert (expert width).
        s: routed experts per query.
        variant: `full`; `route-only` leaves the shared expert out; `compress-only` leaves the
            routed experts out (which is agent attention with m agents).
        pool: windows of the landmark pooling as `AxB`; `auto` chooses the most square ones.
        shared_scale: logits of the shared expert are q Q~^T / sqrt(d) in the `paper`; the authors'
            `released` code scales its landmarks once more, q Q~^T / d.
        landmark_tokens: the `paper` pools the patch grid; the `released` DeiT code pools the first
            h * w tokens (class token in, last patch out).
    """

    m: int = 25
    k: int = 25
    s: int = 1
    variant: Literal["full", "route-only", "compress-only"] = "full"
    pool: str = "auto"
    shared_scale: Literal["paper", "released"] = "paper"
    landmark_tokens: Literal["paper", "released"] = "paper"


@MECHANISMS.register("mita")
class Mita(Mechanism):
    """O = softmax([Q Q~^T, Q K_e1^T, ..., Q K_es^T] / sqrt(d)) [V~, V_e1, ..., V_es]: one softmax
    over the m entries of the shared expert and the k s keys of the query's routed experts.

    Landmarks Q~ [m, d] are averages of Q over m equal windows of the patch grid. Their scores of
    the keys, S = Q~ K^T / sqrt(d) [m, N], make all experts. The shared one has keys Q~ and values
    V~ = softmax(S) V. Routed expert i is K_i, V_i: the k keys with the largest S_i, and their
    values. e1, ..., es are the experts with the largest q Q~^T. A key in two of them counts twice.
    No gradient goes through the two choices, an exact one through all else.

    `route-only` leaves out Q~ and V~, `compress-only` all K_e and V_e, which is agent attention.
    Special tokens are in no window; as queries and keys they are like all others.
    """

    options_type = MitaOptions
    options: MitaOptions
    card = Card(
        strategy="compression & routing",
        expert_type="MLP",
        expert_count="m (+1 shared)",
        construction="landmark probing",
        topology="N-to-m",
        source="Wen et al. 2026, arXiv 2602.01219, Eq. 5-12",
        cost="N (m + k s) d",
        untrained="usable",
    )
    limits = (
        ("mita(m=1,k={tokens},variant=route-only)", "standard"),
        ("mita(m=9,k={tokens},variant=route-only)", "standard"),
        ("mita(m=9,k={tokens},s=9,variant=route-only)", "standard"),
        ("mita(m=9,k=5,variant=compress-only)", "agent(n=9)"),
        ("mita(m=8,k=5,variant=compress-only,pool=2x4)", "agent(n=8,pool=2x4)"),
    )
    samples = (
        {"m": 9, "k": 7},
        {"m": 6, "k": 5, "s": 3},
        {"m": 9, "k": 8, "variant": "route-only"},
        {"m": 8, "k": 5, "variant": "compress-only", "pool": "2x4"},
        {"m": 4, "k": 6, "shared_scale": "released", "landmark_tokens": "released"},
    )
    needs = frozenset({"grid"})
    axes = (("N", "m"), ("K", "k"))

    @property
    def routes(self) -> bool:
        return self.options.variant != "compress-only"

    @classmethod
    def suggest(cls, layout: TokenLayout) -> dict[str, Value]:
        if layout.patches >= 50 and min(layout.grid) >= 5:
            return {}
        side = min(math.isqrt(layout.patches // 2), *layout.grid)
        return {"m": side * side, "k": min(25, layout.tokens // 2)}

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        o = self.options
        limits = {
            "m": (o.m, layout.patches, "patches"),
            "k": (o.k, layout.tokens, "tokens"),
            "s": (o.s, o.m, "experts (m)"),
        }
        for name, (value, most, of) in limits.items():
            in_range(self, name, value, 1, most, f"{of} (tokens {layout})")
        pool_shape(o.m, layout.grid, o.pool, asker=self)

    @property
    def traits(self) -> frozenset[str]:  # type: ignore[override]
        held = {"linear", "averages", "convex", "scaled", "heads", "key-set"}
        if self.options.landmark_tokens == "paper":
            held |= {"special-set", "mirror"}
        if self.options.variant == "route-only":
            held |= {"routed-softmax"}
        return frozenset(held)

    def cost(self, site: SiteShape) -> Cost:
        o, n, d, dv = self.options, site.layout.tokens, site.head_dim, site.value_dim
        flops, between, padding = product_flops(o.m, d, n), o.m * d, 0  # landmark scores
        if o.variant != "route-only":
            flops += product_flops(o.m, n, dv) + attend_flops(n, o.m, d, dv)
            between += o.m * dv
        if o.variant != "compress-only":
            flops += product_flops(n, d, o.m) + o.s * attend_flops(n, o.k, d, dv)
            between += o.m * o.k * (d + dv)
            blocks, block = expert_blocks(n, o.m)
            padding = o.s * attend_flops(blocks * block - n, o.k, d, dv)
        return self._cost(site, flops, between, padding)

    def _landmarks(self, q: Tensor, layout: TokenLayout) -> Tensor:
        if self.options.landmark_tokens == "released":
            shape = pool_shape(self.options.m, layout.grid, self.options.pool)
            return pool_tokens(q, 0, layout.grid, shape)
        return landmarks(q, layout, self.options.m, self.options.pool)

    def branch(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Branch:
        o = self.options
        marks = self._landmarks(q, layout)  # Q~ [B, H, m, D]
        scores = (marks * scale) @ k.transpose(-1, -2)  # S [B, H, m, N], shared by Eq. 6 and 8

        branches = []
        if o.variant != "route-only":
            values = scores.softmax(dim=-1) @ v  # V~, Eq. 8
            again = scale if o.shared_scale == "released" else 1.0
            branches.append(attend(q, marks, values, scale * again))  # Eq. 9
        if o.variant != "compress-only":
            members = top_indices(scores, o.k)
            keys, values = (
                take(x, members.flatten(2)).unflatten(2, members.shape[2:]) for x in (k, v)
            )
            choice = best_indices(q @ marks.transpose(-1, -2), o.s)
            branches += [attend_experts(q, keys, values, choice[..., j], scale) for j in range(o.s)]
        return merge(branches)  # Eq. 10

    def unfit(self, q: Tensor, k: Tensor, v: Tensor) -> str:
        return unfit(q, k, v)

    def fused(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Tensor:
        from mitaswap.kernels.mita import Sizes, mita_attention

        o = self.options
        sizes = Sizes(
            0 if o.landmark_tokens == "released" else layout.prefix,
            *layout.grid,
            *pool_shape(o.m, layout.grid, o.pool),
            0 if o.variant == "compress-only" else o.k,
            o.s,
            int(o.variant != "route-only"),
        )
        again = scale * scale if o.shared_scale == "released" else scale
        return mita_attention(q, k, v, sizes, scale, again)

    @outside_autocast
    def route(self, q: Tensor, k: Tensor, *, layout: TokenLayout, scale: float) -> Routing | None:
        if not self.routes:
            return None
        q, k = working(q, k)
        marks = self._landmarks(q, layout)
        members = top_indices((marks * scale) @ k.transpose(-1, -2), self.options.k)
        return Routing(members, best_indices(q @ marks.transpose(-1, -2), self.options.s))
