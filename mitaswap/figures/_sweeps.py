"""Sweeps of a mechanism's options: their axes, baselines and the regions that keep them.

Pure tables in, tables out, as in `_numbers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from mitaswap.errors import MitaswapError
from mitaswap.figures._numbers import SETTING, latest, own, rows_of, same_spec, settings
from mitaswap.spec import Spec

NEAR = 0.99  # the share of the baseline that counts as "nearly kept"


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
    axes = {*names, *_axes(rows.iloc[0], list(names))}
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
    """What a spec states, its wrappers' options included, by column of the results."""
    try:
        known = Spec.parse(str(spec))
    except MitaswapError:
        return {}
    own = {_column(known.name, option): value for option, value in known.options.items()}
    outer = {
        f"{w.name}_{option}": value for w in known.wrappers for option, value in w.options.items()
    }
    return {**own, **outer}


def _column(mechanism: str, option: str) -> str:
    """The column of an option: a mechanism's own seed is not the run's."""
    return f"{mechanism.partition('+')[0]}_seed" if option == "seed" else option


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
    """A row's place on some axes, by column of the results."""
    return {
        _column(str(row["mechanism"]), _option(row, axis)): row[f"axis_{axis}"]
        for axis in axes
        if f"axis_{axis}" in row
    }


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
    family = "+".join([spec.name, *(wrapper.name for wrapper in spec.wrappers)])
    stated = _options(spec)
    if family != row["mechanism"] or not set(axes) <= set(stated):
        return False
    if set(_options(row["run_with"])) - set(stated):  # there a spec states no defaults
        return False
    known: dict[Any, object] = {**row.dropna().to_dict(), **axes}
    return all(known.get(name, value) == value for name, value in stated.items())


def _own_accuracy(table: pd.DataFrame, like: pd.Series) -> float | None:
    for study in ("matrix", "grid"):
        rows = rows_of(table, study, "top1")
        for column in ("model", "trained_with", *SETTING):
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
