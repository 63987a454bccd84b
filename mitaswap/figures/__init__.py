"""Figures: one file draws one figure from a table of rows. Nothing here imports torch.

A new figure is a file in this folder whose class subclasses `Chart` and is decorated with
`@FIGURES.register("name")`; `mitaswap report` then draws it wherever it applies.
"""

from mitaswap.figures._base import DARK, FIGURES, LIGHT, Chart, Panel, Theme

__all__ = ["DARK", "FIGURES", "LIGHT", "Chart", "Panel", "Theme"]
