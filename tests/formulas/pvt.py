"""PVT's spatial reduction, Wang et al. 2021, Eq. 2-3, and PVTv2's pooled one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from formulas._case import BARE, BOTH, DEEP, EVEN, PLAIN, TAIL, Case, Formula, Inputs, read, windows
from mitaswap import TokenLayout


def strided(
    maps: Tensor, weight: Tensor, grid: tuple[int, int], r: int, counted: bool, transposed: bool
) -> Tensor:
    """Windows of r x r cells of maps [h * w, C]: their numbers times weight [r * r * C, C], over
    the number of cells.
    """
    h, w = grid
    channels, reduced = maps.shape[1], []
    for top in range(0, h, r):
        for left in range(0, w, r):
            total, cells = torch.zeros_like(maps[0]), 0
            for i in range(r):
                for j in range(r):
                    row, column = top + i, left + j
                    if row >= h or column >= w:  # padded with zeros
                        continue
                    first = ((j * r + i) if transposed else (i * r + j)) * channels
                    total = total + maps[row * w + column] @ weight[first : first + channels]
                    cells += 1
            reduced.append(total / (cells if counted else r * r))
    return torch.stack(reduced)


def normed(row: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm of one entry."""
    centred = row - row.sum() / len(row)
    return centred / torch.sqrt((centred * centred).sum() / len(row) + 1e-5) * gain + bias


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def pvt(
    r: int = 2,
    pooled: tuple[int, int] | None = None,
    width: bool = False,
    counted: bool = True,
    transposed: bool = False,
    special: bool = True,
    norm: bool = True,
    mapped: bool = False,
    normed_special: bool = False,
    gelu_first: bool = False,
) -> Formula:
    """softmax(Q SR(K)^T scale) SR(V), special tokens' keys and values unreduced beside.

    Args:
        r: side of the convolution's windows.
        pooled: rows and columns of PVTv2's adaptive windows instead.
        width: whether all heads' channels are mixed (the paper's W^S), not each head's own.
        counted: False leaves windows at the edge weaker, as plain zero padding does: a control.
        transposed: True reads the windows column by column: a control.
        special: False leaves out the special tokens' own entries: a control.
        norm: LayerNorm of every reduced entry, over all heads' channels if `width`.
        mapped: PVTv2's code: pooled entries times a matrix, GELU at the end.
        normed_special: the special tokens' entries normed as well: a control.
        gelu_first: GELU before the norm: a control.
    """

    def formula(at: Inputs) -> Tensor:
        layout, heads = at.layout, at.q.shape[1]
        first, end = layout.prefix, layout.prefix + layout.patches

        def reduced(x: Tensor, name: str) -> list[Tensor]:
            """Entries of each head of one batch element x [H, N, D]."""
            groups = [x[h] for h in range(heads)]
            if width:  # side by side
                groups = [torch.cat(groups, dim=1)]
            entries = []
            for g, group in enumerate(groups):
                if pooled:
                    rows = windows(group, first, layout.grid, pooled)
                    if mapped:
                        rows = torch.stack(
                            [row @ at.params[f"{name}_reduction"][g] for row in rows]
                        )
                else:
                    weight = at.params[f"{name}_reduction"][g]
                    patches = group[first:end]
                    rows = strided(patches, weight, layout.grid, r, counted, transposed)
                finished = []
                for row in rows:
                    row = gelu(row) if mapped and gelu_first else row
                    if norm:
                        row = normed(row, *norms(name, g))
                    finished.append(gelu(row) if mapped and not gelu_first else row)
                entries.append(torch.stack(finished))
            return list(entries[0].split(x.shape[2], dim=1)) if width else entries

        def norms(name: str, group: int) -> list[Tensor]:
            return [at.params[f"{name}_norm_{part}"][group] for part in ("weight", "bias")]

        batches = []
        for b in range(at.q.shape[0]):
            keys, values = reduced(at.k[b], "key"), reduced(at.v[b], "value")
            outputs = []
            for h in range(heads):
                own_keys, own_values = list(keys[h]), list(values[h])
                for j in range(layout.tokens):
                    if special and not first <= j < end:
                        key = at.k[b, h, j]
                        own_keys.append(normed(key, *norms("key", h)) if normed_special else key)
                        own_values.append(at.v[b, h, j])
                entries = torch.stack(own_keys), torch.stack(own_values)
                factors = [at.scale] * len(own_keys)
                outputs.append(torch.stack([read(row, *entries, factors) for row in at.q[b, h]]))
            batches.append(torch.stack(outputs))
        return torch.stack(batches)

    return formula


