"""PolaFormer: linear attention that keeps the interactions of negative features (Meng et al.
2025).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mitaswap.mechanisms._base import MECHANISMS, Mechanism, Options
from mitaswap.mechanisms._card import Card, Cost, SiteShape
from mitaswap.operators.counting import product_flops
from mitaswap.operators.precision import outside_autocast, working
from mitaswap.operators.ranges import at_least
from mitaswap.tokens import TokenLayout


@dataclass(frozen=True)
class PolaformerOptions(Options):
    """Options of polarity-aware linear attention.

    Args:
        alpha: range of the learned exponents, which lie between 1 and 1 + alpha (4, the released
            code's default, starts them at 3).
        eps: added to the normaliser.
        gate: multiply the output by the coefficient matrices G^s and G^o, linear in x.
        channel_scale: divide queries and keys by a learned softplus per channel, as the released
            code does.
    """

    alpha: float = 4.0
    eps: float = 1e-6
    gate: bool = True
    channel_scale: bool = False


@MECHANISMS.register("polaformer")
class Polaformer(Mechanism):
    """Two linear attentions over the signs of queries and keys, N d^2 operations:

        o(q) = [ q_s [k~^T V^s] / (q_s sum_j k~_j)  |  q_o [k~^T V^o] / (q_o sum_j k~_j) ] * G(x).

    With x+ = ReLU(x)^p and x- = ReLU(-x)^p, the keys are k~ = [k+, k-]. q_s = [q+, q-] meets the
    features of its own sign and reads V^s, the first half of the values' channels; q_o = [q-, q+]
    meets those of the opposite sign and reads V^o, the second half (the smaller one where the width
    is odd). p = 1 + alpha sigmoid(power) is learned per channel, and G = [G^s, G^o] is a linear map
    of the module's input. Special tokens are tokens like any other.

    The paper's module is `polaformer+dwc(kernel=5)`; its released code adds that convolution of V
    before it multiplies by G, the wrapper after. The released code's learned positional encoding of
    the keys is left out here.

    Parameters:
        power [H, D]: see above; 0, so that all exponents are 1 + alpha / 2.
        coefficients.weight [H * Dv, C], .bias [H * Dv]: G; 0 and 1, so that G is one. Only with
            `gate`.
        channel_scale [H, D]: softplus of it divides queries and keys; 0, the same for all channels.
            Only with `channel_scale`.
    """

    options_type = PolaformerOptions
    options: PolaformerOptions
    card = Card(
        strategy="compression",
        expert_type="linear layer",
        expert_count="1 shared",
        construction="kernelization",
        topology="all-to-one",
        source="Meng et al. 2025, arXiv 2501.15061, polarity-aware attention",
        cost="N d^2",
        untrained="needs finetuning",
    )
    samples = ({}, {"gate": False}, {"alpha": 2.0, "channel_scale": True})
    # all exponents start alike: the normalisers undo any scale
    traits = frozenset(
        {"linear", "averages", "convex", "heads"}
        | {"key-set", "pointwise", "special-set", "mirror"}
    )

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"x"} if self.options.gate else ())

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        at_least(self, "alpha", self.options.alpha, 0, "as exponents are at least 1")
        at_least(self, "eps", self.options.eps, 0)

    def build(self, site: SiteShape) -> None:
        self.power = nn.Parameter(torch.zeros(site.heads, site.head_dim))
        if self.options.gate:
            width = site.heads * site.value_dim
            self.coefficients = nn.utils.skip_init(nn.Linear, site.width, width)  # draws nothing
            nn.init.zeros_(self.coefficients.weight)
            nn.init.ones_(self.coefficients.bias)
        if self.options.channel_scale:
            self.channel_scale = nn.Parameter(torch.zeros(site.heads, site.head_dim))

    def cost(self, site: SiteShape) -> Cost:
        n, d, dv = site.layout.tokens, site.head_dim, site.value_dim
        # memory k~^T V, what queries read from it, and the normalisers of both signs
        flops = 2 * product_flops(n, 2 * d, dv) + 2 * product_flops(n, 2 * d, 1)
        if self.options.gate:
            flops += product_flops(n, site.width, dv)
        return self._cost(site, flops, between=2 * d * dv)

    @outside_autocast
    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Tensor:
        dtype = q.dtype
        q, k, v = working(q, k, v)
        positive, negative = self._signs(q * (scale * math.sqrt(q.shape[-1])))
        keys = torch.cat(self._signs(k), dim=-1)  # k~ [B, H, N, 2 D]
        memory = keys.transpose(-1, -2) @ v
        total = keys.sum(dim=-2).unsqueeze(-1)
        half = (v.shape[-1] + 1) // 2

        parts = []
        for signs, part in (
            ((positive, negative), memory[..., :half]),
            ((negative, positive), memory[..., half:]),
        ):
            queries = torch.cat(signs, dim=-1)
            parts.append(queries @ part / (queries @ total + self.options.eps))
        out = torch.cat(parts, dim=-1)
        if self.options.gate:
            out = out * self._gate(extra["x"].to(q.dtype), v.shape)
        return out.to(dtype)

    def _signs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """ReLU(x)^p and ReLU(-x)^p of x [B, H, N, D]."""
        if self.options.channel_scale:
            x = x / F.softplus(self.channel_scale.to(x.dtype)).unsqueeze(-2)
        exponent = (1 + self.options.alpha * self.power.to(x.dtype).sigmoid()).unsqueeze(-2)
        return F.relu(x) ** exponent, F.relu(-x) ** exponent

    def _gate(self, x: Tensor, shape: torch.Size) -> Tensor:
        """G(x) as [B, H, N, Dv], from x [B, N, C]."""
        batch, heads, tokens, width = shape
        linear = self.coefficients
        gate = F.linear(x, linear.weight.to(x.dtype), linear.bias.to(x.dtype))
        return gate.view(batch, tokens, heads, width).transpose(1, 2)
