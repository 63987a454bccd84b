"""TTT, Sun et al. 2024, Eq. 1 and 4 to 6: the weights of an inner model learn the keys' values.

The inner gradients are autograd's here, token by token, and stay in the graph: the outer gradients
go through them. Options that only the released code has follow test-time-training/ttt-lm-pytorch.
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
    mean: bool = False,
    residual: bool = True,
    stale: bool = True,
    bias: str = "",
    positions: str = "",
    rope: str = "",
    output_norm: str = "",
    tanh: bool = False,
) -> Formula:
    """Eq. 1 and 4 to 6, and what the released code has besides.

    Args:
        batch: tokens per inner mini-batch; 0 for all.
        mlp: inner model gelu(x W1) W2 instead of x W.
        causal: each query read by the weights of its own token, not by the last ones.
        eta: inner learning rate; 0 for the paper's, 1 (linear) or 0.1 (MLP).
        learned: times sigmoid(theta x).
        norm: x + LN(inner model), or the inner model alone.
        mean: half a mean of squares per token, averaged over tokens, as in the released code; else
            the paper's plain sums.
        residual: False leaves x out of x + LN(.): a control.
        stale: gradients of a mini-batch are all taken at its start (False: each at the weights that
            the tokens before have left, a control).
        bias: `trained`, summands of the layers, trained like the weights; `fixed` (a control), ones
            that the inner steps leave alone; empty for none.
        positions: `total`, a factor of the sum of steps up to a token; controls: `own`, each step
            times its own token's factor, and `negative`, factors that may be below zero.
        rope: `batch`, angles by the place in the mini-batch; controls: `sequence`, by that in the
            sequence, and `halves`, channel i turned with i + D / 2.
        output_norm: `whole`, LayerNorm over the channels of all heads; `heads` (a control), of
            each head's.
        tanh: tanh approximation of GELU.
    """

    def gelu(y: Tensor) -> Tensor:
        if tanh:
            return 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        return 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))

    def turned(x: Tensor, t: int) -> Tensor:
        place = t % batch if batch and rope != "sequence" else t
        pairs = len(x) // 2
        out = list(x)
        for i in range(pairs if rope else 0):
            one, two = (i, i + pairs) if rope == "halves" else (2 * i, 2 * i + 1)
            angle = place / 10000 ** (2 * i / len(x))
            out[one] = x[one] * math.cos(angle) - x[two] * math.sin(angle)
            out[two] = x[two] * math.cos(angle) + x[one] * math.sin(angle)
        return torch.stack(out)

    def formula(at: Inputs) -> Tensor:
        def head(n: int, m: int) -> Tensor:
            tokens, width = at.q.shape[2:]
            q = [turned(at.q[n, m, t] * at.scale * math.sqrt(width), t) for t in range(tokens)]
            k, v = [turned(at.k[n, m, t], t) for t in range(tokens)], at.v[n, m]
            ends = ["1", "2"] if mlp else [""]
            fixed = [at.params[f"bias{end}"][m] for end in ends] if bias else []

            def model(x: Tensor, w: Weights) -> Tensor:
                b = w[len(ends) :] if bias == "trained" else fixed
                y = x @ w[0] + b[0] if b else x @ w[0]
                if mlp:
                    y = gelu(y) @ w[1] + b[1] if b else gelu(y) @ w[1]
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

            def factor(i: int) -> float | Tensor:
                usual = 1 / i if mean else 1.0
                if not positions:
                    return usual
                moved = usual + at.params["offset"][i - 1]
                return moved if moved > 0 or positions == "negative" else 0 * moved

            start: Weights = [at.params[f"weight{end}"][m] for end in ends]
            start = start + (fixed if bias == "trained" else [])
            after: list[Weights] = []  # weights that each token leaves behind
            w = start
            for t in range(tokens):
                if t % (batch or tokens) == 0:
                    start, total, count = w, [torch.zeros_like(x) for x in w], 0
                moves = step(t, start if stale else w)
                count += 1
                by = factor(count)
                if positions == "own":
                    moves, by = [by * move for move in moves], 1.0
                total = [a + b for a, b in zip(total, moves, strict=True)]
                w = [a - by * b for a, b in zip(start, total, strict=True)]
                after.append(w)
            return torch.stack([model(q[t], after[t if causal else -1]) for t in range(tokens)])

        def normed(rows: list[Tensor]) -> list[Tensor]:
            """One token's outputs, head by head."""
            width = len(rows[0])
            numbers = torch.cat(rows)
            middles, spreads = [], []
            for h in range(len(rows)):
                group = rows[h] if output_norm == "heads" else numbers
                middle = group.sum() / len(group)
                middles.append(middle)
                spreads.append(((group - middle) ** 2).sum() / len(group))
            out = []
            for c in range(len(numbers)):
                unit = (numbers[c] - middles[c // width]) / torch.sqrt(spreads[c // width] + 1e-6)
                out.append(unit * at.params["output_weight"][c] + at.params["output_bias"][c])
            return [torch.stack(out[h * width : (h + 1) * width]) for h in range(len(rows))]

        batches = []
        for n in range(at.q.shape[0]):
            out = [head(n, m) for m in range(at.q.shape[1])]
            if output_norm:
                tokens = [normed([x[t] for x in out]) for t in range(at.q.shape[2])]
                out = [torch.stack([rows[m] for rows in tokens]) for m in range(at.q.shape[1])]
            batches.append(torch.stack(out))
        return torch.stack(batches)

    return formula


SMALL = TokenLayout(1, (2, 3), 2)
OTHER = TokenLayout(1, (2, 2), 2)
#: what the released code has besides the paper, all at once
RELEASED = "step=mean,bias=true,positions=true,rope=true,output_norm=true"
EXTRA = {
    "mean": True,
    "bias": "trained",
    "positions": "total",
    "rope": "batch",
    "output_norm": "whole",
}
CASES = [
    Case("ttt(batch=4)", ttt(4), SMALL),
    Case("ttt", ttt(), PLAIN),
    Case("ttt(step=mean)", ttt(mean=True), PLAIN),
    Case("ttt(batch=4,step=mean,order=causal)", ttt(4, causal=True, mean=True), SMALL),
    Case("ttt(batch=4,step=mean,inner=mlp)", ttt(4, mlp=True, mean=True), SMALL, 24),
    Case("ttt(batch=0)", ttt(0), BARE, 24, scale=0.3),
    Case("ttt(batch=4,order=causal)", ttt(4, causal=True), SMALL),
    Case("ttt(batch=1,order=causal)", ttt(1, causal=True), SMALL),
    Case("ttt(batch=5,eta=0.02)", ttt(5, eta=0.02), DEEP),
    Case("ttt(batch=3,rate=constant,eta=0.5)", ttt(3, eta=0.5, learned=False), SMALL, 72),
    Case(
        "ttt(batch=4,norm=false,eta=0.05,order=causal)",
        ttt(4, causal=True, eta=0.05, norm=False),
        SMALL,
    ),
    Case(
        "ttt(batch=0,norm=false,rate=constant,eta=0.5)",
        ttt(0, eta=0.5, norm=False, learned=False),
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
        "ttt(inner=mlp,batch=6,ratio=3,eta=0.01,rate=constant)",
        ttt(6, mlp=True, eta=0.01, learned=False),
        SMALL,
        scale=0.7,
    ),
    Case("ttt(batch=4,bias=true)", ttt(4, bias="trained"), SMALL),
    Case("ttt(batch=4,bias=true,order=causal)", ttt(4, causal=True, bias="trained"), SMALL),
    Case("ttt(batch=0,bias=true,norm=false)", ttt(0, norm=False, bias="trained"), BARE, 7),
    Case(
        "ttt(batch=0,bias=true,inner=mlp,ratio=2)", ttt(0, mlp=True, bias="trained"), SMALL, scale=1
    ),
    Case(
        "ttt(batch=3,bias=true,inner=mlp,order=causal,eta=0.02)",
        ttt(3, mlp=True, causal=True, eta=0.02, bias="trained"),
        SMALL,
    ),
    Case("ttt(batch=4,positions=true)", ttt(4, positions="total"), SMALL),
    Case("ttt(batch=4,positions=true,step=mean)", ttt(4, mean=True, positions="total"), SMALL),
    Case(
        "ttt(batch=4,positions=true,order=causal)",
        ttt(4, causal=True, positions="total"),
        SMALL,
        built=OTHER,
    ),
    Case("ttt(positions=true)", ttt(positions="total"), SMALL, built=OTHER),
    Case(
        "ttt(batch=5,positions=true,eta=0.02,order=causal)",
        ttt(5, causal=True, eta=0.02, positions="total"),
        DEEP,
    ),
    Case(
        "ttt(batch=4,positions=true,inner=mlp,rate=constant)",
        ttt(4, mlp=True, learned=False, positions="total"),
        SMALL,
        built=OTHER,
    ),
    Case("ttt(batch=4,rope=true)", ttt(4, rope="batch"), SMALL),
    Case("ttt(batch=4,rope=true,order=causal)", ttt(4, causal=True, rope="batch"), SMALL, 7),
    Case("ttt(batch=0,rope=true,norm=false)", ttt(0, norm=False, rope="batch"), SMALL, built=OTHER),
    Case("ttt(batch=4,output_norm=true)", ttt(4, output_norm="whole"), SMALL),
    Case(
        "ttt(batch=0,output_norm=true,norm=false,rate=constant)",
        ttt(0, norm=False, learned=False, output_norm="whole"),
        BARE,
    ),
    Case("ttt(inner=mlp,batch=4,gelu=tanh)", ttt(4, mlp=True, tanh=True), SMALL),
    Case(f"ttt(batch=4,order=causal,{RELEASED})", ttt(4, causal=True, **EXTRA), SMALL, built=OTHER),
    Case(
        f"ttt(batch=4,inner=mlp,order=causal,gelu=tanh,{RELEASED})",
        ttt(4, mlp=True, causal=True, tanh=True, **EXTRA),
        SMALL,
    ),
    Case(
        f"ttt(batch=4,inner=mlp,ratio=1,gelu=tanh,{RELEASED})",
        ttt(4, mlp=True, tanh=True, **EXTRA),
        SMALL,
        built=OTHER,
    ),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "the released code's average": Case("ttt(batch=4)", ttt(4, mean=True), SMALL),
    "sums in place of the average": Case("ttt(batch=4,step=mean)", ttt(4), SMALL),
    "gradients at the running weights": Case("ttt(batch=4)", ttt(4, stale=False), SMALL),
    "another mini-batch": Case("ttt(batch=4)", ttt(3), SMALL),
    "one rate of both inner models": Case(
        "ttt(inner=mlp,batch=4)", ttt(4, mlp=True, eta=1.0), SMALL
    ),
    "read in order": Case("ttt(batch=4)", ttt(4, causal=True), SMALL),
    "no residual": Case("ttt(batch=4)", ttt(4, residual=False), SMALL),
    "the same rate for all tokens": Case("ttt(batch=4)", ttt(4, eta=0.5, learned=False), SMALL),
    "biases that do not learn": Case("ttt(batch=4,bias=true)", ttt(4, bias="fixed"), SMALL),
    "no biases": Case("ttt(batch=4,bias=true)", ttt(4), SMALL),
    "each step by its own position": Case(
        "ttt(batch=4,positions=true,order=causal)", ttt(4, causal=True, positions="own"), SMALL
    ),
    "the whole step by each position": Case(
        "ttt(batch=4,positions=true)", ttt(4, positions="own"), SMALL
    ),
    "negative factors": Case(
        "ttt(batch=9,positions=true,order=causal,step=mean)",
        ttt(9, causal=True, mean=True, positions="negative"),
        SMALL,
    ),
    "positions without factors": Case("ttt(batch=4,positions=true)", ttt(4), SMALL),
    "turned by the place in the sequence": Case(
        "ttt(batch=4,rope=true)", ttt(4, rope="sequence"), SMALL
    ),
    "turned in halves": Case("ttt(batch=4,rope=true)", ttt(4, rope="halves"), SMALL),
    "a norm of each head": Case(
        "ttt(batch=4,output_norm=true)", ttt(4, output_norm="heads"), SMALL
    ),
    "the other GELU": Case("ttt(inner=mlp,batch=4,gelu=tanh)", ttt(4, mlp=True), SMALL),
}
