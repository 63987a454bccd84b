"""Softmax attention, the baseline: every query reads every key."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mitaswap.mechanisms._base import MECHANISMS, Mechanism
from mitaswap.mechanisms._card import Card, Cost, SiteShape
from mitaswap.operators.chosen import attend_all
from mitaswap.operators.counting import attend_flops
from mitaswap.operators.experts import Branch
from mitaswap.tokens import TokenLayout


@MECHANISMS.register("standard")
class Standard(Mechanism):
    """O = softmax(Q K^T / sqrt(d)) V, by PyTorch's own operator, so that an identity swap is
    exact to the bit.
    """

    card = Card(
        strategy="none (N-wide MLP)",
        expert_type="MLP",
        expert_count="1",
        construction="all key-value pairs",
        topology="all-to-one",
        source="Vaswani et al. 2017, arXiv 1706.03762, Eq. 1",
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
        # PyTorch's default is not handed over: compiled code pays microseconds for an argument more
        if scale != 1.0 / math.sqrt(q.shape[3]):
            extra["scale"] = scale
        return F.scaled_dot_product_attention(q, k, v, **extra)

    def branch(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Branch:
        return attend_all(q, k, v, scale)

    def cost(self, site: SiteShape) -> Cost:
        n = site.layout.tokens
        return self._cost(site, attend_flops(n, n, site.head_dim, site.value_dim))
