"""MHLA, Zhang et al. 2026, Eq. 3 to 5: linear attention with summaries mixed block by block."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from formulas._case import BARE, BOTH, DEEP, PLAIN, TAIL, Case, Formula, Inputs, each_head
from mitaswap import TokenLayout


def stretched(values: list[Tensor], size: int) -> list[Tensor]:
    """A row of values resized to `size`: linear between the cells' centres, flat beyond them."""
    result = []
    for i in range(size):
        at = max((i + 0.5) * len(values) / size - 0.5, 0.0)
        low = min(math.floor(at), len(values) - 1)
        high, part = min(low + 1, len(values) - 1), at - low
        result.append((1 - part) * values[low] + part * values[high])
    return result


def resized(cells: list[list[Tensor]], shape: tuple[int, int]) -> list[list[Tensor]]:
    """A raster of tensors resized bilinearly: its rows, then its columns."""
    rows = [stretched(row, shape[1]) for row in cells]
    columns = [stretched([row[j] for row in rows], shape[0]) for j in range(shape[1])]
    return [[columns[j][i] for j in range(shape[1])] for i in range(shape[0])]


def to_raster(flat: Tensor, shape: tuple[int, int]) -> list[list[Tensor]]:
    return [[flat[i * shape[1] + j] for j in range(shape[1])] for i in range(shape[0])]


