"""Agent attention, Han et al. 2024, Eq. 4, and the agent bias of its Sec. 4.2."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from formulas._case import (
    BARE,
    BOTH,
    DEEP,
    EVEN,
    PLAIN,
    TAIL,
    Case,
    Formula,
    Inputs,
    each_head,
    read,
    windows,
)
from mitaswap import TokenLayout


def agent(pool: tuple[int, int]) -> Formula:
    """softmax(Q A^T scale) softmax(A K^T scale) V, agents A pooled from the patch queries."""

    def formula(at: Inputs) -> Tensor:
        scale, layout = at.scale, at.layout

        def head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            agents = windows(q, layout.prefix, layout.grid, pool)
            gathered = torch.stack([read(row, k, v, [scale] * len(k)) for row in agents])
            return torch.stack([read(row, agents, gathered, [scale] * len(agents)) for row in q])

        return each_head(head, at.q, at.k, at.v)

    return formula


def at_place(image: Tensor, place: float, size: int, axis: int) -> Tensor:
    """Entry `place` of `size` along one axis of a map, bilinear between the centres of cells."""
    cells = image.shape[axis]
    y = max((place + 0.5) * cells / size - 0.5, 0.0)
    low = math.floor(y)
    high = min(low + 1, cells - 1)
    return image.select(axis, low) * (1 - (y - low)) + image.select(axis, high) * (y - low)


def biased(
    pool: tuple[int, int],
    special: bool = True,
    rows: bool = True,
    exchanged: bool = False,
    both_ways: bool = True,
) -> Formula:
    """softmax(Q A^T scale + B2) softmax(A K^T scale + B1) V.

    Args:
        pool: a x b windows, one agent each.
        special: whether special tokens have biases; they have none where none were at build.
        rows: False leaves the biases of rows out: a control.
        exchanged: True swaps the biases of the two softmaxes: a control.
        both_ways: False leaves B2 out: a control.
    """

    def formula(at: Inputs) -> Tensor:
        layout, p = at.layout, at.params
        h, w = layout.grid

        def bias(direction: str) -> Tensor:
            """B1 (direction keys) or B2 (queries) of every head, agent and token: [H, n, N]."""
            block, lines, stripes = (
                p[f"{direction}_{part}"] for part in ("block", "rows", "columns")
            )
            tokens = []
            for token in range(layout.tokens):
                r, c = divmod(token - layout.prefix, w)
                if 0 <= token - layout.prefix < h * w:
                    total = at_place(at_place(block, r, h, 2), c, w, 2)
                    if rows:
                        total = total + at_place(lines[..., 0], r, h, 2)
                    tokens.append(total + at_place(stripes[:, :, 0], c, w, 2))
                elif special:
                    tokens.append(p[f"{direction}_special"])
                else:
                    tokens.append(torch.zeros_like(block[..., 0, 0]))
            return torch.stack(tokens, dim=2)

        def attend(query: Tensor, keys: Tensor, values: Tensor, added: Tensor) -> Tensor:
            logits = at.scale * (keys * query).sum(1) + added
            weights = torch.exp(logits - logits.detach().max())
            return (weights[:, None] * values).sum(0) / weights.sum()

        first, second = (bias(name) for name in ("keys", "queries"))
        if exchanged:
            first, second = second, first
        if not both_ways:
            second = torch.zeros_like(second)
        batches = []
        for b in range(at.q.shape[0]):
            heads = []
            for n in range(at.q.shape[1]):
                q, k, v = at.q[b, n], at.k[b, n], at.v[b, n]
                agents = windows(q, layout.prefix, layout.grid, pool)
                gathered = torch.stack(
                    [attend(agent, k, v, first[n, i]) for i, agent in enumerate(agents)]
                )
                outputs = [
                    attend(row, agents, gathered, second[n, :, j]) for j, row in enumerate(q)
                ]
                heads.append(torch.stack(outputs))
            batches.append(torch.stack(heads))
        return torch.stack(batches)

    return formula


CASES = [
    Case("agent(n=1)", agent((1, 1))),
    Case("agent(n=15)", agent((3, 5)), DEEP),
    Case("agent(n=6)", agent((2, 3)), BOTH, 24, scale=0.25),
    Case("agent(n=8,pool=2x4)", agent((2, 4)), TAIL, 72),
    Case("agent(n=8,pool=4x2)", agent((4, 2)), TAIL),
    Case("agent(n=6,pool=2x3)", agent((2, 3)), BARE, 8, 0.25, "constant"),
    Case("agent(n=6,bias=true)", biased((2, 3))),
    Case("agent(n=6,bias=true)", biased((2, 3)), BARE, 24),
    Case("agent(n=8,pool=2x4,bias=true)", biased((2, 4)), BOTH, scale=0.25),
    Case("agent(n=1,bias=true)", biased((1, 1)), DEEP, 72),
    Case("agent(n=4,bias=true)", biased((2, 2)), TokenLayout(1, (8, 9), 1)),
    # the agents keep the windows of the grid that they were built for
    Case("agent(n=6,bias=true)", biased((2, 3)), BOTH, built=PLAIN),
    Case("agent(n=6,bias=true)", biased((3, 2)), DEEP, built=TokenLayout(5, (9, 8))),
    Case("agent(n=4,bias=true)", biased((4, 1)), EVEN, 24, built=TokenLayout(2, (8, 3))),
    Case("agent(n=6,bias=true)", biased((2, 3), special=False), TAIL, built=BARE),
    Case("agent(n=8,bias=true)", biased((2, 4)), TokenLayout(1, (7, 4)), built=BOTH),
    Case("agent(n=6,bias=true)", biased((2, 3)), TokenLayout(5, (5, 3)), built=DEEP),
    Case("agent(n=6,bias=true)", biased((2, 3)), BOTH, 8, 0.25, "constant"),
    # fewer rows or columns than windows: these overlap, and maps shrink
    Case("agent(n=8,bias=true)", biased((2, 4)), TokenLayout(1, (8, 3)), built=BOTH),
    Case("agent(bias=true)", biased((7, 7)), PLAIN, built=TokenLayout(1, (8, 7))),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "agents transposed": Case("agent(n=8,pool=2x4)", agent((4, 2)), TAIL),
    "bias without rows": Case("agent(n=6,bias=true)", biased((2, 3), rows=False)),
    "biases exchanged": Case("agent(n=6,bias=true)", biased((2, 3), exchanged=True)),
    "bias of one softmax": Case("agent(n=6,bias=true)", biased((2, 3), both_ways=False)),
    "no bias of special tokens": Case("agent(n=6,bias=true)", biased((2, 3), special=False)),
    "no bias": Case("agent(n=6,bias=true)", agent((2, 3))),
}
