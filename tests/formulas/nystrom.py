"""Nystromformer, Xiong et al. 2021, Sec. 3.2, Eq. 11, and the skip connection of V."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from formulas._case import BARE, BOTH, DEEP, PLAIN, TAIL, Case, Formula, Inputs, windows
from mitaswap import TokenLayout

Marks = Callable[[Tensor, TokenLayout], Tensor]


def segments(count: int) -> Marks:
    """Means over runs of the whole sequence."""

    def means(tokens: Tensor, layout: TokenLayout) -> Tensor:
        n, rows = len(tokens), []
        for i in range(count):
            first, end = math.floor(i * n / count), math.ceil((i + 1) * n / count)
            rows.append(tokens[first:end].sum(0) / (end - first))
        return torch.stack(rows)

    return means


def tiles(pool: tuple[int, int]) -> Marks:
    """Means over windows of the patch grid."""
    return lambda tokens, layout: windows(tokens, layout.prefix, layout.grid, pool)


def softmax_rows(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    rows = []
    for query in queries:
        logits = (keys * query).sum(1) * scale
        mass = torch.exp(logits - logits.detach().max())
        rows.append(mass / mass.sum())
    return torch.stack(rows)


def largest_column_sum(a: Tensor) -> Tensor:
    return torch.stack([a[:, j].sum() for j in range(a.shape[1])]).max()


def inverse(a: Tensor, norm: Tensor, iterations: int) -> Tensor:
    """Eq. 11 from Z_0 = A^T / norm."""
    one = torch.eye(len(a), dtype=a.dtype)
    z = a.T / norm
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
    return z


def skip(v: Tensor, kernel: Tensor, shift: int = 0) -> Tensor:
    """The convolution of one head's V along the sequence: the same kernel for every channel."""
    size, rows = len(kernel), []
    for i in range(len(v)):
        row = torch.zeros_like(v[i])
        for t in range(size):
            j = i + t - (size - 1) // 2 + shift
            if 0 <= j < len(v):
                row = row + kernel[t] * v[j]
        rows.append(row)
    return torch.stack(rows)


def skip_patches(v: Tensor, kernel: Tensor, layout: TokenLayout) -> Tensor:
    """The same along the patches alone: special tokens get nothing."""
    first, (h, w) = layout.prefix, layout.grid
    last = first + h * w
    none = torch.zeros_like(v)
    return torch.cat([none[:first], skip(v[first:last], kernel), none[last:]])


def nystrom(
    marks: Marks,
    iterations: int | None = 6,
    released: bool = False,
    conv: bool = True,
    plain_mean: bool = False,
    one_kernel: bool = False,
    turned: bool = False,
    shift: int = 0,
    patches_only: bool = False,
) -> Formula:
    """softmax(Q K~^T) Z softmax(Q~ K^T) V, and a convolution of V if there is one.

    Args:
        marks: landmarks Q~ of the queries and K~ of the keys.
        iterations: of the inverse; None takes the exact one.
        released: one norm in Z_0 for the whole batch.
        conv: adds V convolved along the sequence, special tokens included; the kernel's size is
            that of the parameter.
        plain_mean: Z = I / m, no inverse: a control.
        one_kernel: all heads take the first head's kernel: a control.
        turned: the kernel back to front: a control.
        shift: moves the kernel off its centre: a control.
        patches_only: convolves along the patches, without special tokens: a control.
    """

    def formula(at: Inputs) -> Tensor:
        batch, heads = at.q.shape[:2]
        places = [(b, h) for b in range(batch) for h in range(heads)]
        queries = {at_: marks(at.q[at_], at.layout) for at_ in places}
        keys = {at_: marks(at.k[at_], at.layout) for at_ in places}
        cores = {at_: softmax_rows(queries[at_], keys[at_], at.scale) for at_ in places}
        norms = {at_: largest_column_sum(cores[at_]) for at_ in places}
        if released:
            together = torch.stack(list(norms.values())).max()
            norms = dict.fromkeys(places, together)

        def head(b: int, h: int) -> Tensor:
            core = cores[b, h]
            if plain_mean:
                z = torch.eye(len(core), dtype=core.dtype) / len(core)
            elif iterations is None:
                z = torch.linalg.inv(core)
            else:
                z = inverse(core, norms[b, h], iterations)
            left = softmax_rows(at.q[b, h], keys[b, h], at.scale)
            right = softmax_rows(queries[b, h], at.k[b, h], at.scale)
            out = left @ (z @ (right @ at.v[b, h]))
            if not conv:
                return out
            kernel = at.params["conv_weight"][0 if one_kernel else h]
            kernel = kernel.flip(0) if turned else kernel
            if patches_only:
                return out + skip_patches(at.v[b, h], kernel, at.layout)
            return out + skip(at.v[b, h], kernel, shift)

        return torch.stack([torch.stack([head(b, h) for h in range(heads)]) for b in range(batch)])

    return formula


