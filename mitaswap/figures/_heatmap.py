"""A heatmap of percentages with unmeasured cells hatched, and outlines around sets of cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from mitaswap.figures._base import Theme

COLOURS = "cividis"  # perceptually uniform, and the same for colour-blind readers
_CASING = 1.2  # points of white, on both sides together


def heatmap(figure: Figure, ax: Axes, values: pd.DataFrame, theme: Theme, unit: str | None) -> None:
    """Draw `values` (percent; NaN = not measured) with the numbers in the cells.

    Args:
        unit: label of the colour bar; without one there is none.
    """
    numbers = values.astype(float)
    # Equal values everywhere (a single cell) would leave the colour scale without a range.
    low, high = float(np.nanmin(numbers)), float(np.nanmax(numbers))
    box = ax.get_position()  # the colour bar is 0.15 inches wide on any map
    width, height = box.width * figure.get_figwidth(), box.height * figure.get_figheight()
    bar = {"fraction": min(0.15, 0.3 / width), "pad": 0.15 / width, "aspect": height / 0.15}
    sns.heatmap(
        numbers,
        ax=ax,
        annot=True,
        fmt=".1f",
        cmap=COLOURS,
        vmin=low,
        vmax=high if high > low else low + 1.0,
        linewidths=1.0,
        linecolor=theme.background,
        annot_kws={"fontsize": 9.0},
        cbar=unit is not None,
        cbar_kws={"label": unit, **bar},
        xticklabels=True,
        yticklabels=True,
    )
    shades = ax.collections[0].to_rgba(numbers.to_numpy()[numbers.notna().to_numpy()])
    for text, shade in zip(ax.texts, shades, strict=True):
        # black or white, whichever differs more; seaborn's own choice is pale on middle shades
        text.set_color("black" if _luminance(shade) > 0.179 else "white")
    for y, x in np.argwhere(numbers.isna().to_numpy()):
        ax.add_patch(unmeasured(theme, (x, y), 1, 1))
    ax.tick_params(length=0)
    scale = ax.collections[0].colorbar
    if scale is not None:
        scale.outline.set_visible(False)


def _luminance(colour: np.ndarray) -> float:
    """Relative luminance of an sRGB colour, 0 to 1, as in WCAG 2."""
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    return float(linear[:3] @ [0.2126, 0.7152, 0.0722])


def unmeasured(theme: Theme, corner: tuple[float, float], width: float, height: float) -> Rectangle:
    """The hatched cell that stands for "not measured", on the map as in the legend."""
    return Rectangle(
        corner,
        width,
        height,
        facecolor=theme.background,
        edgecolor=theme.muted,
        hatch="////",
        linewidth=0.0,
        label="not measured",
    )


@dataclass(frozen=True)
class Outline:
    """A frame along the border of a set of cells, inside it; a white casing keeps the line visible
    on every colour.

    Args:
        cells: boolean, rows by columns of the map.
        label: legend entry.
        width: of the line, in points.
    """

    cells: np.ndarray
    label: str
    width: float
    colour: str = "black"
    dashed: bool = False

    @property
    def breadth(self) -> float:
        """Of line and casing together, in points."""
        return self.width + _CASING

    @property
    def _dashes(self) -> Any:
        return (0, (3.0, 1.8)) if self.dashed else "solid"

    def draw(self, ax: Axes, inset: tuple[float, float]) -> None:
        """Add it to a map, its middle `inset` (x, y) inside the border, in cells."""
        segments = border(self.cells, inset)
        # The casing is solid below a dashed line, too: only then does it part it from the map.
        casing = LineCollection(segments, colors="white", linewidths=self.breadth)
        casing.set_capstyle("projecting")
        line = LineCollection(
            segments, colors=self.colour, linewidths=self.width, linestyles=[self._dashes]
        )
        line.set_capstyle("butt" if self.dashed else "projecting")
        ax.add_collection(casing, autolim=False)
        ax.add_collection(line, autolim=False)

    def key(self) -> Line2D:
        """The legend's handle."""
        stroke = [patheffects.withStroke(linewidth=self.breadth, foreground="white")]
        return Line2D(
            [], [], color=self.colour, lw=self.width, ls=self._dashes, label=self.label,
            path_effects=stroke,
        )  # fmt: skip


def border(cells: np.ndarray, inset: tuple[float, float] = (0.0, 0.0)) -> list[np.ndarray]:
    """Segments [2, 2] (x, y) of the border of a set of cells, moved inwards by `inset` (x, y).

    Args:
        cells: boolean [rows, columns]; the cell (i, j) covers x in [j, j + 1], y in [i, i + 1].
    """
    upright = _edges(cells.T, inset[1], inset[0])
    return [*_edges(cells, *inset), *(edge[:, ::-1] for edge in upright)]


def _edges(cells: np.ndarray, along: float, across: float) -> list[np.ndarray]:
    """The horizontal part of a border."""
    inside = np.pad(np.asarray(cells, dtype=bool), 1)
    edges = []
    for i, j in np.argwhere(inside):
        for side in (-1, 1):  # the edge above, the edge below
            if inside[i + side, j]:
                continue
            y = (i - 1) + (across if side < 0 else 1 - across)
            ends = []
            for towards in (-1, 1):
                x = (j - 1) + (0 if towards < 0 else 1)
                if not inside[i, j + towards]:  # a convex corner: shorter
                    x -= towards * along
                elif inside[i + side, j + towards]:  # a concave corner: longer
                    x += towards * along
                ends.append((x, y))
            edges.append(np.array(ends, dtype=float))
    return edges
