"""What every study is made of: the plan that was asked for, its cells, and how they are run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from mitaswap.evaluation import Settings
from mitaswap.registry import Registry
from mitaswap.results import Row, Run
from mitaswap.spec import Recipe, Spec, Value

if TYPE_CHECKING:
    from mitaswap.studies._workbench import Workbench

#: what a cell runs a network with: one mechanism in the plan's layers, or a recipe of its own
What: TypeAlias = Union[Spec, Recipe]

#: grid axis -> its values, or None for defaults that suit the model
Axes = Mapping[str, tuple[Value, ...] | None]


@dataclass(frozen=True)
class Plan:
    """What one `mitaswap eval` was asked to do. The same plan is the same run.

    Args:
        models: label to model name.
        trained: label to the spec the model was trained with, where the user says so.
        settings: data and how forward passes are made.
        run: specs to run each model with; empty when not asked for.
        grid: axes to sweep; empty when not asked for.
        stats: statistics to collect; empty when not asked for.
        layers: which sites the mechanisms go to.
        model_options: options of `open_model` (arch, pretrained, trust_remote_code).
    """

    models: Mapping[str, str]
    settings: Settings
    trained: Mapping[str, str] = field(default_factory=dict)
    run: tuple[Spec, ...] = ()
    grid: Axes = field(default_factory=dict)
    stats: tuple[str, ...] = ()
    layers: str = "*"
    model_options: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values: what a run directory stores and compares.

        Where the work runs in parallel is no part of it: the numbers do not depend on it.
        """
        settings = {k: v for k, v in asdict(self.settings).items() if k != "workers"}
        return {
            "models": dict(self.models),
            "trained": dict(self.trained),
            **settings,
            "device": str(self.settings.torch_device),
            "run": [str(spec) for spec in self.run],
            "grid": {axis: list(v) if v else None for axis, v in self.grid.items()},
            "stats": list(self.stats),
            "layers": self.layers,
            **{k: v for k, v in self.model_options.items() if v},
        }


@dataclass(frozen=True)
class Cell:
    """One unit of work that is recomputed whole or not at all.

    Args:
        key: names it in the run directory.
        label: names it for people.
        images: forward passes it takes, in images.
        compute: does the work; calls its argument with the number of images just done.
    """

    key: str
    label: str
    images: int
    compute: Callable[[Callable[[int], None]], list[Row]]


#: the cells that a plan asks of one study, none when it asks for nothing; a study never plots
Study: TypeAlias = "Callable[[Plan, Workbench], Iterator[Cell]]"

STUDIES: Registry[Study] = Registry("study", "mitaswap.studies")


def cell_key(study: str, label: str, what: What) -> str:
    """The name of a cell in its run directory."""
    return f"{study}/{label}/{what}"


def cells_of(plan: Plan, bench: Workbench) -> list[Cell]:
    """The cells of all studies that the plan asks for, each once, checked but not computed.

    Raises:
        MitaswapError: a mechanism, option, layer pattern, axis or statistic that cannot be had.
    """
    found = [cell for _, study in STUDIES.items() for cell in study(plan, bench)]
    return list({cell.key: cell for cell in found}.values())


@contextmanager
def open_run(
    directory: str | Path, plan: Mapping[str, Any], provenance: Mapping[str, Any]
) -> Iterator[Run]:
    """`Run.open`, closed at the end; a new run that ends before its first cell leaves no trace."""
    with Run.open(directory, plan, provenance) as run:
        try:
            yield run
        except BaseException:
            run.discard()
            raise


def run_cells(
    cells: list[Cell],
    run: Run,
    on_cell: Callable[[Cell, list[Row]], None] | None = None,
    on_images: Callable[[int], None] | None = None,
) -> None:
    """Compute the cells that the run does not have yet, each written to disk as soon as it is
    done.
    """
    for cell in cells:
        if cell.key in run.done:
            continue
        rows = cell.compute(on_images or (lambda count: None))
        run.append(cell.key, rows)
        if on_cell:
            on_cell(cell, rows)
