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

from mitaswap.errors import MitaswapError
from mitaswap.mechanisms._base import MECHANISMS, Mechanism, Options
from mitaswap.mechanisms._card import Card, Cost, SiteShape
from mitaswap.operators.counting import depthwise_flops, product_flops
from mitaswap.operators.precision import outside_autocast, working
from mitaswap.operators.ranges import at_least
from mitaswap.operators.rotary import turned_on_grid
from mitaswap.tokens import TokenLayout


@dataclass(frozen=True)
class Vit3Options(Options):
    """Options of ViT^3.

    Args:
        lr: learning rate of the inner step.
        conv: heads whose inner model is the convolution: `last` (the paper has it in a single head
            and does not say in which), `all` or `none`. A lone head is the last one. `extra` is the
            released code's: a head besides the others, with a projection of its own.
        step: `paper` takes the plain gradient of the loss. The authors' `released` code divides
            each column of it by its norm + 1, and takes 1/3 for the loss's 1 / sqrt(d).
        rope: turn queries and keys of the heads with a gated unit by a rotary encoding of their
            patch, as the released hierarchical model does; its plain one does not.
    """

    lr: float = 1.0
    conv: Literal["last", "all", "none", "extra"] = "last"
    step: Literal["paper", "released"] = "paper"
    rope: bool = False