CASES = [
    Case("nystrom(m=4)", nystrom(segments(4))),
    Case("nystrom(m=5)", nystrom(segments(5)), TAIL, 24),
    Case("nystrom(m=6,landmarks=windows)", nystrom(tiles((2, 3))), BOTH, scale=0.4),
    Case("nystrom(m=5,conv=3)", nystrom(segments(5)), BOTH),
    Case("nystrom(m=4,conv=7)", nystrom(segments(4)), BARE, 24),
    Case("nystrom(m=4,conv=1)", nystrom(segments(4)), TAIL, scale=0.5),
    # longer than both sides of the sequence
    Case("nystrom(m=5,conv=35)", nystrom(segments(5)), DEEP),
    Case(
        "nystrom(m=6,conv=5,iterations=3,landmarks=windows,scaling=released)",
        nystrom(tiles((2, 3)), 3, released=True),
        BOTH,
        72,
    ),
    Case(
        "nystrom(m=4,conv=9,inverse=exact)",
        nystrom(segments(4), None),
        BOTH,
        built=PLAIN,
        room=1e-8,
    ),
    Case("nystrom(m=4,conv=0)", nystrom(segments(4), conv=False)),
    Case("nystrom(m=5,conv=0)", nystrom(segments(5), conv=False), TAIL, 24),
    Case("nystrom(m=7,conv=0)", nystrom(segments(7), conv=False), DEEP, scale=0.7),
    Case("nystrom(m=5,iterations=3,conv=0)", nystrom(segments(5), 3, conv=False), BOTH, 72),
    Case("nystrom(m=1,conv=0)", nystrom(segments(1), conv=False), BARE),
    Case("nystrom(m=15,conv=0)", nystrom(segments(15), conv=False), BARE),
    Case(
        "nystrom(m=6,landmarks=windows,conv=0)", nystrom(tiles((2, 3)), conv=False), BOTH, scale=0.4
    ),
    Case("nystrom(m=6,landmarks=windows,conv=0)", nystrom(tiles((2, 3)), conv=False), DEEP, 24),
    Case("nystrom(m=4,inverse=exact,conv=0)", nystrom(segments(4), None, conv=False), room=1e-8),
    Case(
        "nystrom(m=6,inverse=exact,landmarks=windows,conv=0)",
        nystrom(tiles((2, 3)), None, conv=False),
        TAIL,
        scale=0.9,
        room=1e-8,
    ),
    Case(
        "nystrom(m=5,scaling=released,conv=0)",
        nystrom(segments(5), released=True, conv=False),
        BOTH,
    ),
    Case(
        "nystrom(m=6,iterations=2,landmarks=windows,scaling=released,conv=0)",
        nystrom(tiles((2, 3)), 2, released=True, conv=False),
        DEEP,
        scale=0.8,
    ),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "one iteration fewer": Case("nystrom(m=5,iterations=3)", nystrom(segments(5), 2)),
    "the other initial norm": Case("nystrom(m=5)", nystrom(segments(5), released=True), BOTH),
    "segments for windows": Case("nystrom(m=6,landmarks=windows)", nystrom(segments(6)), BOTH),
    "exact inverse": Case("nystrom(m=5,iterations=3)", nystrom(segments(5), None)),
    "no inverse": Case("nystrom(m=5)", nystrom(segments(5), plain_mean=True)),
    "no convolution": Case("nystrom(m=5)", nystrom(segments(5), conv=False), BOTH),
    "one kernel for all heads": Case("nystrom(m=5)", nystrom(segments(5), one_kernel=True), BOTH),
    "kernel back to front": Case("nystrom(m=5)", nystrom(segments(5), turned=True), BOTH),
    "kernel off its centre": Case("nystrom(m=5,conv=3)", nystrom(segments(5), shift=1), BOTH),
    "convolution without special tokens": Case(
        "nystrom(m=5,conv=3)", nystrom(segments(5), patches_only=True), BOTH
    ),
}
