"""Linear attention, Katharopoulos et al. 2020, and efficient attention, Shen et al. 2021."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from formulas._case import BARE, BOTH, DEEP, TAIL, Case, Formula, Inputs, each_head


def elu_plus_one(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, torch.exp(torch.minimum(x, torch.zeros_like(x))))


def positive(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.zeros_like(x))


def over_width(x: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm without gain over the full width: all heads' features of one token together."""
    batches = []
    for element in x:
        tokens = []
        for n in range(x.shape[2]):
            token = element[:, n]  # [H, D], the whole width
            tokens.append(token / torch.sqrt((token * token).sum() / token.numel() + eps))
        batches.append(torch.stack(tokens, dim=1))
    return torch.stack(batches)


def linear(feature: Callable[[Tensor], Tensor], norm: bool = False, eps: float = 1e-6) -> Formula:
    """Katharopoulos et al.: sum_j (phi(q) . phi(k_j)) v_j / (sum_j phi(q) . phi(k_j) + eps)."""

    def formula(at: Inputs) -> Tensor:
        q, k = at.q * (at.scale * math.sqrt(at.q.shape[3])), at.k

        def head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rows = []
            for row in q:
                weights = (feature(k) * feature(row)).sum(1)
                rows.append((weights[:, None] * v).sum(0) / (weights.sum() + eps))
            return torch.stack(rows)

        if norm:
            q, k = over_width(q), over_width(k)
        return each_head(head, q, k, at.v)

    return formula


def efficient() -> Formula:
    """Shen et al.: softmax of each query over its features, of each key feature over the tokens."""

    def formula(at: Inputs) -> Tensor:
        def head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mass = torch.exp(k)
            mass = mass / mass.sum(0)
            rows = []
            for row in q:
                features = torch.exp(row) / torch.exp(row).sum()
                rows.append(((mass * features).sum(1)[:, None] * v).sum(0))
            return torch.stack(rows)

        return each_head(head, at.q * (at.scale * math.sqrt(at.q.shape[3])), at.k, at.v)

    return formula


CASES = [
    Case("linear", linear(elu_plus_one)),
    Case("linear", linear(elu_plus_one), TAIL, 24, scale=0.31),
    Case("linear(eps=0.5)", linear(elu_plus_one, eps=0.5), BARE),
    Case("linear(feature=relu)", linear(positive), DEEP, 24),
    Case("linear(feature=relu)", linear(positive), BARE, scale=0.9),
    Case("linear(feature=softmax)", efficient(), BOTH, 8),
    Case("linear(feature=softmax)", efficient(), BARE, 24, scale=0.41),
    Case("linear(feature=relu,norm=rms)", linear(positive, norm=True), BOTH),
    Case("linear(norm=rms)", linear(elu_plus_one, norm=True), DEEP, 72, scale=0.2),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "another feature map": Case("linear", linear(positive)),
    "another eps": Case("linear(feature=relu)", linear(positive, eps=1e-3)),
    "no norm": Case("linear(norm=rms)", linear(elu_plus_one)),
}
