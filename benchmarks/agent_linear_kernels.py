"""The kernels of agent and linear attention against plain torch on a CUDA device, side by side:
agent attention as pooling and two calls of SDPA, linear attention as feature maps and products, in
the inputs' dtype.

Each size is checked against the reference before it is timed. Times are of replayed CUDA graphs, in
turn.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from mita_kernels import (
    BANDWIDTH,
    DTYPE,
    HEADS,
    SIZES,
    captured,
    extra_memory,
    gate,
    in_turn,
    steps,
)
from rich.console import Console
from rich.table import Table
from timing import paired_ratio, quantiles, write_rows
from torch import Tensor

from mitaswap.mechanisms import mechanism
from mitaswap.mechanisms.agent import Agent
from mitaswap.mechanisms.linear import Linear
from mitaswap.operators.pool import landmarks
from mitaswap.tokens import TokenLayout

DIM = 64


def plain(spec: str, layout: TokenLayout) -> Callable[..., Tensor]:
    """The same by torch's own operators, each once over its tensors."""
    part = mechanism(spec)
    if isinstance(part, Agent):
        n, pool = part.options.n, part.options.pool

        def agent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            agents = landmarks(q, layout, n, pool)
            values = F.scaled_dot_product_attention(agents, k, v)
            return F.scaled_dot_product_attention(q, agents, values)

        return agent
    assert isinstance(part, Linear)
    feature, eps = part.options.feature, part.options.eps

    def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if feature == "softmax":
            return q.softmax(-1) @ (k.softmax(-2).transpose(-1, -2) @ v)
        q, k = (F.elu(x) + 1 if feature == "elu" else F.relu(x) for x in (q, k))
        return (q @ (k.transpose(-1, -2) @ v)) / (q @ k.sum(-2).unsqueeze(-1) + eps)

    return linear


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    specs = ["agent", "linear", "linear(feature=relu)", "linear(feature=softmax)"]
    parser.add_argument("--specs", nargs="+", default=specs)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(SIZES)[1:])
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    rows = []
    table = Table(title=f"H={HEADS}, d={DIM}, {DTYPE}, {torch.cuda.get_device_name()}")
    for column in ("spec", "N", "B", "pass", "torch ms", "ours ms", "ratio", "floors", "extra MB"):
        table.add_column(column, justify="right")
    for spec in args.specs:
        for tokens in args.tokens:
            batch, side = SIZES[tokens]
            layout = TokenLayout(0, (side, side))
            error = gate(spec, batch, layout)
            part = mechanism(mechanism(spec).spec.with_options(impl="fused"))
            shape = (batch, HEADS, tokens, DIM)
            *inputs, grad = (torch.randn(shape, device="cuda", dtype=DTYPE) for _ in range(4))
            inputs = [x.requires_grad_() for x in inputs]
            ours = steps(lambda *x: part(*x, layout=layout), inputs, grad)  # noqa: B023
            theirs = steps(plain(spec, layout), inputs, grad)
            # q, k, v read and o written; then q, k, v and o's gradient read, three written
            for name, moved in (("forward", 4), ("forward + backward", 11)):
                extra = extra_memory(ours[name])
                ways = {"ours": captured(ours[name]), "torch": captured(theirs[name])}
                seconds = in_turn(ways, args.rounds)
                floor = moved * grad.numel() * grad.element_size() / BANDWIDTH
                ratio = paired_ratio(seconds["torch"], seconds["ours"])
                for way, values in seconds.items():
                    rows.append(
                        {
                            "benchmark": "agent-linear-kernels",
                            "variant": spec,
                            "by": way,
                            "pass": name,
                            "tokens": tokens,
                            "batch": batch,
                            "torch_over_ours": ratio,
                            "floor_ms": floor * 1e3,
                            "extra_bytes": extra if way == "ours" else None,
                            "error": error if way == "ours" else None,
                            **quantiles(values),
                        }
                    )
                middle = {way: float(np.median(values)) for way, values in seconds.items()}
                table.add_row(
                    spec,
                    f"{tokens:,}",
                    str(batch),
                    name,
                    f"{middle['torch'] * 1e3:.3f}",
                    f"{middle['ours'] * 1e3:.3f}",
                    f"{ratio:.2f}",
                    f"{middle['ours'] / floor:.1f}",
                    f"{extra / 1e6:.0f}",
                )
    Console(width=120).print(table, f"rows: {write_rows('agent-linear-kernels', rows)}")


if __name__ == "__main__":
    main()
