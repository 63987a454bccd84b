"""Focused linear attention: a feature map that turns queries and keys towards their strongest
channel (FLatten Transformer, Han et al. 2023).
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
from mitaswap.operators.counting import product_flops
from mitaswap.operators.positions import with_positions
from mitaswap.operators.precision import outside_autocast, working
from mitaswap.operators.ranges import EPS, at_least
from mitaswap.tokens import TokenLayout


@dataclass(frozen=True)
class FocusedOptions(Options):
    """Options of focused linear attention.

    Args:
        factor: focusing factor p, the power that features are raised to; 1 is linear attention with
            ReLU features.
        eps: added to the normaliser.
        eps_of: what eps is added to: the `sum` of a query's weights, or, as in the released code
            (its first version had the sum), their `mean` over the N keys, so that it counts N
            times.
        floor: added to the features behind ReLU, before all else; 1e-6 in the released code.
        norm: what keeps its length in the focused function: `head`, the features of one head (the
            paper's formula); `width`, those of all heads together (the authors' released code).
        channel_scale: divide the features of queries and keys by a learned softplus per channel
            before focusing, as the released code does.
        positions: add a learned positional encoding to the keys, before the feature map. The
            released code does; the paper's formula has none.
    """

    factor: float = 3.0
    eps: float = 1e-6
    eps_of: Literal["sum", "mean"] = "sum"
    floor: float = 0.0
    norm: Literal["head", "width"] = "head"
    channel_scale: bool = False
    positions: bool = False


@MECHANISMS.register("focused")
class Focused(Mechanism):
    """Linear attention o(q) = phi(q) [ phi(K)^T V ] / ( phi(q) sum_j phi(k_j) ) with the focused
    feature map phi(x) = f_p(ReLU(x)), f_p(x) = |x| / |x^p| x^p, N d^2 operations.

    f_p keeps a vector's length and sharpens its direction: vectors with the same largest channel
    move together, others apart. Special tokens are tokens like any other. With `floor` ReLU(x) is
    ReLU(x) + floor: no feature vanishes. With `positions` phi reads k + e, where e is the entry of
    the key's patch; special tokens, which the authors' networks do not have, get none.

    The paper's module is `focused+dwc(kernel=5)`: a depth-wise convolution of V raises the rank.
    The released code's, whose kernels serve all heads, is `focused(norm=width,channel_scale=true,
    positions=true,floor=1e-6,eps_of=mean)+dwc(kernel=5,share=true)`.

    Parameters, for a grid of h x w:
        channel_scale [H, D]: softplus of it divides the features; 0, the same for all channels, so
            that the normaliser undoes it. Only with `channel_scale`.
        position_table [H, D, h, w]: e of every patch; 0. At another grid it is resized bilinearly.
            Only with `positions`.
    """

    options_type = FocusedOptions
    options: FocusedOptions
    card = Card(
        strategy="compression",
        expert_type="linear layer",
        expert_count="1 shared",
        construction="kernelization",
        topology="all-to-one",
        source="Han et al. 2023, arXiv 2308.00442, Eq. 5-6",
        cost="N d^2",
        untrained="needs finetuning",
    )
    limits = (
        ("focused(positions=true)", "focused"),
        ("focused(factor=1)", "linear(feature=relu)"),
    )
    paper = "focused+dwc(kernel=5)"
    samples = (
        {},
        {"factor": 8.0},
        {"norm": "width", "eps": 1e-9},
        {"channel_scale": True},
        {"positions": True, "factor": 2.0},
        {"eps_of": "mean", "eps": 1e-9},
        {"floor": 0.1, "norm": "width"},
    )

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"grid"} if self.options.positions else ())

    @property
    def traits(self) -> frozenset[str]:  # type: ignore[override]
        held = {"linear", "averages", "convex", "key-set", "pointwise", "special-set", "mirror"}
        if self.options.norm == "head":  # the other spans all heads
            held |= {"heads"}
        if self.options.floor > 0:  # no normaliser undoes its part in the features
            held |= {"scaled"}
        return frozenset(held)

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        at_least(self, "factor", self.options.factor, 1, "which leaves out the focusing", most=64)
        at_least(self, "eps", self.options.eps, 0, most=EPS)
        at_least(self, "floor", self.options.floor, 0, most=EPS)

    def build(self, site: SiteShape) -> None:
        if self.options.channel_scale:
            self.channel_scale = nn.Parameter(torch.zeros(site.heads, site.head_dim))
        if self.options.positions:
            shape = (site.heads, site.head_dim, *site.layout.grid)
            self.position_table = nn.Parameter(torch.zeros(shape))

    def cost(self, site: SiteShape) -> Cost:
        n, d, dv = site.layout.tokens, site.head_dim, site.value_dim
        # memory K^T V, what queries read from it, and their normalisers
        flops = 2 * product_flops(n, d, dv) + product_flops(n, d, 1)
        return self._cost(site, flops, between=d * dv)

    @outside_autocast
    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Tensor:
        dtype = q.dtype
        q, k, v = working(q, k, v)
        if self.options.positions:
            k = with_positions(k, self.position_table, layout)
        q, k = self._features(q * (scale * math.sqrt(q.shape[-1]))), self._features(k)
        total = q @ k.sum(dim=-2).unsqueeze(-1)
        eps = self.options.eps * (k.shape[-2] if self.options.eps_of == "mean" else 1)
        return (q @ (k.transpose(-1, -2) @ v) / (total + eps)).to(dtype)

    def _features(self, x: Tensor) -> Tensor:
        """f_p(ReLU(x)) of x [B, H, N, D]."""
        x = F.relu(x) + self.options.floor
        if self.options.channel_scale:
            x = x / F.softplus(self.channel_scale.to(x.dtype)).unsqueeze(-2)
        together = (-1,) if self.options.norm == "head" else (1, 3)
        # the direction of x^p is that of (x / max x)^p, which neither overflows nor vanishes, and
        # the maximum cancels, in gradients too; a vector of zeros stays one
        peak = x.detach().amax(dim=together, keepdim=True)
        sharp = (x / torch.where(peak > 0, peak, 1)) ** self.options.factor
        length = torch.linalg.vector_norm(x, dim=together, keepdim=True)
        sharpened = torch.linalg.vector_norm(sharp, dim=together, keepdim=True)
        return sharp * (length / torch.where(sharpened > 0, sharpened, 1))
