"""ViT^3: test-time training for images, one step on all tokens, with a gated unit or a convolution
as the inner model (Han et al. 2025).
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
from mitaswap.operators.precision import outside_autocast, working
from mitaswap.operators.ranges import at_least
from mitaswap.tokens import TokenLayout


@dataclass(frozen=True)
class Vit3Options(Options):
    """Options of ViT^3.

    Args:
        lr: learning rate of the inner step.
        conv: heads whose inner model is the convolution: `last` (the paper has it in a single head
            and does not say in which), `all` or `none`. A lone head is the last one.
        step: `paper` takes the plain gradient of the loss. The authors' `released` code divides
            each column of it by its norm + 1, and takes 1/3 for the loss's 1 / sqrt(d).
    """

    lr: float = 1.0
    conv: Literal["last", "all", "none"] = "last"
    step: Literal["paper", "released"] = "paper"


@MECHANISMS.register("vit3")
class Vit3(Mechanism):
    """o(q) = F(q; W) with W = W0 - lr dL/dW0 and L = -sum_t F(k_t; W0) v_t / (N sqrt(d)), over all
    N tokens: N d^2. The update is bidirectional: one step that all tokens share, in no order.

    F is a gated unit, F(x) = (x W1) * silu(x W2), or in one head a 3 x 3 depth-wise convolution of
    the patches. To the convolution a special token is an image of one pixel. Where values have
    another width than keys, its output channel c reads channel c mod D.

    The released code gives the convolution a head besides the others, with a projection of its own;
    here it is one of the H heads, as in the paper. Its positional encodings are not part of this.

    Parameters:
        weight, gate: [G, D, Dv] each, W1 and W2 of the G heads with a gated unit, the first ones;
            start as N(0, 0.02^2), alike in all heads.
        kernel: [H - G, Dv, 9], the taps row by row; starts zero.
    """

    options_type = Vit3Options
    options: Vit3Options
    card = Card(
        strategy="compression",
        expert_type="gated unit or conv",
        expert_count="1 shared",
        construction="test-time training",
        topology="all-to-one",
        source="Han et al. 2025, arXiv 2512.01643, Eq. 5 and 8",
        cost="N d^2",
        untrained="needs finetuning",
    )
    samples = (
        {},
        {"conv": "all", "lr": 0.5},
        {"conv": "none"},
        {"step": "released"},
        {"conv": "all", "step": "released"},
    )
    weight: nn.Parameter
    gate: nn.Parameter
    kernel: nn.Parameter

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset(() if self.options.conv == "none" else {"grid"})

    @property
    def traits(self) -> frozenset[str]:  # type: ignore[override]
        held = {"scaled", "special-set", "mirror"}
        if self.options.conv == "none":
            held |= {"heads", "key-set", "pointwise"}
        if self.options.conv == "all":  # from a zero kernel
            held |= {"heads", "linear"} if self.options.step == "paper" else {"heads"}
        return frozenset(held)

    def _gated(self, heads: int) -> int:
        """Number of heads with a gated unit, G."""
        return {"last": heads - 1, "all": 0, "none": heads}[self.options.conv]

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        at_least(self, "lr", self.options.lr, 0)

    def build(self, site: SiteShape) -> None:
        gated, shape = self._gated(site.heads), (site.head_dim, site.value_dim)
        if gated:
            generator = torch.Generator().manual_seed(0)
            for name in ("weight", "gate"):
                start = 0.02 * torch.randn(shape, generator=generator)
                self.register_parameter(name, nn.Parameter(start.repeat(gated, 1, 1)))
        if gated < site.heads:
            self.kernel = nn.Parameter(torch.zeros(site.heads - gated, site.value_dim, 9))

    def cost(self, site: SiteShape) -> Cost:
        n, d, dv = site.layout.tokens, site.head_dim, site.value_dim
        gated = self._gated(site.heads)
        conv = site.heads - gated
        # W1 and W2 run on keys, have their gradients, and run on queries; what the kernel makes of
        # keys nobody needs, since the loss is linear in it
        flops = gated * 6 * product_flops(n, d, dv) + conv * 2 * depthwise_flops(n, dv, 3)
        trained = gated * 2 * d * dv + conv * 9 * dv
        return self._cost(site, 0) + Cost(flops, 2 * trained)

    @outside_autocast
    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Tensor:
        dtype, gated = q.dtype, self._gated(q.shape[1])
        q, k, v = working(q, k, v)
        q = q * (scale * math.sqrt(q.shape[-1]))
        # the loss is linear in the predictions: its gradient by them is this, negative
        width = 9.0 if self.options.step == "released" else float(v.shape[-1])
        target = v / (v.shape[2] * math.sqrt(width))
        out = []
        if gated:
            out.append(self._gated_unit(*(x[:, :gated] for x in (q, k, target))))
        if gated < q.shape[1]:
            queries, keys, target = (x[:, gated:] for x in (q, k, target))
            out.append(self._convolution(queries, keys, target, layout))
        return torch.cat(out, dim=1).to(dtype)

    def _gated_unit(self, q: Tensor, k: Tensor, target: Tensor) -> Tensor:
        weight, gate = self.weight.to(q.dtype), self.gate.to(q.dtype)
        value, logit = k @ weight, k @ gate
        passed, keys = logit.sigmoid(), k.transpose(-1, -2)
        slope = passed * (1.0 + logit * (1.0 - passed))  # of silu
        weight = weight + self._step(keys @ (target * logit * passed), dim=-2)
        gate = gate + self._step(keys @ (target * value * slope), dim=-2)
        return (q @ weight) * F.silu(q @ gate)

    def _convolution(self, q: Tensor, k: Tensor, target: Tensor, layout: TokenLayout) -> Tensor:
        keys, queries = (_neighbours(x, target.shape[-1], layout) for x in (k, q))
        ascent = keys @ target.transpose(-1, -2)[..., None]  # [B, G, Dv, 9, 1]
        kernel = self.kernel.to(q.dtype) + self._step(ascent[..., 0], dim=-1)
        return (kernel[..., None, :] @ queries)[..., 0, :].transpose(-1, -2)

    def _step(self, ascent: Tensor, dim: int) -> Tensor:
        """What one inner step adds, from the negative gradient."""
        if self.options.step == "released":
            ascent = ascent / (torch.linalg.vector_norm(ascent, dim=dim, keepdim=True) + 1.0)
        return self.options.lr * ascent


def _neighbours(x: Tensor, width: int, layout: TokenLayout) -> Tensor:
    """Each token's 3 x 3 neighbourhood in every channel, zero outside: x [B, G, N, D] to [B, G,
    width, 9, N]. Channels repeat, or are cut, to `width`.
    """
    batch, heads, _, dim = x.shape
    if dim != width:
        x = x[..., torch.arange(width, device=x.device) % dim]
    x = x.transpose(-1, -2)  # [B, G, width, N]
    image = x[..., layout.patch_slice].reshape(batch * heads, width, *layout.grid)
    patches = F.unfold(image, kernel_size=3, padding=1)
    patches = patches.view(batch, heads, width, 9, layout.patches)
    alone = F.pad(x[..., None, :], (0, 0, 4, 4))  # special tokens: the centre tap alone
    before, after = alone[..., : layout.prefix], alone[..., layout.prefix + layout.patches :]
    return torch.cat([before, patches, after], dim=-1)
