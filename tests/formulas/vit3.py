"""ViT^3, Han et al. 2025, Eq. 5 and 8: one step of gradient descent on all keys and values.

The inner gradients are autograd's here and stay in the graph: the outer gradients go through them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from formulas._case import BARE, BOTH, DEEP, PLAIN, TAIL, Case, Formula, Inputs
from mitaswap import TokenLayout

Model = Callable[[Tensor, list[Tensor]], Tensor]


def vit3(
    convolutions: str = "last",
    lr: float = 1.0,
    released: bool = False,
    rope: bool = False,
    flipped: bool = False,
    patches_only: bool = False,
    gate_first: bool = False,
    apart: bool = False,
    exchanged: bool = False,
    scaled: bool = False,
    keys_first: bool = False,
) -> Formula:
    """Eq. 5 and 8.

    Args:
        convolutions: heads whose inner model is a 3 x 3 depth-wise convolution: `last`, `all` or
            `none`; that of the others is a gated linear unit. `extra` is a head of its own, with a
            projection of its own (released code).
        lr: inner learning rate.
        released: the released code's loss (factor 1/3) and its damped gradients.
        rope: queries and keys of gated units are turned by their patch's row and column (released
            code).
        flipped: taps in the order of a true convolution, a control.
        patches_only: special tokens left out of the loss, a control.
        gate_first: silu on the other factor of the gated unit, a control.
        apart: every head turned as if it were alone, a control.
        exchanged: columns turn the first half of the pairs, a control.
        scaled: the site's factor of q for the extra head, too, a control.
        keys_first: the extra head's projection gives its keys before its queries, a control.
    """

    def formula(at: Inputs) -> Tensor:
        (h, w), prefix, heads = at.layout.grid, at.layout.prefix, at.q.shape[1]
        gated = {"last": heads - 1, "all": 0, "none": heads, "extra": heads}[convolutions]

        def turned(rows: Tensor) -> Tensor:
            """Rows [H, N, D] of gated units, each pair of their channels a number times e^(i a)."""
            count, _, dim = rows.shape
            sequence = dim if apart else count * dim
            half = sequence // 4
            outs = []
            for t in range(rows.shape[1]):
                row, place = rows[:, t].flatten(), t - prefix
                numbers = list(row)
                for first in range(0, len(row), sequence) if 0 <= place < h * w else []:
                    for pair in range(2 * half):
                        position = place // w if (pair < half) != exchanged else place % w
                        angle = position * 10000 ** (-(pair % half) / half)
                        a = first + 2 * pair
                        numbers[a] = row[a] * math.cos(angle) - row[a + 1] * math.sin(angle)
                        numbers[a + 1] = row[a] * math.sin(angle) + row[a + 1] * math.cos(angle)
                outs.append(torch.stack(numbers).view(count, dim))
            return torch.stack(outs, dim=1)

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

        def trained(
            model: Model, parts: list[Tensor], q: Tensor, k: Tensor, v: Tensor, columns: bool
        ) -> Tensor:
            agree = (model(k, parts) * v).sum(1)
            if patches_only:
                agree = agree[prefix : prefix + h * w]
            factor = 1 / 3 if released else 1 / math.sqrt(v.shape[1])
            loss = -factor * agree.sum() / len(agree)
            moves = list(torch.autograd.grad(loss, parts, create_graph=True))
            if released:  # a unit's columns are its outputs, a kernel's rows are its channels
                moves = [damped(g) if columns else damped(g.T).T for g in moves]
            return model(q, [x - lr * g for x, g in zip(parts, moves, strict=True)])

        def extra(n: int) -> list[Tensor]:
            """What the head of its own gives to each of the others."""
            weight, bias = (at.params[f"projection.{x}"] for x in ("weight", "bias"))
            rows = torch.stack([(weight * x).sum(1) + bias for x in at.x[n]])
            dim = at.v.shape[3]
            q, k, v = (rows[:, i * dim : (i + 1) * dim] for i in range(3))
            if keys_first:
                q, k = k, q
            if scaled:
                q = q * at.scale * math.sqrt(dim)
            out = trained(convolution, [at.params["kernel"][0]], q, k, v, False)
            join = at.params["join"]
            joins = [join[m * dim : (m + 1) * dim] for m in range(heads)]
            return [torch.stack([(part * row).sum(1) for row in out]) for part in joins]

        elements = []
        for n in range(len(at.q)):
            q, k = list(at.q[n] * at.scale * math.sqrt(at.q.shape[3])), list(at.k[n])
            if rope:
                q[:gated], k[:gated] = (turned(torch.stack(x[:gated])) for x in (q, k))
            out = []
            for m in range(heads):
                if m < gated:
                    parts = [at.params["weight"][m], at.params["gate"][m]]
                    out.append(trained(unit, parts, q[m], k[m], at.v[n, m], True))
                else:
                    parts = [at.params["kernel"][m - gated]]
                    out.append(trained(convolution, parts, q[m], k[m], at.v[n, m], False))
            if convolutions == "extra":
                out = [x + more for x, more in zip(out, extra(n), strict=True)]
            elements.append(torch.stack(out))
        return torch.stack(elements)

    return formula


#: the attention of the authors' hierarchical model
RELEASED = "vit3(conv=extra,step=released,rope=true)"
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
    Case("vit3(conv=extra)", vit3("extra"), BARE),
    Case("vit3(conv=extra,lr=0.5)", vit3("extra", 0.5), SMALL, scale=0.3),
    Case("vit3(conv=extra,step=released)", vit3("extra", released=True), DEEP, built=PLAIN),
    Case("vit3(rope=true)", vit3(rope=True), SMALL, 9),
    Case("vit3(rope=true,conv=none)", vit3("none", rope=True), DEEP, 7, scale=0.5),
    Case("vit3(rope=true,conv=none)", vit3("none", rope=True), BARE, 2),
    Case("vit3(rope=true)", vit3(rope=True), TokenLayout(0, (2, 7)), built=TokenLayout(0, (5, 3))),
    Case(RELEASED, vit3("extra", released=True, rope=True), SMALL),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "taps flipped": Case("vit3(conv=all)", vit3("all", flipped=True), PLAIN),
    "loss over patches alone": Case("vit3", vit3(patches_only=True), PLAIN),
    "factors exchanged": Case("vit3(conv=none)", vit3("none", gate_first=True), PLAIN),
    "the released step": Case("vit3", vit3(released=True), PLAIN),
    "a shorter step": Case("vit3(conv=all)", vit3("all", 0.9), PLAIN),
    "no extra head": Case("vit3(conv=extra)", vit3("none"), PLAIN),
    "the scale in the extra head": Case("vit3(conv=extra)", vit3("extra", scaled=True), scale=0.3),
    "queries and keys exchanged": Case("vit3(conv=extra)", vit3("extra", keys_first=True)),
    "not turned": Case("vit3(rope=true)", vit3()),
    "every head turned alone": Case("vit3(rope=true)", vit3(rope=True, apart=True)),
    "rows and columns exchanged": Case("vit3(rope=true)", vit3(rope=True, exchanged=True)),
}
