"""Softmax attention, the baseline: every query reads every key."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mitaswap.mechanisms._base import MECHANISMS, Mechanism
from mitaswap.mechanisms._card import Card, Cost, SiteShape
from mitaswap.operators.chosen import chunks
from mitaswap.operators.counting import attend_flops
from mitaswap.operators.experts import Branch, attend
from mitaswap.tokens import TokenLayout


@MECHANISMS.register("standard")
class Standard(Mechanism):
    """Scaled dot-product attention, by PyTorch's own operator (so an identity swap is exact to the
    bit).
    """

    card = Card(
        strategy="none (N-wide MLP)",
        expert_type="MLP",
        expert_count="1",
        construction="all key-value pairs",
        topology="all-to-one",
        source="Vaswani et al. 2017, Eq. 1",
        cost="N^2 d",
        untrained="usable",
    )
    traits = frozenset(
        {"linear", "averages", "convex", "scaled", "heads"}
        | {"key-set", "pointwise", "special-set", "mirror", "every-pair"}
    )
    supports = frozenset({"bias", "causal", "dropout"})

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, **extra)

    def branch(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Branch:
        parts = [attend(q[:, :, rows], k, v, scale) for rows in chunks(q.shape[2])]
        out, lse = (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
        return out, lse

    def cost(self, site: SiteShape) -> Cost:
        n = site.layout.tokens
        return self._cost(site, attend_flops(n, n, site.head_dim, site.value_dim))
