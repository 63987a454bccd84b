"""ViT^3, Han et al. 2025, Eq. 5 and 8: one step of gradient descent on all keys and values.

The inner gradients are autograd's here and stay in the graph: the outer gradients go through them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from formulas._case import BARE, BOTH, DEEP, PLAIN, TAIL, Case, Formula, Inputs
from mitaswap import TokenLayout


def vit3(
    convolutions: str = "last",
    lr: float = 1.0,
    released: bool = False,
    flipped: bool = False,
    patches_only: bool = False,
    gate_first: bool = False,
) -> Formula:
    """Eq. 5 and 8.

    Args:
        convolutions: heads whose inner model is a 3 x 3 depth-wise convolution: `last`, `all` or
            `none`; that of the others is a gated linear unit.
        lr: inner learning rate.
        released: the released code's loss (factor 1/3) and its damped gradients.
        flipped: taps in the order of a true convolution, a control.
        patches_only: special tokens left out of the loss, a control.
        gate_first: silu on the other factor of the gated unit, a control.
    """

    def formula(at: Inputs) -> Tensor:
        (h, w), prefix, heads = at.layout.grid, at.layout.prefix, at.q.shape[1]
        gated = {"last": heads - 1, "all": 0, "none": heads}[convolutions]

        def unit(rows: Tensor, parts: list[Tensor]) -> Tensor:
            weight, gate = parts if not gate_first else reversed(parts)
            outs = []
            for row in rows:
                z = row @ gate
                outs.append((row @ weight) * z / (1 + torch.exp(-z)))
            return torch.stack(outs)

        def convolution(rows: Tensor, parts: list[Tensor]) -> Tensor:
            (kernel,) = parts
            outs = []
            for t in range(len(rows)):
                place = t - prefix
                if not 0 <= place < h * w:  # an image of one pixel
                    outs.append(kernel[:, 4] * rows[t])
                    continue
                total = torch.zeros_like(rows[t])
                for dy in (-1, 0, 1):
                    for dx in (-1, 0, 1):
                        r, c = place // w + dy, place % w + dx
                        if 0 <= r < h and 0 <= c < w:
                            tap = (dy + 1) * 3 + dx + 1
                            kept = kernel[:, 8 - tap if flipped else tap]
                            total = total + kept * rows[prefix + r * w + c]
                outs.append(total)
            return torch.stack(outs)

        def damped(g: Tensor) -> Tensor:
            """Each column divided by its length + 1."""
            columns = []
            for column in g.T:
                length = torch.sqrt((column**2).sum())
                columns.append(column / (length + 1))
            return torch.stack(columns).T

        def head(n: int, m: int) -> Tensor:
            q, k, v = at.q[n, m] * at.scale * math.sqrt(at.q.shape[3]), at.k[n, m], at.v[n, m]
            if m < gated:
                model, parts = unit, [at.params["weight"][m], at.params["gate"][m]]
            else:
                model, parts = convolution, [at.params["kernel"][m - gated]]
            agree = (model(k, parts) * v).sum(1)
            if patches_only:
                agree = agree[prefix : prefix + h * w]
            factor = 1 / 3 if released else 1 / math.sqrt(v.shape[1])
            loss = -factor * agree.sum() / len(agree)
            moves = list(torch.autograd.grad(loss, parts, create_graph=True))
            if released:  # a unit's columns are its outputs, a kernel's rows are its channels
                moves = [damped(g) if m < gated else damped(g.T).T for g in moves]
            return model(q, [x - lr * g for x, g in zip(parts, moves, strict=True)])

        return torch.stack(
            [torch.stack([head(n, m) for m in range(heads)]) for n in range(len(at.q))]
        )

    return formula


SMALL = TokenLayout(1, (3, 4), 2)
CASES = [
    Case("vit3", vit3(), PLAIN),
    Case("vit3", vit3(), SMALL, 24, scale=0.3),
    Case("vit3(lr=0.3)", vit3(lr=0.3), DEEP),
    Case("vit3(conv=all)", vit3("all"), BOTH),
    Case("vit3(conv=all,lr=2.0)", vit3("all", 2.0), BARE, 72),
    Case("vit3(conv=none)", vit3("none"), TAIL),
    Case("vit3(conv=none)", vit3("none"), SMALL, 8, 0.25, "constant"),
    Case("vit3(step=released)", vit3(released=True), PLAIN),
    Case("vit3(step=released,conv=all)", vit3("all", released=True), SMALL),
    Case("vit3(step=released,conv=none,lr=0.5)", vit3("none", 0.5, True), SMALL, 24),
    Case("vit3", vit3(), TokenLayout(0, (2, 7)), built=TokenLayout(0, (5, 3))),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "taps flipped": Case("vit3(conv=all)", vit3("all", flipped=True), PLAIN),
    "loss over patches alone": Case("vit3", vit3(patches_only=True), PLAIN),
    "factors exchanged": Case("vit3(conv=none)", vit3("none", gate_first=True), PLAIN),
    "the released step": Case("vit3", vit3(released=True), PLAIN),
    "a shorter step": Case("vit3(conv=all)", vit3("all", 0.9), PLAIN),
}
