"""Accuracy of every model and mechanism with its 95% interval."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from mitaswap.figures._base import FIGURES, Chart, Panel, Theme, stem, wrap
from mitaswap.figures._mechanisms import many
from mitaswap.figures._numbers import latest, own, rows_of, settings
from mitaswap.figures._titles import entitle


@FIGURES.register("accuracy")
class Accuracy(Chart):
    """Top-1 as points with intervals, grouped by model."""

    title = "Accuracy with 95% intervals"
    caption = (
        "Top-1 accuracy of each model (bold) under each mechanism. Bars are 95% Wilson intervals "
        "for the number of images; filled points run with the mechanism of the training. All "
        "points share their images, so overlapping bars do not prove two of them equal."
    )
    rank = 40

    def find(self, table: pd.DataFrame) -> list[Panel]:
        panels = []
        for name, setting, rows in settings(rows_of(table, "matrix", "top1")):
            rows = latest(rows, "model", "trained_with", "run_with")
            # What the ranking shows, line by line and in order, is not shown again.
            rows = rows[rows["top1_low"].notna() & rows["top1_high"].notna() & ~many(rows)]
            if rows.empty:
                continue
            alt = (
                f"Top-1 accuracy with 95% intervals, {len(rows)} points of "
                f"{rows['model'].nunique()} models, from {rows['top1'].min():.1f}% to "
                f"{rows['top1'].max():.1f}%. The table below it has every number."
            )
            data = pd.DataFrame(
                {
                    "Model": rows["model"],
                    "Run with": rows["run_with"],
                    "Top-1 (%)": rows["top1"],
                    "95% from": rows["top1_low"],
                    "95% to": rows["top1_high"],
                    "As trained": own(rows).map({True: "yes", False: "no"}),
                }
            ).reset_index(drop=True)
            panels.append(Panel(stem("accuracy", name), setting, alt, data))
        return panels

    def paint(self, panel: Panel, theme: Theme) -> Figure:
        data = panel.data
        ticks: list[tuple[float, str, str]] = []  # position, label, weight
        position = 0.0
        places: list[float] = []
        data = data.sort_values("Model", key=lambda c: pd.factorize(c)[0], kind="stable")
        for model, rows in data.groupby("Model", sort=False):
            title = wrap(model, 40)
            position += 0.3 + 0.6 * title.count("\n")
            ticks.append((position, title, "bold"))
            for spec in rows["Run with"]:
                position += 1.0
                places.append(position)
                ticks.append((position, wrap(spec, 40), "normal"))
            position += 1.2
        data = data.assign(place=places)
        figure = Figure(figsize=(7.0, 0.24 * position + 1.2), layout="constrained")
        ax = figure.subplots()
        for trained, rows in data.groupby("As trained"):
            top1 = rows["Top-1 (%)"]
            ax.errorbar(
                top1,
                rows["place"],
                xerr=[
                    (top1 - rows["95% from"]).clip(lower=0),
                    (rows["95% to"] - top1).clip(lower=0),
                ],
                fmt="o",
                ms=4.5,
                capsize=2.5,
                lw=1.4,
                color=theme.series[0],
                markerfacecolor=theme.series[0] if trained == "yes" else theme.background,
                label="mechanism as trained" if trained == "yes" else "other mechanism",
            )
        for top1, to, place in zip(data["Top-1 (%)"], data["95% to"], places, strict=True):
            ax.annotate(f"{top1:.1f}", (to, place), (6, 0), textcoords="offset points", va="center")
        ax.set_yticks([at for at, _, _ in ticks], [label for _, label, _ in ticks])
        for text, (_, _, weight) in zip(ax.get_yticklabels(), ticks, strict=True):
            text.set_fontweight(weight)
        ax.set_ylim(position - 0.2, -0.6)
        ax.margins(x=0.08)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x", color=theme.muted, alpha=0.3, lw=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.set_xlabel("Top-1 accuracy (%)")
        figure.legend(loc="outside lower left", ncols=2)
        entitle(figure, ax, panel.heading)
        return figure
