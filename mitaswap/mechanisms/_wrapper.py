"""What composes with any mechanism: `mita(m=25,k=25)+dwc+gate` is MiTA, a convolution of V added to
it, and a gate on the sum.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mitaswap.errors import MitaswapError
from mitaswap.mechanisms._base import Mechanism
from mitaswap.mechanisms._card import Cost, Routing, SiteShape
from mitaswap.registry import Registry
from mitaswap.spec import Spec, Value
from mitaswap.tokens import TokenLayout

WRAPPERS: Registry[type[Wrapper]] = Registry("wrapper", "mitaswap.mechanisms.wrappers")


@dataclass(frozen=True)
class WrapperOptions:
    """Options of a wrapper that has none."""


class Wrapper(Mechanism):
    """A mechanism around another one. A subclass writes `around`, `summary`, and what it changes of
    the inner mechanism's traits, needs and cost; learned parts as any mechanism.
    """

    options_type: ClassVar[Any] = WrapperOptions
    options: Any
    #: one line for `mitaswap ls`
    summary: ClassVar[str]

    def __init__(self, inner: Mechanism, options: Any = None) -> None:
        nn.Module.__init__(self)
        self.inner = inner
        self.options = options if options is not None else self.options_type()
        self.site: SiteShape | None = None
        self.card = inner.card  # type: ignore[misc]
        self.axes = inner.axes  # type: ignore[misc]

    @property
    def spec(self) -> Spec:
        """The inner mechanism's, with this wrapper and its options that differ from the defaults
        behind.
        """
        shown = {
            entry.name: getattr(self.options, entry.name)
            for entry in fields(self.options)
            if getattr(self.options, entry.name) != entry.default
        }
        inner = self.inner.spec
        return Spec(inner.name, inner.options, (*inner.wrappers, Spec(self.name, shown)))

    @property
    def family(self) -> str:
        return f"{self.inner.family}+{self.name}"

    @property
    def settings(self) -> dict[str, Value]:
        own = {f"{self.name}_{f.name}": getattr(self.options, f.name) for f in fields(self.options)}
        return {**self.inner.settings, **own}

    @property
    def supports(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner.supports

    @property
    def traits(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner.traits

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner.needs

    @property
    def unprojected(self) -> dict[str, Value]:  # type: ignore[override]
        return self.inner.unprojected

    @property
    def routes(self) -> bool:
        return self.inner.routes

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        self.inner.check(layout, head_dim)

    def check_site(self, site: SiteShape) -> None:
        super().check_site(site)  # which knows what is around, in what it suggests
        self.inner.check_site(site)

    def fitting(self, layout: TokenLayout, head_dim: int) -> Mechanism | None:
        inner = self.inner.fitting(layout, head_dim)
        return inner and type(self)(inner, self.options)._if_it_fits(layout, head_dim)

    def check_kernel(self, site: SiteShape, device: torch.device, dtype: torch.dtype) -> None:
        self.inner.check_kernel(site, device, dtype)

    def attach(self, site: SiteShape) -> None:
        if self.site is None:
            self.check_site(site)
            self.inner.attach(site)
        super().attach(site)

    def cost(self, site: SiteShape) -> Cost:
        return self.inner.cost(site) + self.extra_cost(site)

    def extra_cost(self, site: SiteShape) -> Cost:
        """What the wrapper adds to the cost of the inner mechanism."""
        raise NotImplementedError

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
        """The whole output. Arguments as `Mechanism.reference`, behind `out`, the inner
        mechanism's output [B, H, N, Dv].
        """
        raise NotImplementedError

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: TokenLayout,
        scale: float,
        extra: dict[str, Any],
    ) -> Tensor:
        given = dict(extra)
        if "x" not in self.inner.needs:
            given.pop("x", None)
        out = self.inner.run(q, k, v, layout, scale, given)
        return self.around(out, q, k, v, layout=layout, scale=scale, **extra)

    def route(self, q: Tensor, k: Tensor, *, layout: TokenLayout, scale: float) -> Routing | None:
        return self.inner.route(q, k, layout=layout, scale=scale)


def wrap(inner: Mechanism, name: str, options: Any) -> Wrapper:
    """`inner` inside the wrapper called `name`.

    Raises:
        MitaswapError: it is inside one already.
    """
    if name in [spec.name for spec in inner.spec.wrappers]:
        raise MitaswapError(f"{inner.spec} has +{name} already; give it once, with all its options")
    return WRAPPERS.get(name)(inner, options)
