"""Deformable attention, Zhu et al. 2021 (Deformable DETR), Eq. 2 on one feature map."""

from __future__ import annotations

import torch
from torch import Tensor

from formulas._case import BARE, BOTH, DEEP, EVEN, PLAIN, TAIL, Case, Formula, Inputs, read
from mitaswap import TokenLayout


def near(place: Tensor, cells: int) -> Tensor:
    """Linear interpolation along one side: the share of every cell at a place, [cells]."""
    return (1 - (place - torch.arange(cells)).abs()).clamp(min=0)


def bilinear(values: Tensor, grid: tuple[int, int], row: Tensor, column: Tensor) -> Tensor:
    """The map [h * w, D] between its cells: four neighbours, zeros outside."""
    shares = near(row, grid[0])[:, None] * near(column, grid[1])
    return (shares.reshape(-1, 1) * values).sum(0)


def mixed(logits: list[Tensor], values: list[Tensor]) -> Tensor:
    """Values weighted by the softmax of their logits."""
    weights = torch.exp(torch.stack(logits) - max(x.item() for x in logits))
    return (weights[:, None] * torch.stack(values)).sum(0) / weights.sum()


def deformable(
    points: int = 4,
    rows_first: bool = False,
    from_corner: bool = False,
    special: bool = True,
    clamped: bool = False,
) -> Formula:
    """A query reads V at a few places that its input decides, with weights that it decides too.

    Args:
        points: K, places per query and head.
        rows_first: an offset is (rows, columns): not the paper, a control.
        from_corner: offsets count from the first patch instead of the query's own: a control.
        special: special tokens take part in the softmax of the patches; False: a control.
        clamped: places outside the grid read its border: a control.
    """

    def formula(at: Inputs) -> Tensor:
        layout, scale, p = at.layout, at.scale, at.params
        height, width = layout.grid
        patches = range(layout.prefix, layout.prefix + layout.patches)
        others = [i for i in range(layout.tokens) if i not in patches]

        def one(b: int, h: int, i: int) -> Tensor:
            q, k, v = at.q[b, h], at.k[b, h], at.v[b, h]
            if i in others:
                return read(q[i], k, v, [scale] * len(k))
            own_row, own_column = divmod(i - layout.prefix, width)
            if from_corner:
                own_row, own_column = 0, 0
            logits, values = [], []
            for point in range(points):
                number = h * points + point
                first, second = (
                    (p["offset_weight"][2 * number + c] * at.x[b, i]).sum()
                    + p["offset_bias"][2 * number + c]
                    for c in (0, 1)
                )
                across, down = (second, first) if rows_first else (first, second)
                row, column = own_row + down, own_column + across
                if clamped:
                    row, column = row.clamp(0, height - 1), column.clamp(0, width - 1)
                values.append(bilinear(v[patches.start : patches.stop], layout.grid, row, column))
                logits.append(
                    (p["logit_weight"][number] * at.x[b, i]).sum() + p["logit_bias"][number]
                )
            for s in others if special else []:
                logits.append(scale * (q[i] * k[s]).sum())
                values.append(v[s])
            return mixed(logits, values)

        batch, heads, tokens, _ = at.q.shape
        out = [
            torch.stack([torch.stack([one(b, h, i) for i in range(tokens)]) for h in range(heads)])
            for b in range(batch)
        ]
        return torch.stack(out)

    return formula


CASES = [
    Case("deformable", deformable()),
    Case("deformable", deformable(), BARE),
    Case("deformable", deformable(), TAIL, 24),
    Case("deformable", deformable(), DEEP, 72),
    Case("deformable", deformable(), BOTH, scale=0.6),
    Case("deformable(points=1)", deformable(1), EVEN),
    Case("deformable(points=2)", deformable(2), PLAIN, 24, scale=0.2),
    Case("deformable(points=6)", deformable(6), DEEP),
    Case("deformable(points=3)", deformable(3), TokenLayout(1, (1, 5))),
    Case("deformable(points=3)", deformable(3), TokenLayout(0, (6, 1), suffix=1)),
    Case("deformable", deformable(), TAIL, built=TokenLayout(0, (3, 5), suffix=2)),
    Case("deformable", deformable(), PLAIN, 8, 0.25, "constant"),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "rows before columns": Case("deformable", deformable(rows_first=True), TAIL),
    "offsets from the corner": Case("deformable", deformable(from_corner=True)),
    "special tokens left out": Case("deformable", deformable(special=False), DEEP),
    "border instead of zeros": Case("deformable", deformable(clamped=True), BARE),
    "one point fewer": Case("deformable(points=3)", deformable(2)),
}
