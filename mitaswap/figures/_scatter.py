"""A scatter plot of mechanisms by number, with a front, and the list of the numbers beside it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mitaswap.figures._base import Theme, wrap
from mitaswap.figures._labels import leads, spread
from mitaswap.figures._mechanisms import keys, look, marker
from mitaswap.figures._titles import fit

_WIDTH, _PLOT, _LEFT, _GAP = 7.4, 4.1, 0.62, 0.2  # inches: figure, axes, left margin, before list
_LINE = 0.125  # inches: one line of the list


@dataclass(frozen=True)
class Points:
    """What one panel shows.

    Args:
        rows: of a comparison, those with both numbers, with `x`, `total` (both in `unit`) and
            `front`.
        body: cost of all but the attention cores, where x is the cores alone; else None.
        unit: "GMACs", or "MMACs" for small networks.
    """

    rows: pd.DataFrame
    body: float | None
    unit: str


def scatter(points: Points, heading: str, theme: Theme) -> Figure:
    """The plot with its front to the left, the list of its points to the right."""
    rows = points.rows
    specs = [wrap(spec, 31) for spec in rows["run_with"]]
    entries = sum(spec.count("\n") + 1.25 for spec in specs) * _LINE
    title = fit(heading, _WIDTH - 0.1, 10)
    top = 0.18 * (title.count("\n") + 1) + (0.1 if points.body is None else 0.55)
    handles = keys(rows, theme, "own mechanism, 100%")
    handles.append(Line2D([], [], color=theme.ink, lw=1.0, label="Pareto front (bold)"))
    bottom = 0.72 + 0.19 * -(-len(handles) // 3)
    plot = min(max(entries, 3.4), 5.2)
    height = top + max(entries, plot + bottom)
    figure = Figure(figsize=(_WIDTH, height))
    figure.text(0.1 / _WIDTH, 1 - 0.06 / height, title, va="top", fontsize=10)
    at = (_LEFT / _WIDTH, (height - top - plot) / height, _PLOT / _WIDTH, plot / height)
    ax = figure.add_axes(at)
    _plot(ax, points, theme)
    start = _LEFT + _PLOT + _GAP
    wide = _WIDTH - start - 0.08
    side = (start / _WIDTH, (height - top - entries) / height, wide / _WIDTH, entries / height)
    _list(figure.add_axes(side), rows, specs, (wide, entries), theme)
    corner = ((_LEFT - 0.1) / _WIDTH, (height - top - plot - 0.62) / height)
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=corner,
        ncols=3,
        fontsize=8,
        borderaxespad=0,
        columnspacing=1.2,
        handletextpad=0.5,
    )
    return figure


def _plot(ax: Axes, points: Points, theme: Theme) -> None:
    """The axes with front, intervals, markers and numbers; their place on the page is settled."""
    rows = points.rows
    _scale(ax, points)
    spans = rows[["retained", "kept_low", "kept_high"]].to_numpy(float)
    low, high = float(np.nanmin(spans)), max(100.0, float(np.nanmax(spans)))
    ax.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    ax.set_ylabel("Retained accuracy (% of the own mechanism)")
    ax.grid(color=theme.muted, alpha=0.25, lw=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    x, y = _front_line(ax, rows)
    ax.plot(x, y, drawstyle="steps-post", color=theme.ink, lw=1.0, zorder=2, label="front")
    ax.axhline(100.0, color=theme.muted, ls="--", lw=0.9, zorder=1)
    for _, row in rows.iterrows():
        _, colour = look(row["strategy"], theme)
        bar = [row["kept_low"], row["kept_high"]]
        ax.plot([row["x"]] * 2, bar, color=colour, lw=0.8, alpha=0.7, zorder=2)
        dot = marker(row, theme)
        dot.set_data([row["x"]], [row["retained"]])
        dot.set_zorder(3)
        ax.add_line(dot)
    _number(ax, rows, theme)


def _scale(ax: Axes, points: Points) -> None:
    x, unit = points.rows["x"], points.unit
    log = bool(x.min() > 0 and x.max() / x.min() >= 4)
    if log:
        ax.set_xscale("log")
        ax.set_xlim(x.min() / 1.4, x.max() * 1.3)
    else:
        pad = 0.08 * (x.max() - x.min()) or 0.1 * x.max() or 1.0
        ax.set_xlim(max(0.0, x.min() - pad), x.max() + pad)
    power = {"GMACs": "10⁹", "MMACs": "10⁶"}[unit]
    count = f"({unit}, multiply-adds × {power})"
    if log:
        ticks = _nice(*ax.get_xlim())
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.xaxis.minorticks_off()
    ticks = [tick for tick in ax.get_xticks() if ax.get_xlim()[0] <= tick <= ax.get_xlim()[1]]
    if points.body is None:
        ax.set_xlabel(f"Cost of one image {count}")
        return
    ax.set_xlabel(f"Cost of one image in the attention cores\n{count}")
    above = ax.secondary_xaxis("top")
    above.set_xticks(ticks, _apart([points.body + tick for tick in ticks]))
    above.minorticks_off()
    above.spines["top"].set_visible(False)
    above.tick_params(length=2)
    above.set_xlabel(f"Whole network ({unit}): {points.body:.3g} + cores", labelpad=4)


def _nice(low: float, high: float) -> list[float]:
    """Round numbers between two limits of a logarithmic axis."""
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
        ticks = [step * 10.0**power for power in powers for step in steps]
        ticks = [float(f"{tick:.3g}") for tick in ticks if low <= tick <= high]
        if len(ticks) >= 4:
            break
    return ticks


def _apart(values: list[float]) -> list[str]:
    """Rising numbers with as few decimals as their distances need."""
    gap = min(np.diff(values), default=1.0)
    decimals = int(np.clip(np.ceil(-np.log10(gap / 4)), 0, 6))
    return [f"{value:.{decimals}f}" for value in values]


def _number(ax: Axes, rows: pd.DataFrame, theme: Theme) -> None:
    """Each marker's rank beside it, bold on the front, with a line to it where it is far."""
    size = 7.5
    inch = 72.0 / ax.figure.dpi
    at = ax.transData.transform(rows[["x", "retained"]].to_numpy(float)) * inch
    words = [str(place) for place in rows["place"]]
    sizes = np.array([[0.64 * size * len(word) + 1.5, 0.75 * size + 2.0] for word in words])
    box = ax.get_window_extent().get_points() * inch
    lines = ax.transData.transform(_lines(ax, rows).reshape(-1, 2)).reshape(-1, 2, 2) * inch
    centres = spread(at, sizes, box, np.where(rows["own"], 6.0, 4.0), lines)
    back = ax.transData.inverted()
    for row, word, point, centre, far in zip(
        rows.to_dict("records"), words, at, centres, leads(at, centres), strict=True
    ):
        x, y = back.transform(centre / inch)
        if far:
            ends = np.array(
                [point, centre + (point - centre) * 5.0 / np.linalg.norm(point - centre)]
            )
            line = back.transform(ends / inch)
            ax.plot(line[:, 0], line[:, 1], color=theme.muted, lw=0.6, zorder=1.5)
        ax.text(
            x,
            y,
            word,
            ha="center",
            va="center_baseline",
            fontsize=size,
            zorder=4,
            fontweight="bold" if row["front"] else "normal",
        )


