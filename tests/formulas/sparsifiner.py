"""Sparsifiner, Wei et al. 2023, Sec. 3: a low-rank prediction of the attention map chooses the keys
of each query.
"""

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
    each_head,
    largest,
    read,
)
from mitaswap import TokenLayout


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """A map [h0, w0] at another size, bilinear between the centres of its cells."""
    rows = []
    for r in range(size[0]):
        y = max((r + 0.5) * image.shape[0] / size[0] - 0.5, 0.0)
        top = math.floor(y)
        bottom = min(top + 1, image.shape[0] - 1)
        for c in range(size[1]):
            x = max((c + 0.5) * image.shape[1] / size[1] - 0.5, 0.0)
            left = math.floor(x)
            right = min(left + 1, image.shape[1] - 1)
            upper = image[top, left] * (1 - (x - left)) + image[top, right] * (x - left)
            lower = image[bottom, left] * (1 - (x - left)) + image[bottom, right] * (x - left)
            rows.append(upper * (1 - (y - top)) + lower * (y - top))
    return torch.stack(rows).view(size)


def sparsifiner(
    keep: int,
    coefficients: int = 8,
    projected: bool = False,
    threshold: float = 0.0,
    built: tuple[int, int] | None = None,
    by_heads: bool = False,
    renormalise: bool = False,
    straight_through: bool = True,
    special_counted: bool = False,
    by_size: bool = True,
    everywhere: bool = False,
) -> Formula:
    """c = softmax(q (down K)^T), the largest of its entries kept; S = c up; softmax over the keys
    with the largest S.

    Args:
        keep: patch keys of each patch query.
        coefficients: entries of c that are kept.
        projected: whether the prediction has its own projections of queries and keys.
        threshold: entries of `up` up to this size are zero.
        built: grid of `down` and `up`, where it is not the layout's.
        by_heads: logits of c are divided by sqrt(H), as the released code does.
        renormalise: makes the kept entries of c sum to one: not the paper's, a control.
        straight_through: False leaves the prediction without any gradient: a control.
        special_counted: True lets special tokens use up places among the kept: a control.
        by_size: False takes the largest entries of c from the other end: a control.
        everywhere: by_heads for the logits of the attention, too: a control.
    """

    def formula(at: Inputs) -> Tensor:
        (h, w), scale, p = at.layout.grid, at.scale, at.params
        of_mask = 1 / math.sqrt(at.q.shape[1]) if by_heads else scale
        if everywhere:
            scale = of_mask
        first, patches = at.layout.prefix, h * w
        special = [j for j in range(at.layout.tokens) if not first <= j < first + patches]
        down, up = list(p["down"]), list(p["up"])
        if built is not None:
            ratio = (built[0] * built[1]) / patches
            down = [resized(row.view(built), (h, w)).flatten() * ratio for row in down]
            up = [resized(row.view(built), (h, w)).flatten() for row in up]
        if threshold:
            up = [torch.where(row.abs() > threshold, row, torch.zeros_like(row)) for row in up]

        def predictor(x: Tensor, name: str) -> Tensor:
            x = x.detach()
            return x @ p[name].T + p[f"{name}_bias"] if projected else x

        def head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys = predictor(k[first : first + patches], "channel_k")
            pooled = [(row[:, None] * keys).sum(0) for row in down]
            out = []
            for i, query in enumerate(q):
                if i in special:
                    out.append(read(query, k, v, [scale] * len(k)))
                    continue
                mine = predictor(query, "channel_q")
                logits = torch.stack([of_mask * (mine * mark).sum() for mark in pooled])
                shares = torch.exp(logits - logits.detach().max())
                shares = shares / shares.sum()
                order = shares.detach() if by_size else -shares.detach()
                kept = largest(order, coefficients)
                total = sum((shares[m] for m in kept), start=torch.zeros_like(shares[0]))
                predicted = torch.zeros_like(up[0])
                for m in kept:
                    predicted = predicted + shares[m] * up[m] / (total if renormalise else 1.0)
                room = keep - len(special) if special_counted else keep
                chosen = largest(predicted.detach(), room)
                terms, values = [], []
                for j in chosen:
                    term = scale * (query * k[first + j]).sum()
                    if straight_through:
                        term = term + predicted[j] - predicted[j].detach()
                    terms.append(term)
                    values.append(v[first + j])
                for j in special:
                    terms.append(scale * (query * k[j]).sum())
                    values.append(v[j])
                weights = torch.stack(terms)
                weights = torch.exp(weights - weights.detach().max())
                out.append((weights[:, None] * torch.stack(values)).sum(0) / weights.sum())
            return torch.stack(out)

        return each_head(head, at.q, at.k, at.v)

    return formula


