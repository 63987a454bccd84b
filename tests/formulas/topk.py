"""k-NN attention: softmax over each query's k best keys, Wang et al. 2022, Sec. 3."""

from __future__ import annotations

import torch
from torch import Tensor

from formulas._case import (
    BARE,
    BOTH,
    DEEP,
    EVEN,
    TAIL,
    Case,
    Formula,
    Inputs,
    each_head,
    largest,
    read,
)


def topk(count: int, patches_only: bool = False, mask_after: bool = False) -> Formula:
    """Softmax over the `count` keys of largest score, for every query on its own.

    Args:
        count: k.
        patches_only: chooses among the patches: a control.
        mask_after: normalises over all keys before it drops the others: a control.
    """

    def formula(at: Inputs) -> Tensor:
        scale, layout = at.scale, at.layout

        def head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rows = []
            for row in q:
                scores = scale * (k * row).sum(1)
                if patches_only:
                    ranked = scores.clone()
                    ranked[: layout.prefix] = float("-inf")
                    ranked[layout.prefix + layout.patches :] = float("-inf")
                    kept = largest(ranked.detach(), count)
                else:
                    kept = largest(scores.detach(), count)
                out = read(row, k[kept], v[kept], [scale] * count)
                if mask_after:
                    mass = torch.exp(scores - scores.detach().max())
                    out = out * mass[kept].sum() / mass.sum()
                rows.append(out)
            return torch.stack(rows)

        return each_head(head, at.q, at.k, at.v)

    return formula


CASES = [
    Case("topk(k=5)", topk(5)),
    Case("topk(k=7)", topk(7), TAIL, 24),
    Case("topk(k=3)", topk(3), DEEP, 72),
    Case("topk(k=6)", topk(6), BARE, scale=0.7),
    Case("topk(k=1)", topk(1), BOTH),
    Case("topk(k=31)", topk(31), BOTH, scale=0.3),
    Case("topk(k=24)", topk(24), EVEN, 24),
    Case("topk(k=4)", topk(4), BOTH, 8, 0.25, "constant"),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "one key fewer": Case("topk(k=5)", topk(4)),
    "patches alone": Case("topk(k=7)", topk(7, patches_only=True), DEEP),
    "masked after the softmax": Case("topk(k=5)", topk(5, mask_after=True)),
}
