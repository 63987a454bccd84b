"""The table of the mechanisms in the rows: their place in the taxonomy and where they come from."""

from __future__ import annotations

import re

import pandas as pd
from markupsafe import Markup, escape

from mitaswap.figures._mechanisms import in_order
from mitaswap.results import addresses

_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_TITLES = {
    "mechanism": "Mechanism",
    "strategy": "Strategy",
    "expert_type": "Expert type",
    "expert_count": "Experts",
    "construction": "Construction",
    "topology": "Topology",
    "cost": "Order of operations",
    "source": "Source",
    "untrained": "Before training",
}


def taxonomy_table(table: pd.DataFrame) -> pd.DataFrame:
    """One row per mechanism whose rows state its strategy, by strategy and name; empty without."""
    cards = table.reindex(columns=[*_TITLES])
    stated = cards["mechanism"].notna() & (cards["mechanism"] != "several")
    cards = cards[stated & cards["strategy"].notna()].drop_duplicates("mechanism", keep="last")
    place = {name: number for number, name in enumerate(in_order(cards["strategy"]))}
    cards = cards.assign(place=cards["strategy"].map(place))
    for formula in ("cost", "expert_count"):  # N^2 d as N² d
        cards[formula] = cards[formula].map(_raised, na_action="ignore")
    return cards.sort_values(["place", "mechanism"])[[*_TITLES]].rename(columns=_TITLES)


def linked(source: str) -> Markup:
    """A source as HTML: all of it text but its numbers of arXiv, which are links."""
    text = str(escape(source))
    for number, address in addresses(text).items():
        text = re.sub(rf"\b{re.escape(number)}\b", f'<a href="{address}">{number}</a>', text)
    return Markup(text)


def _raised(formula: object) -> str:
    return re.sub(r"\^(\d+)", lambda power: power[1].translate(_RAISED), str(formula))
