"""Cross-mechanism matrix: each trained model run with each mechanism."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from mitaswap.figures._base import FIGURES, Chart, Panel, Theme, stem, wrap
from mitaswap.figures._heatmap import Outline, heatmap, unmeasured
from mitaswap.figures._numbers import latest, retained, rows_of, settings
from mitaswap.figures._titles import fit

_DOZEN = 12  # rows beyond which a matrix is drawn densely


@dataclass(frozen=True)
class _Cells:
    """The matrix as three tables of the same shape: mechanisms by models."""

    setting: str
    top1: pd.DataFrame
    retained: pd.DataFrame
    own: pd.DataFrame


@dataclass(frozen=True)
class _Size:
    """Sizes in inches: of a row and of a cell's width, of the figure; dense figures have lower rows
    and no colour bars, and panels that lie beside each other share the names of the rows.
    """

    dense: bool
    row: float
    cell: float
    width: float
    height: float
    beside: bool

    @classmethod
    def of(cls, cells: _Cells, panels: int) -> _Size:
        rows, columns = cells.top1.shape
        dense = rows > _DOZEN
        heads = [line for label in cells.top1.columns for line in label.split("\n")]
        depth = max(label.count("\n") + 1 for label in cells.top1.columns)
        names = [label.split("\n") for label in cells.top1.index]
        letter = 0.072 if dense else 0.08
        left = letter * max(len(line) for name in names for line in name)
        row = 0.42
        if dense:
            row = 0.24 if max(map(len, names)) == 1 else 0.27
        cell = max(0.7, (0.062 if dense else 0.078) * max(map(len, heads)) + 0.08)
        maps, bars = cell * columns, 0.2 if dense else 1.1
        across = left + panels * (maps + bars) if dense else panels * (left + maps + bars)
        height = row * rows + 0.16 * depth + 0.8
        beside = across < 10
        if not beside:
            across, height = left + maps + bars, panels * height
        return cls(dense, row, cell, max(across, 5.0), height + 0.6, beside)


@FIGURES.register("matrix")
class Matrix(Chart):
    """Trained-with (columns) against run-with (rows): top-1, and relative to the own mechanism."""

    title = "Cross-mechanism matrix"
    caption = (
        "Each column is one trained model; each row is the mechanism that computes its attention "
        "at inference, the weights untouched. First panel: top-1 accuracy. Second panel: the same "
        "as a share of the accuracy that the model has with the mechanism it was trained with "
        "(framed, 100%). A column whose cells stay near 100% does not mind the swap. With more "
        "than a dozen mechanisms, those that no model was trained with are in the order of their "
        "mean retained accuracy."
    )
    rank = 10

    def find(self, table: pd.DataFrame) -> list[Panel]:
        panels = []
        for name, setting, rows in settings(rows_of(table, "matrix", "top1")):
            rows = retained(latest(rows, "model", "trained_with", "run_with"))
            if len(rows) < 2:
                continue
            cells = _cells(setting, rows)
            alt = (
                f"Heatmap of top-1 accuracy: {cells.top1.shape[1]} trained models by "
                f"{cells.top1.shape[0]} mechanisms, from {rows['top1'].min():.1f}% to "
                f"{rows['top1'].max():.1f}%. The table below it has every number."
            )
            names = {
                "model": "Model",
                "trained_with": "Trained with",
                "run_with": "Run with",
                "top1": "Top-1 (%)",
                "retained": "Retained (%)",
            }
            data = rows[[*names]].rename(columns=names).reset_index(drop=True)
            panels.append(Panel(stem("matrix", name), setting, alt, data, content=cells))
        return panels

    def paint(self, panel: Panel, theme: Theme) -> Figure:
        cells: _Cells = panel.content
        shown = [(cells.top1, "Top-1 accuracy", "top-1 (%)")]
        if cells.own.any(axis=None):
            shown.append((cells.retained, "Retained accuracy", "% of own mechanism"))
        size = _Size.of(cells, len(shown))
        figure = Figure(figsize=(size.width, size.height), layout="constrained")
        grid = (1, len(shown)) if size.beside else (len(shown), 1)
        axes = figure.subplots(*grid, squeeze=False, sharey=size.dense and size.beside).ravel()
        title = fit(cells.setting, 0.99 * size.width, 9)
        figure.suptitle(title, size=9, x=0.01, ha="left")
        for ax, (values, title, unit) in zip(axes, shown, strict=True):
            ax.set_title(title)
            heatmap(figure, ax, values, theme, None if size.dense else unit)
            inset = (0.03 * size.row / size.cell, 0.03)
            frame = Outline(cells.own.to_numpy(), "own mechanism", width=1.4)
            frame.draw(ax, inset)
            ax.set_xlabel("Trained with")
            ax.set_ylabel("Run with" if ax is axes[0] or not size.beside else "")
            ax.tick_params(axis="both", rotation=0)
            if size.dense:
                ax.tick_params(axis="y", labelsize=8)
                ax.tick_params(axis="x", labelsize=7)
        keys: list[Artist] = [frame.key()] if frame.cells.any() else []
        if cells.retained.isna().any(axis=None):
            keys.append(unmeasured(theme, (0, 0), 1, 1))
        if keys:
            figure.legend(handles=keys, loc="outside lower left", ncols=2)
        return figure


def _cells(setting: str, rows: pd.DataFrame) -> _Cells:
    models = list(dict.fromkeys(zip(rows["model"], rows["trained_with"], strict=True)))
    keys = zip(rows["model"], rows["trained_with"], strict=True)
    rows = rows.assign(column=[models.index(key) for key in keys])
    # Mechanisms in the order of the models that own them, so that those cells lie on the diagonal.
    order: dict[str, None] = {}
    for number, (_, trained_with) in enumerate(models):
        owned = rows.loc[rows["own"] & (rows["column"] == number), "run_with"].tolist()
        order.update(dict.fromkeys(owned or [trained_with]))
    measured = dict.fromkeys(rows["run_with"])
    index = [spec for spec in order if spec in measured]
    index += [spec for spec in measured if spec not in order]
    dense = len(index) > _DOZEN
    if dense:
        value = "retained" if rows["retained"].notna().any() else "top1"
        means = rows.groupby("run_with")[value].mean().sort_values(ascending=False, kind="stable")
        index = [spec for spec in index if spec in order]
        index += [spec for spec in means.index if spec not in order]
    width = 12 if dense else 24
    labels = [
        wrap(trained_with, width) + ("" if model == trained_with else f"\n{wrap(model, width)}")
        for model, trained_with in models
    ]

    def wide(column: str) -> pd.DataFrame:
        cells = rows.pivot(index="run_with", columns="column", values=column)
        cells = cells.reindex(index=index).set_axis(labels, axis=1)
        names = {spec: wrap(spec, 40 if dense else 24) for spec in index}
        return cells.rename(index=names).rename_axis(index=None, columns=None)

    return _Cells(setting, wide("top1"), wide("retained"), wide("own").eq(True))