@MECHANISMS.register("vit3")
class Vit3(Mechanism):
    """o(q) = F(q; W) with W = W0 - lr dL/dW0 and L = -sum_t F(k_t; W0) v_t / (N sqrt(d)), over all
    N tokens: N d^2. The update is bidirectional: one step that all tokens share, in no order.

    F is a gated unit, F(x) = (x W1) * silu(x W2), or in one head a 3 x 3 depth-wise convolution of
    the patches. To the convolution a special token is an image of one pixel. Where values have
    another width than keys, its output channel c reads channel c mod D.

    With `conv=extra` all H heads have a gated unit, and the convolution learns from q', k', v' =
    projection(x), Dv channels each; the site's scale is not for q'. The released code puts its
    output c beside that of the heads, before the output projection; the H Dv channels here have no
    room for it, so join c is added to them, and the output projection P reads c as P join c.

    With `rope` the channels of the gated heads, in one sequence as in the released code, are turned
    in pairs: pair j of the first half by the angle row * 10000^(-j / half) of its patch, pair j of
    the second by column * 10000^(-j / half). Special tokens stay, and so do channels that make no
    two equal halves. That code's other positional encoding is a convolution before the attention
    module, no part of it.

    Parameters:
        weight, gate: [G, D, Dv] each, W1 and W2 of the G heads with a gated unit, the first ones;
            start as N(0, 0.02^2), alike in all heads.
        kernel: [heads with a convolution, Dv, 9], the taps row by row; starts zero.
        projection.weight [3 Dv, C], .bias [3 Dv]: of q', k', v' in this order; N(0, 0.02^2) and 0.
            join [H Dv, Dv]: 0, so that a fresh module has no such head. Only with `conv=extra`.
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
    limits = (("vit3(conv=extra)", "vit3(conv=none)"),)
    samples = (
        {},
        {"conv": "all", "lr": 0.5},
        {"conv": "none"},
        {"step": "released"},
        {"conv": "all", "step": "released"},
        {"conv": "extra"},
        {"rope": True},
        {"conv": "none", "rope": True},
        {"conv": "extra", "rope": True, "step": "released"},
    )
    weight: nn.Parameter
    gate: nn.Parameter
    kernel: nn.Parameter
    join: nn.Parameter

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        held = {"grid"} if self.options.conv != "none" or self.options.rope else set()
        if self.options.conv == "extra":
            held |= {"x"}
        return frozenset(held)

    @property
    def traits(self) -> frozenset[str]:  # type: ignore[override]
        held = {"scaled", "special-set"}
        if not self.options.rope:
            held |= {"mirror"}
            if self.options.conv in ("none", "extra"):  # of the extra head its zero start is seen
                held |= {"heads", "key-set", "pointwise"}
        if self.options.conv == "all":  # from a zero kernel
            held |= {"heads", "linear"} if self.options.step == "paper" else {"heads"}
        return frozenset(held)

    def _gated(self, heads: int) -> int:
        """Number of heads with a gated unit, G."""
        return {"last": heads - 1, "all": 0}.get(self.options.conv, heads)

    def _convolutions(self, heads: int) -> int:
        """Number of heads with a convolution."""
        return 1 if self.options.conv == "extra" else heads - self._gated(heads)

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        at_least(self, "lr", self.options.lr, 0, most=10_000, limit="or outputs overflow")
        if self.options.rope and self.options.conv == "all":
            raise MitaswapError(
                f"{self.spec}: rope=true turns queries and keys of heads with a gated unit, and "
                "conv=all leaves none; use rope=false, or conv=last, none or extra"
            )

    def build(self, site: SiteShape) -> None:
        gated, shape = self._gated(site.heads), (site.head_dim, site.value_dim)
        generator = torch.Generator().manual_seed(0)
        if gated:
            for name in ("weight", "gate"):
                start = 0.02 * torch.randn(shape, generator=generator)
                self.register_parameter(name, nn.Parameter(start.repeat(gated, 1, 1)))
        if convolutions := self._convolutions(site.heads):
            self.kernel = nn.Parameter(torch.zeros(convolutions, site.value_dim, 9))
        if self.options.conv == "extra":
            width = site.value_dim
            self.projection = nn.utils.skip_init(nn.Linear, site.width, 3 * width)
            nn.init.normal_(self.projection.weight, std=0.02, generator=generator)
            nn.init.zeros_(self.projection.bias)
            self.join = nn.Parameter(torch.zeros(site.heads * width, width))

    def cost(self, site: SiteShape) -> Cost:
        n, d, dv = site.layout.tokens, site.head_dim, site.value_dim
        gated = self._gated(site.heads)
        conv = self._convolutions(site.heads)
        # W1 and W2 run on keys, have their gradients, and run on queries; what the kernel makes of
        # keys nobody needs, since the loss is linear in it
        flops = gated * 6 * product_flops(n, d, dv) + conv * 2 * depthwise_flops(n, dv, 3)
        if self.options.conv == "extra":
            flops += product_flops(n, site.width, 3 * dv) + product_flops(n, dv, site.heads * dv)
        trained = gated * 2 * d * dv + conv * 9 * dv
        return self._cost(site, 0) + Cost(flops, 2 * trained)

    @outside_autocast
    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Tensor:
        dtype, gated = q.dtype, self._gated(q.shape[1])
        q, k, v = working(q, k, v)
        q, target = q * (scale * math.sqrt(q.shape[-1])), self._target(v)
        out = []
        if gated:
            queries, keys = q[:, :gated], k[:, :gated]
            if self.options.rope:
                queries, keys = turned_on_grid(queries, layout), turned_on_grid(keys, layout)
            out.append(self._gated_unit(queries, keys, target[:, :gated]))
        if gated < q.shape[1]:
            queries, keys, target = (x[:, gated:] for x in (q, k, target))
            out.append(self._convolution(queries, keys, target, layout))
        whole = torch.cat(out, dim=1)
        if self.options.conv == "extra":
            whole = whole + self._extra(extra["x"].to(q.dtype), layout)
        return whole.to(dtype)

    def _target(self, v: Tensor) -> Tensor:
        """The gradient of the loss by the predictions, negative; they are no part of it, since the
        loss is linear in them.
        """
        width = 9.0 if self.options.step == "released" else float(v.shape[-1])
        return v / (v.shape[2] * math.sqrt(width))

    def _extra(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """What the extra head adds, [B, H, N, Dv], from x [B, N, C]."""
        linear = self.projection
        qkv = F.linear(x, linear.weight.to(x.dtype), linear.bias.to(x.dtype))
        q, k, v = (part[:, None] for part in qkv.chunk(3, dim=-1))  # one head
        out = self._convolution(q, k, self._target(v), layout)[:, 0]  # [B, N, Dv]
        out = out @ self.join.to(x.dtype).t()
        return out.unflatten(-1, (-1, v.shape[-1])).transpose(1, 2)

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
