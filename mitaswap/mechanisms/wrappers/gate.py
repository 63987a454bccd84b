"""A sigmoid gate on the output, computed from the attention module's input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mitaswap.mechanisms._card import Cost, SiteShape
from mitaswap.mechanisms._wrapper import WRAPPERS, Wrapper
from mitaswap.operators.counting import product_flops
from mitaswap.operators.precision import outside_autocast, working
from mitaswap.tokens import TokenLayout


@dataclass(frozen=True)
class GateOptions:
    """Options of the output gate.

    Args:
        per: one gate for each `channel` (the paper's choice), or one for each `head`.
    """

    per: Literal["channel", "head"] = "channel"


@WRAPPERS.register("gate")
class Gate(Wrapper):
    """2 sigmoid(W x + b) * O (Qiu et al. 2025, arXiv 2505.06708: the gate after the sum over
    values).

    The factor 2 makes the start, W = b = 0, change nothing; the layer's own output projection can
    take it up, so that the functions that can be learned are the paper's.

    Parameters:
        weight [G, C], bias [G]: G = H * Dv gates head by head, or G = H; they start at zero.
    """

    options_type = GateOptions
    options: GateOptions
    summary = "multiplies the output by 2 sigmoid(W x + b); starts as the identity"
    samples = ({}, {"per": "head"})

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner.needs | {"x"}

    def build(self, site: SiteShape) -> None:
        gates = self._gates(site)
        self.weight = nn.Parameter(torch.zeros(gates, site.width))
        self.bias = nn.Parameter(torch.zeros(gates))

    def _gates(self, site: SiteShape) -> int:
        return site.heads * (site.value_dim if self.options.per == "channel" else 1)

    @outside_autocast
    def around(
        self,
        out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layout: TokenLayout,
        scale: float,
        **extra: Any,
    ) -> Tensor:
        (x,) = working(extra["x"])
        logits = F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
        gate = logits.sigmoid().unflatten(2, (out.shape[1], -1)).transpose(1, 2)  # [B, H, N, Dv|1]
        return (out * (2 * gate)).to(out.dtype)

    def extra_cost(self, site: SiteShape) -> Cost:
        gates, tokens = self._gates(site), site.layout.tokens
        read = 0 if "x" in self.inner.needs else tokens * site.width
        flops = product_flops(tokens, site.width, gates)
        return Cost(flops, read + gates * (site.width + 1))
