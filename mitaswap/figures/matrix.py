"""Cross-mechanism matrix: each trained model run with each mechanism."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from mitaswap.figures._base import FIGURES, Chart, Panel, Theme, stem, wrap
from mitaswap.figures._heatmap import heatmap, outline, unmeasured
from mitaswap.figures._numbers import latest, retained, rows_of, settings


@dataclass(frozen=True)
class _Cells:
    """The matrix as three tables of the same shape: mechanisms by models."""

    setting: str
    top1: pd.DataFrame
    retained: pd.DataFrame
    own: pd.DataFrame


@FIGURES.register("matrix")
class Matrix(Chart):
    """Trained-with (columns) against run-with (rows): top-1, and relative to the own mechanism."""

    title = "Cross-mechanism matrix"
    caption = (
        "Each column is one trained model; each row is the mechanism that computes its attention "
        "at inference, the weights untouched. First panel: top-1 accuracy. Second panel: the same "
        "as a share of the accuracy that the model has with the mechanism it was trained with "
        "(framed, 100%). A column whose cells stay near 100% does not mind the swap."
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
        rows, columns = cells.top1.shape
        lines = [line for label in cells.top1.columns for line in label.split("\n")]
        depth = max(label.count("\n") + 1 for label in cells.top1.columns)
        left = 0.08 * max(len(line) for label in cells.top1.index for line in label.split("\n"))
        cell = max(0.7, 0.078 * max(map(len, lines)) + 0.08)
        width, height = left + cell * columns + 1.1, 0.42 * rows + 0.16 * depth + 0.8
        beside = len(shown) * width < 10
        size = (len(shown) * width, height + 0.6) if beside else (width, len(shown) * height + 0.6)
        figure = Figure(figsize=(max(size[0], 5.0), size[1]), layout="constrained")
        grid = (1, len(shown)) if beside else (len(shown), 1)
        axes = figure.subplots(*grid, squeeze=False).ravel()
        figure.suptitle(wrap(cells.setting, 90), size=9, x=0.01, ha="left")
        for ax, (values, title, unit) in zip(axes, shown, strict=True):
            ax.set_title(title)
            heatmap(figure, ax, values, theme, unit)
            inset = (0.03 * 0.42 / cell, 0.03)
            frame = outline(ax, cells.own.to_numpy(), "own mechanism", inset=inset, width=1.4)
            ax.set_xlabel("Trained with")
            ax.set_ylabel("Run with" if ax is axes[0] or not beside else "")
            ax.tick_params(axis="both", rotation=0)
        keys: list[Artist] = [] if frame is None else [frame]
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
    labels = [
        wrap(trained_with) + ("" if model == trained_with else f"\n{wrap(model)}")
        for model, trained_with in models
    ]

    def wide(column: str) -> pd.DataFrame:
        cells = rows.pivot(index="run_with", columns="column", values=column)
        cells = cells.reindex(index=index).set_axis(labels, axis=1)
        return cells.rename(index=wrap).rename_axis(index=None, columns=None)

    return _Cells(setting, wide("top1"), wide("retained"), wide("own").eq(True))
