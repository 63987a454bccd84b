"""The numbers behind the figures: which rows count, which of them can be compared, own accuracy.

Pure tables in, tables out; nothing is drawn here, so the report's words and tables use the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from mitaswap.errors import MitaswapError
from mitaswap.spec import Spec

_COLUMNS = (
    *(
        "study",
        "model",
        "trained_with",
        "run_with",
        "mechanism",
        "data",
        "split",
        "images",
        "layers",
    ),
    *("correct", "top1", "top1_low", "top1_high", "top5", "loss", "infer_samples_per_sec"),
    *("statistic", "layer", "path", "head", "value", "low", "high", "chance", "run"),
    *("gmacs", "attn_gmacs", "gmacs_executed", "attn_mbytes"),
    *("param_count", "strategy", "untrained"),
)
SETTING = ["data", "split", "images", "layers"]


def rows_of(table: pd.DataFrame, study: str, measured: str) -> pd.DataFrame:
    """The rows of one study that have a value in the column `measured`; known columns all exist."""
    extra = [column for column in table.columns if column not in _COLUMNS]
    table = table.reindex(columns=[*_COLUMNS, *extra])
    return table[(table["study"] == study) & table[measured].notna()]


def settings(rows: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Rows that can be compared, as (file stem, setting in words, rows).

    Different data sets, splits, numbers of images or swapped layers never share a panel.
    """
    for _, part in rows.groupby(SETTING, sort=False, dropna=False):
        first = part[SETTING].iloc[0].dropna()
        names = [str(first[column]) for column in ("data", "split") if column in first]
        words = list(names)
        if "images" in first:
            words.append(f"{int(first['images']):,} images")
        if first.get("layers", "*") != "*":
            words.append(f"layers {first['layers']}")
        yield "-".join(names), ", ".join(words), part


def same_spec(one: object, other: object) -> bool:
    """Whether two spec strings say the same, whatever the order of their options; the order of
    wrappers counts, since the inner ones are applied first.
    """
    if one == other:
        return True
    try:
        return Spec.parse(str(one)) == Spec.parse(str(other))
    except MitaswapError:
        return False


def own(rows: pd.DataFrame) -> pd.Series:
    """For each row, whether its model runs with the mechanism it was trained with."""
    pairs = zip(rows["run_with"], rows["trained_with"], strict=True)
    return pd.Series([same_spec(a, b) for a, b in pairs], index=rows.index, dtype=bool)


def retained(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with `own` (runs as trained) and `retained`, percent of the own top-1."""
    rows = rows.assign(own=own(rows))
    mine = latest(rows[rows["own"]], "model", "trained_with")
    base = mine.set_index(["model", "trained_with"])["top1"]
    keys = pd.MultiIndex.from_frame(rows[["model", "trained_with"]])
    return rows.assign(
        retained=100 * rows["top1"].to_numpy(float) / base.reindex(keys).to_numpy(float)
    )


def latest(rows: pd.DataFrame, *key: str) -> pd.DataFrame:
    """The last row for each key: what was measured again replaces what was there."""
    return rows.drop_duplicates(list(key), keep="last")


def repeats(table: pd.DataFrame) -> int:
    """How many accuracy rows are replaced by later ones of the same model, mechanism and data."""
    count = 0
    for study in ("matrix", "grid"):
        rows = rows_of(table, study, "top1")
        axes = [c for c in rows.columns if c.startswith("axis_")] if study == "grid" else []
        key = ["model", "trained_with", "run_with", "mechanism", *SETTING, *axes]
        count += len(rows) - len(latest(rows, *key))
    return count
