"""The numbers behind the figures: which rows count, own accuracy, sweeps and their regions.

Pure tables in, tables out; nothing is drawn here, so the report's words and tables use the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mitaswap.errors import MitaswapError
from mitaswap.spec import Spec

NEAR = 0.99  # the share of the baseline that counts as "nearly kept"
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
)
_SETTING = ["data", "split", "images", "layers"]


def rows_of(table: pd.DataFrame, study: str, measured: str) -> pd.DataFrame:
    """The rows of one study that have a value in the column `measured`; known columns all exist."""
    extra = [column for column in table.columns if column not in _COLUMNS]
    table = table.reindex(columns=[*_COLUMNS, *extra])
    return table[(table["study"] == study) & table[measured].notna()]


def settings(rows: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Rows that can be compared, as (file stem, setting in words, rows).

    Different data sets, splits, numbers of images or swapped layers never share a panel.
    """
    for _, part in rows.groupby(_SETTING, sort=False, dropna=False):
        first = part[_SETTING].iloc[0].dropna()
        names = [str(first[column]) for column in ("data", "split") if column in first]
        words = list(names)
        if "images" in first:
            words.append(f"{int(first['images']):,} images")
        if first.get("layers", "*") != "*":
            words.append(f"layers {first['layers']}")
        yield "-".join(names), ", ".join(words), part


def same_spec(one: object, other: object) -> bool:
    """Whether two spec strings say the same, whatever the order of their options."""
    if one == other:
        return True
    try:
        first, second = Spec.parse(str(one)), Spec.parse(str(other))
    except MitaswapError:
        return False
    return first.name == second.name and dict(first.options) == dict(second.options)


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
        key = ["model", "trained_with", "run_with", "mechanism", *_SETTING, *axes]
        count += len(rows) - len(latest(rows, *key))
    return count


@dataclass(frozen=True)
class Sweep:
    """Accuracy of one model over one or two options of a mechanism.

    Args:
        model: label of the model.
        trained_with: its own mechanism, a spec string.
        mechanism: what was swept.
        fixed: options that this sweep holds constant and others of the same mechanism do not.
        y: axis and option of the rows, for instance ("N", "m"); None in one dimension.
        x: axis and option of the columns.
        values: top-1 in percent, rows by columns; NaN where nothing was measured.
        training: (row, column) labels of the cell the model was trained with, if it is in the grid.
        baseline: accuracy of the model with its own mechanism, in percent, if it was measured.
        setting: the data, in words.
    """

    model: str
    trained_with: str
    mechanism: str
    fixed: dict[str, object]
    y: tuple[str, str] | None
    x: tuple[str, str]
    values: pd.DataFrame
    training: tuple[object, object] | None
    baseline: float | None
    setting: str

    @property
    def cells(self) -> dict[tuple[Any, Any], float]:
        """(row, column) labels to top-1 of all measured cells, from the worst to the best."""
        pairs = ((y, x) for y in self.values.index for x in self.values.columns)
        found = {(y, x): float(self.values.loc[y, x]) for y, x in pairs}
        measured = [(cell, top1) for cell, top1 in found.items() if pd.notna(top1)]
        return dict(sorted(measured, key=lambda pair: pair[1]))

    def at_least(self, share: float) -> pd.DataFrame:
        """The cells at or above `share` of the baseline; none where there is no baseline."""
        limit = float("inf") if self.baseline is None else share * self.baseline
        return self.values >= limit - 1e-9


def sweeps(table: pd.DataFrame) -> list[Sweep]:
    """All option sweeps among the rows of the study "grid", in order of appearance.

    Rows that sweep other axes, or that differ in an option which is none, are sweeps of their own.
    """
    rows = rows_of(table, "grid", "top1")
    found = []
    for _, setting, part in settings(rows):
        for _, model in part.groupby(["model", "trained_with", "mechanism"], sort=False):
            swept = [_swept(row) for _, row in model.iterrows()]
            for names in dict.fromkeys(swept):
                if names:
                    found += _cuts(table, model[[n == names for n in swept]], names, setting)
    return found


def _swept(row: pd.Series) -> tuple[str, ...]:
    """The axes that a row has a place on."""
    axes = [c for c in row.index if c.startswith("axis_") and not c.endswith("_name")]
    return tuple(axis.removeprefix("axis_") for axis in axes if pd.notna(row[axis]))


