"""Queries of special tokens at full softmax attention, all others by the inner mechanism."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from formulas._case import BARE, BOTH, DEEP, TAIL, Case, Formula, Inputs
from formulas.agent import agent
from formulas.linear import elu_plus_one, linear
from formulas.mita import mita
from formulas.standard import standard


def prefix(inner: Callable[[Inputs], Tensor], behind: bool = True) -> Formula:
    """Token by token; `behind=False` forgets the suffix."""

    def formula(at: Inputs) -> Tensor:
        one, other, rows = inner(at), standard()(at), []
        first, last = at.layout.prefix, at.layout.prefix + at.layout.grid[0] * at.layout.grid[1]
        for n in range(at.q.shape[2]):
            special = n < first or (behind and n >= last)
            rows.append(other[:, :, n] if special else one[:, :, n])
        return torch.stack(rows, dim=2)

    return formula


CASES = [
    Case("linear+prefix", prefix(linear(elu_plus_one))),
    Case("linear+prefix", prefix(linear(elu_plus_one)), BARE),
    Case("linear+prefix", prefix(linear(elu_plus_one)), BOTH, 24, scale=0.3),
    Case("agent(n=6)+prefix", prefix(agent((2, 3))), DEEP),
    Case("mita(m=6,k=5)+prefix", prefix(mita((2, 3), 5)), TAIL),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "suffix forgotten": Case("linear+prefix", prefix(linear(elu_plus_one), behind=False), BOTH),
    "nothing kept": Case("linear+prefix", linear(elu_plus_one)),
}
