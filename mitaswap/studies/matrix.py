"""The cross-mechanism matrix (the paper's Fig. 8): each model, trained with X, run with Y."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mitaswap.results import Row
from mitaswap.studies._base import STUDIES, Cell, Plan, What, cell_key
from mitaswap.studies._groups import expanded, fitted
from mitaswap.studies._workbench import Workbench

#: what is run when nothing was asked for
DEFAULT_RUN = ("standard", "linear", "agent", "mita")


@STUDIES.register("matrix")
def matrix(plan: Plan, bench: Workbench) -> Iterator[Cell]:
    """Every model with every mechanism of `--run`; what each model was trained with and what it was
    converted to are always among them.
    """
    for label in plan.models:
        own, saved = bench.own(label), bench.saved(label)
        specs = expanded(bench, label, plan.run)
        if not (plan.run or plan.grid or plan.stats):
            specs = [fitted(bench, label, name) for name in DEFAULT_RUN]
        for what in dict.fromkeys([own, *([saved] if saved else []), *specs]):
            bench.check(label, what)
            yield Cell(
                key=cell_key("matrix", label, what),
                label=f"{label} run with {what}",
                images=len(bench.images.set),
                compute=_compute(bench, label, what),
            )


def _compute(bench: Workbench, label: str, what: What) -> Callable[..., list[Row]]:
    def compute(on_images: Callable[[int], None]) -> list[Row]:
        return [bench.measure("matrix", label, what, on_images)]

    return compute
