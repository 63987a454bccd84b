"""Sweep of two options of a mechanism at inference: number of experts N and keys per expert K."""

from __future__ import annotations

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mitaswap.figures._base import FIGURES, Chart, Panel, Theme, stem, wrap
from mitaswap.figures._heatmap import heatmap, outline, unmeasured
from mitaswap.figures._sweeps import NEAR, Sweep, sweeps

_MEANING = {"N": "number of experts", "K": "keys per expert"}


@FIGURES.register("grid")
class Grid(Chart):
    """Top-1 over the two options, with the training cell and the regions that keep the baseline."""

    title = "Accuracy over experts and keys"
    caption = (
        "Top-1 accuracy of one trained model whose mechanism runs with other option values than it "
        "was trained with: rows are the number of experts N, columns the keys per expert K. The "
        "thick orange frame is the cell that the model was trained with. The solid line encloses "
        "all cells at or above the baseline, the dashed line all cells at or above 99% of it. The "
        "baseline is the accuracy of the training cell or, for a model trained with another "
        "mechanism, its accuracy with that one."
    )
    rank = 20

    def find(self, table: pd.DataFrame) -> list[Panel]:
        panels = []
        for sweep in sweeps(table):
            values = list(sweep.cells.values())
            alt = (
                f"Heatmap of top-1 accuracy of {sweep.model} over {len(values)} settings of "
                f"{sweep.mechanism}{_fixed(sweep)}, from {values[0]:.1f}% to {values[-1]:.1f}%"
            )
            if sweep.baseline is not None:
                alt += (
                    f"; baseline {sweep.baseline:.1f}%, "
                    f"{sweep.at_least(1.0).to_numpy().sum()} cells at or above it, "
                    f"{sweep.at_least(NEAR).to_numpy().sum()} at or above 99% of it"
                )
            alt += ". The table below it has every number."
            option = sweep.x[1]
            columns = [f"{option} = {value}" for value in sweep.values.columns]
            data = sweep.values.set_axis(columns, axis=1)
            data = data.rename_axis(index=sweep.y[1] if sweep.y else "top-1 (%)").reset_index()
            parts = [sweep.model, sweep.mechanism, *(f"{k}{v}" for k, v in sweep.fixed.items())]
            panels.append(Panel(stem("grid", *parts), _heading(sweep), alt, data, content=sweep))
        return panels

    def paint(self, panel: Panel, theme: Theme) -> Figure:
        sweep: Sweep = panel.content
        rows, columns = sweep.values.shape
        size = (max(0.52 * columns + 1.9, 5.0), 0.4 * rows + 2.2)
        figure = Figure(figsize=size, layout="constrained")
        ax = figure.subplots()
        heatmap(figure, ax, sweep.values, theme, "top-1 (%)")
        ax.set_xlabel(_label(sweep.x))
        ax.set_ylabel(_label(sweep.y) if sweep.y else "")
        ax.tick_params(axis="both", rotation=0)
        ax.set_title(wrap(panel.heading, int(13 * size[0])))
        keys = _frames(ax, sweep, theme)
        if sweep.values.isna().any(axis=None):
            keys.append(unmeasured(theme, (0, 0), 1, 1))
        figure.legend(handles=keys, loc="outside lower left", ncols=1 if columns < 9 else 2)
        return figure


def _frames(ax: Axes, sweep: Sweep, theme: Theme) -> list[Artist]:
    """Draw what applies of training cell and regions; returns the legend."""
    if sweep.baseline is None:
        text = "no frames: the model's own mechanism was not measured"
        return [Line2D([], [], lw=0, label=text)]
    base = f"{sweep.baseline:.1f}%"
    near = f"at or above 99% of it, {NEAR * sweep.baseline:.1f}%"
    keys = [
        outline(
            ax, sweep.at_least(NEAR).to_numpy(), near, inset=(0.03, 0.03), width=1.3, dashed=True
        ),
        outline(
            ax,
            sweep.at_least(1.0).to_numpy(),
            f"at or above the baseline, {base}",
            inset=(0.1, 0.1),
            width=1.3,
        ),
    ]
    if sweep.training is None:
        text = f"baseline: {base}, run with {sweep.trained_with} as in training"
        keys.append(Line2D([], [], lw=0, label=wrap(text, 60)))
    else:
        cell = sweep.values.copy().astype(object)
        cell[:] = False
        cell.loc[sweep.training] = True
        where = ", ".join(
            f"{axis[1]} = {at}"
            for axis, at in zip((sweep.y, sweep.x), sweep.training, strict=True)
            if axis
        )
        keys.append(
            outline(
                ax,
                cell.to_numpy(dtype=bool),
                f"trained here, the baseline: {where}",
                inset=(0.07, 0.07),
                width=2.6,
                colour="#d55e00",
            )
        )
    # Outermost first when drawn, but the legend reads from the cell to the regions around it.
    return [key for key in reversed(keys) if key is not None]


def _label(axis: tuple[str, str]) -> str:
    name, option = axis
    return f"{name}: {_MEANING[name]} ({option})" if name in _MEANING else option


def _heading(sweep: Sweep) -> str:
    heading = f"{sweep.model} run with {sweep.mechanism}{_fixed(sweep)}"
    return f"{heading} ({sweep.setting})" if sweep.setting else heading


def _fixed(sweep: Sweep) -> str:
    return "".join(f", {name} = {value}" for name, value in sweep.fixed.items())
