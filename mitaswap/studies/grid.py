"""Sweeps of a mechanism's options (the paper's Fig. 7): K keys per expert against N experts, or any
other option.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import fields

from mitaswap.errors import MitaswapError, unknown
from mitaswap.mechanisms import MECHANISMS, mechanism
from mitaswap.results import Row
from mitaswap.spec import Spec, Value
from mitaswap.studies._base import STUDIES, Cell, Plan, What, cell_key
from mitaswap.studies._groups import GROUPS
from mitaswap.studies._workbench import Workbench

logger = logging.getLogger(__name__)

#: the squares of the paper's Fig. 7
SQUARES = tuple(side * side for side in range(1, 11))


@STUDIES.register("grid")
def grid(plan: Plan, bench: Workbench) -> Iterator[Cell]:
    """Every model with every point of `--grid`, for the mechanisms of `--run` that have its
    options; without `--run` for the model's own mechanism if it has them, else for MiTA.
    """
    if not plan.grid:
        return
    specs = [mechanism(spec).spec for spec in plan.run if spec.name not in GROUPS]
    swept = [(spec, names) for spec in specs if (names := _options_of(spec, plan))]
    if specs and not swept:
        raise _no_such_axis(plan, specs[0])
    for spec in specs:
        if spec not in [base for base, _ in swept]:
            logger.warning("%s lacks an axis of %s: not swept", spec, ", ".join(plan.grid))
    for label in plan.models:
        for base, names in swept or [_own_or_mita(plan, bench.own(label))]:
            for spec, point in _points(plan, bench, label, base, names):
                axes: Row = {f"axis_{axis}": _plain(v) for axis, v in point.items()}
                axes |= {f"axis_{a}_name": n for a, n in zip(plan.grid, names, strict=True)}
                yield Cell(
                    key=cell_key("grid", label, spec),
                    label=f"{label} run with {spec}",
                    images=len(bench.images.set),
                    compute=_compute(bench, label, spec, axes),
                )


def _own_or_mita(plan: Plan, own: What) -> tuple[Spec, list[str]]:
    names = _options_of(own, plan) if isinstance(own, Spec) else None
    if isinstance(own, Spec) and names:
        return own, names
    mita = mechanism("mita").spec
    names = _options_of(mita, plan)
    if not names:
        raise _no_such_axis(plan, mita)
    return mita, names


def _points(
    plan: Plan, bench: Workbench, label: str, base: Spec, names: list[str]
) -> Iterator[tuple[Spec, dict[str, Value]]]:
    """The specs of a sweep, each with its place on the axes.

    Values that were asked for must work; defaults are kept where they do.
    """
    values = [given or _defaults(axis) for axis, given in plan.grid.items()]
    found = []
    for point in itertools.product(*values):
        spec = mechanism(base.with_options(**dict(zip(names, point, strict=True)))).spec
        found.append((spec, dict(zip(plan.grid, point, strict=True))))
    if None in plan.grid.values():
        found = [entry for entry in found if bench.fits(label, entry[0])] or found[:1]
    for spec, place in found:
        bench.check(label, spec)
        yield spec, place


def _compute(bench: Workbench, label: str, spec: Spec, axes: Row) -> Callable[..., list[Row]]:
    def compute(on_images: Callable[[int], None]) -> list[Row]:
        return [{**bench.measure("grid", label, spec, on_images), **axes}]

    return compute


def _plain(value: Value) -> str | int | float | None:
    return str(value) if isinstance(value, tuple) else value


def _options_of(spec: Spec, plan: Plan) -> list[str] | None:
    """The mechanism's option for each axis, or None when it lacks one."""
    cls = MECHANISMS.get(spec.name)
    known = {**{entry.name: entry.name for entry in fields(cls.options_type)}, **dict(cls.axes)}
    names = [known.get(axis) for axis in plan.grid]
    for axis, name in zip(plan.grid, names, strict=True):
        if name is not None and names.count(name) > 1:
            others = [a for a, n in zip(plan.grid, names, strict=True) if n == name and a != axis]
            raise MitaswapError(
                f"--grid sweeps the option {name} of {spec.name} twice, as {axis} and as "
                f"{', '.join(others)}; give it once"
            )
    return None if None in names else names  # type: ignore[return-value]


def _defaults(axis: str) -> tuple[Value, ...]:
    if axis in ("K", "N"):
        return SQUARES
    raise MitaswapError(f'--grid {axis} needs values, for instance --grid "{axis}=1,2"')


def _no_such_axis(plan: Plan, spec: Spec) -> MitaswapError:
    cls = MECHANISMS.get(spec.name)
    allowed = [*dict(cls.axes), *(entry.name for entry in fields(cls.options_type))]
    odd = next((axis for axis in plan.grid if axis not in allowed), next(iter(plan.grid)))
    return unknown(
        f"axis of {spec.name}",
        odd,
        allowed,
        "K is keys per expert, N is the number of experts; other axes are options of the "
        "mechanism.",
    )
