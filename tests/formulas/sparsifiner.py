"""Sparsifiner, Wei et al. 2023, Sec. 3: a low-rank prediction of the attention map chooses the keys
of each query.
"""

from __future__ import annotations

import math
from typing import Any

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
    floor: float = 0.0,
    tied: bool = False,
    magnitude: bool = False,
    inside: bool = False,
    averaged: bool = True,
    sign_kept: bool = False,
    special_first: bool = False,
    above: bool = True,
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
        floor: entries of c up to this size are zero.
        tied: `up` is `down`.
        magnitude: absolute values of `up`, before they meet c.
        inside: special tokens have entries in `down` and `up`, and are keys among the kept.
        averaged: False leaves special tokens out of the sums of keys, while inside: a control.
        sign_kept: takes absolute values of the scores in place of those of `up`: a control.
        special_first: their entries stand before those of patches, even if they do not: a control.
        above: False takes the entries of c up to `floor` and not those above it: a control.
    """

    def formula(at: Inputs) -> Tensor:
        (h, w), scale, p = at.layout.grid, at.scale, at.params
        of_mask = 1 / math.sqrt(at.q.shape[1]) if by_heads else scale
        if everywhere:
            scale = of_mask
        first, patches = at.layout.prefix, h * w
        special = [j for j in range(at.layout.tokens) if not first <= j < first + patches]
        down, up = list(p["down"]), list(p["down" if tied else "up"])
        if built is not None:
            ratio = (built[0] * built[1]) / patches
            down = [resized(row.view(built), (h, w)).flatten() * ratio for row in down]
            up = [resized(row.view(built), (h, w)).flatten() for row in up]
        if inside and special:
            prefix = len(special) if special_first else first

            def among(row: Tensor, others: Tensor) -> Tensor:
                return torch.cat([others[:prefix], row, others[prefix:]])

            outside = p["down_special"] if averaged else 0 * p["down_special"]
            down = [among(row, others) for row, others in zip(down, outside, strict=True)]
            extra = p["down_special" if tied else "up_special"]
            up = [among(row, others) for row, others in zip(up, extra, strict=True)]
        if magnitude and not sign_kept:
            up = [torch.where(row < 0, -row, row) for row in up]
        if threshold:
            up = [torch.where(row.abs() > threshold, row, torch.zeros_like(row)) for row in up]

        def predictor(x: Tensor, name: str) -> Tensor:
            x = x.detach()
            return x @ p[name].T + p[f"{name}_bias"] if projected else x

        def head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            begin = 0 if inside else first
            keys = predictor(k if inside else k[first : first + patches], "channel_k")
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
                if floor:
                    kept = [m for m in kept if (float(shares[m].detach()) > floor) == above]
                total = sum((shares[m] for m in kept), start=torch.zeros_like(shares[0]))
                predicted = torch.zeros_like(up[0])
                for m in kept:
                    predicted = predicted + shares[m] * up[m] / (total if renormalise else 1.0)
                if sign_kept:
                    predicted = torch.where(predicted < 0, -predicted, predicted)
                room = keep - len(special) if special_counted else keep
                chosen = largest(predicted.detach(), room)
                terms, values = [], []
                for j in chosen:
                    term = scale * (query * k[begin + j]).sum()
                    if straight_through:
                        term = term + predicted[j] - predicted[j].detach()
                    terms.append(term)
                    values.append(v[begin + j])
                for j in [] if inside else special:
                    terms.append(scale * (query * k[j]).sum())
                    values.append(v[j])
                weights = torch.stack(terms)
                weights = torch.exp(weights - weights.detach().max())
                out.append((weights[:, None] * torch.stack(values)).sum(0) / weights.sum())
            return torch.stack(out)

        return each_head(head, at.q, at.k, at.v)

    return formula


def six(options: str, *args: Any, **more: Any) -> Case:
    """A case of six windows."""
    return Case(f"sparsifiner(n=6,{options})", *args, **more)


FIVE = "sparsifiner(n=6,k=5,coefficients=4)"
INSIDE = "sparsifiner(n=6,k=6,coefficients=4,special=inside)"
MAGNITUDE = "sparsifiner(n=6,k=5,coefficients=4,magnitude=true)"
FLOOR = "sparsifiner(n=6,k=5,coefficients=6,coefficient_threshold=0.15)"
HEADS = "sparsifiner(n=6,k=5,coefficients=4,mask_scale=heads)"
CASES = [
    Case(FIVE, sparsifiner(5, 4)),
    six("k=4,coefficients=6", sparsifiner(4, 6), DEEP, 24),
    six("k=4,coefficients=1", sparsifiner(4, 1), BARE, 72),
    Case("sparsifiner(n=9,k=7)", sparsifiner(7), TAIL, scale=0.6),
    Case("sparsifiner(n=8,k=9,pool=2x4,coefficients=3)", sparsifiner(9, 3), BOTH),
    Case("sparsifiner(n=15,k=15)", sparsifiner(15), PLAIN),
    six("k=1,coefficients=2", sparsifiner(1, 2), DEEP),
    six("k=5,coefficients=4,channels=3", sparsifiner(5, 4, True), BOTH),
    six("k=5,coefficients=4,channels=12", sparsifiner(5, 4, True), scale=0.5),
    six("k=6,coefficients=3,threshold=0.2", sparsifiner(6, 3, threshold=0.2), TAIL),
    six("k=6,coefficients=4,channels=4", sparsifiner(6, 4, True, built=(3, 5)), BOTH, built=PLAIN),
    six(
        "k=5,coefficients=4,threshold=0.1",
        sparsifiner(5, 4, threshold=0.1, built=(4, 7)),
        EVEN,
        24,
        built=TokenLayout(1, (4, 7)),
    ),
    Case(FIVE, sparsifiner(5, 4), TAIL, 8, 0.25, "constant"),
    Case(HEADS, sparsifiner(5, 4, by_heads=True), BOTH),
    Case(
        "sparsifiner(n=9,k=7,mask_scale=heads)", sparsifiner(7, by_heads=True), DEEP, 24, scale=0.6
    ),
    six(
        "k=4,coefficients=2,channels=4,mask_scale=heads,threshold=0.1",
        sparsifiner(4, 2, True, threshold=0.1, by_heads=True),
        BARE,
        scale=0.1,
    ),
    six(
        "k=6,coefficients=4,channels=4,mask_scale=heads",
        sparsifiner(6, 4, True, built=(3, 5), by_heads=True),
        BOTH,
        built=PLAIN,
    ),
    Case(FLOOR, sparsifiner(5, 6, floor=0.15), BOTH),
    six(
        "k=5,coefficients=4,coefficient_threshold=0.2,threshold=0.1,channels=3",
        sparsifiner(5, 4, True, threshold=0.1, built=(4, 7), floor=0.2),
        EVEN,
        built=TokenLayout(1, (4, 7)),
    ),
    six("k=5,coefficients=4,tied=true", sparsifiner(5, 4, tied=True), BOTH),
    six(
        "k=6,coefficients=4,channels=4,tied=true",
        sparsifiner(6, 4, True, built=(3, 5), tied=True),
        BOTH,
        built=PLAIN,
    ),
    Case(MAGNITUDE, sparsifiner(5, 4, magnitude=True), DEEP),
    six(
        "k=6,coefficients=5,magnitude=true,threshold=0.2,tied=true",
        sparsifiner(6, 5, threshold=0.2, built=(4, 7), tied=True, magnitude=True),
        EVEN,
        24,
        built=TokenLayout(1, (4, 7)),
    ),
    Case(INSIDE, sparsifiner(6, 4, inside=True), BOTH),
    six("k=7,coefficients=6,special=inside", sparsifiner(7, 6, inside=True), DEEP),
    six("k=4,coefficients=3,special=inside", sparsifiner(4, 3, inside=True), BARE),
    six(
        "k=17,coefficients=3,special=inside",
        sparsifiner(17, 3, inside=True),
        TokenLayout(1, (3, 5), suffix=1),
    ),
    six(
        "k=6,coefficients=4,channels=4,special=inside,tied=true,magnitude=true",
        sparsifiner(6, 4, True, built=(3, 5), tied=True, magnitude=True, inside=True),
        BOTH,
        built=TokenLayout(1, (3, 5), suffix=2),
    ),
    Case(INSIDE, sparsifiner(6, 4, built=(4, 7), inside=True), EVEN, built=TokenLayout(1, (4, 7))),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "one key fewer": Case(FIVE, sparsifiner(4, 4)),
    "one coefficient fewer": Case(FIVE, sparsifiner(5, 3)),
    "smallest coefficients": Case(FIVE, sparsifiner(5, 4, by_size=False)),
    "special tokens counted": Case(FIVE, sparsifiner(5, 4, special_counted=True)),
    "own projections left out": six("k=5,coefficients=4,channels=3", sparsifiner(5, 4)),
    "no threshold": six("k=6,coefficients=3,threshold=0.2", sparsifiner(6, 3), TAIL),
    "the site's scale in the mask": Case(HEADS, sparsifiner(5, 4), BOTH),
    "the heads' scale in the mask": Case(FIVE, sparsifiner(5, 4, by_heads=True), BOTH),
    "the mask's scale everywhere": Case(
        HEADS, sparsifiner(5, 4, by_heads=True, everywhere=True), BOTH
    ),
    "coefficients below the threshold": Case(FLOOR, sparsifiner(5, 6, floor=0.15, above=False)),
    "no threshold of coefficients": Case(FLOOR, sparsifiner(5, 6)),
    "a basis of its own": Case(FIVE, sparsifiner(5, 4, tied=True)),
    "a tied basis by magnitude": six(
        "k=5,coefficients=4,tied=true", sparsifiner(5, 4, tied=True, magnitude=True)
    ),
    "signed basis": Case(MAGNITUDE, sparsifiner(5, 4)),
    "magnitude of the scores": Case(MAGNITUDE, sparsifiner(5, 4, magnitude=True, sign_kept=True)),
    "special keys not averaged": Case(INSIDE, sparsifiner(6, 4, inside=True, averaged=False), BOTH),
    "special tokens apart": Case(INSIDE, sparsifiner(6, 4), BOTH),
    "all special tokens first": Case(
        INSIDE, sparsifiner(6, 4, inside=True, special_first=True), BOTH
    ),
}