def mhla(
    pool: tuple[int, int],
    feature: str = "relu",
    eps: float = 1e-6,
    built: tuple[int, int] | None = None,
    clipped: bool = True,
    special: bool = True,
    by_columns: bool = False,
    released: bool = False,
    eps_in_features: bool = True,
    by_rows: bool = False,
    weighed: bool = True,
) -> Formula:
    """Eq. 3 to 5.

    Args:
        pool: a x b blocks, M = a * b.
        feature: phi, `relu` or `elu` + 1.
        eps: of the normaliser.
        built: blocks at the grid where the coefficients were made, if they were others.
        clipped: whether coefficients stay within 0 and 1 (False: a control).
        special: whether patches read special tokens (False: a control).
        by_columns: coefficients transposed, those of a key block for the query blocks: a control.
        released: the normaliser of the authors' code, where the queries at one place of all blocks
            meet the z of their own block.
        eps_in_features: False leaves the released eps out of the features: a control.
        by_rows: places in blocks counted down the columns: a control.
        weighed: False keeps the coefficients' size where there are fewer blocks: a control.
    """

    def phi(row: Tensor) -> Tensor:
        extra = eps if released and eps_in_features else 0.0
        if feature == "relu":
            return torch.stack([x if x > 0 else 0 * x for x in row]) + extra
        return torch.stack([x + 1 if x > 0 else torch.exp(x) for x in row]) + extra

    def coefficients(mixing: Tensor) -> Tensor:
        c = mixing
        if clipped:  # on every update of the parameter: the gradient does not see it
            c = mixing + (mixing.detach().clip(0.0, 1.0) - mixing.detach())
        if built is None or built == pool:
            return c
        read = [resized(to_raster(row, built), pool) for row in c]
        rows = torch.stack([torch.stack([x for line in cells for x in line]) for cells in read])
        asked = resized(to_raster(rows, built), pool)
        fewer = pool[0] * pool[1] / (built[0] * built[1])  # blocks, so each weighs more
        return torch.stack([x for line in asked for x in line]) / (fewer if weighed else 1.0)

    def formula(at: Inputs) -> Tensor:
        (h, w), (a, b) = at.layout.grid, pool
        blocks, c = a * b, coefficients(at.params["mixing"])
        if by_columns:
            c = c.T
        owner: list[int | None] = [None] * at.layout.tokens  # None: a special token
        place: dict[int, tuple[int, int]] = {}  # of a patch in its block
        held_by: list[list[list[int]]] = []  # rows of patches of every block
        for i in range(a):
            for j in range(b):
                lines: list[list[int]] = []
                for r in range(i * h // a, (i + 1) * h // a):
                    lines.append([])
                    for s in range(j * w // b, (j + 1) * w // b):
                        patch = at.layout.prefix + r * w + s
                        place[patch] = (r - i * h // a, s - j * w // b)
                        lines[-1].append(patch)
                        owner[patch] = i * b + j
                held_by.append(lines)

        def beside(patch: int, block: int) -> int:
            """The patch of another block at the same place, or the nearest that the block has."""
            row, column = place[patch]
            if by_rows:
                row, column = column, row
            lines = held_by[block]
            return lines[min(row, len(lines) - 1)][min(column, len(lines[0]) - 1)]

        def head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            queries = [phi(row * at.scale * math.sqrt(len(row))) for row in q]
            keys = [phi(row) for row in k]
            rows = []
            for token, (query, block) in enumerate(zip(queries, owner, strict=True)):
                top, below = torch.zeros_like(v[0]), torch.zeros_like(query[0])
                for key, value, held in zip(keys, v, owner, strict=True):
                    if block is None or (held is None and special):
                        weight = torch.ones_like(below) / blocks
                    elif held is None:
                        continue
                    else:
                        weight = c[block, held]
                    alike = (query * key).sum()
                    top = top + weight * alike * value
                    if released and block is not None and held is not None:
                        alike = (queries[beside(token, held)] * key).sum()
                    below = below + weight * alike
                rows.append(top / (below + (eps if released else eps / blocks)))
            return torch.stack(rows)

        return each_head(head, at.q, at.k, at.v)

    return formula


def started(kind: str, pool: tuple[int, int]) -> Tensor:
    """Coefficients [m, m] before training."""
    places = [(i, j) for i in range(pool[0]) for j in range(pool[1])]
    far = math.dist(places[0], places[-1])
    rows = []
    for here in places:
        row = []
        for there in places:
            r = math.dist(here, there)
            row.append(
                {
                    "paper": 1 - r / max(math.dist(here, x) for x in places),
                    "released": math.cos(math.pi * r / far / 4),
                    "linear": 1 - r / far,
                    "exp": math.exp(-r / 3),
                    "gaussian": math.exp(-(r**2) / (2 * (far / 3) ** 2)),
                    "local": float(max(abs(here[0] - there[0]), abs(here[1] - there[1])) <= 1),
                    "uniform": 1.0,
                }[kind]
            )
        rows.append(row)
    c = torch.tensor(rows)
    if kind == "gaussian":
        return c / c.sum() * len(places)
    return c / (c.sum(1)[:, None] if kind == "paper" else c.sum(0))


SMALL = TokenLayout(2, (3, 3), 1)
CASES = [
    Case("mhla(m=4)", mhla((2, 2)), SMALL),
    Case("mhla(m=6)", mhla((2, 3)), PLAIN),
    Case("mhla(m=3,pool=1x3)", mhla((1, 3)), BARE, scale=0.8),
    Case("mhla(m=3,pool=3x1,eps=0.5)", mhla((3, 1), eps=0.5), SMALL, 24),
    Case("mhla(m=4,feature=elu)", mhla((2, 2), "elu"), DEEP, scale=0.2),
    Case("mhla(m=8,pool=2x4,start=released)", mhla((2, 4)), TAIL),
    Case("mhla(m=6,start=linear)", mhla((2, 3)), BOTH),
    Case("mhla(m=6,start=exp)", mhla((2, 3)), TAIL),
    Case("mhla(m=6,start=gaussian)", mhla((2, 3)), DEEP),
    Case("mhla(m=9,start=local)", mhla((3, 3)), SMALL),
    Case(
        "mhla(m=6,start=gaussian)",
        mhla((2, 3), built=(3, 2)),
        PLAIN,
        built=TokenLayout(1, (5, 3)),
    ),
    Case("mhla(m=1)", mhla((1, 1)), SMALL, 72),
    Case("mhla(m=9,start=uniform)", mhla((3, 3)), SMALL),
    Case("mhla(m=4)", mhla((2, 2), built=(2, 2)), SMALL, built=TokenLayout(2, (5, 4), 1)),
    Case("mhla(m=6)", mhla((2, 3), built=(3, 2)), PLAIN, built=TokenLayout(1, (5, 3))),
    Case(
        "mhla(m=8,feature=elu)",
        mhla((2, 4), "elu", built=(4, 2)),
        TokenLayout(0, (2, 5)),
        built=TokenLayout(0, (7, 3)),
    ),
    Case("mhla(m=4)", mhla((2, 2)), SMALL, 8, 0.25, "constant"),
    Case("mhla(m=6,normaliser=released)", mhla((2, 3), released=True), BOTH),
    Case("mhla(m=4,normaliser=released,eps=0.5)", mhla((2, 2), eps=0.5, released=True), BARE, 24),
    Case(
        "mhla(m=8,pool=2x4,normaliser=released,start=released)",
        mhla((2, 4), released=True),
        TokenLayout(1, (4, 8)),
        scale=0.3,
    ),
    Case(
        "mhla(m=4,feature=elu,normaliser=released)",
        mhla((2, 2), "elu", built=(2, 2), released=True),
        SMALL,
        built=TokenLayout(2, (5, 4), 1),
    ),
    Case(
        "mhla(m=6,normaliser=released)",
        mhla((2, 3), built=(3, 2), released=True),
        PLAIN,
        built=TokenLayout(1, (5, 3)),
    ),
    # 4 x 3 blocks on a grid that has room for 3 x 3
    Case("mhla(m=12)", mhla((3, 3), built=(4, 3)), SMALL, built=TokenLayout(2, (7, 5), 1)),
    Case(
        "mhla(m=12,pool=4x3,normaliser=released,eps=0.5)",
        mhla((2, 3), eps=0.5, built=(4, 3), released=True),
        TokenLayout(1, (2, 5)),
        built=TokenLayout(0, (7, 5)),
    ),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "coefficients of more blocks": Case(
        "mhla(m=12)",
        mhla((3, 3), built=(4, 3), weighed=False),
        SMALL,
        built=TokenLayout(2, (7, 5), 1),
    ),
    "blocks transposed": Case("mhla(m=8,pool=2x4)", mhla((4, 2)), BOTH),
    "coefficients not clipped": Case("mhla(m=4)", mhla((2, 2), clipped=False), SMALL),
    "coefficients transposed": Case("mhla(m=6)", mhla((2, 3), by_columns=True), PLAIN),
    "no special keys": Case("mhla(m=6)", mhla((2, 3), special=False), PLAIN),
    "elu for relu": Case("mhla(m=6)", mhla((2, 3), "elu"), PLAIN),
    "the paper's normaliser": Case("mhla(m=6,normaliser=released)", mhla((2, 3)), BOTH),
    "the released normaliser": Case("mhla(m=6)", mhla((2, 3), released=True), BOTH),
    "eps beside the features": Case(
        "mhla(m=4,normaliser=released,eps=0.5)",
        mhla((2, 2), eps=0.5, released=True, eps_in_features=False),
        SMALL,
    ),
    "places transposed": Case(
        "mhla(m=6,normaliser=released)", mhla((2, 3), released=True, by_rows=True), BOTH
    ),
}
