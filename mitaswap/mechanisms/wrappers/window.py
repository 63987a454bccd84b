"""A local window that every patch always attends to, beside what the inner mechanism gives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mitaswap.errors import MitaswapError
from mitaswap.mechanisms._base import MECHANISMS, Mechanism
from mitaswap.mechanisms._card import Cost, Routing, SiteShape
from mitaswap.mechanisms._wrapper import WRAPPERS, Wrapper
from mitaswap.operators.experts import Branch, merge
from mitaswap.operators.neighbourhood import attend_near, near_flops
from mitaswap.operators.precision import outside_autocast, working
from mitaswap.operators.ranges import odd
from mitaswap.operators.special import join, split
from mitaswap.tokens import TokenLayout


@dataclass(frozen=True)
class WindowOptions:
    """Options of the local window.

    Args:
        size: side of the window around each patch, odd; cut off at the edges of the grid.
        mix: `softmax` puts the window's keys into the inner mechanism's own softmax (a key in both
            counts twice, as in MiTA's concatenation); `gate` moves the output towards the window's
            by one learned weight for each head, for mechanisms that are no softmax.
    """

    size: int = 7
    mix: Literal["softmax", "gate"] = "softmax"


@WRAPPERS.register("window")
class Window(Wrapper):
    """softmax([q K_inner^T, q K_window^T] scale) [V_inner, V_window], or (1 - g) O_inner + g
    O_window.

    With mix=gate a fresh wrapper changes nothing: g starts at zero.

    Special tokens have no place in the grid: as queries they keep the inner mechanism's output, as
    keys they are in no window.

    Parameters:
        weight [H], with mix=gate: g = tanh(weight), zero at the start.
    """

    options_type = WindowOptions
    options: WindowOptions
    summary = "lets every patch also attend to the patches around it"
    samples = ({"size": 3}, {"size": 5, "mix": "gate"})

    def __init__(self, inner: Mechanism, options: WindowOptions | None = None) -> None:
        super().__init__(inner, options)
        if self.options.mix == "softmax" and type(inner).branch is Mechanism.branch:
            able = [n for n, cls in MECHANISMS.items() if cls.branch is not Mechanism.branch]
            raise MitaswapError(
                f"{inner.spec} has no softmax that a window could join; use +window(mix=gate), "
                "which weighs two outputs, put +window before other wrappers, or take one of "
                f"{', '.join(able)}"
            )

    @property
    def supports(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset()

    @property
    def traits(self) -> frozenset[str]:  # type: ignore[override]
        if self.options.mix == "gate":  # from a gate at zero
            return self.inner.traits - {"routed-softmax"}
        return (self.inner.traits - {"key-set", "pointwise", "routed-softmax"}) | {"scaled"}

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner.needs | {"grid"}

    @property
    def routes(self) -> bool:
        return False  # the window is no expert, and without it the routing would be half the truth

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        super().check(layout, head_dim)
        side = max(*layout.grid, *self._built(layout).grid)
        odd(self, "size", self.options.size, side, ", with the query in its middle")

    def build(self, site: SiteShape) -> None:
        if self.options.mix == "gate":
            self.weight = nn.Parameter(torch.zeros(site.heads))

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: TokenLayout,
        scale: float,
        extra: dict[str, Any],
    ) -> Tensor:
        if self.options.mix == "gate":
            return super().run(q, k, v, layout, scale, extra)
        return self._joined(q, k, v, layout, scale, extra)

    @outside_autocast
    def _joined(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: TokenLayout,
        scale: float,
        extra: dict[str, Any],
    ) -> Tensor:
        dtype = q.dtype
        q, k, v = (t.contiguous() for t in working(q, k, v))
        out, lse = self.inner.branch(q, k, v, layout=layout, scale=scale, **extra)
        (patches, special), (parts, _) = split(out, layout), split(lse, layout)
        both, _ = merge([(patches, parts), self._near(q, k, v, layout, scale)])
        return join(both, special, layout).to(dtype)

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
        dtype = out.dtype
        out, q, k, v = working(out, q, k, v)
        patches, special = split(out, layout)
        near, _ = self._near(q, k, v, layout, scale)
        gate = self.weight.to(out.dtype).tanh()[:, None, None]
        return join(patches + gate * (near - patches), special, layout).to(dtype)

    def _near(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, scale: float) -> Branch:
        reach = self.options.size // 2
        queries, keys, values = (split(x, layout)[0] for x in (q, k, v))
        return attend_near(queries, keys, values, layout.grid, (reach, reach), scale)

    def extra_cost(self, site: SiteShape) -> Cost:
        reach = self.options.size // 2
        flops, beside = near_flops(site.layout.grid, (reach, reach), site.head_dim, site.value_dim)
        return Cost(site.heads * flops, 0, site.heads * beside)

    def route(self, q: Tensor, k: Tensor, *, layout: TokenLayout, scale: float) -> Routing | None:
        return None
