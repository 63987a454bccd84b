"""Linear attention: softmax's exponential kernel replaced by a product of feature maps
(Katharopoulos et al. 2020).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from mitaswap.errors import MitaswapError
from mitaswap.kernels import unfit
from mitaswap.mechanisms._base import MECHANISMS, Mechanism, Options
from mitaswap.mechanisms._card import Card, Cost, SiteShape
from mitaswap.operators.counting import product_flops
from mitaswap.operators.precision import outside_autocast, working
from mitaswap.operators.ranges import EPS, at_least
from mitaswap.tokens import TokenLayout


@dataclass(frozen=True)
class LinearOptions(Options):
    """Options of linear attention.

    Args:
        feature: `elu` is elu(x) + 1 (Katharopoulos et al. 2020); `relu`; `softmax` normalises
            queries over features and keys over tokens (efficient attention, Shen et al. 2021, arXiv
            1812.01243).
        norm: `rms` divides queries and keys by their root mean square over all heads first; with
            `feature=relu` and `eps=1e-6` this is the linear baseline of the MiTA authors' released
            code. `none` is the paper's.
        eps: added to the normaliser.
    """

    feature: Literal["elu", "relu", "softmax"] = "elu"
    norm: Literal["none", "rms"] = "none"
    eps: float = 1e-6


@MECHANISMS.register("linear")
class Linear(Mechanism):
    """o(q) = phi(q) [ phi(K)^T V ] / ( phi(q) sum_j phi(k_j) ), N d^2 operations."""

    options_type = LinearOptions
    options: LinearOptions
    card = Card(
        strategy="compression",
        expert_type="linear layer",
        expert_count="1 shared",
        construction="kernelization",
        topology="all-to-one",
        source="Katharopoulos et al. 2020, arXiv 2006.16236, Eq. 5",
        cost="N d^2",
        untrained="needs finetuning",
    )
    samples = ({}, {"feature": "relu"}, {"feature": "softmax"}, {"feature": "relu", "norm": "rms"})

    @property
    def traits(self) -> frozenset[str]:  # type: ignore[override]
        held = {"linear", "averages", "convex", "key-set", "pointwise", "special-set", "mirror"}
        if self.options.norm == "none":  # the norm spans all heads, and undoes any scale
            held |= {"heads"} if self.options.feature == "relu" else {"heads", "scaled"}
        return frozenset(held)

    def cost(self, site: SiteShape) -> Cost:
        n, d, dv = site.layout.tokens, site.head_dim, site.value_dim
        flops = 2 * product_flops(n, d, dv)  # memory K^T V, and what queries read from it
        if self.options.feature != "softmax":
            flops += product_flops(n, d, 1)
        return self._cost(site, flops, between=d * dv)

    @outside_autocast
    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Tensor:
        dtype = q.dtype
        q, k, v = working(q, k, v)
        # feature maps are not homogeneous: a site with another scale than 1 / sqrt(D) has its
        # queries in other units
        q = q * (scale * math.sqrt(q.shape[-1]))
        if self.options.norm == "rms":
            q, k = _over_width(q), _over_width(k)
        q, k = self._features(q, k)
        memory = k.transpose(-1, -2) @ v
        out = q @ memory
        if self.options.feature != "softmax":  # whose rows sum to one already
            out = out / (q @ k.sum(dim=-2).unsqueeze(-1) + self.options.eps)
        return out.to(dtype)

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        at_least(self, "eps", self.options.eps, 0, most=EPS)
        if self.options.impl == "fused" and self.options.norm == "rms":
            raise MitaswapError(
                f"{self.spec} has no kernel for norm=rms; use impl=auto or impl=reference"
            )

    def unfit(self, q: Tensor, k: Tensor, v: Tensor) -> str:
        return "norm=rms" if self.options.norm == "rms" else unfit(q, k, v)

    def fused(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Tensor:
        from mitaswap.kernels.linear import linear_attention

        factor = scale * math.sqrt(q.shape[3])
        return linear_attention(q, k, v, self.options.feature, factor, self.options.eps)

    def _features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.options.feature == "elu":
            return F.elu(q) + 1, F.elu(k) + 1
        if self.options.feature == "relu":
            return F.relu(q), F.relu(k)
        return q.softmax(dim=-1), k.softmax(dim=-2)


def _over_width(x: Tensor) -> Tensor:
    """RMS norm of x [B, H, N, D] over heads and features together, as a norm of the full width
    would.
    """
    return x * x.square().mean(dim=(1, 3), keepdim=True).add(1e-6).rsqrt()
