"""Native Sparse Attention, Yuan et al. 2025, Eq. 5 to 12, without causality."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from formulas._case import BARE, BOTH, DEEP, EVEN, TAIL, Case, Formula, Inputs, largest, read
from mitaswap import TokenLayout

#: a block: the tokens that it holds, each with its slot
Block = list[tuple[int, int]]


def window_blocks(layout: TokenLayout, side: int) -> list[Block]:
    """Disjoint windows of at most side x side patches."""
    h, w = layout.grid
    a, b = math.ceil(h / side), math.ceil(w / side)
    blocks = []
    for i in range(a):
        for j in range(b):
            top, left = i * h // a, j * w // b
            blocks.append(
                [
                    (layout.prefix + r * w + c, (r - top) * side + (c - left))
                    for r in range(top, (i + 1) * h // a)
                    for c in range(left, (j + 1) * w // b)
                ]
            )
    return blocks


def raster_blocks(layout: TokenLayout, side: int) -> list[Block]:
    """Runs of at most side * side patches."""
    count = math.ceil(layout.patches / (side * side))
    blocks = []
    for i in range(count):
        first, end = (n * layout.patches // count for n in (i, i + 1))
        blocks.append([(layout.prefix + t, t - first) for t in range(first, end)])
    return blocks


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def compressed(
    tokens: Tensor, block: Block, of: Mapping[str, Tensor], name: str, positions: bool
) -> Tensor:
    """phi: the block's mean, and what an MLP of its tokens and their places in it adds."""
    mean = sum((tokens[t] for t, _ in block), torch.zeros_like(tokens[0])) / len(block)
    if f"{name}.weight_in" not in of:
        return mean
    hidden = of[f"{name}.bias_in"]
    for t, slot in block:
        token = tokens[t] + of[f"{name}.position"][slot] if positions else tokens[t]
        hidden = hidden + of[f"{name}.weight_in"][:, slot, :] @ token
    return mean + of[f"{name}.weight_out"] @ gelu(hidden) + of[f"{name}.bias_out"]


