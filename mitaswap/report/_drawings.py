"""Charts become files and inline SVG, in a light and a dark version."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from mitaswap.figures import DARK, FIGURES, LIGHT, Chart, Panel, Theme
from mitaswap.figures._base import distinct, stem

_DPI = 200  # of the PNGs: sharp in print at a column's width


@dataclass(frozen=True)
class Drawing:
    """One panel of a chart, on disk and ready for the page.

    Args:
        stem: of its files, safe and distinct.
        light, dark: inline `<svg>` for each theme.
    """

    panel: Panel
    stem: str
    light: Markup
    dark: Markup


def charts(table: pd.DataFrame) -> list[Chart]:
    """All figures that apply to the rows, in the order of the report."""
    known = sorted((cls() for _, cls in FIGURES.items()), key=lambda chart: chart.rank)
    return [chart for chart in known if chart.applies(table)]


def drawings(chart: Chart, table: pd.DataFrame, directory: Path, taken: set[str]) -> list[Drawing]:
    """Draw a chart in both themes; write STEM.svg and STEM.png (light) into `directory`.

    Args:
        taken: stems of the report so far; extended.
    """
    panels = chart.panels(table)
    # A chart from another distribution may name its stems as it likes: they are cleaned here.
    names = distinct([*taken, *(stem(panel.stem) for panel in panels)])[len(taken) :]
    taken.update(names)
    drawn = []
    for panel, name, light, dark in zip(
        panels, names, _painted(chart, table, LIGHT), _painted(chart, table, DARK), strict=True
    ):
        text = _svg(light, LIGHT)
        (directory / f"{name}.svg").write_text(text, encoding="utf-8")
        with mpl.rc_context(LIGHT.rc):
            light.savefig(directory / f"{name}.png", dpi=_DPI, metadata={"Software": None})
        drawn.append(
            Drawing(
                panel,
                name,
                inline(text, f"{name}-light-", panel.alt),
                inline(_svg(dark, DARK), f"{name}-dark-", panel.alt),
            )
        )
    return drawn


def _painted(chart: Chart, table: pd.DataFrame, theme: Theme) -> Iterator[Figure]:
    for _, figure in chart.draw(table, theme):
        yield figure


def _svg(figure: Figure, theme: Theme) -> str:
    buffer = io.StringIO()
    with mpl.rc_context(theme.rc):  # no date: the same rows give the same file
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "mitaswap"})
    return buffer.getvalue()


def inline(svg: str, prefix: str, alt: str) -> Markup:
    """An SVG file of matplotlib's as an element of an HTML page.

    Many such elements share one page, so their ids get a prefix; otherwise a clip path of one
    drawing would be looked up in another, hidden one.
    """
    element = svg[svg.index("<svg") :]
    element = re.sub(r"\s*<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    seen: dict[str, int] = {}

    def name(found: re.Match[str]) -> str:
        # Equal images, such as two colour bars, get equal ids, and nothing refers to them.
        seen[found[1]] = number = seen.get(found[1], 0) + 1
        return f'id="{prefix}{found[1]}"' if number == 1 else f'id="{prefix}{found[1]}-{number}"'

    def own(tag: re.Match[str]) -> str:  # only inside tags: labels are the user's text
        text = re.sub(r'\bid="([^"]*)"', name, tag[0])
        return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", text)

    element = re.sub(r"<[^>]+>", own, element)
    label = f'<svg role="img" aria-label="{escape(alt)}" '
    return Markup(element.replace("<svg ", label, 1).strip())
