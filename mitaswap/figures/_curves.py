"""One line per mechanism over a size, with its band, on two logarithmic axes."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from mitaswap.figures._base import Panel, Theme, wrap
from mitaswap.figures._titles import entitle

_MARKERS = "osD^vPX*"
_DASHES = ("-", "-.", ":")


def curves(
    panel: Panel, theme: Theme, x: str, quantiles: tuple[str, str, str], across: str, up: str
) -> Figure:
    """One line with a band per mechanism, both axes logarithmic; floors where rows have them."""
    rows, (low, mid, high) = panel.content, quantiles
    figure = Figure(figsize=(7.0, 4.4), layout="constrained")
    ax = figure.subplots()
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    for number, (name, line) in enumerate(rows.groupby("run_with", sort=False)):
        colour = theme.series[number % len(theme.series)]
        dashes = _DASHES[number // len(theme.series) % len(_DASHES)]
        at = line[x].to_numpy(float)
        ax.fill_between(
            at, line[low].to_numpy(float), line[high].to_numpy(float), color=colour, alpha=0.2, lw=0
        )
        ax.plot(
            at, line[mid].to_numpy(float), color=colour, ls=dashes, lw=1.6, ms=4.5,
            marker=_MARKERS[number % len(_MARKERS)], label=wrap(name, 40),
        )  # fmt: skip
        if x == "tokens" and line["bytes_floor_ms"].notna().any():
            floor = line["bytes_floor_ms"].to_numpy(float)
            ax.plot(at, floor, color=colour, ls=(0, (4, 3)), lw=0.8, alpha=0.9)
    _ticks(ax, rows, x, theme)
    ax.set_xlabel(across)
    ax.set_ylabel(up)
    figure.legend(loc="outside lower left", ncols=2, handlelength=3.2)
    entitle(figure, ax, panel.heading)
    return figure


def _ticks(ax: Axes, rows: pd.DataFrame, x: str, theme: Theme) -> None:
    label = {"tokens": "tokens", "pixels": "img_size"}[x]
    known = rows.drop_duplicates(x).sort_values(x)
    at = known[x].to_numpy(float)
    words = [f"{v:,.0f}" if isinstance(v, (int, float)) else str(v) for v in known[label]]
    ax.set_xticks(at, words)
    ax.minorticks_off()
    low, high = ax.get_ylim()
    steps = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    ax.yaxis.set_major_locator(LogLocator(subs=steps, numticks=30))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    ax.grid(color=theme.muted, alpha=0.3, lw=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
