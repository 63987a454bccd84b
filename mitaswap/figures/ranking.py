"""All mechanisms that one model ran with, from the most accurate to the least."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mitaswap.figures._base import FIGURES, Chart, Panel, Theme, stem, wrap
from mitaswap.figures._mechanisms import (
    Comparison,
    comparisons,
    keys,
    look,
    many,
    marker,
    needs_finetuning,
)
from mitaswap.figures._titles import fit


@FIGURES.register("ranking")
class Ranking(Chart):
    """Top-1 with intervals, one line per mechanism, marked by strategy."""

    title = "Ranking of the mechanisms"
    caption = (
        "Top-1 accuracy of one trained model under each mechanism, the weights untouched, from the "
        "highest to the lowest. Bars are 95% Wilson intervals for the number of images; all points "
        "share their images, so overlapping bars do not prove two of them equal. Shape and colour "
        "are the strategy by which a mechanism saves work, the star and the dashed line are the "
        "mechanism of the training. A hollow marker is a mechanism that computes another function "
        "than softmax attention and needs finetuning: its number says what the swap alone does, "
        'not what the mechanism can reach. Ranks are the numbers in "Cost and accuracy".'
    )
    rank = 12

    def find(self, table: pd.DataFrame) -> list[Panel]:
        panels = []
        for found in comparisons(table):
            rows = found.rows
            if not many(rows).any():
                continue
            first, last = rows.iloc[0], rows.iloc[-1]
            alt = (
                f"Dot chart of top-1 accuracy of {found.model} under {len(rows)} mechanisms: "
                f"highest with {first['run_with']} ({first['top1']:.1f}%), lowest with "
                f"{last['run_with']} ({last['top1']:.1f}%)"
            )
            if found.own is not None:
                kept = (rows.loc[~rows["own"], "top1"] >= 0.99 * found.own).sum()
                alt += f"; {kept} others reach 99% of its own {found.own:.1f}%"
            alt += ". The table below it has every number."
            data = pd.DataFrame(
                {
                    "Rank": rows["place"],
                    "Mechanism": rows["run_with"],
                    "Strategy": rows["strategy"],
                    "Top-1 (%)": rows["top1"],
                    "95% from": rows["top1_low"],
                    "to": rows["top1_high"],
                    "Retained (%)": rows["retained"],
                    "GMACs": rows["gmacs"],
                    "Needs finetuning": [_needs(row) for _, row in rows.iterrows()],
                }
            )
            name = stem("ranking", found.model, found.name)
            panels.append(Panel(name, found.heading, alt, data, {"GMACs": 3}, content=found))
        return panels

    def paint(self, panel: Panel, theme: Theme) -> Figure:
        found: Comparison = panel.content
        rows = found.rows
        labels = [wrap(spec, 40) for spec in rows["run_with"]]
        heights = [1 + 0.7 * label.count("\n") for label in labels]
        figure = Figure(figsize=(7.0, 0.19 * sum(heights) + 1.6), layout="constrained")
        ax = figure.subplots()
        place = 0.0
        middles = []
        for height, (_, row) in zip(heights, rows.iterrows(), strict=True):
            _point(ax, row, place + height / 2, theme)
            middles.append(place + height / 2)
            place += height
        ax.set_yticks(middles, labels)
        for text, own in zip(ax.get_yticklabels(), rows["own"], strict=True):
            text.set_fontweight("bold" if own else "normal")
        ax.set_ylim(place, -0.1)
        ax.margins(x=0.04)
        ax.tick_params(axis="y", length=0, labelsize=8, pad=24)
        ax.grid(axis="both", color=theme.muted, alpha=0.25, lw=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.set_xlabel("Top-1 accuracy (%)")
        title = fit(panel.heading, 0.99 * figure.get_figwidth(), 10)
        figure.suptitle(title, size=10, x=0.01, ha="left")
        _columns(ax, rows, middles)
        shown: list[Line2D] = []
        if found.own is not None:
            ax.axvline(found.own, color=theme.ink, ls="--", lw=1.0, zorder=1)
            words = f"its accuracy, {found.own:.1f}%"
            shown.append(Line2D([], [], color=theme.ink, ls="--", lw=1.0, label=words))
        shown = keys(rows, theme, "own mechanism") + shown
        figure.legend(handles=shown, loc="outside lower left", ncols=3)
        return figure


def _point(ax: Axes, row: pd.Series, at: float, theme: Theme) -> None:
    _, colour = look(row["strategy"], theme)
    ax.plot([row["top1_low"], row["top1_high"]], [at, at], color=colour, lw=1.3, zorder=2)
    dot = marker(row, theme)
    dot.set_data([row["top1"]], [at])
    dot.set_zorder(3)
    ax.add_line(dot)


def _columns(ax: Axes, rows: pd.DataFrame, places: list[float]) -> None:
    """Ranks to the left, numbers in two columns to the right, where no point can be."""
    columns = {"": (0, -6, rows["place"].map(str))}
    for name, at, title in (("top1", 34, "top-1"), ("retained", 78, "% of own")):
        if rows[name].notna().any():
            texts = rows[name].map(lambda value: "–" if pd.isna(value) else f"{value:.1f}")
            columns[title] = (1, at, texts)
    for title, (side, offset, texts) in columns.items():
        for text, place in zip([title, *texts], [-0.6, *places], strict=True):
            ax.annotate(
                text,
                (side, place),
                (offset, 0),
                xycoords=ax.get_yaxis_transform(),
                textcoords="offset points",
                ha="right",
                va="center_baseline",
                fontsize=8,
            )


def _needs(row: pd.Series) -> str:
    if row["own"]:
        return "no (own)"
    return "yes" if needs_finetuning(row) else "no" if row["untrained"] == "usable" else "–"
