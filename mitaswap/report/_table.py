"""A data frame as the text of a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd


@dataclass(frozen=True)
class Table:
    """A table as text, ready for a template.

    Args:
        head: column titles.
        rows: cells as text.
        right: for each column, whether it holds numbers.
        data: what all rows were measured on, where it is the same for all.
    """

    head: list[str]
    rows: list[list[str]]
    right: list[bool]
    data: str = ""

    @classmethod
    def of(cls, frame: pd.DataFrame, decimals: int | Mapping[str, int] = 2) -> Table:
        """A data frame as text; what is missing becomes a dash, one common setting leaves.

        Args:
            decimals: of the floats, or those of some columns; the others have 2.
        """
        data = ""
        if "Data" in frame and frame["Data"].nunique() == 1:
            data = f", on {frame['Data'].iloc[0]}"
            frame = frame.drop(columns="Data")
        right = [bool(pd.api.types.is_numeric_dtype(frame[column])) for column in frame]
        cells = frame.astype(object).to_numpy().tolist()
        known = decimals if isinstance(decimals, Mapping) else {}
        usual = decimals if isinstance(decimals, int) else 2
        places = [known.get(str(column), usual) for column in frame]
        rows = [[_text(*cell) for cell in zip(row, places, strict=True)] for row in cells]
        return cls([str(column) for column in frame], rows, right, data)


def _text(value: Any, decimals: int) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.{decimals}f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
