"""What every mechanism is: options, a card, a check, a reference, and perhaps routing, a kernel and
parameters.
"""

from __future__ import annotations

import math
from dataclasses import Field, dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mitaswap.errors import MitaswapError
from mitaswap.mechanisms._call import check_call
from mitaswap.mechanisms._card import Card, Cost, Routing, SiteShape
from mitaswap.operators.experts import Branch
from mitaswap.operators.precision import outside_autocast, working
from mitaswap.registry import Registry
from mitaswap.spec import Spec, Value
from mitaswap.tokens import TokenLayout

MECHANISMS: Registry[type[Mechanism]] = Registry("mechanism", "mitaswap.mechanisms")


@dataclass(frozen=True)
class Options:
    """Options every mechanism has; a mechanism's own class adds its fields.

    Args:
        impl: `reference` (PyTorch), `fused` (a kernel; an error where there is none), or `auto`.
    """

    impl: Literal["auto", "reference", "fused"] = "auto"


class Mechanism(nn.Module):
    """One attention mechanism with its options fixed.

    A subclass declares `options_type`, `card`, `samples`, `traits` and what it `needs` and
    `supports`, and writes `check`, `reference` and `cost`. Learned parts are created by `build`,
    from constants or from a generator of its own, never from the global one: the same options and
    site always start alike.
    """

    name: ClassVar[str]
    options_type: ClassVar[type[Options]] = Options
    card: ClassVar[Card]
    #: option sets that the laws of the test suite and the benchmarks run over
    samples: ClassVar[tuple[dict[str, Value], ...]] = ({},)
    #: options at which it equals another mechanism, as pairs of call strings; {tokens} and
    #: {patches} are those of the layout, {dim} is the head's
    limits: ClassVar[tuple[tuple[str, str], ...]] = ()
    #: the paper's module, where the name alone is not that: wrappers around the formula
    paper: ClassVar[str] = ""
    #: the laws that hold for it, of `TRAITS`; where options decide, a property
    traits: ClassVar[frozenset[str]] = frozenset()
    #: what it reads of a site besides q, k, v: "grid" (where the patches are), "x" (the attention
    #: module's input), "project" (its key and value projections, to map other rows in the place of
    #: x, which it then needs too); where options decide, a property
    needs: ClassVar[frozenset[str]] = frozenset()
    #: options with which it does not need "project": for sites whose projections are not known
    unprojected: ClassVar[dict[str, Value]] = {}
    #: what a site may hand over besides q, k, v: any of "bias", "causal", "dropout"
    supports: ClassVar[frozenset[str]] = frozenset()
    #: the options that `--grid K,N` sweeps, as (axis, option) pairs; empty without experts
    axes: ClassVar[tuple[tuple[str, str], ...]] = ()

    def __init__(self, options: Options | None = None) -> None:
        super().__init__()
        self.options = options if options is not None else self.options_type()
        self.site: SiteShape | None = None
        if self.options.impl == "fused" and type(self).fused is Mechanism.fused:
            raise MitaswapError(f"{self.name} has no fused kernel; use impl=reference or impl=auto")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "options" and self.__dict__.get("site") is not None:
            raise MitaswapError(
                f"the options of {self.spec} are fixed where it is attached; make another one with "
                "mechanism(...)"
            )
        super().__setattr__(name, value)

    @property
    def spec(self) -> Spec:
        """Name and the options that differ from their defaults, plus those of the axes."""
        shown = {}
        for entry in fields(self.options):
            value = getattr(self.options, entry.name)
            if value != entry.default or entry.name in dict(self.axes).values():
                shown[entry.name] = value
        return Spec(self.name, shown)

    @property
    def _fields(self) -> tuple[Field[Any], ...]:
        return fields(self.options)

    @property
    def family(self) -> str:
        """Name without options: of the mechanism, and of the wrappers around it."""
        return self.name

    @property
    def settings(self) -> dict[str, Value]:
        """All options by name, those of wrappers as `WRAPPER_OPTION`: columns of the results (where
        `seed` is the run's, so that a mechanism's own is `NAME_seed`).
        """
        names = {f.name: f"{self.name}_seed" if f.name == "seed" else f.name for f in self._fields}
        return {column: getattr(self.options, name) for name, column in names.items()}

    @property
    def routes(self) -> bool:
        """Whether these options route queries to experts, so that `route` has an answer."""
        return False

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        """Raise `MitaswapError` if these options cannot work on `layout`: called before any work is
        done, for every layout.
        """

    def check_site(self, site: SiteShape) -> None:
        """All that can be asked before a mechanism is attached, without building anything: `check`,
        and what depends on heads and width.
        """
        self.fit(site.layout, site.head_dim)

    def fit(self, layout: TokenLayout, head_dim: int) -> None:
        """`check`, whose error also says what fits, where defaults are to blame.

        Raises:
            MitaswapError: these options cannot work on `layout`.
        """
        try:
            self.check(layout, head_dim)
        except MitaswapError as error:
            other = self.fitting(layout, head_dim)
            there = f"; for {layout} there is {other.spec}" if other else ""
            raise MitaswapError(f"{error}{there}") from None

    def fitting(self, layout: TokenLayout, head_dim: int) -> Mechanism | None:
        """The same with the options that `suggest` has for a layout, where these are at their
        defaults; None if that changes nothing, or does not fit either.
        """
        left = {e.name for e in self._fields if getattr(self.options, e.name) == e.default}
        found: dict[str, Any] = self.suggest(layout)
        found = {name: value for name, value in found.items() if name in left}
        if not found:
            return None
        return type(self)(replace(self.options, **found))._if_it_fits(layout, head_dim)

    def _if_it_fits(self, layout: TokenLayout, head_dim: int) -> Mechanism | None:
        try:
            self.check(layout, head_dim)
        except MitaswapError:
            return None
        return self

    def _built(self, layout: TokenLayout) -> TokenLayout:
        """The layout that learned parts were created for; `layout` if there are none yet."""
        return self.site.layout if self.site else layout

    @classmethod
    def suggest(cls, layout: TokenLayout) -> dict[str, Value]:
        """Options for a layout that the defaults do not fit, or where they leave nothing to save;
        empty (the default) elsewhere.
        """
        return {}

    def build(self, site: SiteShape) -> None:
        """Create learned parts and buffers for one site; default: none. Their start is the best
        that the formula allows without training, and they fit any later grid by interpolation.
        """

    def attach(self, site: SiteShape) -> None:
        """Settle at a site, once: `build` runs here. A mechanism that was not attached attaches
        itself to the first tensors that it is called with.

        Raises:
            MitaswapError: the options do not fit the site.
        """
        if self.site is not None:
            raise MitaswapError(f"{self.spec} is attached already, to {self.site}")
        self.check_site(site)
        if type(self).build is not Mechanism.build:
            # parts that can be trained, with their numbers, whatever mode or device the caller set
            with torch.inference_mode(False), torch.device("cpu"):
                self.build(site)
        self.site = site

    @property
    def learns(self) -> bool:
        """Whether `build` created anything: parameters, or buffers drawn for the site."""
        return any(True for _ in self.parameters()) or any(True for _ in self.buffers())

    def cost(self, site: SiteShape) -> Cost:
        """FLOPs and memory traffic of one image at a site, by the formula."""
        raise NotImplementedError

    def _twin(self, q: Tensor, layout: TokenLayout) -> Mechanism:
        """One of the same options, attached at the site of these queries: it can answer for a
        mechanism that is not attached yet and shall not be by a question.
        """
        twin = type(self)(self.options)
        twin.attach(SiteShape(q.shape[1], q.shape[3], layout))
        return twin.to(q.device)

    def _cost(self, site: SiteShape, flops: int, between: int = 0, padding: int = 0) -> Cost:
        """`Cost` of a core that reads q, k, v (and x, if needed) and its parameters, and writes
        the output; `flops`, `between` (numbers stored and read back) and `padding` per head.
        """
        own = self  # where it is attached already, whatever that grid: these parts are read
        if self.site is None:
            own = type(self)(self.options)
            own.attach(site)
        tokens = site.layout.tokens
        moved = site.heads * tokens * 2 * (site.head_dim + site.value_dim)
        moved += tokens * site.width if "x" in self.needs else 0
        moved += sum(p.numel() for p in own.parameters())
        heads = site.heads
        between *= 2 * heads
        return Cost(heads * flops, moved + between, heads * padding, between)

    def branch(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Branch:
        """The formula of a mechanism whose output is one softmax: output and log-sum-exp, so that
        other keys can join the same softmax. Arguments as `reference`, contiguous and in working
        precision. Mechanisms that are no softmax write `reference` instead.
        """
        raise NotImplementedError

    @outside_autocast
    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Tensor:
        """The mechanism's formula in PyTorch, on any device and dtype; default: from `branch`.

        Args:
            q, k, v: [B, H, N, D].
            layout: token layout of the N tokens.
            scale: factor of q k^T.
            extra: what `supports` and `needs` declare, by name (`attn_mask`, `is_causal`,
                `dropout_p`; `x` [B, N, C]; `project`, a function of rows [B, M, C] that returns
                their keys and values [B, H, M, D] in the dtype of the rows).

        Returns:
            [B, H, N, D] in q's dtype.
        """
        # views of a fused projection are strided; each is read several times, so it is copied once
        exact = (t.contiguous() for t in working(q, k, v))
        out, _ = self.branch(*exact, layout=layout, scale=scale, **extra)
        return out.to(q.dtype)

    def fused(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Tensor:
        """The same by a kernel. Overridden by mechanisms that have one; without it, `impl=fused` is
        refused at construction.
        """
        raise NotImplementedError

    def unfit(self, q: Tensor, k: Tensor, v: Tensor) -> str:
        """What the kernel cannot take of these tensors and the options, in words; empty: nothing.
        `impl=auto` then takes the reference, `impl=fused` is an error.
        """
        return ""

    def check_kernel(self, site: SiteShape, device: torch.device, dtype: torch.dtype) -> None:
        """Raise `MitaswapError` if `impl=fused` was asked for and the kernel cannot take what a
        network of this device and dtype hands over.
        """
        if self.options.impl == "fused":
            widths = (site.head_dim, site.head_dim, site.value_dim)
            q, k, v = (torch.empty(1, site.heads, 1, n, device=device, dtype=dtype) for n in widths)
            if problem := self.unfit(q, k, v):
                raise self._no_kernel(problem)

    def _no_kernel(self, problem: str) -> MitaswapError:
        return MitaswapError(
            f"{self.spec} has no kernel for {problem}; use impl=auto or impl=reference"
        )

    def route(self, q: Tensor, k: Tensor, *, layout: TokenLayout, scale: float) -> Routing | None:
        """The routing of these queries and keys; None for mechanisms that do not route."""
        return None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: TokenLayout,
        scale: float | None = None,
        **extra: Any,
    ) -> Tensor:
        """Attend. Arguments as `reference`; `scale=None` means 1 / sqrt(D).

        Raises:
            MitaswapError: shapes, layout and options do not fit, `extra` holds what the mechanism
                cannot honour, or lacks the x or the projections that it needs.
        """
        check_call(self, q, k, v, layout, extra)
        x = extra.get("x")
        if self.site is None:
            width = x.shape[2] if x is not None else 0
            self.attach(SiteShape(q.shape[1], q.shape[3], layout, v.shape[3], width))
            if self.learns:  # half precision keeps learned parts in float32, as the sums are
                exact = q.dtype in (torch.float32, torch.float64)
                with torch.inference_mode(False):
                    self.to(q.device, q.dtype if exact else torch.float32)
        if scale is None:
            scale = 1.0 / math.sqrt(q.shape[3])
        return self.run(q, k, v, layout, scale, extra)

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: TokenLayout,
        scale: float,
        extra: dict[str, Any],
    ) -> Tensor:
        """`forward` without its checks, for callers that have made them."""
        impl = self.options.impl
        has_kernel = type(self).fused is not Mechanism.fused
        fused = impl == "fused" or (impl == "auto" and has_kernel and q.is_cuda)
        if fused and (problem := self.unfit(q, k, v)):
            if impl == "fused":
                raise self._no_kernel(problem)
            fused = False
        run = self.fused if fused else self.reference
        return run(q, k, v, layout=layout, scale=scale, **extra)

    def extra_repr(self) -> str:
        return str(self.spec)