CASES = [
    Case("sparsifiner(n=6,k=5,coefficients=4)", sparsifiner(5, 4)),
    Case("sparsifiner(n=6,k=4,coefficients=6)", sparsifiner(4, 6), DEEP, 24),
    Case("sparsifiner(n=6,k=4,coefficients=1)", sparsifiner(4, 1), BARE, 72),
    Case("sparsifiner(n=9,k=7)", sparsifiner(7), TAIL, scale=0.6),
    Case("sparsifiner(n=8,k=9,pool=2x4,coefficients=3)", sparsifiner(9, 3), BOTH),
    Case("sparsifiner(n=15,k=15)", sparsifiner(15), PLAIN),
    Case("sparsifiner(n=6,k=1,coefficients=2)", sparsifiner(1, 2), DEEP),
    Case("sparsifiner(n=6,k=5,coefficients=4,channels=3)", sparsifiner(5, 4, True), BOTH),
    Case("sparsifiner(n=6,k=5,coefficients=4,channels=12)", sparsifiner(5, 4, True), scale=0.5),
    Case(
        "sparsifiner(n=6,k=6,coefficients=3,threshold=0.2)", sparsifiner(6, 3, threshold=0.2), TAIL
    ),
    Case(
        "sparsifiner(n=6,k=6,coefficients=4,channels=4)",
        sparsifiner(6, 4, True, built=(3, 5)),
        BOTH,
        built=PLAIN,
    ),
    Case(
        "sparsifiner(n=6,k=5,coefficients=4,threshold=0.1)",
        sparsifiner(5, 4, threshold=0.1, built=(4, 7)),
        EVEN,
        24,
        built=TokenLayout(1, (4, 7)),
    ),
    Case("sparsifiner(n=6,k=5,coefficients=4)", sparsifiner(5, 4), TAIL, 8, 0.25, "constant"),
    Case(
        "sparsifiner(n=6,k=5,coefficients=4,mask_scale=heads)",
        sparsifiner(5, 4, by_heads=True),
        BOTH,
    ),
    Case(
        "sparsifiner(n=9,k=7,mask_scale=heads)", sparsifiner(7, by_heads=True), DEEP, 24, scale=0.6
    ),
    Case(
        "sparsifiner(n=6,k=4,coefficients=2,channels=4,mask_scale=heads,threshold=0.1)",
        sparsifiner(4, 2, True, threshold=0.1, by_heads=True),
        BARE,
        scale=0.1,
    ),
    Case(
        "sparsifiner(n=6,k=6,coefficients=4,channels=4,mask_scale=heads)",
        sparsifiner(6, 4, True, built=(3, 5), by_heads=True),
        BOTH,
        built=PLAIN,
    ),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "one key fewer": Case("sparsifiner(n=6,k=5,coefficients=4)", sparsifiner(4, 4)),
    "one coefficient fewer": Case("sparsifiner(n=6,k=5,coefficients=4)", sparsifiner(5, 3)),
    "smallest coefficients": Case(
        "sparsifiner(n=6,k=5,coefficients=4)", sparsifiner(5, 4, by_size=False)
    ),
    "special tokens counted": Case(
        "sparsifiner(n=6,k=5,coefficients=4)", sparsifiner(5, 4, special_counted=True)
    ),
    "own projections left out": Case(
        "sparsifiner(n=6,k=5,coefficients=4,channels=3)", sparsifiner(5, 4)
    ),
    "no threshold": Case(
        "sparsifiner(n=6,k=6,coefficients=3,threshold=0.2)", sparsifiner(6, 3), TAIL
    ),
    "the site's scale in the mask": Case(
        "sparsifiner(n=6,k=5,coefficients=4,mask_scale=heads)", sparsifiner(5, 4), BOTH
    ),
    "the heads' scale in the mask": Case(
        "sparsifiner(n=6,k=5,coefficients=4)", sparsifiner(5, 4, by_heads=True), BOTH
    ),
    "the mask's scale everywhere": Case(
        "sparsifiner(n=6,k=5,coefficients=4,mask_scale=heads)",
        sparsifiner(5, 4, by_heads=True, everywhere=True),
        BOTH,
    ),
}
