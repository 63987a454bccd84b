"""Agent attention: a few pooled queries read all keys, and all queries read those few (Han et al.
2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mitaswap.errors import MitaswapError
from mitaswap.mechanisms._base import MECHANISMS, Card, Mechanism, Options
from mitaswap.operators.experts import attend
from mitaswap.operators.pool import landmarks, pool_shape
from mitaswap.operators.precision import outside_autocast, working
from mitaswap.tokens import TokenLayout


@dataclass(frozen=True)
class AgentOptions(Options):
    """Options of agent attention.

    Args:
        n: number of agents, averages of the queries over n windows of the patch grid.
        pool: windows as `AxB`; `auto` chooses the most square ones.
    """

    n: int = 49
    pool: str = "auto"


@MECHANISMS.register("agent")
class Agent(Mechanism):
    """O = softmax(Q A^T / sqrt(d)) softmax(A K^T / sqrt(d)) V, with agents A pooled from Q. No
    bias, no convolution.
    """

    options_type = AgentOptions
    options: AgentOptions
    card = Card(
        strategy="compression",
        expert_type="MLP",
        expert_count="1 shared",
        construction="landmark probing",
        topology="all-to-one",
        source="Han et al. 2024, Eq. 4",
        cost="N n d",
    )
    samples = ({}, {"n": 9}, {"n": 8, "pool": "2x4"}, {"n": 6})
    axes = (("N", "n"),)

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        if not 1 <= self.options.n <= layout.patches:
            raise MitaswapError(
                f"{self.spec} needs 1 <= n <= {layout.patches} patches (tokens {layout}); use "
                f"n={layout.patches} or fewer"
            )
        pool_shape(self.options.n, layout.grid, self.options.pool)

    @outside_autocast
    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Tensor:
        dtype = q.dtype
        q, k, v = (x.contiguous() for x in working(q, k, v))
        agents = landmarks(q, layout, self.options.n, self.options.pool)
        values, _ = attend(agents, k, v, scale)
        out, _ = attend(q, agents, values, scale)
        return out.to(dtype)
