"""Mixture of block attention, Lu et al. 2025, Eq. 2 to 6, without the causal mask."""

from __future__ import annotations

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
    each_head,
    largest,
    read,
)
from mitaswap import TokenLayout


def runs(layout: TokenLayout, count: int) -> list[list[int]]:
    """Token positions of consecutive runs of the raster of patches."""
    patches = layout.patches
    bounds = [i * patches // count for i in range(count + 1)]
    return [[layout.prefix + n for n in range(bounds[i], bounds[i + 1])] for i in range(count)]


def windows(layout: TokenLayout, shape: tuple[int, int]) -> list[list[int]]:
    """Token positions of a x b windows of the grid, row by row; no patch is in two of them."""
    (h, w), (a, b) = layout.grid, shape
    blocks: list[list[int]] = [[] for _ in range(a * b)]
    for i in range(a):
        for r in range(i * h // a, (i + 1) * h // a):
            for j in range(b):
                for c in range(j * w // b, (j + 1) * w // b):
                    blocks[i * b + j].append(layout.prefix + r * w + c)
    return blocks


def moba(
    shape: int | tuple[int, int],
    routed: int,
    own: bool = True,
    pool_sum: bool = False,
    special_keys: bool = True,
) -> Formula:
    """Eq. 2 to 6.

    Args:
        shape: number of runs of the raster, or a x b windows of the grid.
        routed: k, blocks that a patch reads.
        own: whether a patch's own block is always one of them.
        pool_sum: True scores by the sum of a block's keys instead of their mean: a control.
        special_keys: False hides the special tokens from the patches: a control.
    """

    def formula(at: Inputs) -> Tensor:
        layout, scale = at.layout, at.scale
        blocks = runs(layout, shape) if isinstance(shape, int) else windows(layout, shape)
        home = {n: i for i, block in enumerate(blocks) for n in block}
        special = [n for n in range(layout.tokens) if n not in home]

        def head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            means = [sum(k[n] for n in block) for block in blocks]
            if not pool_sum:
                means = [x / len(block) for x, block in zip(means, blocks, strict=True)]
            rows = []
            for n in range(layout.tokens):
                if n in home:
                    scores = torch.stack([(q[n] * mean).sum() for mean in means]).detach()
                    if own:
                        scores[home[n]] = float("inf")
                    chosen = largest(scores, routed)
                    seen = [j for i in chosen for j in blocks[i]]
                    seen += special if special_keys else []
                else:
                    seen = list(range(layout.tokens))
                rows.append(read(q[n], k[seen], v[seen], [scale] * len(seen)))
            return torch.stack(rows)

        return each_head(head, at.q, at.k, at.v)

    return formula


CASES = [
    Case("moba(n=3,k=1)", moba(3, 1)),
    Case("moba(n=4,k=2)", moba(4, 2), TAIL, 24),
    Case("moba(n=4,k=3)", moba(4, 3), DEEP, 72),
    Case("moba(n=5,k=2)", moba(5, 2), BOTH),
    Case("moba(n=4,k=1)", moba(4, 1), BARE, 24, scale=0.7),
    Case("moba(n=5,k=5)", moba(5, 5), BOTH, scale=0.3),
    Case("moba(n=6,k=2,blocks=windows)", moba((2, 3), 2), BOTH),
    Case("moba(n=8,k=3,blocks=windows,pool=2x4)", moba((2, 4), 3), TAIL),
    Case("moba(n=6,k=3,blocks=windows)", moba((2, 3), 3), DEEP, scale=0.5),
    Case("moba(n=4,k=2,blocks=windows)", moba((2, 2), 2), EVEN, 8, 0.5, "constant"),
    Case("moba(n=3,k=1,own=false)", moba(3, 1, own=False)),
    Case("moba(n=4,k=2,own=false)", moba(4, 2, own=False), TAIL, 24),
    Case("moba(n=4,k=3,own=false)", moba(4, 3, own=False), DEEP, 72),
    Case("moba(n=5,k=5,own=false)", moba(5, 5, own=False), BOTH, scale=0.3),
    Case("moba(n=6,k=2,blocks=windows,own=false)", moba((2, 3), 2, own=False), BOTH),
    Case("moba(n=8,k=3,blocks=windows,pool=4x2,own=false)", moba((4, 2), 3, own=False), TAIL, 72),
    Case("moba(n=4,k=2,blocks=windows,own=false)", moba((2, 2), 2, own=False), EVEN),
    Case("moba(n=4,k=2,own=false)", moba(4, 2, own=False), BOTH, 8, 0.25, "constant"),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "one block more": Case("moba(n=4,k=2)", moba(4, 3)),
    "windows transposed": Case("moba(n=8,k=3,blocks=windows,pool=2x4)", moba((4, 2), 3), TAIL),
    "own block not guaranteed": Case("moba(n=4,k=2)", moba(4, 2, own=False)),
    "own block guaranteed": Case("moba(n=4,k=2,own=false)", moba(4, 2)),
    "sums of keys": Case("moba(n=4,k=2)", moba(4, 2, pool_sum=True), DEEP),
    "patches blind to special tokens": Case("moba(n=4,k=2)", moba(4, 2, special_keys=False)),
}
