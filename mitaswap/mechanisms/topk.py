"""Top-k attention: every query reads the k keys that it scores highest, exactly (Wang et al. 2022).

It scores all pairs, so it saves little; it is what cheaper ways to find a query's keys aim at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mitaswap.mechanisms._base import MECHANISMS, Mechanism, Options
from mitaswap.mechanisms._card import Card, Cost, Routing, SiteShape
from mitaswap.operators.chosen import attend_chosen, chunks, keep_top, own_choice
from mitaswap.operators.counting import product_flops
from mitaswap.operators.experts import Branch
from mitaswap.operators.precision import outside_autocast, working
from mitaswap.operators.ranges import in_range
from mitaswap.operators.select import top_indices
from mitaswap.spec import Value
from mitaswap.tokens import TokenLayout


@dataclass(frozen=True)
class TopkOptions(Options):
    """Options of top-k attention.

    Args:
        k: keys per query; 100 is the paper's for the 197 tokens of DeiT.
    """

    k: int = 100


@MECHANISMS.register("topk")
class Topk(Mechanism):
    """o(q) = softmax over the k largest of scale * q K^T, applied to their values.

    Each query is routed to an expert of its own, the set of its k best keys; of equal scores the
    lowest positions are taken. Special tokens are ordinary queries and keys. The output is softmax
    attention at k = N.
    """

    options_type = TopkOptions
    options: TopkOptions
    card = Card(
        strategy="routing",
        expert_type="MLP",
        expert_count="N",
        construction="exact scores",
        topology="N times one-to-one",
        source="Wang et al. 2022 (KVT), arXiv 2106.00515, Sec. 3.2 (cited by section)",
        cost="N^2 d",
        untrained="usable",
    )
    limits = (("topk(k={tokens})", "standard"),)
    samples = ({"k": 30}, {"k": 48})
    traits = frozenset(
        {"linear", "averages", "convex", "scaled", "heads", "key-set", "pointwise", "special-set"}
        | {"mirror", "routed-softmax", "every-pair"}
    )
    axes = (("K", "k"),)

    @property
    def routes(self) -> bool:
        return True

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        most = layout.tokens
        in_range(self, "k", self.options.k, 1, most, f"tokens (tokens {layout})")

    @classmethod
    def suggest(cls, layout: TokenLayout) -> dict[str, Value]:
        fits = TopkOptions.k <= layout.tokens
        return {} if fits else {"k": (layout.tokens + 1) // 2}  # the paper's share of the tokens

    def cost(self, site: SiteShape) -> Cost:
        n, k, d, dv = site.layout.tokens, self.options.k, site.head_dim, site.value_dim
        flops = product_flops(n, d, n) + product_flops(n, k, dv)
        # weights of keys that are not kept are zeros of a dense product
        return self._cost(site, flops, padding=product_flops(n, n - k, dv))

    def branch(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Branch:

        def best(rows: slice, logits: Tensor) -> Tensor:
            return keep_top(logits, logits.detach(), self.options.k)

        return attend_chosen(q, k, v, scale, best)

    @outside_autocast
    def route(self, q: Tensor, k: Tensor, *, layout: TokenLayout, scale: float) -> Routing | None:
        q, k = (x.contiguous() for x in working(q, k))
        best = [
            top_indices((q[:, :, rows] * scale) @ k.transpose(-1, -2), self.options.k)
            for rows in chunks(q.shape[2])
        ]
        members = torch.cat(best, dim=2)
        return Routing(members, own_choice(members))
