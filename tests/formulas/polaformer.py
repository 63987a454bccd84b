"""PolaFormer's polarity-aware linear attention, Meng et al. 2025."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from formulas._case import BARE, BOTH, DEEP, PLAIN, TAIL, Case, Formula, Inputs
from formulas.focused import encoding
from mitaswap import TokenLayout


def part(x: Tensor, sign: float, exponent: Tensor) -> Tensor:
    """The part of x of one sign, as its size to the power of each channel's exponent."""
    size = sign * x
    there = size > 0
    safe = torch.where(there, size, torch.ones_like(size))
    return torch.where(there, torch.exp(exponent * torch.log(safe)), torch.zeros_like(size))


def convolved(at: Inputs, b: int, h: int, n: int) -> Tensor:
    """The depth-wise convolution of V at one token, one kernel for each channel of a head."""
    (height, width), place = at.layout.grid, n - at.layout.prefix
    if not 0 <= place < height * width:
        return torch.zeros_like(at.v[b, h, n])
    kernels, total = at.params["conv_weight"][:, 0], at.params["conv_bias"]
    reach = kernels.shape[1] // 2
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            row, column = place // width + dy, place % width + dx
            if 0 <= row < height and 0 <= column < width:
                value = at.v[b, h, at.layout.prefix + row * width + column]
                total = total + kernels[:, reach + dy, reach + dx] * value
    return total


def polaformer(
    alpha: float = 4.0,
    eps: float = 1e-6,
    gate: bool = True,
    scaled: bool = False,
    positions: bool = False,
    conv: bool = False,
    mean: bool = False,
    crossed: bool = True,
    one_sum: bool = False,
    gate_first: bool = False,
    bare_queries: bool = True,
) -> Formula:
    """Same-signed and opposite-signed parts act on two halves of the values' channels.

    Args:
        alpha: exponents are 1 + alpha sigmoid(w).
        eps: added to the sum of the weights.
        gate: whether G, linear in the input, multiplies the output.
        scaled: q and k are divided by a learned softplus (released code).
        positions: keys have a learned positional encoding (released code).
        conv: a depth-wise convolution of V is added before the gate (released code).
        mean: eps is added to the mean of the weights over all tokens (released code).
        crossed: False takes same-signed weights for both halves: not the paper, a control.
        one_sum: True normalises both halves by the same-signed sum: not the paper, a control.
        gate_first: True adds the convolution to what the gate left: not the code, a control.
        bare_queries: False gives queries the encoding, too: not the code, a control.
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
                where = torch.zeros_like(at.k[b, h])
                if positions:
                    table = at.params["position_table"]
                    where = torch.stack([encoding(table, at.layout, n)[h] for n in range(tokens)])
                k = (at.k[b, h] + where) / softplus
                up, down = part(k, 1.0, exponent), part(k, -1.0, exponent)
                rows = []
                for n in range(tokens):
                    q = at.q[b, h, n] * (at.scale * math.sqrt(dim)) / softplus
                    if not bare_queries:
                        q = q + where[n] / softplus
                    q_up, q_down = part(q, 1.0, exponent), part(q, -1.0, exponent)
                    same = (up * q_up).sum(1) + (down * q_down).sum(1)
                    opposite = (up * q_down).sum(1) + (down * q_up).sum(1)
                    if not crossed:
                        opposite = same
                    total = same.sum() if one_sum else opposite.sum()
                    v = at.v[b, h]
                    first = (same[:, None] * v[:, :half]).sum(0)
                    second = (opposite[:, None] * v[:, half:]).sum(0)
                    count = tokens if mean else 1
                    first = first / count / (same.sum() / count + eps)
                    second = second / count / (total / count + eps)
                    row = torch.cat([first, second])
                    if conv and not gate_first:
                        row = row + convolved(at, b, h, n)
                    if gate:
                        channels = range(h * len(row), (h + 1) * len(row))
                        weight, bias = (at.params[f"coefficients.{x}"] for x in ("weight", "bias"))
                        row = row * torch.stack(
                            [(weight[c] * at.x[b, n]).sum() + bias[c] for c in channels]
                        )
                    if conv and gate_first:
                        row = row + convolved(at, b, h, n)
                    rows.append(row)
                out.append(torch.stack(rows))
            elements.append(torch.stack(out))
        return torch.stack(elements)

    return formula


RELEASED = "polaformer(conv=5,positions=true,channel_scale=true,eps_of=mean)"
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
    Case("polaformer(positions=true)", polaformer(positions=True), DEEP),
    Case(
        "polaformer(positions=true,gate=false)",
        polaformer(gate=False, positions=True),
        BOTH,
        24,
        built=PLAIN,
    ),
    Case(
        "polaformer(positions=true)",
        polaformer(positions=True),
        TokenLayout(0, (3, 5)),
        built=TokenLayout(0, (7, 4)),
    ),
    Case("polaformer(conv=3)", polaformer(conv=True), TAIL),
    Case("polaformer(conv=1,gate=false)", polaformer(gate=False, conv=True), BARE, 9),
    Case("polaformer(conv=7)", polaformer(conv=True), DEEP, scale=0.6),
    Case("polaformer(eps_of=mean,eps=0.2)", polaformer(eps=0.2, mean=True), BOTH),
    Case("polaformer(eps_of=mean,gate=false)", polaformer(gate=False, mean=True), TAIL, 9),
    Case(RELEASED, polaformer(scaled=True, positions=True, conv=True, mean=True), BOTH),
    Case(RELEASED, polaformer(scaled=True, positions=True, conv=True, mean=True), BOTH, built=DEEP),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "another exponent": Case("polaformer(gate=false)", polaformer(4.1, gate=False)),
    "opposite signs left out": Case("polaformer", polaformer(crossed=False)),
    "one normaliser": Case("polaformer", polaformer(one_sum=True)),
    "eps on the sum": Case("polaformer(eps_of=mean,eps=0.1)", polaformer(eps=0.1)),
    "eps on the mean": Case("polaformer(eps=0.1)", polaformer(eps=0.1, mean=True)),
    "no gate": Case("polaformer", polaformer(gate=False)),
    "scale left out": Case("polaformer(channel_scale=true)", polaformer()),
    "positions left out": Case("polaformer(positions=true)", polaformer()),
    "positions of queries too": Case(
        "polaformer(positions=true)", polaformer(positions=True, bare_queries=False)
    ),
    "convolution left out": Case("polaformer(conv=3)", polaformer()),
    "convolution after the gate": Case(
        "polaformer(conv=3)", polaformer(conv=True, gate_first=True)
    ),
}
