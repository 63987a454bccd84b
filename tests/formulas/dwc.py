"""A depth-wise convolution of V over the patch grid, added (FLatten, Han et al. 2023, Eq. 11)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from formulas._case import BOTH, DEEP, TAIL, Case, Formula, Inputs
from formulas.mita import mita
from formulas.standard import standard


def dwc(
    inner: Callable[[Inputs], Tensor], kernel: int, shared: bool = False, flipped: bool = False
) -> Formula:
    """inner(...) + the sum of the neighbours' values, each channel with its own weights.

    Args:
        inner: the mechanism's formula.
        kernel: side of the kernel.
        shared: channel c of every head has the weights c (released code).
        flipped: True transposes the kernel: nobody's, a control.
    """

    def formula(at: Inputs) -> Tensor:
        out, (h, w), reach = inner(at), at.layout.grid, kernel // 2
        batches = []
        for b in range(out.shape[0]):
            heads = []
            for head in range(out.shape[1]):
                first = 0 if shared else head * out.shape[3]
                channels = slice(first, first + out.shape[3])
                weight, bias = at.params["weight"][channels, 0], at.params["bias"][channels]
                tokens = list(out[b, head])
                for r in range(h):
                    for c in range(w):
                        total = bias
                        for i in range(kernel):
                            for j in range(kernel):
                                y, x = r + i - reach, c + j - reach
                                if 0 <= y < h and 0 <= x < w:
                                    value = at.v[b, head, at.layout.prefix + y * w + x]
                                    taken = weight[:, j, i] if flipped else weight[:, i, j]
                                    total = total + taken * value
                        place = at.layout.prefix + r * w + c
                        tokens[place] = tokens[place] + total
                heads.append(torch.stack(tokens))
            batches.append(torch.stack(heads))
        return torch.stack(batches)

    return formula


CASES = [
    Case("standard+dwc", dwc(standard(), 3)),
    Case("standard+dwc", dwc(standard(), 3), DEEP, 24),
    Case("standard+dwc(kernel=5)", dwc(standard(), 5), BOTH, scale=0.3),
    Case("standard+dwc(kernel=1)", dwc(standard(), 1), TAIL),
    Case("mita(m=6,k=5)+dwc", dwc(mita((2, 3), 5), 3), BOTH),
    Case("standard+dwc(share=true)", dwc(standard(), 3, shared=True)),
    Case("standard+dwc(share=true,kernel=5)", dwc(standard(), 5, shared=True), BOTH, 24),
    Case("standard+dwc(share=true)", dwc(standard(), 3, shared=True), DEEP, built=TAIL),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "transposed kernel": Case("standard+dwc", dwc(standard(), 3, flipped=True)),
    "transposed shared kernel": Case(
        "standard+dwc(share=true)", dwc(standard(), 3, shared=True, flipped=True)
    ),
    "first head's kernels for all": Case("standard+dwc", dwc(standard(), 3, shared=True)),
    "no convolution": Case("standard+dwc", standard()),
}
