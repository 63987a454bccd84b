"""InLine attention: linear attention normalised by subtraction, with a local residual (Han et al.
2024, Bridging the Divide).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mitaswap.errors import MitaswapError
from mitaswap.mechanisms._base import MECHANISMS, Mechanism, Options
from mitaswap.mechanisms._card import Card, Cost, SiteShape
from mitaswap.operators.counting import depthwise_flops, product_flops
from mitaswap.operators.precision import outside_autocast, working
from mitaswap.operators.ranges import at_least
from mitaswap.tokens import TokenLayout

#: where the exponent of exp(t x) is cut off
CUT = 30.0


@dataclass(frozen=True)
class InlineOptions(Options):
    """Options of InLine attention.

    Args:
        kernel: feature map phi of queries and keys: `identity`, `relu` or `leakyrelu` (slope 0.01),
            or `exp`, exp(t x), one of the released code's.
        t: factor in the exponent of `exp`; 0.2 in the released code.
        local: add the local residual, a 3 x 3 convolution of V whose weights are predicted from x.
    """

    kernel: Literal["identity", "relu", "leakyrelu", "exp"] = "identity"
    t: float = 0.2
    local: bool = True


@MECHANISMS.register("inline")
class Inline(Mechanism):
    """Injective linear attention, N d^2 operations:

        w_ij = phi(q_i) phi(k_j) - 1/N sum_s phi(q_i) phi(k_s) + 1/N,  o_i = sum_j w_ij v_j.

    Subtraction in place of division lets different queries have different weights, which still
    sum to one; they may be negative. phi(q) carries the factor scale / N of the released code,
    which the paper leaves out of its equation for brevity; with the identity kernel the weights are
    then softmax attention's to first order in its scores. Nothing normalises exp(t x), so its
    exponent is cut off at 30: products stay finite.

    With `local`, a patch also receives the values of its 3 x 3 neighbourhood (zero beyond the
    grid), weighted per channel by r = MLP(mean of x over all tokens). The MLP has one hidden layer
    and, as in the released code, reads only a head's own C / H channels. Special tokens are queries
    and keys like any other, receive no residual and are nobody's neighbours.

    Parameters (with `local`):
        hidden_weight [H, C / H, C / H], hidden_bias [H, C / H]: identity and 0.
        residual_weight [H, 9 Dv, C / H], residual_bias [H, 9 Dv]: rows by channel, then by offset
            in raster order; 0, so that there is no residual at first.
    """

    options_type = InlineOptions
    options: InlineOptions
    card = Card(
        strategy="compression",
        expert_type="linear layer",
        expert_count="1 shared",
        construction="kernelization",
        topology="all-to-one",
        source="Han et al. 2024, arXiv 2412.06590, Eq. 5; local residual: by name",
        cost="N d^2",
        untrained="needs finetuning",
    )
    samples = (
        {},
        {"local": False},
        {"kernel": "relu"},
        {"kernel": "leakyrelu", "local": False},
        {"kernel": "exp", "t": 1.0},
    )
    # of the residual only its zero start is seen
    traits = frozenset(
        {"linear", "averages", "scaled", "heads", "key-set", "pointwise", "special-set", "mirror"}
    )

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"grid", "x"} if self.options.local else ())

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        at_least(self, "t", self.options.t, 0, most=CUT, limit="where exponents are cut off")

    def check_site(self, site: SiteShape) -> None:
        super().check_site(site)
        if self.options.local and site.width % site.heads:
            raise MitaswapError(
                f"{self.spec} cuts the input's channels into one slice per head, and "
                f"{site.width} channels are no multiple of {site.heads} heads; use local=false"
            )

    def build(self, site: SiteShape) -> None:
        if not self.options.local:
            return
        heads, width, taps = site.heads, site.width // site.heads, 9 * site.value_dim
        self.hidden_weight = nn.Parameter(torch.eye(width).repeat(heads, 1, 1))
        self.hidden_bias = nn.Parameter(torch.zeros(heads, width))
        self.residual_weight = nn.Parameter(torch.zeros(heads, taps, width))
        self.residual_bias = nn.Parameter(torch.zeros(heads, taps))

    def cost(self, site: SiteShape) -> Cost:
        n, d, dv = site.layout.tokens, site.head_dim, site.value_dim
        flops, between = 2 * product_flops(n, d, dv), d * dv  # memory, and what queries read of it
        if self.options.local:
            width, taps = site.width // site.heads, 9 * dv
            flops += product_flops(1, width, width + taps)
            flops += depthwise_flops(site.layout.patches, dv, 3)
            between += taps
        return self._cost(site, flops, between)

    @outside_autocast
    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Tensor:
        dtype, tokens, root = q.dtype, q.shape[2], math.sqrt(q.shape[3])
        q, k, v = working(q, k, v)
        q, k = self._features(q * (scale * root)), self._features(k)
        # sum_j (phi(q_i) phi(k_j) - its mean) v_j, plus the mean of the values
        memory = (k - k.mean(dim=-2, keepdim=True)).transpose(-1, -2) @ v
        out = q @ (memory / (tokens * root)) + v.mean(dim=-2, keepdim=True)
        if self.options.local:
            residual = self._residual(v[:, :, layout.patch_slice], layout, extra["x"].to(q.dtype))
            special = (0, 0, layout.prefix, layout.suffix)  # zero rows around the patches
            out = out + F.pad(residual, special)
        return out.to(dtype)

    def _features(self, x: Tensor) -> Tensor:
        if self.options.kernel == "relu":
            return F.relu(x)
        if self.options.kernel == "exp":
            return (self.options.t * x).clamp(max=CUT).exp()
        return F.leaky_relu(x) if self.options.kernel == "leakyrelu" else x

    def _residual(self, v: Tensor, layout: TokenLayout, x: Tensor) -> Tensor:
        """The convolution of v [B, H, patches, Dv] with each image's own weights."""
        if not v.shape[0]:  # a convolution has no zero groups
            return v
        batch, heads, _, width = v.shape
        mean = x.mean(dim=1).unflatten(1, (heads, -1)).transpose(0, 1)  # [H, B, C / H]
        hidden = F.gelu(_per_head(mean, self.hidden_weight, self.hidden_bias))
        taps = _per_head(hidden, self.residual_weight, self.residual_bias)
        kernels = taps.transpose(0, 1).reshape(-1, 1, 3, 3)  # B * H * Dv depth-wise kernels
        image = v.transpose(-1, -2).reshape(1, -1, *layout.grid)
        conv = F.conv2d(image, kernels, padding=1, groups=kernels.shape[0])
        return conv.view(batch, heads, width, layout.patches).transpose(-1, -2)


def _per_head(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer for each head: x [H, B, in], weight [H, out, in], bias [H, out]."""
    return x @ weight.to(x.dtype).transpose(-1, -2) + bias.to(x.dtype).unsqueeze(1)