def _cuts(
    table: pd.DataFrame, rows: pd.DataFrame, names: tuple[str, ...], setting: str
) -> list[Sweep]:
    """One sweep of at most two axes for each value of the other axes, and of every option that
    differs without being an axis.
    """
    x = "K" if "K" in names else next((n for n in names if n != "N"), "N")
    y = "N" if "N" in names and x != "N" else next((n for n in names if n != x), None)
    fixed = {n: [_plain(v) for v in rows[f"axis_{n}"]] for n in names if n not in (x, y)}
    axes = {*names, *(_option(rows.iloc[0], name) for name in names)}
    stated = [_options(spec) for spec in rows["run_with"]]
    for option in dict.fromkeys(name for options in stated for name in options):
        values = _values(rows, option, stated)
        if option not in axes and len({str(value) for value in values}) > 1:
            fixed[option] = values
    keys = list(zip(*fixed.values(), strict=True)) if fixed else [()] * len(rows)
    return [
        _sweep(
            table,
            rows[[k == key for k in keys]],
            y,
            x,
            dict(zip(fixed, key, strict=True)),
            setting,
        )
        for key in dict.fromkeys(keys)
    ]


def _values(rows: pd.DataFrame, option: str, stated: list[dict[str, Any]]) -> list[object]:
    """One option in every row: its column, else what the spec states, which leaves defaults out."""
    column = rows[option] if option in rows else [None] * len(rows)
    return [
        options.get(option, "default") if pd.isna(value) else _plain(value)
        for value, options in zip(column, stated, strict=True)
    ]


def _options(spec: object) -> dict[str, Any]:
    try:
        return dict(Spec.parse(str(spec)).options)
    except MitaswapError:
        return {}


def _sweep(
    table: pd.DataFrame,
    cut: pd.DataFrame,
    y: str | None,
    x: str,
    fixed: dict[str, object],
    setting: str,
) -> Sweep:
    first = cut.iloc[0]
    x_axis, y_axis = f"axis_{x}", f"axis_{y}"
    if y is None:
        cut = cut.assign(**{y_axis: ""})
    cut = latest(cut, y_axis, x_axis)
    values = cut.pivot(index=y_axis, columns=x_axis, values="top1").sort_index(axis=0)
    values = values.sort_index(axis=1).rename_axis(index=None, columns=None)
    values.index, values.columns = _whole(values.index), _whole(values.columns)
    is_own = [
        _is_own(row, _axes(row, [x, *([y] if y else []), *fixed])) for _, row in cut.iterrows()
    ]
    mine = cut[is_own]
    training, baseline = None, None
    if len(mine):
        row = mine.iloc[-1]
        training, baseline = (_plain(row[y_axis]), _plain(row[x_axis])), float(row["top1"])
    else:
        # The own mechanism was measured elsewhere: in the matrix, or in another cut of this grid.
        baseline = _own_accuracy(table, first)
    return Sweep(
        str(first["model"]),
        str(first["trained_with"]),
        str(first["mechanism"]),
        {name: _plain(value) for name, value in fixed.items()},
        None if y is None else (y, _option(first, y)),
        (x, _option(first, x)),
        values,
        training,
        baseline,
        setting,
    )


def _option(row: pd.Series, axis: str) -> str:
    name = row.get(f"axis_{axis}_name")
    return str(name) if isinstance(name, str) else axis


def _axes(row: pd.Series, axes: list[str]) -> dict[str, object]:
    return {_option(row, axis): row[f"axis_{axis}"] for axis in axes if f"axis_{axis}" in row}


def _is_own(row: pd.Series, axes: dict[str, object]) -> bool:
    """Whether a cell of a grid is the mechanism its model was trained with.

    The spec strings may differ although the mechanism is the same ("mita(m=25,k=25,s=1)" states a
    default), so the options are compared: those of the training spec with the row's own columns.
    """
    if same_spec(row["run_with"], row["trained_with"]):
        return True
    try:
        spec = Spec.parse(str(row["trained_with"]))
    except MitaswapError:
        return False
    if spec.name != row["mechanism"] or not set(axes) <= set(spec.options):
        return False
    if set(_options(row["run_with"])) - set(spec.options):  # there a spec states no defaults
        return False
    known: dict[Any, object] = {**row.dropna().to_dict(), **axes}
    return all(known.get(name, value) == value for name, value in spec.options.items())


def _own_accuracy(table: pd.DataFrame, like: pd.Series) -> float | None:
    for study in ("matrix", "grid"):
        rows = rows_of(table, study, "top1")
        for column in ("model", "trained_with", *_SETTING):
            same = rows[column] == like[column]
            rows = rows[same | (rows[column].isna() & pd.isna(like[column]))]
        rows = rows[own(rows)]
        if len(rows):
            return float(rows.iloc[-1]["top1"])
    return None


def _whole(labels: pd.Index) -> pd.Index:
    return pd.Index([_plain(label) for label in labels], dtype=object)


def _plain(value: object) -> object:
    """16.0, which a column with gaps makes of 16, as 16 again."""
    value = value.item() if hasattr(value, "item") else value
    return int(value) if isinstance(value, float) and value.is_integer() else value
