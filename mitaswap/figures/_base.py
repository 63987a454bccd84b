"""What every figure is: a chart that finds its panels in a table and paints each in a theme."""

from __future__ import annotations

import re
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from mitaswap.registry import Registry


@dataclass(frozen=True)
class Theme:
    """Colours of a page, light or dark; all of them readable on its background.

    Args:
        name: "light" or "dark".
        background: colour of the page.
        ink: text and axes.
        muted: what stands back: grid lines, hatching, reference lines.
        series: the data, distinguishable by colour-blind readers (Okabe and Ito).
    """

    name: str
    background: str
    ink: str
    muted: str
    series: tuple[str, ...]

    @property
    def rc(self) -> Any:
        """The dict for `matplotlib.rc_context`, wanted while drawing and while saving."""
        inks = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
        return {
            **dict.fromkeys(inks, self.ink),
            "figure.facecolor": self.background,
            "axes.facecolor": self.background,
            "savefig.facecolor": self.background,
            "legend.frameon": False,
            "font.size": 9.0,
            "axes.titlesize": 10.0,
            "axes.titlelocation": "left",
            "hatch.linewidth": 0.6,
            # Names come from users: a dollar sign in one is a dollar sign, not mathematics.
            "text.parse_math": False,
            # Text stays text: it can be searched, copied and read aloud. DejaVu, which comes with
            # Matplotlib, is as wide as Verdana and wider than the others, so that nothing
            # overlaps where it is missing.
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica"],
            "svg.hashsalt": "mitaswap",
        }


LIGHT = Theme("light", "#ffffff", "#1b1f24", "#8a929c", ("#0072b2", "#d55e00", "#009e73"))
DARK = Theme("dark", "#14181d", "#e4e7eb", "#7d8691", ("#56b4e9", "#ff8a3d", "#2ed3a2"))


@dataclass(frozen=True)
class Panel:
    """One drawing of a chart, before it is painted.

    Args:
        stem: file stem: letters, digits, dots and dashes.
        heading: what it is a drawing of, in a few words.
        alt: what a reader who cannot see it needs to know, in a sentence or two.
        data: the numbers shown, with readable column names.
        decimals: decimals of the floats in `data`, or those of some columns (else 2).
        content: what the chart itself needs to paint it.
    """

    stem: str
    heading: str
    alt: str
    data: pd.DataFrame
    decimals: int | Mapping[str, int] = 2
    content: Any = field(default=None, repr=False, compare=False)


class Chart(ABC):
    """A kind of figure: a subclass states title and caption, finds its panels and paints one.

    Attributes:
        title: heading in the report.
        caption: what it shows and how to read it.
        rank: place in the report, ascending.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    caption: ClassVar[str]
    rank: ClassVar[int] = 100

    def applies(self, table: pd.DataFrame) -> bool:
        """Whether the rows hold something that this chart shows."""
        return bool(self.panels(table))

    @abstractmethod
    def find(self, table: pd.DataFrame) -> list[Panel]:
        """What there is to draw, in order; columns may be absent, values NaN."""

    @abstractmethod
    def paint(self, panel: Panel, theme: Theme) -> Figure:
        """Draw one panel; called inside the theme's `rc_context`."""

    def panels(self, table: pd.DataFrame) -> list[Panel]:
        """What `draw` draws, in the same order, each under a file stem of its own."""
        found = self.find(table)
        names = distinct(panel.stem for panel in found)
        return [replace(panel, stem=name) for panel, name in zip(found, names, strict=True)]

    def draw(self, table: pd.DataFrame, theme: Theme = LIGHT) -> list[tuple[str, Figure]]:
        """(file stem, figure) of every panel. Save them inside `rc_context(theme.rc)`, too."""
        with mpl.rc_context(theme.rc):
            return [(panel.stem, self.paint(panel, theme)) for panel in self.panels(table)]


FIGURES: Registry[type[Chart]] = Registry("figure", "mitaswap.figures")


def stem(*parts: object) -> str:
    """A file stem from names that users gave: nothing in it can leave a directory."""
    text = "-".join(re.sub(r"[^A-Za-z0-9.]+", "-", str(part)).strip("-.") for part in parts)
    return re.sub(r"-{2,}", "-", text).strip("-.")[:80] or "figure"


def distinct(stems: Iterable[str]) -> list[str]:
    """The stems, numbered where two would be one file (also where a file system ignores case)."""
    taken: set[str] = set()
    result = []
    for name in stems:
        candidate, number = name, 1
        while candidate.lower() in taken:
            number += 1
            candidate = f"{name}-{number}"
        taken.add(candidate.lower())
        result.append(candidate)
    return result


def wrap(label: object, width: int = 24) -> str:
    """A label broken into lines; long names stay whole, unlike with an ellipsis, and break behind a
    sign where they can: `linear(feature=relu)+` `dwc(kernel=5)`.
    """
    lines: list[str] = []
    for line in str(label).splitlines() or [""]:
        for part in textwrap.wrap(line, width, break_long_words=False) or [""]:
            lines += _broken(part, width)
    return "\n".join(lines)


def _broken(name: str, width: int) -> list[str]:
    """A name in pieces of at most `width`, their ends at a sign where one is near enough."""
    lines = []
    while len(name) > width:
        signs = [found.end() for found in re.finditer(r"[+,_/:(]", name[:width])]
        end = signs[-1] if signs and signs[-1] > width // 3 else width
        lines.append(name[:end])
        name = name[end:]
    return [*lines, name]
