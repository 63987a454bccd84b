"""Headings in as many lines as they need to end inside the figure, by the width of the letters."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from mitaswap.figures._base import wrap

_EDGE = 0.1  # inches between a heading and the figure's right edge


def fit(heading: str, inches: float, size: float) -> str:
    """A heading broken into lines of at most `inches` minus a margin, at a font size in points."""
    room = 72 * (inches - _EDGE)
    measure = text_to_path.get_text_width_height_descent
    font = FontProperties(size=size)  # of the theme's family: call it inside its rc_context
    for width in range(len(heading), 8, -1):
        lines = wrap(heading, width)
        sizes = [measure(line, font, ismath=False) for line in lines.split("\n")]
        if max(size[0] for size in sizes) <= room:
            return lines
    return wrap(heading, 8)


def entitle(figure: Figure, ax: Axes, heading: str) -> None:
    """Give axes in a constrained layout their title, as wide as there is room to the right of them.
    Comes last: what else is drawn decides where they begin.
    """
    title = ax.set_title(wrap(heading, 60))
    size = float(FontProperties(size=title.get_fontsize()).get_size_in_points())
    for _ in range(3):  # more lines make the axes lower, which may change the labels beside them
        figure.draw_without_rendering()
        room = figure.get_figwidth() * (1 - ax.get_position().x0)
        lines = fit(heading, room, size)
        if lines == title.get_text():
            break
        title.set_text(lines)
