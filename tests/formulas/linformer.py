"""Linformer, Wang et al. 2020, Eq. 7, on the patches of a grid."""

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
    read,
    windows,
)
from mitaswap import TokenLayout


def neighbours(place: int, size: int, old: int) -> list[tuple[int, float]]:
    """Old cells that a new one lies between and their shares, by the centres of cells."""
    centre = max((place + 0.5) * old / size - 0.5, 0.0)
    low = math.floor(centre)
    high, share = min(low + 1, old - 1), centre - low
    return [(low, 1 - share), (high, share)]


def resized(row: Tensor, old: tuple[int, int], new: tuple[int, int], keep: bool = True) -> Tensor:
    """A row of weights over the old grid's cells, bilinearly on the new one, with its old sum."""
    if old == new:
        return row
    cells = []
    for y in range(new[0]):
        for x in range(new[1]):
            cell = torch.zeros((), dtype=row.dtype)
            for i, down in neighbours(y, new[0], old[0]):
                for j, across in neighbours(x, new[1], old[1]):
                    cell = cell + down * across * row[i * old[1] + j]
            cells.append(cell)
    if not keep:
        return torch.stack(cells)
    scaled = torch.stack(cells) * (old[0] * old[1]) / (new[0] * new[1])
    return scaled + (row.sum() - scaled.sum()) / len(cells)


def linformer(
    pool: tuple[int, int],
    sharing: str = "headwise",
    built: tuple[int, int] | None = None,
    keep: bool = True,
    special: bool = True,
) -> Formula:
    """softmax(Q [E K; special keys]^T) [F V; special values].

    E and F are averages over windows of the patches plus what is learned, dE and dF.

    Args:
        pool: a x b windows.
        sharing: headwise: one E, one F for all heads; none: each head its own; key-value: E = F.
        built: grid of dE and dF where it isn't the input's.
        keep: whether resized rows keep their sums: False is a control.
        special: whether special tokens are keys: False is a control.
    """

    def formula(at: Inputs) -> Tensor:
        layout = at.layout
        first, end = layout.prefix, layout.prefix + layout.patches
        outside = [*range(first), *range(end, layout.tokens)] if special else []

        def entries(tokens: Tensor, name: str, h: int) -> Tensor:
            matrix = at.params[name][h if sharing == "none" else 0]
            rows = []
            for row, mean in zip(matrix, windows(tokens, first, layout.grid, pool), strict=True):
                weights = resized(row, built or layout.grid, layout.grid, keep)
                rows.append(mean + (weights[:, None] * tokens[first:end]).sum(0))
            return torch.stack(rows + [tokens[j] for j in outside])

        def head(b: int, h: int) -> Tensor:
            of_values = "key_projection" if sharing == "key-value" else "value_projection"
            keys = entries(at.k[b, h], "key_projection", h)
            values = entries(at.v[b, h], of_values, h)
            return torch.stack([read(q, keys, values, [at.scale] * len(keys)) for q in at.q[b, h]])

        batch, heads = at.q.shape[:2]
        return torch.stack([torch.stack([head(b, h) for h in range(heads)]) for b in range(batch)])

    return formula


WIDE = TokenLayout(1, (3, 8), suffix=1)

CASES = [
    Case("linformer(n=6)", linformer((2, 3))),
    Case("linformer(n=8)", linformer((2, 4)), TAIL, 24, scale=0.3),
    Case("linformer(n=15)", linformer((3, 5)), DEEP),
    Case("linformer(n=1)", linformer((1, 1)), BARE, 72),
    Case("linformer(n=6,sharing=none)", linformer((2, 3), "none"), BOTH),
    Case("linformer(n=4,sharing=none)", linformer((2, 2), "none"), BARE, 24, scale=0.5),
    Case("linformer(n=6,sharing=key-value)", linformer((2, 3), "key-value"), DEEP, scale=0.7),
    Case("linformer(n=6)", linformer((2, 3), built=(3, 5)), BOTH, built=PLAIN),
    Case("linformer(n=6)", linformer((2, 3), built=(4, 7)), PLAIN, built=BOTH),
    Case("linformer(n=28)", linformer((4, 7), built=(4, 7)), BARE, built=TAIL),
    Case("linformer(n=4,sharing=none)", linformer((2, 2), "none", (4, 6)), WIDE, built=EVEN),
    Case(
        "linformer(n=3,sharing=key-value)",
        linformer((1, 3), "key-value", (3, 5)),
        EVEN,
        built=DEEP,
    ),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "special tokens are no keys": Case("linformer(n=6)", linformer((2, 3), special=False), BOTH),
    "windows transposed": Case("linformer(n=6)", linformer((3, 2))),
    "E for F": Case("linformer(n=6)", linformer((2, 3), "key-value")),
    "one head's for all": Case("linformer(n=6,sharing=none)", linformer((2, 3))),
    "sums not kept": Case(
        "linformer(n=6)", linformer((2, 3), built=(3, 5), keep=False), BOTH, built=PLAIN
    ),
}
