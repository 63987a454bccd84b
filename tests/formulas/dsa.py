"""DeepSeek Sparse Attention, DeepSeek-AI 2025, Eq. 1-2: a lightning indexer picks the keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from formulas._case import BARE, BOTH, DEEP, TAIL, Case, Formula, Inputs, largest
from mitaswap import TokenLayout


def normalised(key: Tensor, gain: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm of one index key."""
    centred = key - key.sum() / len(key)
    return centred / torch.sqrt((centred * centred).sum() / len(key) + eps) * gain + bias


def turned(row: Tensor, place: tuple[int, int] | None, one_axis: bool) -> Tensor:
    """Half of the channels in pairs, a complex number each, times exp(i angle): the pairs of the
    first quarter by the row, those of the second by the column.
    """
    if place is None:
        return row
    size, channels = len(row) // 8, list(row)
    for axis in (0, 1):
        for i in range(size):
            angle = place[0 if one_axis else axis] * 100 ** (-i / size)
            at = 2 * (axis * size + i)
            real, imaginary = row[at], row[at + 1]
            channels[at] = real * math.cos(angle) - imaginary * math.sin(angle)
            channels[at + 1] = real * math.sin(angle) + imaginary * math.cos(angle)
    return torch.stack(channels)


def dsa(
    count: int,
    index_heads: int,
    from_x: bool = False,
    norm: bool = False,
    rectified: bool = True,
    rope: bool = False,
    one_axis: bool = False,
    keys_turned: bool = True,
) -> Formula:
    """softmax over the k keys of largest I = sum_j w_j ReLU(q^I_j . k^I), the same for all heads.

    Args:
        count: k, keys per query.
        index_heads: heads of the indexer.
        from_x: the indexer reads the module's input, not the heads' queries and keys.
        norm: LayerNorm of the index keys.
        rectified: False leaves ReLU out: not the paper, a control.
        rope: index queries and keys turned by their place on the grid.
        one_axis: by the row alone: a control.
        keys_turned: False turns queries alone: a control.
    """

    def formula(at: Inputs) -> Tensor:
        q, k, v, of = at.q, at.k, at.v, at.params
        first, (h, w) = at.layout.prefix, at.layout.grid

        def place(token: int) -> tuple[int, int] | None:
            patch = token - first
            return (patch // w, patch % w) if rope and 0 <= patch < h * w else None

        batches = []
        for b in range(q.shape[0]):
            out: list[list[Tensor]] = [[] for _ in range(q.shape[1])]
            tokens = range(q.shape[2])
            if from_x:
                asking = asked = [at.x[b, t].detach() for t in tokens]
            else:  # heads side by side
                asking = [torch.cat([head[t] for head in q[b]]).detach() for t in tokens]
                asked = [torch.cat([head[t] for head in k[b]]).detach() for t in tokens]
            index_keys = [of["index_keys"] @ token for token in asked]
            if norm:
                index_keys = [
                    normalised(key, of["norm_weight"], of["norm_bias"]) for key in index_keys
                ]
            if keys_turned:
                index_keys = [turned(x, place(t), one_axis) for t, x in enumerate(index_keys)]
            stacked = torch.stack(index_keys)
            size = stacked.shape[1]
            for t in tokens:
                index = torch.zeros(len(tokens), dtype=q.dtype)
                for j in range(index_heads):
                    query = of["index_queries"][j * size : (j + 1) * size] @ asking[t]
                    query = turned(query, place(t), one_axis)
                    match = (stacked * query).sum(1)
                    if rectified:
                        match = torch.where(match > 0, match, torch.zeros_like(match))
                    gate = (of["head_weights"][j] * asking[t]).sum() + of["head_bias"][j]
                    index = index + gate * match
                kept = largest(index.detach(), count)
                for n in range(q.shape[1]):
                    logits = at.scale * (k[b, n, kept] * q[b, n, t]).sum(1)
                    logits = logits + index[kept] - index[kept].detach()  # zero, for its gradient
                    weights = torch.exp(logits - logits.detach().max())
                    weights = weights / weights.sum()
                    out[n].append((weights[:, None] * v[b, n, kept]).sum(0))
            batches.append(torch.stack([torch.stack(rows) for rows in out]))
        return torch.stack(batches)

    return formula


CASES = [
    Case("dsa(k=5)", dsa(5, 3)),
    Case("dsa(k=7,index_dim=16)", dsa(7, 3), TAIL, 24),
    Case("dsa(k=6,index_heads=1,index_dim=8)", dsa(6, 1), DEEP),
    Case("dsa(k=6,index_heads=2)", dsa(6, 2), BOTH, scale=0.6),
    Case("dsa(k=4,index_heads=5,index_dim=3)", dsa(4, 5), BARE, 72),
    # one key has weight one: gradients of the indexer are zero but for rounding
    Case("dsa(k=1,index_dim=5)", dsa(1, 3), BARE, scale=0.2, room=1e-9),
    Case("dsa(k=16)", dsa(16, 3)),
    Case("dsa(k=5,norm=true,index_dim=12)", dsa(5, 3, norm=True), DEEP, 24, scale=0.3),
    Case("dsa(k=5,index_from=x)", dsa(5, 3, from_x=True)),
    Case("dsa(k=8,index_from=x,index_heads=2,index_dim=9)", dsa(8, 2, from_x=True), BOTH),
    Case("dsa(k=6,norm=true,index_from=x,seed=3)", dsa(6, 3, from_x=True, norm=True), TAIL),
    Case("dsa(k=5,rope=true,index_dim=16)", dsa(5, 3, rope=True), BOTH),
    Case("dsa(k=6,rope=true,index_dim=11,index_heads=2)", dsa(6, 2, rope=True), BARE, 24),
    Case(
        "dsa(k=7,rope=true,norm=true,index_from=x)",
        dsa(7, 3, from_x=True, norm=True, rope=True),
        DEEP,
        built=TokenLayout(5, (4, 4)),
    ),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "one key more": Case("dsa(k=5)", dsa(6, 3)),
    "no ReLU": Case("dsa(k=5)", dsa(5, 3, rectified=False)),
    "one index head fewer": Case("dsa(k=5)", dsa(5, 2)),
    "no norm": Case("dsa(k=5,norm=true)", dsa(5, 3)),
    "no rotation": Case("dsa(k=5,rope=true)", dsa(5, 3)),
    "columns without rotation": Case("dsa(k=5,rope=true)", dsa(5, 3, rope=True, one_axis=True)),
    "queries alone turned": Case("dsa(k=5,rope=true)", dsa(5, 3, rope=True, keys_turned=False)),
}
