"""From a call string to a mechanism: options by name and type, wrappers around it."""

from __future__ import annotations

import contextlib
import math
import typing
from dataclasses import fields
from typing import Any, Literal

from mitaswap.errors import MitaswapError, unknown
from mitaswap.mechanisms._base import MECHANISMS, Mechanism
from mitaswap.mechanisms._card import SiteShape
from mitaswap.mechanisms._outside import explain
from mitaswap.mechanisms._wrapper import WRAPPERS, wrap
from mitaswap.spec import Spec, Value
from mitaswap.tokens import TokenLayout


def mechanism(spec: str | Spec) -> Mechanism:
    """Build a mechanism from its call string: `mechanism("mita(m=25,k=25)")(q, k, v, layout=...,
    scale=None)`.

    Raises:
        MitaswapError: unknown mechanism, wrapper or option, a value of the wrong type, or a kernel
            that the mechanism does not have.
    """
    spec = Spec.parse(spec)
    explain(spec.name)
    if spec.name in WRAPPERS and spec.name not in MECHANISMS:
        own = Spec(spec.name, spec.options)
        raise MitaswapError(
            f"{spec.name} is a wrapper: write it behind a mechanism, for instance "
            f"'mita(m=25,k=25)+{own}'"
        )
    cls = MECHANISMS.get(spec.name)
    part = cls(_options(cls.options_type, Spec(spec.name, spec.options)))
    for outer in spec.wrappers:
        part = wrap(part, outer.name, _options(WRAPPERS.get(outer.name).options_type, outer))
    return part


def spelled_out(spec: Spec) -> Spec:
    """The same with every option named: what it means in a version with other defaults, too. Not
    `impl`, which is a matter of the machine.
    """

    def named(kind: type, part: Spec) -> dict[str, Value]:
        options = _options(kind, part)
        every = {f.name: getattr(options, f.name) for f in fields(options)}
        return {k: v for k, v in every.items() if k != "impl" or k in part.options}

    return Spec(
        spec.name,
        named(MECHANISMS.get(spec.name).options_type, Spec(spec.name, spec.options)),
        tuple(
            Spec(outer.name, named(WRAPPERS.get(outer.name).options_type, outer))
            for outer in spec.wrappers
        ),
    )


def usual_site(part: Mechanism, heads: int = 3) -> SiteShape:
    """A site to describe a mechanism at: a ViT's usual one, 224 pixels in patches of 16, a class
    token, heads of 64; or, for what is made for thousands of tokens, that of 1,024 pixels.

    Raises:
        MitaswapError: it fits neither.
    """
    small, large = (SiteShape(heads, 64, TokenLayout(1, (side, side))) for side in (14, 64))
    try:
        mechanism(part.spec).check_site(small)
    except MitaswapError as error:
        with contextlib.suppress(MitaswapError):
            mechanism(part.spec).check_site(large)
            return large
        raise error
    return small


def learned_numbers(part: Mechanism, site: SiteShape | None = None) -> int:
    """How many parameters of its own an unattached mechanism has at a site, by default its usual
    one; it is attached there then.
    """
    part.attach(site or usual_site(part))
    return sum(p.numel() for p in part.parameters())


def _options(kind: Any, spec: Spec) -> Any:
    types = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, value in spec.options.items():
        if name not in types:
            raise unknown(f"option of {spec.name}", name, types)
        values[name] = _typed(types[name], name, value, spec)
    return kind(**values)


def _typed(kind: Any, name: str, value: Value, spec: Spec) -> Value:
    if typing.get_origin(kind) is Literal:
        allowed = typing.get_args(kind)
        if value is None:  # the grammar's word for nothing is also an option's
            value = "none"
        if value in allowed:
            return value
        raise unknown(f"value of {name} in {str(spec)!r}:", str(value), [str(a) for a in allowed])
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:  # more digits than a float has: out of every range
            return math.inf if value > 0 else -math.inf
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise MitaswapError(f"{name}={value!r} in {str(spec)!r} must be of type {kind.__name__}")
    return value
