"""The check before the clock: what would be timed must agree with the formula in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mitaswap.benchmark.core import Attend, CoreShape, Inputs, attending, cast, once, projecting
from mitaswap.benchmark.timing import Failure, attempt
from mitaswap.benchmark.tolerance import distance, nudged, rounding
from mitaswap.errors import MitaswapError
from mitaswap.mechanisms import Mechanism, SiteShape, Wrapper, mechanism
from mitaswap.spec import Spec
from mitaswap.tokens import TokenLayout

_DRAWS = 3  # moved inputs
_GRIDS = ((6, 7), (9, 8), (14, 14), (24, 24), (40, 40))  # of the small shape, the first that fits
_WHOLE = 2**20  # numbers in q up to which all images and heads are compared
_LARGE = 2**22  # numbers in one image's q up to which all of its heads are
_SCORES = 2**25  # scores in float64 that are held at once: more, and softmax's queries are sampled


@dataclass(frozen=True)
class Verdict:
    """What the gate found.

    Args:
        error: relative error of the tensor nearest to (or farthest above) its tolerance.
        tolerance: of the same tensor.
        tokens: longest sequence that was checked.
        implementation: "fused" or "reference", whichever ran.
    """

    error: float
    tolerance: float
    tokens: int
    implementation: str


class Refused(MitaswapError):
    """An implementation that does not compute its formula."""


def gate(part: Mechanism, shape: CoreShape, compiled: bool = False) -> Verdict:
    """Check a mechanism on a small shape and on the one asked for.

    The asked one runs whole, as it will be timed; of large ones the last image is compared, of very
    large ones a few heads where heads are independent, and of softmax attention some queries. If
    memory does not suffice for that in float64, the small shape stands alone (`tokens` tells).

    Raises:
        Refused: it is off by more than the tolerance, or gives numbers that are not finite.
    """
    small, verdict, used = _small(part.spec, shape), None, "reference"
    if small is not None:
        fresh = cast(part.spec, small)
        with _watched(fresh) as calls:
            verdict = _compare(fresh, attending(fresh, small), small)
        used = "fused" if calls else "reference"
    attend = attending(part, shape, compiled)
    # a compiler would trace the watching, too; it is shown what will be timed
    with _watched(part, unless=compiled and small is not None) as calls:
        checked = attempt(lambda: _compare(part, attend, shape), shape.device)
    if isinstance(checked, Failure):
        if verdict is None or checked.status != "out of memory":
            raise Refused(checked.error)
        return replace(verdict, implementation=used)
    used = "fused" if calls else used
    worse = checked if verdict is None or _share(checked) >= _share(verdict) else verdict
    return replace(worse, tokens=checked.tokens, implementation=used)


def _share(verdict: Verdict) -> float:
    return verdict.error / verdict.tolerance


@contextmanager
def _watched(part: Mechanism, unless: bool = False) -> Iterator[list[str]]:
    """The calls of the mechanism's kernel inside the block."""
    while isinstance(part, Wrapper):
        part = part.inner
    calls: list[str] = []
    kernel = part.fused

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(part.name)
        return kernel(*args, **kwargs)

    if type(part).fused is not Mechanism.fused and not unless:
        part.__dict__["fused"] = watched
    try:
        yield calls
    finally:
        part.__dict__.pop("fused", None)


def _small(spec: Spec, shape: CoreShape) -> CoreShape | None:
    """A shape of a few tokens that the options fit; None if none is smaller than the asked one."""
    site = shape.site
    for grid in _GRIDS:
        layout = TokenLayout(site.layout.prefix, grid, site.layout.suffix)
        if layout.tokens >= site.layout.tokens:
            return None
        try:
            mechanism(spec).check(layout, site.head_dim)
        except MitaswapError:
            continue
        own = SiteShape(min(site.heads, 3), site.head_dim, layout, site.value_dim)
        return replace(shape, batch=2, site=own)
    return None


