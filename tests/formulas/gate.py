"""A sigmoid gate of the module's input on the output (Qiu et al. 2025), neutral at zero."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from formulas._case import BOTH, DEEP, Case, Formula, Inputs
from formulas.agent import agent
from formulas.dwc import dwc
from formulas.standard import standard


def gate(inner: Callable[[Inputs], Tensor], per_head: bool = False, peak: float = 2.0) -> Formula:
    """Each output number times peak / (1 + exp(-(w . x + b)))."""

    def formula(at: Inputs) -> Tensor:
        own = {n.removeprefix("inner."): p for n, p in at.params.items() if n.startswith("inner.")}
        out = inner(Inputs(at.q, at.k, at.v, at.scale, at.layout, at.x, own))
        weight, bias = at.params["weight"], at.params["bias"]
        batches = []
        for b in range(out.shape[0]):
            heads = []
            for head in range(out.shape[1]):
                rows = []
                for n in range(out.shape[2]):
                    gates = []
                    for c in range(out.shape[3]):
                        row = head if per_head else head * out.shape[3] + c
                        logit = (weight[row] * at.x[b, n]).sum() + bias[row]
                        gates.append(peak / (1 + torch.exp(-logit)))
                    rows.append(out[b, head, n] * torch.stack(gates))
                heads.append(torch.stack(rows))
            batches.append(torch.stack(heads))
        return torch.stack(batches)

    return formula


CASES = [
    Case("standard+gate", gate(standard())),
    Case("standard+gate", gate(standard()), BOTH, scale=0.3),
    Case("standard+gate(per=head)", gate(standard(), per_head=True), DEEP, 24),
    Case("agent(n=6)+gate", gate(agent((2, 3))), BOTH),
    Case("standard+dwc+gate", gate(dwc(standard(), 3))),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "no factor of two": Case("standard+gate", gate(standard(), peak=1.0)),
    "no gate": Case("standard+gate", standard()),
}
