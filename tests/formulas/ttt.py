"""TTT, Sun et al. 2024, Eq. 1 and 4 to 6: the weights of an inner model learn the keys' values.

The inner gradients are autograd's here, token by token, and stay in the graph: the outer gradients
go through them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from formulas._case import BARE, DEEP, PLAIN, Case, Formula, Inputs
from mitaswap import TokenLayout

Weights = list[Tensor]


def ttt(
    batch: int = 16,
    mlp: bool = False,
    causal: bool = False,
    eta: float = 0.0,
    learned: bool = True,
    norm: bool = True,
    mean: bool = True,
    residual: bool = True,
    stale: bool = True,
) -> Formula:
    """Eq. 1 and 4 to 6.

    Args:
        batch: tokens per inner mini-batch; 0 for all.
        mlp: inner model gelu(x W1) W2 instead of x W.
        causal: each query read by the weights of its own token, not by the last ones.
        eta: inner learning rate; 0 for the paper's, 1 (linear) or 0.1 (MLP).
        learned: times sigmoid(theta x).
        norm: x + LN(inner model), or the inner model alone.
        mean: half a mean of squares per token, averaged over tokens; else plain sums, as printed.
        residual: False leaves x out of x + LN(.): a control.
        stale: gradients of a mini-batch are all taken at its start (False: each at the weights that
            the tokens before have left, a control).
    """

    def formula(at: Inputs) -> Tensor:
        def head(n: int, m: int) -> Tensor:
            q, k, v = at.q[n, m] * at.scale * math.sqrt(at.q.shape[3]), at.k[n, m], at.v[n, m]

            def model(x: Tensor, w: Weights) -> Tensor:
                y = x @ w[0]
                if mlp:
                    y = (0.5 * y * (1 + torch.erf(y / math.sqrt(2)))) @ w[1]
                if not norm:
                    return y
                middle = y.sum() / len(y)
                spread = ((y - middle) ** 2).sum() / len(y)
                y = (y - middle) / torch.sqrt(spread + 1e-6)
                y = y * at.params["norm_weight"][m] + at.params["norm_bias"][m]
                return x + y if residual else y

            def step(t: int, w: Weights) -> Weights:
                loss = ((model(k[t], w) - v[t]) ** 2).sum()
                loss = loss / 2 / v.shape[1] if mean else loss
                usual = 0.1 if mlp else 1.0
                rate: float | Tensor = eta if eta else usual
                if learned:
                    theta = (at.params["rate_weight"][m] * at.x[n, t]).sum()
                    rate = rate / (1 + torch.exp(-theta - at.params["rate_bias"][m]))
                return [rate * g for g in torch.autograd.grad(loss, w, create_graph=True)]

            names = ["weight1", "weight2"] if mlp else ["weight"]
            start: Weights = [at.params[name][m] for name in names]
            after: list[Weights] = []  # weights that each token leaves behind
            w = start
            for t in range(len(q)):
                if t % (batch or len(q)) == 0:
                    start, total, count = w, [torch.zeros_like(x) for x in w], 0
                moves = step(t, start if stale else w)
                total = [a + b for a, b in zip(total, moves, strict=True)]
                count += 1
                w = [a - b / (count if mean else 1) for a, b in zip(start, total, strict=True)]
                after.append(w)
            return torch.stack([model(q[t], after[t if causal else -1]) for t in range(len(q))])

        size = at.q.shape[:2]
        return torch.stack(
            [torch.stack([head(n, m) for m in range(size[1])]) for n in range(size[0])]
        )

    return formula


SMALL = TokenLayout(1, (2, 3), 2)
CASES = [
    Case("ttt(batch=4)", ttt(4), SMALL),
    Case("ttt", ttt(), PLAIN),
    Case("ttt(batch=0)", ttt(0), BARE, 24, scale=0.3),
    Case("ttt(batch=4,order=causal)", ttt(4, causal=True), SMALL),
    Case("ttt(batch=1,order=causal)", ttt(1, causal=True), SMALL),
    Case("ttt(batch=5,step=sum,eta=0.02)", ttt(5, eta=0.02, mean=False), DEEP),
    Case("ttt(batch=3,rate=constant,eta=0.5)", ttt(3, eta=0.5, learned=False), SMALL, 72),
    Case(
        "ttt(batch=4,norm=false,step=sum,eta=0.05,order=causal)",
        ttt(4, causal=True, eta=0.05, norm=False, mean=False),
        SMALL,
    ),
    Case(
        "ttt(batch=0,norm=false,step=sum,rate=constant,eta=0.5)",
        ttt(0, eta=0.5, norm=False, mean=False, learned=False),
        PLAIN,
    ),
    Case("ttt(inner=mlp,batch=4)", ttt(4, mlp=True), SMALL),
    Case("ttt(inner=mlp,batch=4,eta=0.2)", ttt(4, mlp=True, eta=0.2), SMALL),
    Case("ttt(inner=mlp,batch=0,ratio=2)", ttt(0, mlp=True), SMALL),
    Case(
        "ttt(inner=mlp,batch=4,ratio=1,norm=false,order=causal)",
        ttt(4, mlp=True, norm=False, causal=True),
        SMALL,
    ),
    Case(
        "ttt(inner=mlp,batch=6,ratio=3,step=sum,eta=0.01,rate=constant)",
        ttt(6, mlp=True, eta=0.01, mean=False, learned=False),
        SMALL,
        scale=0.7,
    ),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "gradients at the running weights": Case("ttt(batch=4)", ttt(4, stale=False), SMALL),
    "another mini-batch": Case("ttt(batch=4)", ttt(3), SMALL),
    "one rate of both inner models": Case(
        "ttt(inner=mlp,batch=4)", ttt(4, mlp=True, eta=1.0), SMALL
    ),
    "read in order": Case("ttt(batch=4)", ttt(4, causal=True), SMALL),
    "no residual": Case("ttt(batch=4)", ttt(4, residual=False), SMALL),
    "the same rate for all tokens": Case("ttt(batch=4)", ttt(4, eta=0.5, learned=False), SMALL),
}
