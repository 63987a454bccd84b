"""Statistics of the routing, per layer and head, of each model with each mechanism that routes (the
paper's Fig. 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mitaswap.errors import MitaswapError
from mitaswap.evaluation import observe_routing
from mitaswap.mechanisms import Mechanism, mechanism
from mitaswap.results import Row
from mitaswap.spec import Recipe
from mitaswap.stats import STATISTICS
from mitaswap.studies._base import STUDIES, Cell, Plan, What, cell_key
from mitaswap.studies._groups import fitted
from mitaswap.studies._workbench import Workbench


@STUDIES.register("overlap")
def overlap(plan: Plan, bench: Workbench) -> Iterator[Cell]:
    """The statistics of `--stats` for the routed mechanisms of `--run`, else each model's own, else
    (without `--run`) MiTA.
    """
    for name in plan.stats:
        STATISTICS.get(name)
    if not plan.stats:
        return
    asked = [mechanism(spec) for spec in plan.run]
    routed = {label: _routed(bench, label, asked) for label in plan.models}
    if not any(routed.values()):
        raise MitaswapError(
            f"--stats {','.join(plan.stats)} needs a mechanism that routes, but --run has only "
            f"{', '.join(str(part.spec) for part in asked)}; add mita"
        )
    for label, found in routed.items():
        for what in found:
            bench.check(label, what)
            yield Cell(
                key=cell_key("overlap", label, what),
                label=f"{label}: {', '.join(plan.stats)} of {what}",
                images=len(bench.images.set),
                compute=_compute(bench, label, what, list(plan.stats)),
            )


def _routed(bench: Workbench, label: str, asked: list[Mechanism]) -> list[What]:
    own = bench.own(label)
    found: list[What] = [part.spec for part in asked if part.routes]
    if found:
        return found
    specs = [spec for _, spec in own.rules] if isinstance(own, Recipe) else [own]
    if any(mechanism(spec).routes for spec in specs):
        return [own]
    return [] if asked else [fitted(bench, label, "mita")]


def _compute(
    bench: Workbench, label: str, what: What, names: list[str]
) -> Callable[..., list[Row]]:
    def compute(on_images: Callable[[int], None]) -> list[Row]:
        decoded = bench.images.decoded(bench.network(label))
        with bench.swapped(label, what) as (network, handle):
            found = observe_routing(
                network, handle, names, decoded, bench.settings, on_images, bench.sites(label)
            )
        common = bench.common("overlap", label, what)
        return [{**common, **row} for row in found]

    return compute