def _compare(part: Mechanism, attend: Attend, shape: CoreShape) -> Verdict:
    """One shape.

    Raises:
        Refused: as `gate`.
    """
    inputs = Inputs.draw(shape, x="x" in part.needs)
    images, heads = _compared(part, shape)
    rows = _rows(part, shape, len(range(shape.site.heads)[heads]))
    if rows is not None and shape.backward:
        kept = torch.zeros_like(inputs.grad)
        kept[:, :, rows] = inputs.grad[:, :, rows]
        inputs = replace(inputs, grad=kept)
    ours = once(attend, inputs, shape.backward, list(part.parameters()))
    exact = _oracle(part, shape, images, heads, rows)
    given = [t[images].detach().double() for t in inputs.given]
    given = [t[:, heads] for t in given[:3]] + given[3:]
    grad = inputs.grad[images][:, heads].double() if shape.backward else inputs.grad
    ours = [_cut(t, i, images, heads, rows) for i, t in enumerate(ours)]
    del inputs
    truth = exact(given, grad)
    moved = [nudged(given, shape, draw) for draw in range(_DRAWS)]
    off = [[distance(a, b) for a, b in zip(exact(m, grad), truth, strict=True)] for m in moved]
    worst: tuple[float, float, str] | None = None
    for i, name in enumerate(shape.names):
        found = () if truth[i] is None else distance(ours[i], truth[i])
        for j, error in enumerate(found):
            tolerance = 2 * max(draw[i][j] for draw in off) + 4 * rounding(shape)
            if worst is None or error / tolerance > worst[0] / worst[1]:
                worst = error, tolerance, name
    assert worst is not None
    error, tolerance, name = worst
    site = shape.site
    if error > tolerance:
        raise Refused(
            f"{part.spec} is not timed: its {name} is off by {error:.2g} of its norm, tolerance "
            f"{tolerance:.2g}, at batch {shape.batch}, {site.heads} heads of {site.head_dim}, "
            f"tokens {site.layout}, {str(shape.dtype).removeprefix('torch.')}"
        )
    return Verdict(error, tolerance, site.layout.tokens, "")


def _compared(part: Mechanism, shape: CoreShape) -> tuple[slice, slice]:
    """Which images and heads are compared."""
    site, everything = shape.site, slice(None)
    one = site.heads * site.layout.tokens * site.head_dim
    if shape.batch * one <= _WHOLE:
        return everything, everything
    last = slice(shape.batch - 1, shape.batch)
    whole = [*part.parameters(), *part.buffers()] or "x" in part.needs
    if one <= _LARGE or whole or "heads" not in part.traits:
        return last, everything
    return last, slice(site.heads - 1, site.heads)


def _rows(part: Mechanism, shape: CoreShape, heads: int) -> Tensor | None:
    """Queries that are compared, where each is independent of the others; None for all."""
    tokens = shape.site.layout.tokens
    if part.name != "standard" or isinstance(part, Wrapper) or heads * tokens**2 <= _SCORES:
        return None
    count = max(64, _SCORES // (heads * tokens))
    made = torch.Generator().manual_seed(shape.seed)
    rows = torch.randperm(tokens, generator=made)[:count].sort().values
    return rows.to(shape.device)


def _oracle(
    part: Mechanism, shape: CoreShape, images: slice, heads: slice, rows: Tensor | None
) -> Callable[[Iterable[Tensor], Tensor], list[Any]]:
    """The mechanism's formula in float64, for the images, heads and queries that are compared."""
    site = shape.site
    exact = mechanism(part.spec.with_options(impl="reference"))
    exact.attach(site)
    exact = exact.to(shape.device, torch.float64).eval()
    scale = 1.0 / math.sqrt(site.head_dim)
    project = projecting(shape, torch.float64) if "project" in part.needs else None

    def attend(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        extra: dict[str, Any] = {"x": x} if "x" in part.needs else {}
        if project is not None:
            extra["project"] = project
        return exact.run(q, k, v, site.layout, scale, extra)

    def run(given: Iterable[Tensor], grad: Tensor) -> list[Any]:
        q, k, v, x = given
        if rows is not None:
            q, grad = q[:, :, rows], grad[:, :, rows] if shape.backward else grad
        q, k, v, x = (t.detach().requires_grad_(shape.backward) for t in (q, k, v, x))
        return once(attend, Inputs(q, k, v, x, grad), shape.backward, [])

    return run


def _cut(
    tensor: Tensor | None, number: int, images: slice, heads: slice, rows: Tensor | None
) -> Tensor | None:
    """What is compared of the tensor that `once` returns at this place."""
    if tensor is None or number == 4:  # dx has no heads
        return None if tensor is None else tensor[images]
    cut = tensor[images][:, heads]
    return cut[:, :, rows] if rows is not None and number < 2 else cut
