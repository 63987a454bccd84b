"""Deformable attention transformer (DAT), Xia et al. 2022, Sec. 3.2."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from formulas._case import BARE, DEEP, PLAIN, Case, Formula, Inputs, read
from mitaswap import TokenLayout


def near(place: Tensor, cells: int) -> Tensor:
    """Linear interpolation along one side: the share of every cell at a place, [cells]."""
    return (1 - (place - torch.arange(cells)).abs()).clamp(min=0)


def bilinear(values: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """The map [h, w, D] between its cells: four neighbours, zeros outside."""
    shares = near(row, values.shape[0])[:, None] * near(column, values.shape[1])
    return (shares[:, :, None] * values).sum((0, 1))


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def normalised(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Layer norm of one vector."""
    centred = x - x.sum() / len(x)
    return centred / ((centred**2).sum() / len(x) + 1e-5).sqrt() * gain + bias


def dat(
    stride: int = 2,
    groups: int = 1,
    kernel: int = 5,
    reach: float = 2.0,
    half_cell: bool = False,
    norm: bool = False,
    bias: bool = True,
    limit: bool = True,
    table_mirrored: bool = False,
    one_set: bool = False,
    special: bool = True,
) -> Formula:
    """Reference points, moved by an offset network on the queries; sampled keys, one softmax.

    Args:
        stride: patches for each reference point, r.
        groups: groups of heads, each with points of its own.
        kernel: of the offset network's depth-wise convolution.
        reach: s of the tanh that bounds the offsets; 0 clamps the points to the grid instead.
        half_cell: the released code's reference points.
        norm: the released code's layer norm.
        bias: relative position bias.
        limit: False leaves out the tanh: not the paper, a control.
        table_mirrored: the bias reads key minus query: a control.
        one_set: all heads read the first group's points: a control.
        special: False keeps special tokens from the patches' softmax: a control.
    """

    def reference(index: int, count: int) -> float:
        if count == 1:
            return 0.0
        return 2 * (index + 0.5 * half_cell) / (count - 1) - 1

    def formula(at: Inputs) -> Tensor:
        layout, scale, p = at.layout, at.scale, at.params
        height, width = layout.grid
        sizes = (math.ceil(height / stride), math.ceil(width / stride))
        first, last = layout.prefix, layout.prefix + layout.patches
        others = [*range(first), *range(last, layout.tokens)]
        batch, heads, _, dim = at.q.shape
        members = heads // groups

        def points(b: int, group: int) -> list[tuple[Tensor, Tensor]]:
            """Normalised (row, column) of a group's points, in raster order."""
            queries = [
                at.q[b, h, first:last] for h in range(group * members, (group + 1) * members)
            ]
            image = torch.cat(queries, dim=1).reshape(height, width, members * dim)
            found = []
            for i in range(sizes[0]):
                for j in range(sizes[1]):
                    t = p["dwc_bias"]
                    for a in range(kernel):
                        for c in range(kernel):
                            y, x = i * stride + a - kernel // 2, j * stride + c - kernel // 2
                            if 0 <= y < height and 0 <= x < width:
                                t = t + p["dwc_weight"][:, 0, a, c] * image[y, x]
                    if norm:
                        t = normalised(t, p["norm_weight"], p["norm_bias"])
                    t = gelu(t)
                    place = []
                    for axis, index in enumerate((i, j)):
                        moved = (p["offset_weight"][axis] * t).sum()
                        if reach > 0 and limit:
                            moved = reach * torch.tanh(moved) / max(sizes[axis] - 1, 1)
                        moved = reference(index, sizes[axis]) + moved
                        place.append(moved if reach > 0 else moved.clamp(-1, 1))
                    found.append((place[0], place[1]))
            return found

        def along(normal: Tensor, cells: int) -> Tensor:
            return (normal + 1) / 2 * (cells - 1)

        def displaced(own: int, side: int, normal: Tensor) -> Tensor:
            """Half the normalised way from a point to a query at `own` of `side` cells."""
            if side == 1:
                return torch.zeros_like(normal)
            way = (2 * own / (side - 1) - 1 - normal) / 2
            return -way if table_mirrored else way

        def one_head(b: int, h: int, places: list[tuple[Tensor, Tensor]]) -> Tensor:
            q, k, v = at.q[b, h], at.k[b, h], at.v[b, h]
            maps = [x[first:last].reshape(height, width, -1) for x in (k, v)]
            keys, values = (
                torch.stack([bilinear(m, along(y, height), along(x, width)) for y, x in places])
                for m in maps
            )
            rows = []
            for i in range(layout.tokens):
                if i in others:
                    rows.append(read(q[i], k, v, [scale] * len(k)))
                    continue
                own_row, own_column = divmod(i - first, width)
                logits = [scale * (q[i] * key).sum() for key in keys]
                for n, (y, x) in enumerate(places if bias else []):
                    table = p["table"][h]
                    row = along(displaced(own_row, height, y), table.shape[0])
                    column = along(displaced(own_column, width, x), table.shape[1])
                    logits[n] = logits[n] + bilinear(table[:, :, None], row, column)[0]
                seen = others if special else []
                logits += [scale * (q[i] * k[s]).sum() for s in seen]
                held = torch.cat([values, v[seen]])
                weights = torch.exp(torch.stack(logits) - max(x.item() for x in logits))
                rows.append((weights[:, None] * held).sum(0) / weights.sum())
            return torch.stack(rows)

        out = []
        for b in range(batch):
            places = [points(b, group) for group in range(groups)]
            own = [places[0 if one_set else h // members] for h in range(heads)]
            out.append(torch.stack([one_head(b, h, own[h]) for h in range(heads)]))
        return torch.stack(out)

    return formula


#: special tokens at the end, an even number of columns and a grid that stride 3 does not divide
TALL = TokenLayout(0, (5, 4), suffix=2)
WIDE = TokenLayout(1, (3, 4), suffix=1)

CASES = [
    Case("dat", dat()),
    Case("dat", dat(), TokenLayout(0, (4, 3)), 24),
    Case("dat(stride=3)", dat(3), TALL),
    # 3 * 96 channels are 2.25 groups of 128: three, of the divisors of three heads
    Case("dat(kernel=3)", dat(kernel=3, groups=3), WIDE, 96),
    Case("dat(groups=1,kernel=3)", dat(kernel=3), WIDE, 96),
    Case("dat(stride=1,bias=false)", dat(1, bias=False), DEEP),
    Case("dat(stride=3,groups=3)", dat(3, groups=3), TALL),
    Case("dat(stride=3,kernel=3,groups=3)", dat(3, groups=3, kernel=3), WIDE, scale=0.6),
    Case("dat(kernel=1,reach=0.7)", dat(kernel=1, reach=0.7), PLAIN, 24),
    Case("dat(reach=0.0)", dat(reach=0), DEEP),
    Case("dat(reach=0.0,groups=3,bias=false)", dat(reach=0, groups=3, bias=False), BARE, 24),
    Case("dat(reference_points=released)", dat(half_cell=True), DEEP, scale=0.2),
    Case("dat(norm=true,groups=3)", dat(norm=True, groups=3), PLAIN, 72),
    Case("dat(stride=1)", dat(1), TokenLayout(1, (1, 5))),
    Case("dat(stride=3)", dat(3), WIDE),
    Case("dat(reference_points=released)", dat(half_cell=True), TokenLayout(0, (2, 3))),
    Case("dat(kernel=3)", dat(kernel=3), PLAIN, built=TokenLayout(1, (4, 6))),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "half a cell off": Case("dat", dat(half_cell=True)),
    "points shared by all heads": Case("dat(groups=3)", dat(groups=3, one_set=True)),
    "one set of points for many channels": Case("dat", dat(groups=3, one_set=True), WIDE, 96),
    "no tanh": Case("dat", dat(limit=False)),
    "clamped points": Case("dat", dat(reach=0)),
    "key minus query in the table": Case("dat", dat(table_mirrored=True), DEEP),
    "no bias": Case("dat", dat(bias=False)),
    "special tokens left out": Case("dat", dat(special=False), DEEP),
}
