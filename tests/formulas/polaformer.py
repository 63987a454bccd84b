"""PolaFormer's polarity-aware linear attention, Meng et al. 2025."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from formulas._case import BARE, BOTH, DEEP, TAIL, Case, Formula, Inputs


def part(x: Tensor, sign: float, exponent: Tensor) -> Tensor:
    """The part of x of one sign, as its size to the power of each channel's exponent."""
    size = sign * x
    there = size > 0
    safe = torch.where(there, size, torch.ones_like(size))
    return torch.where(there, torch.exp(exponent * torch.log(safe)), torch.zeros_like(size))


def polaformer(
    alpha: float = 4.0,
    eps: float = 1e-6,
    gate: bool = True,
    scaled: bool = False,
    crossed: bool = True,
    one_sum: bool = False,
) -> Formula:
    """Same-signed and opposite-signed parts act on two halves of the values' channels.

    Args:
        alpha: exponents are 1 + alpha sigmoid(w).
        eps: added to the sum of the weights.
        gate: whether G, linear in the input, multiplies the output.
        scaled: q and k are divided by a learned softplus (released code).
        crossed: False takes same-signed weights for both halves: not the paper, a control.
        one_sum: True normalises both halves by the same-signed sum: not the paper, a control.
    """

    def formula(at: Inputs) -> Tensor:
        batch, heads, tokens, dim = at.q.shape
        half = math.ceil(at.v.shape[3] / 2)
        elements = []
        for b in range(batch):
            out = []
            for h in range(heads):
                exponent = 1 + alpha / (1 + torch.exp(-at.params["power"][h]))
                softplus = torch.ones_like(exponent)
                if scaled:
                    softplus = torch.log(1 + torch.exp(at.params["channel_scale"][h]))
                k = at.k[b, h] / softplus
                up, down = part(k, 1.0, exponent), part(k, -1.0, exponent)
                rows = []
                for n in range(tokens):
                    q = at.q[b, h, n] * (at.scale * math.sqrt(dim)) / softplus
                    q_up, q_down = part(q, 1.0, exponent), part(q, -1.0, exponent)
                    same = (up * q_up).sum(1) + (down * q_down).sum(1)
                    opposite = (up * q_down).sum(1) + (down * q_up).sum(1)
                    if not crossed:
                        opposite = same
                    total = same.sum() if one_sum else opposite.sum()
                    v = at.v[b, h]
                    first = (same[:, None] * v[:, :half]).sum(0) / (same.sum() + eps)
                    second = (opposite[:, None] * v[:, half:]).sum(0) / (total + eps)
                    row = torch.cat([first, second])
                    if gate:
                        channels = range(h * len(row), (h + 1) * len(row))
                        weight, bias = (at.params[f"coefficients.{x}"] for x in ("weight", "bias"))
                        row = row * torch.stack(
                            [(weight[c] * at.x[b, n]).sum() + bias[c] for c in channels]
                        )
                    rows.append(row)
                out.append(torch.stack(rows))
            elements.append(torch.stack(out))
        return torch.stack(elements)

    return formula


CASES = [
    Case("polaformer", polaformer()),
    Case("polaformer", polaformer(), TAIL, 24, scale=0.31),
    Case("polaformer", polaformer(), DEEP, 7),
    Case("polaformer", polaformer(), BARE, 1),
    Case("polaformer(alpha=0)", polaformer(0.0), BOTH),
    Case("polaformer(alpha=2.5)", polaformer(2.5), BARE, scale=0.9),
    Case("polaformer(eps=0.5)", polaformer(eps=0.5), BOTH),
    Case("polaformer(gate=false)", polaformer(gate=False), TAIL, 72),
    Case("polaformer(gate=false,alpha=1)", polaformer(1.0, gate=False), DEEP, 9),
    Case("polaformer(channel_scale=true)", polaformer(scaled=True), BOTH),
    Case(
        "polaformer(channel_scale=true,gate=false)", polaformer(gate=False, scaled=True), DEEP, 24
    ),
    Case("polaformer", polaformer(), BARE, 8, 0.25, "constant"),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "another exponent": Case("polaformer(gate=false)", polaformer(4.1, gate=False)),
    "opposite signs left out": Case("polaformer", polaformer(crossed=False)),
    "one normaliser": Case("polaformer", polaformer(one_sum=True)),
    "no gate": Case("polaformer", polaformer(gate=False)),
    "scale left out": Case("polaformer(channel_scale=true)", polaformer()),
}
