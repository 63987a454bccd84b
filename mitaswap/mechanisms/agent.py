"""Agent attention: a few pooled queries read all keys, and all queries read those few (Han et al.
2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mitaswap.errors import MitaswapError
from mitaswap.kernels import unfit
from mitaswap.mechanisms._base import MECHANISMS, Mechanism, Options
from mitaswap.mechanisms._card import Card, Cost, SiteShape
from mitaswap.operators.counting import attend_flops
from mitaswap.operators.experts import Branch, attend
from mitaswap.operators.pool import pool_shape, pool_tokens
from mitaswap.operators.ranges import in_range
from mitaswap.spec import Value
from mitaswap.tokens import TokenLayout

#: rows and columns of the coarse map of the agent bias, as in the released code
BLOCKS = 7


@dataclass(frozen=True)
class AgentOptions(Options):
    """Options of agent attention.

    Args:
        n: number of agents, averages of the queries over n windows of the patch grid.
        pool: windows as `AxB`; `auto` chooses the most square ones.
        bias: the paper's agent bias, B1 and B2: learned, and zero at first. Off by default, so that
            the mechanism has no parameters and its kernel can run, which takes no bias.
    """

    n: int = 49
    pool: str = "auto"
    bias: bool = False


@MECHANISMS.register("agent")
class Agent(Mechanism):
    """O = softmax(Q A^T / sqrt(d) + B2) softmax(A K^T / sqrt(d) + B1) V, with agents A pooled from
    Q. Without `bias`, B1 = B2 = 0.

    B1 [n, N] is a sum of three maps over the patch grid, each resized bilinearly to the grid at
    hand: one of at most 7 x 7 blocks, one of rows, one of columns. Special tokens, which no map
    holds, share one number per agent. B2 [N, n] is made alike. The paper's module is
    agent(bias=true)+dwc.

    With `bias`, agent i keeps its numbers on every grid, and so its window: the agents stay a x b
    windows as on the grid that they were built for. Where another grid has fewer rows or columns
    than that, windows overlap and maps have fewer places than blocks. Without `bias`, `auto`
    chooses windows anew for each grid.

    Parameters, all zero at first, for a grid of h x w:
        keys_block, queries_block [H, n, min(7, h), min(7, w)], keys_rows, queries_rows [H, n, h,
            1], keys_columns, queries_columns [H, n, 1, w]: the maps of B1 and of B2.
        keys_special, queries_special [H, n]: only where there are special tokens.
    """

    options_type = AgentOptions
    options: AgentOptions
    card = Card(
        strategy="compression",
        expert_type="MLP",
        expert_count="1 shared",
        construction="landmark probing",
        topology="all-to-one",
        source="Han et al. 2024, arXiv 2312.08874, Eq. 4",
        cost="N n d",
        untrained="usable",
    )
    limits = (("agent(n=9,bias=true)", "agent(n=9)"),)
    paper = "agent(bias=true)+dwc"
    samples = ({}, {"n": 9}, {"n": 8, "pool": "2x4"}, {"n": 6}, {"n": 12, "bias": True})
    traits = frozenset(
        {"linear", "averages", "convex", "scaled", "heads", "key-set", "special-set", "mirror"}
    )
    needs = frozenset({"grid"})
    axes = (("N", "n"),)

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        if self.site is None or not self.options.bias:  # learned maps and their agents fit any grid
            patches = layout.patches
            in_range(self, "n", self.options.n, 1, patches, f"patches (tokens {layout})")
            self._shape(layout)
        if self.options.impl == "fused" and self.options.bias:
            raise MitaswapError(
                f"{self.spec} has no kernel for bias=true; use impl=auto or impl=reference"
            )

    @classmethod
    def suggest(cls, layout: TokenLayout) -> dict[str, Value]:
        height, width = (min(side, 7) for side in layout.grid)
        return {} if height == width == 7 else {"n": height * width}

    def _shape(self, layout: TokenLayout) -> tuple[int, int]:
        """Rows and columns of the agents' windows."""
        if self.site is None or not self.options.bias:
            return pool_shape(self.options.n, layout.grid, self.options.pool, asker=self)
        return self.windows

    def build(self, site: SiteShape) -> None:
        if not self.options.bias:
            return
        self.windows = self._shape(site.layout)
        height, width = site.layout.grid
        shapes: dict[str, tuple[int, ...]] = {
            "block": (min(BLOCKS, height), min(BLOCKS, width)),
            "rows": (height, 1),
            "columns": (1, width),
        }
        if site.layout.tokens > site.layout.patches:
            shapes["special"] = ()
        for side in ("keys", "queries"):
            for name, shape in shapes.items():
                table = torch.zeros(site.heads, self.options.n, *shape)
                self.register_parameter(f"{side}_{name}", nn.Parameter(table))

    def cost(self, site: SiteShape) -> Cost:
        n, d, dv = self.options.n, site.head_dim, site.value_dim
        flops = 2 * attend_flops(site.layout.tokens, n, d, dv)
        return self._cost(site, flops, between=n * (d + dv))

    def branch(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Branch:
        agents = pool_tokens(q, layout.prefix, layout.grid, self._shape(layout))
        to_keys, to_queries = self._bias("keys", layout, q), self._bias("queries", layout, q)
        values, _ = attend(agents, k, v, scale, to_keys)
        to_agents = to_queries if to_queries is None else to_queries.transpose(-1, -2)
        return attend(q, agents, values, scale, to_agents)

    def unfit(self, q: Tensor, k: Tensor, v: Tensor) -> str:
        return "bias=true" if self.options.bias else unfit(q, k, v)

    def fused(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Tensor:
        from mitaswap.kernels.agent import Windows, agent_attention

        windows = Windows(layout.prefix, *layout.grid, *self._shape(layout))
        return agent_attention(q, k, v, windows, scale)

    def _bias(self, side: str, layout: TokenLayout, like: Tensor) -> Tensor | None:
        """One direction's bias between agents and all tokens, [H, n, N]; None without bias."""
        if not self.options.bias:
            return None
        dtype = like.dtype
        height, width = layout.grid
        sizes = {"block": (height, width), "rows": (height, 1), "columns": (1, width)}
        block, rows, columns = (
            F.interpolate(self.get_parameter(f"{side}_{name}").to(dtype), size, mode="bilinear")
            for name, size in sizes.items()
        )
        patches = (block + rows + columns).flatten(2)
        special = patches.new_zeros(patches.shape[:2])
        if hasattr(self, f"{side}_special"):
            special = self.get_parameter(f"{side}_special").to(dtype)
        before, after = (
            special.unsqueeze(-1).expand(-1, -1, count) for count in (layout.prefix, layout.suffix)
        )
        return torch.cat([before, patches, after], dim=-1)
