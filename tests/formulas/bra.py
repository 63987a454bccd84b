"""Bi-level routing attention (BiFormer), Zhu et al. 2023, Eq. 3 to 7, without the convolution."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from formulas._case import (
    BARE,
    BOTH,
    DEEP,
    EVEN,
    TAIL,
    Case,
    Formula,
    Inputs,
    largest,
    read,
)
from mitaswap import TokenLayout


def regions(layout: TokenLayout, shape: tuple[int, int]) -> list[list[int]]:
    """Token positions of each of the a x b regions, row by row; no patch is in two of them."""
    (h, w), (a, b) = layout.grid, shape
    found = []
    for i in range(a):
        for j in range(b):
            rows = range(i * h // a, (i + 1) * h // a)
            columns = range(j * w // b, (j + 1) * w // b)
            found.append([layout.prefix + r * w + c for r in rows for c in columns])
    return found


def bra(
    shape: tuple[int, int],
    routed: int,
    shared: bool = True,
    special_keys: bool = True,
    plain_special: bool = True,
    wide: bool = False,
    wide_special: bool = True,
) -> Formula:
    """Eq. 3 to 7.

    Args:
        shape: a x b regions.
        routed: k, regions that the patches of a region read.
        shared: one region graph for all heads, by the inner product over the full width.
        special_keys: False hides the special tokens from the patches: a control.
        plain_special: False lets special tokens read special tokens alone: a control.
        wide: logits over the square root of the width of all heads, not of one.
        wide_special: False scales the special tokens' own logits as without `wide`: a control.
    """

    def formula(at: Inputs) -> Tensor:
        layout, scale = at.layout, at.scale
        held = regions(layout, shape)
        patches = [n for region in held for n in region]
        special = [n for n in range(layout.tokens) if n not in patches]

        def graph(q: Tensor, k: Tensor) -> list[list[int]]:
            """Adjacency of the regions from q, k [N, width], Eq. 3 to 5."""
            queries = [sum(q[n] for n in region) / len(region) for region in held]
            keys = [sum(k[n] for n in region) / len(region) for region in held]
            affinity = [torch.stack([(row * column).sum() for column in keys]) for row in queries]
            return [largest(row.detach(), routed) for row in affinity]

        batches = []
        for q, k, v in zip(at.q, at.k, at.v, strict=True):
            heads = []
            for h in range(q.shape[0]):
                if shared:  # heads side by side: [N, H * D]
                    adjacency = graph(q.transpose(0, 1).flatten(1), k.transpose(0, 1).flatten(1))
                else:
                    adjacency = graph(q[h], k[h])
                seen: dict[int, list[int]] = {
                    n: list(range(layout.tokens)) if plain_special else special for n in special
                }
                for region, others in zip(held, adjacency, strict=True):
                    gathered = [n for other in others for n in held[other]]
                    for n in region:
                        seen[n] = gathered + (special if special_keys else [])
                rows = []
                for n in range(layout.tokens):
                    factor = scale
                    if wide and (wide_special or n not in special):
                        factor = scale * math.sqrt(q.shape[2]) / math.sqrt(q.shape[0] * q.shape[2])
                    factors = [factor] * len(seen[n])
                    rows.append(read(q[h, n], k[h, seen[n]], v[h, seen[n]], factors))
                heads.append(torch.stack(rows))
            batches.append(torch.stack(heads))
        return torch.stack(batches)

    return formula


CASES = [
    Case("bra(n=6,k=2)", bra((2, 3), 2)),
    Case("bra(n=6,k=3)", bra((2, 3), 3), TAIL, 24),
    Case("bra(n=4,k=1)", bra((2, 2), 1), DEEP, 72),
    Case("bra(n=15,k=4)", bra((3, 5), 4), BARE, scale=0.7),
    Case("bra(n=6,k=6)", bra((2, 3), 6), BOTH),
    Case("bra(n=1,k=1)", bra((1, 1), 1), DEEP),
    Case("bra(n=8,k=3,pool=2x4)", bra((2, 4), 3), TAIL),
    Case("bra(n=8,k=3,pool=4x2)", bra((4, 2), 3), TAIL, scale=0.25),
    Case("bra(n=6,k=2,graph=per-head)", bra((2, 3), 2, shared=False), BOTH),
    Case("bra(n=8,k=3,pool=2x4,graph=per-head)", bra((2, 4), 3, shared=False), EVEN, 24, 0.4),
    Case("bra(n=6,k=2)", bra((2, 3), 2), BOTH, 8, 0.25, "constant"),
    Case("bra(n=6,k=4,graph=per-head)", bra((2, 3), 4, shared=False), TAIL, 8, 0.5, "constant"),
    Case("bra(n=6,k=2,scale=width)", bra((2, 3), 2, wide=True), BOTH),
    Case("bra(n=15,k=4,scale=width)", bra((3, 5), 4, wide=True), BARE, 24, 0.7),
    Case(
        "bra(n=8,k=3,pool=2x4,graph=per-head,scale=width)",
        bra((2, 4), 3, shared=False, wide=True),
        TAIL,
    ),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "regions transposed": Case("bra(n=8,k=3,pool=2x4)", bra((4, 2), 3), TAIL),
    "one region fewer": Case("bra(n=6,k=3)", bra((2, 3), 2)),
    "a graph for each head": Case("bra(n=6,k=2)", bra((2, 3), 2, shared=False), BOTH),
    "patches blind to special tokens": Case("bra(n=6,k=2)", bra((2, 3), 2, special_keys=False)),
    "special tokens among themselves": Case(
        "bra(n=6,k=2)", bra((2, 3), 2, plain_special=False), DEEP
    ),
    "the site's scale": Case("bra(n=6,k=2,scale=width)", bra((2, 3), 2), BOTH),
    "the width's scale": Case("bra(n=6,k=2)", bra((2, 3), 2, wide=True), BARE),
    "special queries at the site's scale": Case(
        "bra(n=6,k=2,scale=width)", bra((2, 3), 2, wide=True, wide_special=False), DEEP
    ),
}
