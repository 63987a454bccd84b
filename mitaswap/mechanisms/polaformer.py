"""PolaFormer: linear attention that keeps the interactions of negative features (Meng et al.
2025).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mitaswap.mechanisms._base import MECHANISMS, Mechanism, Options
from mitaswap.mechanisms._card import Card, Cost, SiteShape
from mitaswap.operators.counting import depthwise_flops, product_flops
from mitaswap.operators.depthwise import convolved
from mitaswap.operators.positions import with_positions
from mitaswap.operators.precision import outside_autocast, working
from mitaswap.operators.ranges import EPS, at_least, odd
from mitaswap.tokens import TokenLayout


@dataclass(frozen=True)
class PolaformerOptions(Options):
    """Options of polarity-aware linear attention.

    Args:
        alpha: range of the learned exponents, which lie between 1 and 1 + alpha (4, the released
            code's default, starts them at 3).
        eps: added to the normaliser.
        eps_of: what eps is added to: the `sum` of a query's weights, or, as in the released code,
            their `mean` over the N keys, so that it counts N times.
        gate: multiply the output by the coefficient matrices G^s and G^o, linear in x.
        channel_scale: divide queries and keys by a learned softplus per channel, as the released
            code does.
        positions: add a learned positional encoding to the keys, before their signs are taken
            apart. The released code does; the paper's formula has none.
        conv: side of the kernel, odd, of a depth-wise convolution of V that is added before G
            multiplies, as in the released code (5 there); 0 leaves it out.
    """

    alpha: float = 4.0
    eps: float = 1e-6
    eps_of: Literal["sum", "mean"] = "sum"
    gate: bool = True
    channel_scale: bool = False
    positions: bool = False
    conv: int = 0


@MECHANISMS.register("polaformer")
class Polaformer(Mechanism):
    """Two linear attentions over the signs of queries and keys, N d^2 operations:

        o(q) = [ q_s [k~^T V^s] / (q_s sum_j k~_j)  |  q_o [k~^T V^o] / (q_o sum_j k~_j) ] * G(x).

    With x+ = ReLU(x)^p and x- = ReLU(-x)^p, the keys are k~ = [k+, k-]. q_s = [q+, q-] meets the
    features of its own sign and reads V^s, the first half of the values' channels; q_o = [q-, q+]
    meets those of the opposite sign and reads V^o, the second half (the smaller one where the width
    is odd). p = 1 + alpha sigmoid(power) is learned per channel, and G = [G^s, G^o] is a linear map
    of the module's input. Special tokens are tokens like any other.

    The paper's module is `polaformer+dwc(kernel=5)`, which adds a convolution of V to the output.
    The released code's is `polaformer(conv=5,positions=true,channel_scale=true,eps_of=mean)`. With
    `conv` the convolution of V over the patch grid joins the bracket, so that G multiplies it too,
    and one kernel per channel of a head serves all heads, as with `+dwc(share=true)`. With
    `positions` the keys are k + e, where e is the entry of the key's patch. Special tokens, which
    the authors' networks do not have, get no encoding and nothing from the convolution.

    Parameters, for a grid of h x w:
        power [H, D]: see above; 0, so that all exponents are 1 + alpha / 2.
        coefficients.weight [H * Dv, C], .bias [H * Dv]: G; 0 and 1, so that G is one. Only with
            `gate`.
        channel_scale [H, D]: softplus of it divides queries and keys; 0, the same for all channels.
            Only with `channel_scale`.
        position_table [H, D, h, w]: e of every patch; 0. At another grid it is resized bilinearly.
            Only with `positions`.
        conv_weight [Dv, 1, conv, conv], conv_bias [Dv]: the convolution; 0. Only with `conv`.
    """

    options_type = PolaformerOptions
    options: PolaformerOptions
    card = Card(
        strategy="compression",
        expert_type="linear layer",
        expert_count="1 shared",
        construction="kernelization",
        topology="all-to-one",
        source="Meng et al. 2025, arXiv 2501.15061; Eq. 3, 4 and 9 of the ICLR submission",
        cost="N d^2",
        untrained="needs finetuning",
    )
    limits = (
        ("polaformer(positions=true)", "polaformer"),
        ("polaformer(conv=3)", "polaformer"),
    )
    paper = "polaformer+dwc(kernel=5)"
    samples = (
        {},
        {"gate": False},
        {"alpha": 2.0, "channel_scale": True},
        {"positions": True, "gate": False},
        {"conv": 3, "gate": False},
        {"conv": 5, "positions": True, "channel_scale": True},
        {"eps_of": "mean", "eps": 1e-9},
    )
    # all exponents start alike: the normalisers undo any scale
    traits = frozenset(
        {"linear", "averages", "convex", "heads"}
        | {"key-set", "pointwise", "special-set", "mirror"}
    )

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        held = {"x"} if self.options.gate else set()
        if self.options.positions or self.options.conv:
            held |= {"grid"}
        return frozenset(held)

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        limit = "or powers overflow"
        at_least(self, "alpha", self.options.alpha, 0, "as exponents are at least 1", 16, limit)
        at_least(self, "eps", self.options.eps, 0, most=EPS)
        side, why = max(self._built(layout).grid), ", or the convolution is not centred"
        odd(self, "conv", self.options.conv, side, why, zero=True)

    def build(self, site: SiteShape) -> None:
        self.power = nn.Parameter(torch.zeros(site.heads, site.head_dim))
        if self.options.gate:
            width = site.heads * site.value_dim
            self.coefficients = nn.utils.skip_init(nn.Linear, site.width, width)  # draws nothing
            nn.init.zeros_(self.coefficients.weight)
            nn.init.ones_(self.coefficients.bias)
        if self.options.channel_scale:
            self.channel_scale = nn.Parameter(torch.zeros(site.heads, site.head_dim))
        if self.options.positions:
            shape = (site.heads, site.head_dim, *site.layout.grid)
            self.position_table = nn.Parameter(torch.zeros(shape))
        if conv := self.options.conv:
            self.conv_weight = nn.Parameter(torch.zeros(site.value_dim, 1, conv, conv))
            self.conv_bias = nn.Parameter(torch.zeros(site.value_dim))

    def cost(self, site: SiteShape) -> Cost:
        n, d, dv = site.layout.tokens, site.head_dim, site.value_dim
        # memory k~^T V, what queries read from it, and the normalisers of both signs
        flops = 2 * product_flops(n, 2 * d, dv) + 2 * product_flops(n, 2 * d, 1)
        if self.options.gate:
            flops += product_flops(n, site.width, dv)
        if conv := self.options.conv:
            flops += depthwise_flops(site.layout.patches, dv, conv)
        return self._cost(site, flops, between=2 * d * dv)

    @outside_autocast
    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Tensor:
        dtype = q.dtype
        q, k, v = working(q, k, v)
        if self.options.positions:
            k = with_positions(k, self.position_table, layout)
        positive, negative = self._signs(q * (scale * math.sqrt(q.shape[-1])))
        keys = torch.cat(self._signs(k), dim=-1)  # k~ [B, H, N, 2 D]
        memory = keys.transpose(-1, -2) @ v
        total = keys.sum(dim=-2).unsqueeze(-1)
        eps = self.options.eps * (k.shape[-2] if self.options.eps_of == "mean" else 1)
        half = (v.shape[-1] + 1) // 2

        parts = []
        for signs, part in (
            ((positive, negative), memory[..., :half]),
            ((negative, positive), memory[..., half:]),
        ):
            queries = torch.cat(signs, dim=-1)
            parts.append(queries @ part / (queries @ total + eps))
        out = torch.cat(parts, dim=-1)
        if self.options.conv:
            out = out + convolved(v, self.conv_weight, self.conv_bias, layout)
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
