"""A local window joined to another mechanism's softmax, or weighed against its output."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from formulas._case import BARE, BOTH, DEEP, TAIL, Case, Formula, Inputs, each_head, read, windows
from formulas.linear import elu_plus_one, linear


def around(at: Inputs, n: int, size: int) -> list[int]:
    """Positions of the patches at most size // 2 rows and columns from patch n (of the raster)."""
    (h, w), reach = at.layout.grid, size // 2
    row, column = divmod(n, w)
    return [
        at.layout.prefix + y * w + x
        for y in range(h)
        for x in range(w)
        if abs(y - row) <= reach and abs(x - column) <= reach
    ]


def patch_of(at: Inputs, n: int) -> int | None:
    """Place of token n in the raster, None for a special token."""
    place = n - at.layout.prefix
    return place if 0 <= place < at.layout.grid[0] * at.layout.grid[1] else None


def joined(size: int, pool: tuple[int, int] | None = None, once: bool = False) -> Formula:
    """One softmax over all keys (or, with `pool`, over agents) and the window's keys once more."""

    def formula(at: Inputs) -> Tensor:
        def head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = k, v
            if pool is not None:
                keys = windows(q, at.layout.prefix, at.layout.grid, pool)
                values = torch.stack([read(row, k, v, [at.scale] * len(k)) for row in keys])
            rows = []
            for n, row in enumerate(q):
                place = patch_of(at, n)
                near = [] if place is None or once else around(at, place, size)
                pairs = torch.cat([keys, k[near]]), torch.cat([values, v[near]])
                rows.append(read(row, *pairs, [at.scale] * len(pairs[0])))
            return torch.stack(rows)

        return each_head(head, at.q, at.k, at.v)

    return formula


def weighed(inner: Callable[[Inputs], Tensor], size: int) -> Formula:
    """(1 - g) inner + g local, g = tanh(weight) for each head; patches only."""

    def formula(at: Inputs) -> Tensor:
        out, batches = inner(at), []
        for b in range(at.q.shape[0]):
            heads = []
            for h in range(at.q.shape[1]):
                w, rows = at.params["weight"][h], []
                g = (torch.exp(w) - torch.exp(-w)) / (torch.exp(w) + torch.exp(-w))
                for n in range(at.q.shape[2]):
                    place, row = patch_of(at, n), out[b, h, n]
                    if place is not None:
                        near = around(at, place, size)
                        pairs = at.k[b, h][near], at.v[b, h][near]
                        local = read(at.q[b, h, n], *pairs, [at.scale] * len(near))
                        row = (1 - g) * row + g * local
                    rows.append(row)
                heads.append(torch.stack(rows))
            batches.append(torch.stack(heads))
        return torch.stack(batches)

    return formula


GATED = "window(size=3,mix=gate)"
CASES = [
    Case("standard+window(size=3)", joined(3)),
    Case("standard+window", joined(7), BOTH, 24, scale=0.3),
    Case("standard+window(size=1)", joined(1), DEEP),
    Case("agent(n=6)+window(size=3)", joined(3, (2, 3)), TAIL),
    Case("agent(n=6)+window(size=5)", joined(5, (2, 3)), BARE, scale=0.5),
    Case(f"linear+{GATED}", weighed(linear(elu_plus_one), 3)),
    Case(f"linear+{GATED}", weighed(linear(elu_plus_one), 3), BOTH, 24),
    Case("standard+window(size=5,mix=gate)", weighed(joined(1, once=True), 5), DEEP),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "keys in both counted once": Case("standard+window(size=3)", joined(3, once=True)),
    "larger window": Case("standard+window(size=3)", joined(5)),
    "a gate at zero": Case(
        f"linear+{GATED}",
        lambda at: weighed(linear(elu_plus_one), 3)(
            Inputs(at.q, at.k, at.v, at.scale, at.layout, at.x, {"weight": torch.zeros(3)})
        ),
    ),
}
