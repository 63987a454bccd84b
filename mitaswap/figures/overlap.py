"""Overlap of what an expert reads and who reads the expert, layer by layer."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mitaswap.figures._base import FIGURES, Chart, Panel, Theme, stem
from mitaswap.figures._numbers import rows_of, settings
from mitaswap.figures._titles import entitle


@FIGURES.register("overlap")
class Overlap(Chart):
    """Mean IoU per layer over heads, the range over experts and images, and the chance level."""

    title = "Expert overlap per layer"
    caption = (
        "Intersection over union (IoU) of two sets of token positions: the keys that an expert "
        "gathered, and the queries that were routed to it. Line: mean over images, experts and "
        "heads. Band: smallest and largest value of any single expert. Dashed: what random sets of "
        "the same sizes would give. Well above the dashed line, experts serve the positions that "
        "they are made of; near or below it, they serve others."
    )
    rank = 30

    def find(self, table: pd.DataFrame) -> list[Panel]:
        rows = rows_of(table, "overlap", "value")
        rows = rows[(rows["statistic"] == "overlap") & rows["layer"].notna()]
        panels = []
        for _, setting, part in settings(rows):
            for (model, run_with), cut in part.groupby(["model", "run_with"], sort=False):
                layers = _layers(cut.drop_duplicates(["layer", "path", "head"], keep="last"))
                ranked = layers.sort_values("Mean IoU")
                bottom, top = ranked.iloc[0], ranked.iloc[-1]
                alt = (
                    f"Line chart of expert overlap over {len(layers)} layers of {model} run with "
                    f"{run_with}: highest in layer {top['Layer']:.0f} ({top['Mean IoU']:.3f}), "
                    f"lowest in layer {bottom['Layer']:.0f} ({bottom['Mean IoU']:.3f}). "
                    "The table below it has every number."
                )
                heading = f"{model} run with {run_with}" + (f" ({setting})" if setting else "")
                panels.append(Panel(stem("overlap", model, run_with), heading, alt, layers, 3))
        return panels

    def paint(self, panel: Panel, theme: Theme) -> Figure:
        layers = panel.data
        figure = Figure(figsize=(max(5.0, 0.42 * len(layers) + 1.6), 3.5), layout="constrained")
        ax = figure.subplots()
        x, colour = layers["Layer"].to_numpy(float), theme.series[0]
        mean, low, high, chance = (
            layers[name].to_numpy(float) for name in ("Mean IoU", "Smallest", "Largest", "Chance")
        )
        ax.fill_between(x, low, high, color=colour, alpha=0.2, lw=0, label="range over experts")
        ax.plot(x, mean, color=colour, marker="o", ms=4, lw=1.8, label="mean over heads")
        ax.plot(x, chance, color=theme.ink, ls="--", lw=1.2, label="chance")
        if len(x) == 1:  # a line through one point would be invisible
            ax.errorbar(x, mean, [mean - low, high - mean], color=colour, capsize=3)
            ax.axhline(chance[0], color=theme.ink, ls="--", lw=1.2)
        ax.set_xlim(x.min() - 0.5, x.max() + 0.5)
        ax.set_ylim(bottom=0.0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=24, steps=[1, 2, 5, 10]))
        ax.grid(axis="y", color=theme.muted, alpha=0.3, lw=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_xlabel("Layer (1 = first)")
        ax.set_ylabel("Overlap (IoU, 0 to 1)")
        figure.legend(loc="outside lower left", ncols=3)
        entitle(figure, ax, panel.heading)
        return figure


def _layers(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per layer, numbered from 1, over its heads."""
    by_layer = rows.groupby("layer", sort=True)
    layers = pd.DataFrame(
        {
            "Mean IoU": by_layer["value"].mean(),
            "Smallest": by_layer["low"].min(),
            "Largest": by_layer["high"].max(),
            "Chance": by_layer["chance"].mean(),
            "Heads": by_layer["head"].nunique(),
        }
    )
    layers.insert(0, "Layer", layers.index.astype(int) + 1)
    return layers.reset_index(drop=True)