def nsa(
    side: int,
    count: int,
    around: int,
    raster: bool = False,
    own: bool = True,
    shared: bool = False,
    special: bool = True,
    positions: bool = True,
) -> Formula:
    """o = g_cmp o_cmp + g_slc o_slc + g_win o_win for patches, softmax attention for special
    tokens.

    Args:
        side: of a block; count: blocks per query; around: side of the neighbourhood.
        raster: blocks and neighbourhoods along the raster.
        own: the query's own block is one of those selected.
        shared: one selection for all heads.
        special: False hides special tokens from the selected branch: a control.
        positions: False leaves out the places within blocks: a control.
    """

    def formula(at: Inputs) -> Tensor:
        layout, scale = at.layout, at.scale
        width = layout.grid[1]
        first, end = layout.prefix, layout.prefix + layout.patches
        specials = [*range(first), *range(end, layout.tokens)]
        blocks = raster_blocks(layout, side) if raster else window_blocks(layout, side)

        def near(query: int) -> list[int]:
            """Patches in the neighbourhood of a patch, itself among them."""
            found = []
            for other in range(first, end):
                if raster:
                    inside = 2 * abs(query - other) <= around * around - 1
                else:
                    rows = abs((query - first) // width - (other - first) // width)
                    columns = abs((query - first) % width - (other - first) % width)
                    inside = 2 * max(rows, columns) <= around - 1
                if inside:
                    found.append(other)
            return found

        def element(b: int) -> Tensor:
            heads = range(at.q.shape[1])
            small = [
                [
                    torch.stack(
                        [compressed(x[b, h], block, at.params, name, positions) for block in blocks]
                    )
                    for x, name in ((at.k, "key_map"), (at.v, "value_map"))
                ]
                for h in heads
            ]

            def attend(h: int, t: int, tokens: list[int]) -> Tensor:
                return read(
                    at.q[b, h, t], at.k[b, h, tokens], at.v[b, h, tokens], [scale] * len(tokens)
                )

            out: list[list[Tensor]] = [[] for _ in heads]
            for t in range(layout.tokens):
                if t in specials:
                    for h in heads:
                        out[h].append(attend(h, t, list(range(layout.tokens))))
                    continue
                importance = []
                for h in heads:
                    scores = scale * (small[h][0] * at.q[b, h, t]).sum(1).detach()
                    weights = torch.exp(scores - scores.max())
                    importance.append(weights / weights.sum())
                if shared:
                    importance = [sum(importance, torch.zeros_like(importance[0]))] * len(heads)
                for h in heads:
                    scores = importance[h].clone()
                    if own:
                        for m, block in enumerate(blocks):
                            if t in [token for token, _ in block]:
                                scores[m] = math.inf
                    selected = [token for m in largest(scores, count) for token, _ in blocks[m]]
                    keys = torch.cat([small[h][0], at.k[b, h, specials]])
                    values = torch.cat([small[h][1], at.v[b, h, specials]])
                    branches = [
                        read(at.q[b, h, t], keys, values, [scale] * len(keys)),
                        attend(h, t, selected + (specials if special else [])),
                        attend(h, t, near(t) + specials),
                    ]
                    total = torch.zeros_like(branches[0])
                    for c, branch in enumerate(branches):
                        row = 3 * h + c
                        gate = (at.params["gate_weight"][row] * at.x[b, t]).sum()
                        gate = gate + at.params["gate_bias"][row] - math.log(2)
                        total = total + branch / (1 + torch.exp(-gate))
                    out[h].append(total)
            return torch.stack([torch.stack(rows) for rows in out])

        return torch.stack([element(b) for b in range(at.q.shape[0])])

    return formula


CASES = [
    Case("nsa(block=2,k=2,window=3)", nsa(2, 2, 3)),
    Case("nsa(block=2,k=3,window=5)", nsa(2, 3, 5), TAIL, 24),
    Case("nsa(block=3,k=2,window=3)", nsa(3, 2, 3), BOTH, scale=0.6),
    Case("nsa(block=1,k=4,window=1)", nsa(1, 4, 1), DEEP),
    Case("nsa(block=2,k=6,window=3)", nsa(2, 6, 3), BARE),
    Case("nsa(block=2,k=1,window=3)", nsa(2, 1, 3), EVEN, 72),
    Case("nsa(block=2,k=2,window=3,own=false)", nsa(2, 2, 3, own=False), DEEP, scale=0.3),
    Case("nsa(block=2,choice=shared,k=2,window=3)", nsa(2, 2, 3, shared=True), BOTH),
    Case(
        "nsa(block=2,choice=shared,compress=mean,k=3,own=false,window=3)",
        nsa(2, 3, 3, own=False, shared=True),
        TAIL,
    ),
    Case("nsa(block=2,blocks=raster,k=2,window=3)", nsa(2, 2, 3, raster=True), BOTH),
    Case(
        "nsa(block=2,blocks=raster,compress=mean,k=2,own=false,window=1)",
        nsa(2, 2, 1, raster=True, own=False),
        BARE,
        24,
    ),
    Case("nsa(block=3,compress=mean,k=2,window=7)", nsa(3, 2, 7), TokenLayout(1, (5, 4), 2)),
    Case(
        "nsa(block=2,compress=mean,k=2,own=false,window=3)",
        nsa(2, 2, 3, own=False),
        BOTH,
        8,
        0.25,
        "constant",
    ),
    Case("nsa(block=2,k=2,window=3)", nsa(2, 2, 3), BOTH, built=TokenLayout(1, (3, 5))),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "one block more": Case("nsa(block=2,k=2,window=3)", nsa(2, 3, 3)),
    "own block not fixed": Case("nsa(block=2,k=2,window=3)", nsa(2, 2, 3, own=False), TAIL),
    "heads select together": Case("nsa(block=2,k=2,window=3)", nsa(2, 2, 3, shared=True), TAIL),
    "no positions in blocks": Case("nsa(block=2,k=2,window=3)", nsa(2, 2, 3, positions=False)),
    "selection without special tokens": Case(
        "nsa(block=2,k=2,window=3)", nsa(2, 2, 3, special=False)
    ),
}
