"""PVT's spatial reduction, Wang et al. 2021, Eq. 2-3, and PVTv2's pooled one: of the module's
input, as in the papers (`sra`), and of keys and values behind their projections (`pvt`).
"""

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


def sra(
    r: int = 2,
    pooled: tuple[int, int] | None = None,
    groups: int = 1,
    counted: bool = True,
    norm: bool = True,
    mapped: bool = False,
    by_columns: bool = False,
    interleaved: bool = False,
    biased: bool = True,
    normed_special: bool = False,
    norm_behind: bool = False,
    keys_alone: bool = False,
) -> Formula:
    """head_j = softmax(Q_j (SR(x) W_j^K)^T scale) SR(x) W_j^V, SR(x) = Norm(Reshape(x, r) W^S); the
    keys and values of special tokens as they are, beside.

    Args:
        r: R_i, side of the windows.
        pooled: rows and columns of PVTv2's adaptive windows instead.
        groups: how many slices of x's channels are reduced, each by a W^S and a Norm of its own.
        counted: the sum over a window at the edge by its own number of patches; False, by r r: a
            control.
        norm: whether there is a Norm.
        mapped: PVTv2's code: the averages times W^S, GELU at the end.
        by_columns: True flattens windows column by column: a control.
        interleaved: True gives every group each `groups`-th channel: a control.
        biased: False leaves the biases of W^K and W^V out: a control.
        normed_special: special tokens' keys are W^K Norm(x) too: a control.
        norm_behind: Norm of the projected rows, not of what is projected: a control.
        keys_alone: values have no Norm: a control.
    """

    def formula(at: Inputs) -> Tensor:
        images, heads, tokens, dim = at.q.shape
        (height, width), first = at.layout.grid, at.layout.prefix
        special = [j for j in range(tokens) if not first <= j < first + height * width]
        size = at.x.shape[2] // groups

        def channels(g: int) -> list[int]:
            return [c * groups + g if interleaved else g * size + c for c in range(size)]

        def norm_of(row: Tensor, g: int) -> Tensor:
            mean = row.mean()
            variance = ((row - mean) ** 2).mean()
            gain, shift = at.params["norm_weight"][g], at.params["norm_bias"][g]
            return gain * ((row - mean) / (variance + 1e-5).sqrt()) + shift

        def tokens_of_windows() -> list[list[int | None]]:
            """The patches that each entry is made of, None where the window leaves the grid."""
            found = []
            for top in range(0, height, r):
                for left in range(0, width, r):
                    cells: list[int | None] = []
                    for n in range(r * r):
                        down, across = (n % r, n // r) if by_columns else (n // r, n % r)
                        y, x = top + down, left + across
                        cells.append(first + y * width + x if y < height and x < width else None)
                    found.append(cells)
            return found

        def sr(x: Tensor, g: int) -> list[Tensor]:
            """All entries of one image's channels of one group, x [N, C / groups]."""
            entries = []
            if pooled:
                entries = list(windows(x, first, at.layout.grid, pooled))
                if mapped:
                    entries = [at.params["reduction"][g].T @ entry for entry in entries]
            else:
                nothing = torch.zeros_like(x[0])
                for cells in tokens_of_windows():
                    reshaped = torch.cat([nothing if n is None else x[n] for n in cells])
                    there = len([n for n in cells if n is not None]) if counted else r * r
                    entries.append(at.params["reduction"][g].T @ reshaped / there)
            if norm and not norm_behind:
                entries = [norm_of(entry, g) for entry in entries]
            return [gelu(entry) for entry in entries] if mapped else entries

        def whole(x: Tensor) -> list[Tensor]:
            """SR of x [N, C], all channels in their places."""
            order = torch.tensor([c for g in range(groups) for c in channels(g)])
            parts = [sr(x[:, channels(g)], g) for g in range(groups)]
            return [torch.cat(slices)[order.argsort()] for slices in zip(*parts, strict=True)]

        def projected(row: Tensor, part: str) -> Tensor:
            made = row @ at.projections[f"{part}_weight"]
            made = made + at.projections[f"{part}_bias"] if biased else made
            return norm_of(made, 0) if norm_behind else made

        outputs = []
        for b in range(images):
            rows = whole(at.x[b])
            plain = rows
            if keys_alone:
                count = at.layout.patches // len(rows)
                assert r * r == count, "for this control windows must be whole"
                plain = [
                    at.params["reduction"][0].T @ torch.cat([at.x[b, n] for n in cells]) / count
                    for cells in tokens_of_windows()
                ]
            keys = [projected(row, "key") for row in rows]
            values = [projected(row, "value") for row in plain]
            for h in range(heads):
                mine = slice(h * dim, (h + 1) * dim)
                own_keys = [at.k[b, h, j] for j in special]
                if normed_special:
                    own_keys = [projected(norm_of(at.x[b, j], 0), "key")[mine] for j in special]
                all_keys = torch.stack([key[mine] for key in keys] + own_keys)
                all_values = [value[mine] for value in values] + [at.v[b, h, j] for j in special]
                for query in at.q[b, h]:
                    scores = torch.stack([at.scale * (key * query).sum() for key in all_keys])
                    weights = torch.softmax(scores, dim=0)
                    terms = [w * y for w, y in zip(weights, all_values, strict=True)]
                    outputs.append(torch.stack(terms).sum(0))
        return torch.stack(outputs).view(images, heads, tokens, dim)

    return formula


CASES = [
    Case("pvt", sra(), BOTH),
    Case("pvt", sra(), EVEN, 24, built=PLAIN),
    Case("pvt", sra(), BARE, scale=0.4),
    Case("pvt(r=3)", sra(3), DEEP, 24),
    Case("pvt(r=1)", sra(1), TAIL, scale=0.2),
    Case("pvt(norm=false)", sra(norm=False), BOTH),
    Case("pvt(r=3,norm=false)", sra(3, norm=False), DEEP, 24, 0.7),
    Case("pvt(r=1,norm=false)", sra(1, norm=False), BARE),
    Case("pvt(mix=head)", sra(groups=3), PLAIN),
    Case("pvt(mix=head)", sra(groups=3), EVEN, built=BOTH),
    Case("pvt(r=3,mix=head,norm=false)", sra(3, groups=3, norm=False), DEEP, 24),
    Case("pvt(reduction=pool)", sra(pooled=(4, 7), norm=False), TokenLayout(1, (4, 9), 2)),
    Case("pvt(reduction=pool,size=2)", sra(pooled=(2, 2), norm=False), TAIL, scale=0.25),
    Case("pvt(reduction=pool,size=3,mix=head)", sra(pooled=(3, 3), norm=False), DEEP, 24),
    Case("pvt(reduction=pool-conv,size=2)", sra(pooled=(2, 2), mapped=True), BOTH),
    Case(
        "pvt(reduction=pool-conv,size=3,mix=head)",
        sra(pooled=(3, 3), groups=3, mapped=True),
        EVEN,
        built=PLAIN,
    ),
    Case(
        "pvt(reduction=pool-conv,norm=false)",
        sra(pooled=(3, 5), norm=False, mapped=True),
        BARE,
        24,
    ),
    Case("pvt(place=after)", pvt(width=True), BOTH),
    Case("pvt(place=after)", pvt(width=True), EVEN, built=PLAIN),
    Case("pvt(place=after,r=3)", pvt(3, width=True), DEEP, 24),
    Case("pvt(place=after,mix=head)", pvt()),
    Case("pvt(place=after,r=3,mix=head)", pvt(3), DEEP, 24, 0.4),
    Case("pvt(place=after,r=1,mix=head)", pvt(1), BARE),
    Case(
        "pvt(place=after,reduction=pool)", pvt(pooled=(4, 7), norm=False), TokenLayout(1, (4, 9), 2)
    ),
    Case(
        "pvt(place=after,reduction=pool,size=2)", pvt(pooled=(2, 2), norm=False), TAIL, scale=0.25
    ),
    Case(
        "pvt(place=after,reduction=pool,size=3,norm=false)",
        pvt(pooled=(3, 3), norm=False),
        DEEP,
        24,
    ),
    Case(
        "pvt(place=after,reduction=pool-conv,size=2)",
        pvt(pooled=(2, 2), width=True, mapped=True),
        BOTH,
    ),
    Case(
        "pvt(place=after,reduction=pool-conv,size=3,mix=head)",
        pvt(pooled=(3, 3), mapped=True),
        EVEN,
        built=PLAIN,
    ),
    Case(
        "pvt(place=after,reduction=pool-conv,mix=head,norm=false)",
        pvt(pooled=(3, 5), norm=False, mapped=True),
        BARE,
        24,
    ),
    Case("pvt(place=after,mix=head,norm=false)", pvt(norm=False)),
    Case("pvt(place=after,mix=head,norm=false)", pvt(norm=False), TAIL, 24),
    Case("pvt(place=after,r=3,mix=head,norm=false)", pvt(3, norm=False), DEEP, 8, 0.7),
    Case("pvt(place=after,r=1,mix=head,norm=false)", pvt(1, norm=False), BARE),
    Case("pvt(place=after,r=2,mix=head,norm=false)", pvt(norm=False), EVEN, 72),
    Case("pvt(place=after,norm=false)", pvt(width=True, norm=False), BOTH),
    Case("pvt(place=after,r=3,norm=false)", pvt(3, width=True, norm=False), DEEP, 24),
    Case("pvt(place=after,r=2,mix=head,norm=false)", pvt(norm=False), BOTH, built=PLAIN),
    Case("pvt(place=after,norm=false)", pvt(width=True, norm=False), EVEN, built=PLAIN),
    Case("pvt(place=after,mix=head,norm=false)", pvt(norm=False), BARE, 8, 0.25, "constant"),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "norm behind the projections": Case("pvt", sra(norm_behind=True), BOTH),
    "values without norm": Case("pvt", sra(keys_alone=True), EVEN),
    "projections without biases": Case("pvt(norm=false)", sra(norm=False, biased=False)),
    "special tokens reduced": Case("pvt", sra(normed_special=True), DEEP),
    "edge windows weaker": Case("pvt(norm=false)", sra(norm=False, counted=False)),
    "windows of the input by columns": Case("pvt", sra(by_columns=True), EVEN),
    "channels dealt to the groups": Case("pvt(mix=head)", sra(groups=3, interleaved=True)),
    "no norm of the input": Case("pvt", sra(norm=False), BOTH),
    "averages not mapped": Case(
        "pvt(reduction=pool-conv,size=2,norm=false)", sra(pooled=(2, 2), norm=False), TAIL
    ),
    "plain zero padding": Case(
        "pvt(place=after,mix=head,norm=false)", pvt(counted=False, norm=False)
    ),
    "windows read by columns": Case("pvt(place=after,mix=head)", pvt(transposed=True), EVEN),
    "no special entries": Case("pvt(place=after,mix=head)", pvt(special=False), DEEP),
    "disjoint windows": Case(
        "pvt(place=after,reduction=pool,size=2)", pvt(pooled=(2, 1), norm=False), TAIL
    ),
    "one more window": Case(
        "pvt(place=after,reduction=pool,size=2)", pvt(pooled=(3, 3), norm=False), DEEP
    ),
    "no norm": Case("pvt(place=after)", pvt(width=True, norm=False), BOTH),
    "special tokens normed": Case("pvt(place=after,mix=head)", pvt(normed_special=True), DEEP),
    "no map of the averages": Case(
        "pvt(place=after,reduction=pool-conv,size=2,norm=false)",
        pvt(pooled=(2, 2), width=True, norm=False),
        TAIL,
    ),
    "GELU before the norm": Case(
        "pvt(place=after,reduction=pool-conv,size=2,mix=head)",
        pvt(pooled=(2, 2), mapped=True, gelu_first=True),
        TAIL,
    ),
}
