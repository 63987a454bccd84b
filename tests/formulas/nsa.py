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
    local: int = 2,
    shared: bool = False,
    special: bool = True,
    positions: bool = True,
    initial: int = 1,
    apart: bool = True,
    plain_queries: bool = True,
) -> Formula:
    """o = g_cmp o_cmp + g_slc o_slc + g_win o_win for patches, softmax attention for special
    tokens.

    Args:
        side: of a block; count: blocks per query; around: side of the neighbourhood.
        raster: blocks and neighbourhoods along the raster.
        local: number of blocks up to the query's own, itself among them, that it selects.
        shared: one selection for all heads.
        special: False hides special tokens from the selected branch: a control.
        positions: False leaves out the places within blocks: a control.
        initial: number of blocks, from the first, that every query selects.
        apart: each branch has its own keys and values, maps of those of all heads.
        plain_queries: False lets special queries read the last branch's own: a control.
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

        def projected(x: Tensor, name: str, number: int) -> Tensor:
            """A branch's keys or values x [H, N, D]: channels of all heads times its own map."""
            if not apart:
                return x
            weight, width = at.params[f"{name}_projections.weight"][number], x.shape[2]
            tokens = []
            for t in range(x.shape[1]):
                whole = torch.cat([x[h, t] for h in range(x.shape[0])])
                mapped = torch.stack([(whole * column).sum() for column in weight.T])
                tokens.append(torch.stack(mapped.split(width)))
            return torch.stack(tokens, dim=1)

        def element(b: int) -> Tensor:
            heads = range(at.q.shape[1])
            keys_of = [projected(at.k[b], "key", n) for n in range(3)]
            values_of = [projected(at.v[b], "value", n) for n in range(3)]
            small = [
                [
                    torch.stack(
                        [compressed(x[h], block, at.params, name, positions) for block in blocks]
                    )
                    for x, name in ((keys_of[0], "key_map"), (values_of[0], "value_map"))
                ]
                for h in heads
            ]

            def attend(h: int, t: int, tokens: list[int], number: int | None = None) -> Tensor:
                k, v = (
                    (at.k[b], at.v[b]) if number is None else (keys_of[number], values_of[number])
                )
                return read(at.q[b, h, t], k[h, tokens], v[h, tokens], [scale] * len(tokens))

            out: list[list[Tensor]] = [[] for _ in heads]
            for t in range(layout.tokens):
                if t in specials:
                    for h in heads:
                        number = None if plain_queries else 2
                        out[h].append(attend(h, t, list(range(layout.tokens)), number))
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
                    for m in range(initial):
                        scores[m] = math.inf
                    for m, block in enumerate(blocks):
                        if t in [token for token, _ in block]:
                            for other in range(max(m - local + 1, 0), m + 1):
                                scores[other] = math.inf
                    selected = [token for m in largest(scores, count) for token, _ in blocks[m]]
                    keys = torch.cat([small[h][0], keys_of[0][h, specials]])
                    values = torch.cat([small[h][1], values_of[0][h, specials]])
                    branches = [
                        read(at.q[b, h, t], keys, values, [scale] * len(keys)),
                        attend(h, t, selected + (specials if special else []), 1),
                        attend(h, t, near(t) + specials, 2),
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


#: one projection for all branches, and of the blocks only the query's own is fixed
ONE = {"initial": 0, "local": 1, "apart": False}
FREE = {"initial": 0, "local": 0, "apart": False}

CASES = [
    Case("nsa(block=2,k=4,window=3)", nsa(2, 4, 3)),
    Case("nsa(block=2,k=5,window=5)", nsa(2, 5, 5), TAIL, 24),
    Case("nsa(block=3,k=4,window=3)", nsa(3, 4, 3), BOTH, scale=0.6),
    Case("nsa(block=1,k=5,window=1)", nsa(1, 5, 1), DEEP),
    Case("nsa(block=2,k=6,window=3)", nsa(2, 6, 3), BARE),
    Case("nsa(block=2,k=3,window=3)", nsa(2, 3, 3), EVEN, 72),
    Case("nsa(block=2,choice=shared,k=4,window=3)", nsa(2, 4, 3, shared=True), BOTH),
    Case("nsa(block=2,blocks=raster,k=4,window=3)", nsa(2, 4, 3, raster=True), BOTH),
    Case("nsa(block=3,compress=mean,k=3,window=7)", nsa(3, 3, 7), TokenLayout(1, (5, 4), 2)),
    Case("nsa(block=2,k=4,window=3)", nsa(2, 4, 3), BOTH, built=TokenLayout(1, (3, 5))),
    Case("nsa(block=2,k=4,window=3,local=1)", nsa(2, 4, 3, local=1), BOTH),
    Case("nsa(block=2,k=4,window=3,local=0)", nsa(2, 4, 3, local=0), DEEP, scale=0.3),
    Case("nsa(block=2,k=4,window=3,local=3)", nsa(2, 4, 3, local=3), TAIL),
    Case("nsa(block=2,k=3,window=3,first=0)", nsa(2, 3, 3, initial=0), BOTH),
    Case("nsa(block=2,k=5,window=3,first=3)", nsa(2, 5, 3, initial=3), EVEN, 24),
    Case("nsa(block=2,k=6,window=3,first=2,local=4)", nsa(2, 6, 3, initial=2, local=4), BOTH),
    Case(
        "nsa(block=2,k=4,window=3,projections=site,compress=mean)",
        nsa(2, 4, 3, apart=False),
        BOTH,
        8,
        0.25,
        "constant",
    ),
    Case(
        "nsa(block=2,k=4,window=3,projections=site,choice=shared)",
        nsa(2, 4, 3, shared=True, apart=False),
        TAIL,
        8,
        0.25,
        "constant",
    ),
    Case(
        "nsa(block=2,k=3,window=3,compress=mean,first=0,local=0)",
        nsa(2, 3, 3, initial=0, local=0),
        BOTH,
        scale=0.2,
        built=TokenLayout(1, (3, 5)),
    ),
    Case("nsa(block=2,k=2,window=3,first=0,local=1,projections=site)", nsa(2, 2, 3, **ONE)),
    Case(
        "nsa(block=2,k=3,window=5,first=0,local=1,projections=site)",
        nsa(2, 3, 5, **ONE),
        TAIL,
        24,
    ),
    Case(
        "nsa(block=2,k=1,window=3,first=0,local=1,projections=site)",
        nsa(2, 1, 3, **ONE),
        EVEN,
        72,
    ),
    Case(
        "nsa(block=2,blocks=raster,k=2,window=3,first=0,local=1,projections=site)",
        nsa(2, 2, 3, raster=True, **ONE),
        BOTH,
        built=TokenLayout(1, (3, 5)),
    ),
    Case(
        "nsa(block=2,choice=shared,compress=mean,k=3,first=0,local=0,window=3,projections=site)",
        nsa(2, 3, 3, shared=True, **FREE),
        TAIL,
    ),
    Case(
        "nsa(block=2,blocks=raster,compress=mean,k=2,first=0,local=0,window=1,projections=site)",
        nsa(2, 2, 1, raster=True, **FREE),
        BARE,
        24,
    ),
    Case(
        "nsa(block=2,compress=mean,k=2,first=0,local=0,window=3,projections=site)",
        nsa(2, 2, 3, **FREE),
        BOTH,
        8,
        0.25,
        "constant",
    ),
    Case(
        "nsa(block=2,blocks=raster,k=2,window=3,first=2,local=0,compress=mean,projections=site)",
        nsa(2, 2, 3, raster=True, initial=2, local=0, apart=False),
        BARE,
    ),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "one block more": Case("nsa(block=2,k=4,window=3)", nsa(2, 5, 3)),
    "own block not fixed": Case(
        "nsa(block=2,k=2,window=3,first=0,local=1)", nsa(2, 2, 3, initial=0, local=0), TAIL
    ),
    "block before the own not fixed": Case(
        "nsa(block=2,k=4,window=3)", nsa(2, 4, 3, local=1), BOTH
    ),
    "one more local block": Case("nsa(block=2,k=5,window=3)", nsa(2, 5, 3, local=3), BOTH),
    "heads select together": Case("nsa(block=2,k=4,window=3)", nsa(2, 4, 3, shared=True), TAIL),
    "no positions in blocks": Case("nsa(block=2,k=4,window=3)", nsa(2, 4, 3, positions=False)),
    "selection without special tokens": Case(
        "nsa(block=2,k=4,window=3)", nsa(2, 4, 3, special=False)
    ),
    "first block not fixed": Case("nsa(block=2,k=3,window=3)", nsa(2, 3, 3, initial=0), BOTH),
    "one more block fixed": Case("nsa(block=2,k=5,window=3)", nsa(2, 5, 3, initial=2), EVEN),
    "one projection for all branches": Case("nsa(block=2,k=4,window=3)", nsa(2, 4, 3, apart=False)),
    "special queries read a branch's projection": Case(
        "nsa(block=2,k=4,window=3)", nsa(2, 4, 3, plain_queries=False)
    ),
}