CASES = [
    Case("pvt", pvt(width=True), BOTH),
    Case("pvt", pvt(width=True), EVEN, built=PLAIN),
    Case("pvt(r=3)", pvt(3, width=True), DEEP, 24),
    Case("pvt(mix=head)", pvt()),
    Case("pvt(r=3,mix=head)", pvt(3), DEEP, 24, 0.4),
    Case("pvt(r=1,mix=head)", pvt(1), BARE),
    Case("pvt(reduction=pool)", pvt(pooled=(4, 7), norm=False), TokenLayout(1, (4, 9), 2)),
    Case("pvt(reduction=pool,size=2)", pvt(pooled=(2, 2), norm=False), TAIL, scale=0.25),
    Case("pvt(reduction=pool,size=3,norm=false)", pvt(pooled=(3, 3), norm=False), DEEP, 24),
    Case("pvt(reduction=pool-conv,size=2)", pvt(pooled=(2, 2), width=True, mapped=True), BOTH),
    Case(
        "pvt(reduction=pool-conv,size=3,mix=head)",
        pvt(pooled=(3, 3), mapped=True),
        EVEN,
        built=PLAIN,
    ),
    Case(
        "pvt(reduction=pool-conv,mix=head,norm=false)",
        pvt(pooled=(3, 5), norm=False, mapped=True),
        BARE,
        24,
    ),
    Case("pvt(mix=head,norm=false)", pvt(norm=False)),
    Case("pvt(mix=head,norm=false)", pvt(norm=False), TAIL, 24),
    Case("pvt(r=3,mix=head,norm=false)", pvt(3, norm=False), DEEP, 8, 0.7),
    Case("pvt(r=1,mix=head,norm=false)", pvt(1, norm=False), BARE),
    Case("pvt(r=2,mix=head,norm=false)", pvt(norm=False), EVEN, 72),
    Case("pvt(norm=false)", pvt(width=True, norm=False), BOTH),
    Case("pvt(r=3,norm=false)", pvt(3, width=True, norm=False), DEEP, 24),
    Case("pvt(r=2,mix=head,norm=false)", pvt(norm=False), BOTH, built=PLAIN),
    Case("pvt(norm=false)", pvt(width=True, norm=False), EVEN, built=PLAIN),
    Case("pvt(mix=head,norm=false)", pvt(norm=False), BARE, 8, 0.25, "constant"),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "plain zero padding": Case("pvt(mix=head,norm=false)", pvt(counted=False, norm=False)),
    "windows read by columns": Case("pvt(mix=head)", pvt(transposed=True), EVEN),
    "no special entries": Case("pvt(mix=head)", pvt(special=False), DEEP),
    "disjoint windows": Case("pvt(reduction=pool,size=2)", pvt(pooled=(2, 1), norm=False), TAIL),
    "one more window": Case("pvt(reduction=pool,size=2)", pvt(pooled=(3, 3), norm=False), DEEP),
    "no norm": Case("pvt", pvt(width=True, norm=False), BOTH),
    "special tokens normed": Case("pvt(mix=head)", pvt(normed_special=True), DEEP),
    "no map of the averages": Case(
        "pvt(reduction=pool-conv,size=2,norm=false)",
        pvt(pooled=(2, 2), width=True, norm=False),
        TAIL,
    ),
    "GELU before the norm": Case(
        "pvt(reduction=pool-conv,size=2,mix=head)",
        pvt(pooled=(2, 2), mapped=True, gelu_first=True),
        TAIL,
    ),
}
