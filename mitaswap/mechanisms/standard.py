"""Softmax attention, the baseline: every query reads every key."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mitaswap.mechanisms._base import MECHANISMS, Card, Mechanism
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
    )
    supports = frozenset({"bias", "causal", "dropout"})

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, **extra)
