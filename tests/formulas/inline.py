"""InLine attention, Han et al. 2024 (Bridging the Divide), Eq. 5 and its local residual."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from formulas._case import BARE, BOTH, DEEP, TAIL, Case, Formula, Inputs
from mitaswap import TokenLayout


def identity(x: Tensor) -> Tensor:
    return x


def relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.zeros_like(x))


def leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.01 * x)


def exponential(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: math.e ** (factor * x)


def inline(
    kernel: Callable[[Tensor], Tensor] = identity,
    local: bool = True,
    one: bool = True,
    over_patches: bool = False,
    turned: bool = False,
) -> Formula:
    """Weights phi(q) . phi(k_j) less their mean plus 1 / N, and 3 x 3 neighbours of patches.

    Args:
        kernel: phi, before the factor of q.
        local: whether the local residual is added.
        one: False leaves out the 1 / N: not the paper, a control.
        over_patches: True takes the residual's mean of x over patches: not the paper, a control.
        turned: True reads neighbours mirrored: not the paper, a control.
    """

    def formula(at: Inputs) -> Tensor:
        batch, heads, tokens, dim = at.q.shape
        first, (height, width) = at.layout.prefix, at.layout.grid

        def global_part(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            phi_k = kernel(k)
            rows = []
            for row in q:
                phi_q = kernel(row * (at.scale * math.sqrt(dim))) / (math.sqrt(dim) * tokens)
                scores = (phi_k * phi_q).sum(1)
                weights = scores - scores.sum() / tokens + (1 / tokens if one else 0.0)
                rows.append((weights[:, None] * v).sum(0))
            return torch.stack(rows)

        def residual(x: Tensor, v: Tensor, h: int) -> Tensor:
            """What the patches of head h get, zero for special tokens."""
            seen = x[first : first + height * width] if over_patches else x
            mean = seen.sum(0) / len(seen)
            part = len(mean) // heads
            own = mean[h * part : (h + 1) * part]
            p = {name: table[h] for name, table in at.params.items()}
            hidden = (p["hidden_weight"] * own).sum(1) + p["hidden_bias"]
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            taps = ((p["residual_weight"] * hidden).sum(1) + p["residual_bias"]).view(-1, 9)
            rows = [torch.zeros_like(v[0]) for _ in range(tokens)]
            for y in range(height):
                for column in range(width):
                    near = []
                    for dy in (-1, 0, 1):
                        for dx in (-1, 0, 1):
                            there, across = y + dy, column + dx
                            if 0 <= there < height and 0 <= across < width:
                                near.append(((dy + 1) * 3 + (dx + 1), there * width + across))
                    factors = torch.stack([taps[:, 8 - t if turned else t] for t, _ in near])
                    values = torch.stack([v[first + place] for _, place in near])
                    rows[first + y * width + column] = (factors * values).sum(0)
            return torch.stack(rows)

        elements = []
        for b in range(batch):
            out = []
            for h in range(heads):
                head = global_part(at.q[b, h], at.k[b, h], at.v[b, h])
                if local:
                    head = head + residual(at.x[b], at.v[b, h], h)
                out.append(head)
            elements.append(torch.stack(out))
        return torch.stack(elements)

    return formula


CASES = [
    Case("inline", inline()),
    Case("inline", inline(), TAIL, 24, scale=0.31),
    Case("inline", inline(), DEEP, built=BOTH),
    Case("inline", inline(), TokenLayout(0, (1, 6), 1)),
    Case("inline(kernel=relu)", inline(relu), BOTH, scale=0.9),
    Case("inline(kernel=leakyrelu)", inline(leaky), BARE, 24),
    Case("inline(local=false)", inline(local=False), BOTH, 72),
    Case("inline(local=false)", inline(local=False), BARE, scale=0.7),
    Case("inline(kernel=relu,local=false)", inline(relu, local=False), DEEP, 24),
    Case("inline(kernel=leakyrelu,local=false)", inline(leaky, local=False), TAIL, scale=0.2),
    Case("inline(local=false)", inline(local=False), BARE, 8, 0.25, "constant"),
    Case("inline(kernel=exp)", inline(exponential(0.2)), BOTH),
    Case("inline(kernel=exp,local=false)", inline(exponential(0.2), local=False), BARE, scale=0.7),
    Case("inline(kernel=exp,t=1.0)", inline(exponential(1.0)), DEEP, 24),
    Case("inline(kernel=exp,t=0.5,local=false)", inline(exponential(0.5), local=False), TAIL),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "weights sum to zero": Case("inline(local=false)", inline(local=False, one=False)),
    "another kernel": Case("inline(kernel=leakyrelu)", inline(relu)),
    "another exponent": Case("inline(kernel=exp)", inline(exponential(0.21))),
    "no exponential": Case("inline(kernel=exp)", inline()),
    "mean of patches alone": Case("inline", inline(over_patches=True)),
    "neighbours mirrored": Case("inline", inline(turned=True)),
}
