"""Sweep of two options of a mechanism at inference: number of experts N and keys per expert K."""

from __future__ import annotations

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mitaswap.figures._base import FIGURES, Chart, Panel, Theme, stem, wrap
from mitaswap.figures._heatmap import Outline, heatmap, unmeasured
from mitaswap.figures._sweeps import NEAR, Sweep, sweeps
from mitaswap.figures._titles import entitle

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
        size = (max(0.6 * columns + 1.9, 5.0), 0.4 * rows + 2.2)
        figure = Figure(figsize=size, layout="constrained")
        ax = figure.subplots()
        heatmap(figure, ax, sweep.values, theme, "top-1 (%)")
        ax.set_xlabel(_label(sweep.x))
        ax.set_ylabel(_label(sweep.y) if sweep.y else "")
        ax.tick_params(axis="both", rotation=0)
        frames, keys = _frames(sweep)
        if sweep.values.isna().any(axis=None):
            keys.append(unmeasured(theme, (0, 0), 1, 1))
        figure.legend(handles=keys, loc="outside lower left", ncols=1 if columns < 9 else 2)
        entitle(figure, ax, panel.heading)
        _nest(ax, frames)
        return figure


def _frames(sweep: Sweep) -> tuple[list[Outline], list[Artist]]:
    """What applies of regions and training cell, each inside those before it; and the legend."""
    if sweep.baseline is None:
        text = "no frames: the model's own mechanism was not measured"
        return [], [Line2D([], [], lw=0, label=text)]
    base = f"{sweep.baseline:.1f}%"
    near = f"at or above 99% of it, {NEAR * sweep.baseline:.1f}%"
    above = f"at or above the baseline, {base}"
    frames = [
        Outline(sweep.at_least(NEAR).to_numpy(), near, 1.2, dashed=True),
        Outline(sweep.at_least(1.0).to_numpy(), above, 1.2),
    ]
    if sweep.training is not None:
        cell = sweep.values.copy().astype(object)
        cell[:] = False
        cell.loc[sweep.training] = True
        where = ", ".join(
            f"{axis[1]} = {at}"
            for axis, at in zip((sweep.y, sweep.x), sweep.training, strict=True)
            if axis
        )
        here = f"trained here, the baseline: {where}"
        frames.append(Outline(cell.to_numpy(dtype=bool), here, 2.2, colour="#d55e00"))
    frames = [frame for frame in frames if frame.cells.any()]
    # The legend reads from the cell to the regions around it.
    keys: list[Artist] = [frame.key() for frame in reversed(frames)]
    if sweep.training is None:
        text = f"baseline: {base}, run with {sweep.trained_with} as in training"
        keys.insert(0, Line2D([], [], lw=0, label=wrap(text, 60)))
    return frames, keys


def _nest(ax: Axes, frames: list[Outline]) -> None:
    """Draw outlines so that none covers another where they meet: side by side, by their width in
    points, for which the layout must be settled.
    """
    box = ax.get_window_extent()
    point = ax.figure.dpi / 72
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    width, height = box.width / abs(right - left), box.height / abs(high - low)
    depth = 0.5  # half of the line between two cells
    for frame in frames:
        middle = point * (depth + frame.breadth / 2)
        frame.draw(ax, (middle / width, middle / height))
        depth += frame.breadth + 0.2


def _label(axis: tuple[str, str]) -> str:
    name, option = axis
    return f"{name}: {_MEANING[name]} ({option})" if name in _MEANING else option


def _heading(sweep: Sweep) -> str:
    heading = f"{sweep.model} run with {sweep.mechanism}{_fixed(sweep)}"
    return f"{heading} ({sweep.setting})" if sweep.setting else heading


def _fixed(sweep: Sweep) -> str:
    return "".join(f", {name} = {value}" for name, value in sweep.fixed.items())
