"""Softmax attention, Vaswani et al. 2017, Eq. 1."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from formulas._case import BOTH, Case, Formula, Inputs, each_head, read


def standard() -> Formula:
    """softmax(Q K^T scale) V."""

    def formula(at: Inputs) -> Tensor:
        scale = at.scale

        def head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.stack([read(row, k, v, [scale] * len(k)) for row in q])

        return each_head(head, at.q, at.k, at.v)

    return formula


CASES = [
    Case("standard", standard()),
    Case("standard", standard(), BOTH, 24, scale=0.3),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "another scale": Case("standard", lambda at: standard()(replace(at, scale=1.01 * at.scale))),
}
