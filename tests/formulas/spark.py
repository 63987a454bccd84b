"""Spark Attention, You et al. 2025: a low-dimensional predictor and statistical top-k."""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

from formulas._case import (
    BARE,
    BOTH,
    DEEP,
    TAIL,
    Case,
    Formula,
    Inputs,
    each_head,
    largest,
    read,
)


def above_threshold(scores: Tensor, count: int, spread: int = 1) -> list[int]:
    """Keys whose predicted score reaches mean + std * Q(1 - k / N): about k of N, were the scores
    normally distributed. `spread` is what is taken off N in the variance's denominator.
    """
    values = scores.tolist()
    total = len(values)
    if count == total:
        return list(range(total))
    mean = sum(values) / total
    variance = sum((value - mean) ** 2 for value in values) / (total - spread)
    threshold = mean + variance**0.5 * NormalDist().inv_cdf(1 - count / total)
    threshold = min(threshold, max(values))
    return [j for j in range(total) if values[j] >= threshold]


def spark(
    count: int,
    features: int,
    exact: bool = False,
    softplus: bool = True,
    normalised: bool = False,
    spread: int = 1,
) -> Formula:
    """softmax of the predictor over the kept keys, times softplus of the rest, applied to V.

    Args:
        count: k, keys per query.
        features: r, leading features that predict.
        exact: the k best keys instead of those above the statistical threshold.
        softplus: the paper's gate; False: one softmax of the whole logits.
        normalised: weights divided by their sum: not the paper, a control.
        spread: of `above_threshold`.
    """

    def formula(at: Inputs) -> Tensor:
        scale = at.scale

        def head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rows = []
            for row in q:
                predicted = scale * (k[:, :features] * row[:features]).sum(1)
                rest = scale * (k[:, features:] * row[features:]).sum(1)
                scores = predicted.detach()
                kept = largest(scores, count) if exact else above_threshold(scores, count, spread)
                if not softplus:
                    rows.append(read(row, k[kept], v[kept], [scale] * len(kept)))
                    continue
                weights = torch.exp(predicted[kept] - scores.max())
                weights = weights / weights.sum() * torch.log(1 + torch.exp(rest[kept]))
                if normalised:
                    weights = weights / weights.sum()
                rows.append((weights[:, None] * v[kept]).sum(0))
            return torch.stack(rows)

        return each_head(head, at.q, at.k, at.v)

    return formula


CASES = [
    Case("spark(k=5)", spark(5, 4)),
    Case("spark(k=5)", spark(5, 12), TAIL, 24),
    Case("spark(k=7,r=10)", spark(7, 10), DEEP, 72),
    Case("spark(k=1,r=3)", spark(1, 3), BARE, scale=0.7),
    Case("spark(k=16,r=3)", spark(16, 3)),
    Case("spark(k=14)", spark(14, 4), DEEP, scale=0.5),
    Case("spark(k=6,r=8)", spark(6, 8), BOTH),
    Case("spark(k=6,select=exact)", spark(6, 4, exact=True), BOTH),
    Case("spark(k=6,r=5,select=exact)", spark(6, 5, exact=True), BARE, 24, scale=0.3),
    Case("spark(k=5,gate=exp)", spark(5, 4, softplus=False), DEEP),
    Case("spark(k=9,r=2,gate=exp,select=exact)", spark(9, 2, True, False), TAIL, scale=0.6),
    Case("spark(k=7,r=8,gate=exp,select=exact)", spark(7, 8, True, False)),
    Case("spark(k=5)", spark(5, 4), TAIL, 8, 0.25, "constant"),
    Case("spark(k=5,select=exact)", spark(5, 4, exact=True), BOTH, 8, 0.25, "constant"),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "one feature more predicts": Case("spark(k=5)", spark(5, 5)),
    "exact top-k": Case("spark(k=5)", spark(5, 4, exact=True)),
    "biased variance": Case("spark(k=5)", spark(5, 4, spread=0), TAIL),
    "weights sum to one": Case("spark(k=5)", spark(5, 4, normalised=True)),
    "one key more": Case("spark(k=6,select=exact)", spark(7, 4, exact=True)),
}