def _lines(ax: Axes, rows: pd.DataFrame) -> np.ndarray:
    """[m, 2, 2]: intervals and front, line by line, as (x, y) of both ends."""
    bars = rows[rows["kept_low"].notna() & rows["kept_high"].notna()]
    found = [
        ((x, low), (x, high))
        for x, low, high in zip(bars["x"], bars["kept_low"], bars["kept_high"], strict=True)
    ]
    ends = list(zip(*_front_line(ax, rows), strict=True))
    for (x, y), (next_x, next_y) in itertools.pairwise(ends):
        found += [((x, y), (next_x, y)), ((next_x, y), (next_x, next_y))]
    return np.array(found, dtype=float).reshape(-1, 2, 2)


def _front_line(ax: Axes, rows: pd.DataFrame) -> tuple[list[float], list[float]]:
    """x and y of the front's members, the cheapest first, and of its end at the plot's right."""
    members = rows[rows["front"]].sort_values("x", kind="stable")
    x, y = members["x"].tolist(), members["retained"].tolist()
    return [*x, ax.get_xlim()[1]], [*y, y[-1]]


def _list(
    ax: Axes, rows: pd.DataFrame, specs: list[str], size: tuple[float, float], theme: Theme
) -> None:
    """Rank, marker, spec and retained accuracy of every point, in inches of the axes."""
    wide, high = size
    ax.set_axis_off()
    ax.set_xlim(0, wide)
    ax.set_ylim(high, 0)
    y = 0.0
    for spec, (_, row) in zip(specs, rows.iterrows(), strict=True):
        lines = spec.split("\n")
        weight = "bold" if row["front"] else "normal"
        dot = marker(row, theme, 4.5)
        dot.set_data([0.29], [y + 0.6 * _LINE])
        ax.add_line(dot)
        texts = [(0.17, 0, str(row["place"]), "right", weight)]
        texts += [(0.4, number, line, "left", weight) for number, line in enumerate(lines)]
        texts += [(wide, 0, f"{row['retained']:.1f}", "right", "normal")]
        for x, number, text, side, heavy in texts:
            at = y + (number + 0.93) * _LINE
            ax.text(x, at, text, ha=side, va="baseline", fontsize=7.5, fontweight=heavy)
        y += (len(lines) + 0.25) * _LINE
