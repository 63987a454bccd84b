"""Native Sparse Attention, Yuan et al. 2025, Eq. 5 to 12, without causality."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from formulas._case import BARE, BOTH, DEEP, EVEN, TAIL, Case, Formula, Inputs, largest, read
from mitaswap import TokenLayout
from mitaswap.spec import Spec

#: a block: the tokens that it holds, each with its slot
Block = list[tuple[int, int]]


def reaches(length: int, span: int, stride: int) -> list[tuple[int, int]]:
    """Where compressed blocks start and end along one side: `stride` apart, or a little less, so
    that the last one ends with the side.
    """
    shared = min(span - stride, length - 1)
    count = math.ceil((length - shared) / stride)
    cuts = [i * (length - shared) // count for i in range(count + 1)]
    return [(cuts[i], cuts[i + 1] + shared) for i in range(count)]


def window_spans(layout: TokenLayout, span: int, stride: int) -> list[Block]:
    """Windows of at most span x span patches, which may overlap."""
    h, w = layout.grid
    return [
        [
            (layout.prefix + r * w + c, (r - top) * span + (c - left))
            for r in range(top, bottom)
            for c in range(left, right)
        ]
        for top, bottom in reaches(h, span, stride)
        for left, right in reaches(w, span, stride)
    ]


def raster_spans(layout: TokenLayout, span: int, stride: int) -> list[Block]:
    """Runs of at most span * span patches, which may overlap."""
    return [
        [(layout.prefix + t, t - first) for t in range(first, end)]
        for first, end in reaches(layout.patches, span * span, stride * stride)
    ]


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


def eq9(weights: Tensor, grid: tuple[int, int], span: int, stride: int, side: int) -> list[Tensor]:
    """Eq. 9 along both axes, on a grid that all sizes divide: p_slc[j] = sum_{m < l' / d} sum_{n <
    l / d} p_cmp[j l' / d - m - n], block j and the entries of p_cmp counted from 1.
    """
    h, w = grid
    compressed = weights.reshape((h - span) // stride + 1, (w - span) // stride + 1)
    found = []
    for down in range(1, h // side + 1):
        for across in range(1, w // side + 1):
            total = torch.zeros_like(weights[0])
            for m in itertools.product(range(side // stride), repeat=2):
                for n in itertools.product(range(span // stride), repeat=2):
                    row = down * side // stride - m[0] - n[0]
                    column = across * side // stride - m[1] - n[1]
                    if 1 <= row <= len(compressed) and 1 <= column <= compressed.shape[1]:
                        total = total + compressed[row - 1, column - 1]
            found.append(total)
    return found


def mapped(weights: Tensor, spans: list[Block], blocks: list[Block], how: str) -> list[Tensor]:
    """What Eq. 9 becomes where sizes do not divide: each compressed block's weight, times the part
    of its tokens that a selection block holds.

    Args:
        how: `part`; controls: `inside` takes those alone that lie within the block, `once` takes
            all that share a token with it, whole.
    """
    found = []
    for block in blocks:
        own = {t for t, _ in block}
        total = torch.zeros_like(weights[0])
        for weight, span in zip(weights, spans, strict=True):
            held = sum(t in own for t, _ in span)
            if how == "part":
                total = total + weight * held / len(span)
            elif held == len(span) or (how == "once" and held):
                total = total + weight
        found.append(total)
    return found


def nsa(
    side: int,
    count: int,
    around: int,
    span: int = 2,
    stride: int = 1,
    how: str = "part",
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
        span, stride: side of a compressed block, and from one to the next.
        how: `part` for importance by shared tokens, `printed` by Eq. 9 as it stands, or a control
            (`mapped`).
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
        of_runs = raster_spans if raster else window_spans
        spans = of_runs(layout, span, stride)

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
                        [compressed(x[h], block, at.params, name, positions) for block in spans]
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
                    if how == "printed":
                        sums = eq9(importance[h], layout.grid, span, stride, side)
                    else:
                        sums = mapped(importance[h], spans, blocks, how)
                    scores = torch.stack(sums)
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


def small(options: str) -> str:
    """A call string for small grids: unless others are given, compressed windows of 3 x 3 patches,
    2 apart, selected ones of 4 x 4, a neighbourhood of 5 x 5.
    """
    sizes = {"block": 4, "k": 6, "span": 3, "stride": 2, "window": 5, "blocks": "windows"}
    return str(Spec("nsa", {**sizes, **Spec.parse(f"nsa({options})").options}))


#: one projection for all branches, and of the blocks only the query's own is fixed
ONE = {"initial": 0, "local": 1, "apart": False}
FREE = {"initial": 0, "local": 0, "apart": False}
#: compressed and selected blocks are the same
SAME = {"span": 2, "stride": 2}
BIG = TokenLayout(1, (8, 12), 1)

CASES = [
    Case("nsa(k=4)", nsa(8, 4, 23, 6, 4, raster=True), TokenLayout(1, (14, 15)), 4),
    Case(small("block=2,k=4,window=3,span=2,stride=1"), nsa(2, 4, 3)),
    Case(small("block=2,k=5,window=5,span=2,stride=1"), nsa(2, 5, 5), TAIL, 24),
    Case(small("block=3,k=4,window=3,span=2,stride=1"), nsa(3, 4, 3), BOTH, scale=0.6),
    Case(small("block=1,k=5,window=1,span=1,stride=1"), nsa(1, 5, 1, 1, 1), DEEP),
    Case(small("block=2,k=6,window=3,span=4"), nsa(2, 6, 3, 4, 2), BARE),
    Case(small("block=2,k=3,window=3,span=4"), nsa(2, 3, 3, 4, 2), EVEN, 72),
    Case(small("k=5"), nsa(4, 5, 5, 3, 2), TokenLayout(1, (9, 10), 1), 4),
    # all sizes divide the grid: Eq. 9 as it is printed
    Case(small("k=5,span=4"), nsa(4, 5, 5, 4, 2, "printed"), BIG, 4),
    Case(
        small("k=2,first=0,local=0,projections=site,compress=mean,span=4"),
        nsa(4, 2, 5, 4, 2, "printed", **FREE),
        BIG,
        4,
        scale=1.5,
    ),
    Case(small("block=2,k=5,window=3,span=2,stride=1"), nsa(2, 5, 3, 2, 1, "printed"), EVEN),
    Case(
        small("block=2,k=2,window=3,span=2,stride=2,first=0,local=1,projections=site"),
        nsa(2, 2, 3, 2, 2, "printed", **ONE),
        EVEN,
        scale=2.0,
    ),
    Case(
        small("block=4,k=1,window=1,span=2,stride=1,first=0,local=0,projections=site"),
        nsa(4, 1, 1, 2, 1, "printed", **FREE),
        TokenLayout(0, (4, 8)),
    ),
    Case(
        small("block=2,choice=shared,k=4,window=3,span=3,stride=1"),
        nsa(2, 4, 3, 3, 1, shared=True),
        BOTH,
    ),
    Case(
        small("block=2,blocks=raster,k=4,window=3,span=2,stride=1"), nsa(2, 4, 3, raster=True), BOTH
    ),
    Case(
        small("block=3,compress=mean,k=3,window=7,span=3"),
        nsa(3, 3, 7, 3, 2),
        TokenLayout(1, (5, 4), 2),
    ),
    Case(
        small("block=2,k=4,window=3,span=3"),
        nsa(2, 4, 3, 3, 2),
        BOTH,
        built=TokenLayout(1, (3, 5)),
    ),
    # no side is as long as a span
    Case(small("block=2,k=4,window=3,span=6,stride=3"), nsa(2, 4, 3, 6, 3), built=EVEN),
    Case(small("block=2,k=4,window=3,local=1,span=4"), nsa(2, 4, 3, 4, 2, local=1), BOTH),
    Case(
        small("block=2,k=4,window=3,local=0,span=4"), nsa(2, 4, 3, 4, 2, local=0), DEEP, scale=0.3
    ),
    Case(small("block=2,k=4,window=3,local=3,span=2"), nsa(2, 4, 3, **SAME, local=3), TAIL),
    Case(small("block=2,k=3,window=3,first=0,span=2"), nsa(2, 3, 3, **SAME, initial=0), BOTH),
    Case(small("block=2,k=5,window=3,first=3,span=4"), nsa(2, 5, 3, 4, 2, initial=3), EVEN, 24),
    Case(
        small("block=2,k=6,window=3,first=2,local=4,span=2"),
        nsa(2, 6, 3, **SAME, initial=2, local=4),
        BOTH,
    ),
    Case(
        small("block=2,k=4,window=3,projections=site,compress=mean,span=2"),
        nsa(2, 4, 3, **SAME, apart=False),
        BOTH,
        8,
        0.25,
        "constant",
    ),
    Case(
        small("block=2,k=4,window=3,projections=site,choice=shared,span=2"),
        nsa(2, 4, 3, **SAME, shared=True, apart=False),
        TAIL,
        8,
        0.25,
        "constant",
    ),
    Case(
        small("block=2,k=3,window=3,compress=mean,first=0,local=0,span=2"),
        nsa(2, 3, 3, **SAME, initial=0, local=0),
        BOTH,
        scale=0.2,
        built=TokenLayout(1, (3, 5)),
    ),
    Case(
        small("block=2,k=2,window=3,first=0,local=1,projections=site,span=2"),
        nsa(2, 2, 3, **SAME, **ONE),
    ),
    Case(
        small("block=2,k=3,window=5,first=0,local=1,projections=site,span=3,stride=1"),
        nsa(2, 3, 5, 3, 1, **ONE),
        TAIL,
        24,
    ),
    Case(
        small("block=2,k=1,window=3,first=0,local=1,projections=site,span=4"),
        nsa(2, 1, 3, 4, 2, **ONE),
        EVEN,
        72,
    ),
    Case(
        small("block=2,blocks=raster,k=2,window=3,first=0,local=1,projections=site,span=2"),
        nsa(2, 2, 3, **SAME, raster=True, **ONE),
        BOTH,
        built=TokenLayout(1, (3, 5)),
    ),
    Case(
        small(
            "block=2,choice=shared,compress=mean,k=3,first=0,local=0,window=3,"
            "projections=site,span=4"
        ),
        nsa(2, 3, 3, 4, 2, shared=True, **FREE),
        TAIL,
    ),
    Case(
        small(
            "block=2,blocks=raster,compress=mean,k=2,first=0,local=0,window=1,projections=site,"
            "span=3"
        ),
        nsa(2, 2, 1, 3, 2, raster=True, **FREE),
        BARE,
        24,
    ),
    Case(
        small("block=2,compress=mean,k=2,first=0,local=0,window=3,projections=site,span=2"),
        nsa(2, 2, 3, **SAME, **FREE),
        BOTH,
        8,
        0.25,
        "constant",
    ),
    Case(
        small(
            "block=2,blocks=raster,k=2,window=3,first=2,local=0,compress=mean,"
            "projections=site,span=4"
        ),
        nsa(2, 2, 3, 4, 2, raster=True, initial=2, local=0, apart=False),
        BARE,
    ),
]

#: nothing fixed, so that importance decides alone
LONE = small("block=2,k=2,window=3,span=2,stride=1,first=0,local=0")
ALONE = {"initial": 0, "local": 0}

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "one block more": Case(small("block=2,k=4,window=3,span=2"), nsa(2, 5, 3, **SAME)),
    "own block not fixed": Case(
        small("block=2,k=2,window=3,first=0,local=1,span=2"),
        nsa(2, 2, 3, **SAME, initial=0, local=0),
        TAIL,
    ),
    "block before the own not fixed": Case(
        small("block=2,k=4,window=3,span=2"), nsa(2, 4, 3, **SAME, local=1), BOTH
    ),
    "one more local block": Case(
        small("block=2,k=5,window=3,span=2"), nsa(2, 5, 3, **SAME, local=3), BOTH
    ),
    "heads select together": Case(
        small("block=2,k=4,window=3,span=2"), nsa(2, 4, 3, **SAME, shared=True), TAIL
    ),
    "no positions in blocks": Case(
        small("block=2,k=4,window=3,span=2"), nsa(2, 4, 3, **SAME, positions=False)
    ),
    "selection without special tokens": Case(
        small("block=2,k=4,window=3,span=2"), nsa(2, 4, 3, **SAME, special=False)
    ),
    "first block not fixed": Case(
        small("block=2,k=3,window=3,span=2"), nsa(2, 3, 3, **SAME, initial=0), BOTH
    ),
    "one more block fixed": Case(
        small("block=2,k=5,window=3,span=2"), nsa(2, 5, 3, **SAME, initial=2), EVEN
    ),
    "one projection for all branches": Case(
        small("block=2,k=4,window=3,span=2"), nsa(2, 4, 3, **SAME, apart=False)
    ),
    "special queries read a branch's projection": Case(
        small("block=2,k=4,window=3,span=2"), nsa(2, 4, 3, **SAME, plain_queries=False)
    ),
    "compressed blocks side by side": Case(LONE, nsa(2, 2, 3, 2, 2, **ALONE), BOTH),
    "only compressed blocks within": Case(LONE, nsa(2, 2, 3, how="inside", **ALONE), BOTH),
    "each compressed block once": Case(LONE, nsa(2, 2, 3, how="once", **ALONE), BOTH),
}
