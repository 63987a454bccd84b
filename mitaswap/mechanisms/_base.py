"""What every mechanism is: options, a card, a check, a reference, and perhaps routing, a kernel and
parameters.
"""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from mitaswap.errors import MitaswapError, unknown
from mitaswap.registry import Registry
from mitaswap.spec import Spec, Value
from mitaswap.tokens import TokenLayout

MECHANISMS: Registry[type[Mechanism]] = Registry("mechanism", "mitaswap.mechanisms")


@dataclass(frozen=True)
class Card:
    """A mechanism's place in the paper's five-dimensional taxonomy (Tab. 1), and where it comes
    from.

    Args:
        strategy: how the N-wide fast-weight MLP is scaled: by compression, by routing, or both.
        expert_type: what one expert is (a linear layer, an MLP, ...).
        expert_count: how many experts there are.
        construction: how experts are formed from keys and values.
        topology: which queries go to which experts.
        source: paper, year and equation.
        cost: order of the operations for N tokens, as a formula.
    """

    strategy: str
    expert_type: str
    expert_count: str
    construction: str
    topology: str
    source: str
    cost: str


@dataclass(frozen=True)
class Routing:
    """Who holds which keys and who asks whom: all that statistics see of a routed mechanism.

    Args:
        members: key positions that each expert holds, int64 [B, H, M, K].
        choice: experts that each query takes, best first, int64 [B, H, N, s].
    """

    members: Tensor
    choice: Tensor


@dataclass(frozen=True)
class Options:
    """Options every mechanism has; a mechanism's own class adds its fields.

    Args:
        impl: `reference` (PyTorch), `fused` (a kernel; an error where there is none), or `auto`.
    """

    impl: Literal["auto", "reference", "fused"] = "auto"


class Mechanism(nn.Module):
    """One attention mechanism with its options fixed.

    A subclass declares `options_type`, `card`, `samples` and `supports`, and writes `reference`. It
    is an `nn.Module` so that mechanisms with learned parts can create them in `attach`; those
    without keep no state at all.
    """

    name: ClassVar[str]
    options_type: ClassVar[type[Options]] = Options
    card: ClassVar[Card]
    #: option sets that the laws of the test suite and the benchmarks run over
    samples: ClassVar[tuple[dict[str, Value], ...]] = ({},)
    #: what a site may hand over besides q, k, v: any of "bias", "causal", "dropout"
    supports: ClassVar[frozenset[str]] = frozenset()
    #: the options that `--grid K,N` sweeps, as (axis, option) pairs; empty without experts
    axes: ClassVar[tuple[tuple[str, str], ...]] = ()

    def __init__(self, options: Options | None = None) -> None:
        super().__init__()
        self.options = options if options is not None else self.options_type()
        if self.options.impl == "fused" and type(self).fused is Mechanism.fused:
            raise MitaswapError(f"{self.name} has no fused kernel; use impl=reference or impl=auto")

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
    def routes(self) -> bool:
        """Whether these options route queries to experts, so that `route` has an answer."""
        return False

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        """Raise `MitaswapError` if these options cannot work on `layout`: called before any work is
        done.
        """

    def attach(self, heads: int, head_dim: int, layout: TokenLayout) -> None:
        """Create learned parts for one site. Called once, when the mechanism is swapped in;
        default: none.
        """

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Tensor:
        """The mechanism's formula in PyTorch, on any device and dtype.

        Args:
            q, k, v: [B, H, N, D].
            layout: token layout of the N tokens.
            scale: factor of q k^T.
            extra: what `supports` declares, by name (`attn_mask`, `is_causal`, `dropout_p`).

        Returns:
            [B, H, N, D] in q's dtype.
        """
        raise NotImplementedError

    def fused(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Tensor:
        """The same by a kernel. Overridden by mechanisms that have one; without it, `impl=fused` is
        refused at construction.
        """
        raise NotImplementedError

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
            MitaswapError: shapes, layout and options do not fit, or `extra` holds what the
                mechanism cannot honour.
        """
        if q.ndim != 4 or q.shape != k.shape or q.shape[:3] != v.shape[:3]:
            raise MitaswapError(
                "q, k, v must be [B, H, N, D] of one shape (v may have its own D), got "
                f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
            )
        layout.check(q.shape[2], "q")
        self.check(layout, q.shape[3])
        for name in extra:
            if name not in _PART:
                raise unknown("argument of an attention call", name, _PART)
            if _PART[name] not in self.supports:
                raise MitaswapError(
                    f"{self.spec} cannot honour {name}; only mechanisms that support it can"
                )
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
        run = self.fused if self.options.impl == "fused" else self.reference
        return run(q, k, v, layout=layout, scale=scale, **extra)

    def extra_repr(self) -> str:
        return str(self.spec)


#: keyword of an attention call -> the entry of `supports` that allows it
_PART = {"attn_mask": "bias", "is_causal": "causal", "dropout_p": "dropout"}


def mechanism(spec: str | Spec) -> Mechanism:
    """Build a mechanism from its call string: `mechanism("mita(m=25,k=25)")(q, k, v, layout=...,
    scale=None)`.

    Raises:
        MitaswapError: unknown mechanism or option, a value of the wrong type, or a kernel that the
            mechanism does not have.
    """
    spec = Spec.parse(spec)
    cls = MECHANISMS.get(spec.name)
    return cls(_options(cls, spec))


def _options(cls: type[Mechanism], spec: Spec) -> Options:
    types = typing.get_type_hints(cls.options_type)
    values: dict[str, Any] = {}
    for name, value in spec.options.items():
        if name not in types:
            raise unknown(f"option of {spec.name}", name, types)
        values[name] = _typed(types[name], name, value, spec)
    return cls.options_type(**values)


def _typed(kind: Any, name: str, value: Value, spec: Spec) -> Value:
    if typing.get_origin(kind) is Literal:
        allowed = typing.get_args(kind)
        if value in allowed:
            return value
        raise unknown(f"value of {name} in {str(spec)!r}:", str(value), [str(a) for a in allowed])
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise MitaswapError(f"{name}={value!r} in {str(spec)!r} must be of type {kind.__name__}")
    return value
