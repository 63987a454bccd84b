"""The mechanisms that one model ran with, side by side, and how figures mark their strategies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from mitaswap.figures._base import Theme
from mitaswap.figures._numbers import latest, retained, rows_of, settings

MANY = 5  # mechanisms of one model that are worth a ranking

#: the strategies of the taxonomy in the order of legends and tables, with marker and number of the
#: theme's colour (None: the ink); shape and colour say the same
_LOOKS: dict[str, tuple[str, int | None]] = {
    "none (N-wide MLP)": ("^", None),
    "compression": ("o", 0),
    "routing": ("s", 1),
    "compression & routing": ("D", 2),
}
UNKNOWN = "strategy not stated"
OWN = "*"  # the marker of the mechanism a model was trained with


@dataclass(frozen=True)
class Comparison:
    """One model with all mechanisms that it ran with on the same images.

    Args:
        name: file stem of the setting.
        heading: model, its own mechanism and the setting, in words.
        model: label of the model.
        trained_with: its own mechanism, a spec string.
        own: its top-1 with that one, in percent; None where it was not measured.
        rows: one per mechanism, the most accurate first, with `place` (1 = first), `strategy`,
            `untrained`, and `kept_low`, `kept_high`: the interval in percent of `own`.
    """

    name: str
    heading: str
    model: str
    trained_with: str
    own: float | None
    rows: pd.DataFrame


def comparisons(table: pd.DataFrame) -> Iterator[Comparison]:
    """Every model of the study "matrix" whose rows state the strategies of their mechanisms."""
    for name, setting, rows in settings(rows_of(table, "matrix", "top1")):
        rows = retained(latest(rows, "model", "trained_with", "run_with"))
        for (model, trained_with), part in rows.groupby(["model", "trained_with"], sort=False):
            if part["strategy"].isna().all():
                continue
            mine = part.loc[part["own"], "top1"].astype(float)
            own = float(mine.iloc[-1]) if len(mine) else None
            words = str(model) if model == trained_with else f"{model}, trained with {trained_with}"
            words += f" ({setting})" if setting else ""
            yield Comparison(name, words, str(model), str(trained_with), own, _ranked(part, own))


def _ranked(rows: pd.DataFrame, own: float | None) -> pd.DataFrame:
    rows = rows.sort_values("top1", ascending=False, kind="stable").reset_index(drop=True)
    numbers = ["top1", "top1_low", "top1_high", "retained", "param_count"]
    numbers += ["gmacs", "attn_gmacs", "gmacs_executed", "attn_mbytes"]
    rows[numbers] = rows[numbers].astype(float).replace([np.inf, -np.inf], np.nan)
    share = 100 / own if own else np.nan
    return rows.assign(
        place=range(1, len(rows) + 1),
        strategy=rows["strategy"].fillna(UNKNOWN).astype(str),
        kept_low=share * rows["top1_low"],
        kept_high=share * rows["top1_high"],
    )


def many(rows: pd.DataFrame) -> pd.Series:
    """For each row, whether its model ran with so many mechanisms that a ranking shows them."""
    known = rows[rows["strategy"].notna()]
    counts = known.groupby(["model", "trained_with"])["run_with"].nunique()
    keys = pd.MultiIndex.from_frame(rows[["model", "trained_with"]])
    return pd.Series(counts.reindex(keys).to_numpy() >= MANY, index=rows.index)


def in_order(strategies: Iterable[str]) -> list[str]:
    """Distinct strategies in the order of the taxonomy, others behind them by name."""
    known = list(_LOOKS)
    found = set(strategies)
    return [name for name in known if name in found] + sorted(found - set(known))


def look(strategy: str, theme: Theme) -> tuple[str, str]:
    """(marker, colour) of a strategy."""
    marker, number = _LOOKS.get(strategy, ("v", None))
    return marker, theme.ink if number is None else theme.series[number]


def marker(row: pd.Series, theme: Theme, size: float = 5.0) -> Line2D:
    """The marker of one mechanism: a star for the own one, hollow where training is needed."""
    shape, colour = look(row["strategy"], theme)
    hollow = needs_finetuning(row)
    return Line2D(
        [],
        [],
        lw=0,
        color=colour,
        marker=OWN if row["own"] else shape,
        markersize=2 * size if row["own"] else size,
        markerfacecolor=theme.background if hollow else colour,
        markeredgewidth=1.0,
    )


def needs_finetuning(row: pd.Series) -> bool:
    """Whether the mechanism is another function than the one that the model was trained with."""
    return not row["own"] and row["untrained"] == "needs finetuning"


def keys(rows: pd.DataFrame, theme: Theme, own: str) -> list[Line2D]:
    """Legend of the markers in `rows`; `own` is the words for the star."""
    found = []
    for strategy in in_order(rows.loc[~rows["own"], "strategy"]):
        shape, colour = look(strategy, theme)
        found.append(Line2D([], [], lw=0, color=colour, marker=shape, ms=5, label=strategy))
    if rows["own"].any():
        found.insert(0, Line2D([], [], lw=0, color=theme.ink, marker=OWN, ms=9, label=own))
    if any(needs_finetuning(row) for _, row in rows.iterrows()):
        hollow = Line2D([], [], lw=0, color=theme.muted, marker="o", ms=5)
        hollow.set_markerfacecolor(theme.background)
        hollow.set_label("hollow: needs finetuning")
        found.append(hollow)
    return found
