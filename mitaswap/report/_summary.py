"""What the rows say, in words and in tables; every number is read from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mitaswap.figures import FIGURES, Panel
from mitaswap.figures._numbers import latest, repeats, retained, rows_of, settings
from mitaswap.figures._sweeps import NEAR, Sweep, sweeps

_FEW = 6  # sentences of one kind in the summary
_NUMERICS = ["arch", "param_count", "img_size", "crop_pct", "interpolation", "batch_size"]
_NUMERICS += ["device", "dtype", "seed"]


def _whole(column: pd.Series) -> pd.Series:
    """Counts, which gaps in their column have turned into floats."""
    return column.astype("Float64").astype("Int64")


def _with_interval(row: pd.Series | None) -> str:
    if row is None:
        return "–"
    if pd.isna(row["top1_low"]) or pd.isna(row["top1_high"]):
        return f"{row['top1']:.2f}"
    interval = f"({row['top1_low']:.2f} to {row['top1_high']:.2f})"
    return f"{row['top1']:.2f} {interval}".replace(" ", "\u00a0")  # on one line


@dataclass(frozen=True)
class _Swap:
    """One model as trained, and with the other mechanism that keeps most of its accuracy."""

    model: str
    trained_with: str
    own: pd.Series | None
    best: pd.Series | None
    setting: str


def _swaps(table: pd.DataFrame) -> list[_Swap]:
    found = []
    for setting, rows in _matrices(table):
        for _, part in rows.groupby(["model", "trained_with"], sort=False):
            own = part[part["own"]]
            others = part[~part["own"]].sort_values(by=["top1"], kind="stable")
            found.append(
                _Swap(
                    str(part["model"].iloc[0]),
                    str(part["trained_with"].iloc[0]),
                    own.iloc[-1] if len(own) else None,
                    others.iloc[-1] if len(others) else None,
                    setting,
                )
            )
    return found


def _matrices(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [
        (setting, retained(latest(rows, "model", "trained_with", "run_with")))
        for _, setting, rows in settings(rows_of(table, "matrix", "top1"))
    ]


def swap_table(table: pd.DataFrame) -> pd.DataFrame:
    """One row per model: as trained, and the other mechanism that keeps most of its accuracy."""
    return pd.DataFrame(
        {
            "Model": swap.model,
            "Trained with": swap.trained_with,
            "Top-1 as trained (%)": _with_interval(swap.own),
            "Best other mechanism": "–" if swap.best is None else swap.best["run_with"],
            "Its top-1 (%)": _with_interval(swap.best),
            "Retained (%)": math.nan if swap.best is None else swap.best["retained"],
            "Data": swap.setting,
        }
        for swap in _swaps(table)
    )


def grid_table(table: pd.DataFrame) -> pd.DataFrame:
    """One row per sweep: baseline, best setting, and how many settings keep the baseline."""
    rows = []
    for sweep in sweeps(table):
        best, top1 = list(sweep.cells.items())[-1]
        rows.append(
            {
                "Model": sweep.model,
                "Swept": ", ".join([sweep.mechanism, *_fixed(sweep)]),
                "Baseline (%)": math.nan if sweep.baseline is None else sweep.baseline,
                "Best setting": _at(sweep, best),
                "Its top-1 (%)": top1,
                "Settings": len(sweep.cells),
                "At or above baseline": _count(sweep, 1.0),
                "At or above 99% of it": _count(sweep, NEAR),
                "Data": sweep.setting,
            }
        )
    return pd.DataFrame(rows)


def _fixed(sweep: Sweep) -> list[str]:
    return [f"{name} = {value}" for name, value in sweep.fixed.items()]


def _count(sweep: Sweep, share: float) -> int | None:
    return None if sweep.baseline is None else int(sweep.at_least(share).to_numpy().sum())


def _reach(count: int | None) -> str:
    return f"{count} {'reaches' if count == 1 else 'reach'}"


def _at(sweep: Sweep, cell: Any) -> str:
    axes = zip((sweep.y, sweep.x), cell, strict=True)
    return ", ".join(f"{axis[1]}\u00a0=\u00a0{value}" for axis, value in axes if axis)


def accuracy_table(table: pd.DataFrame) -> pd.DataFrame:
    """Every cell that is no point of a sweep, with its interval."""
    parts = []
    for setting, rows in _matrices(table):
        rows = rows.sort_values(by=["model"], key=lambda c: pd.factorize(c)[0], kind="stable")
        low, high = rows["top1_low"], rows["top1_high"]
        parts.append(
            pd.DataFrame(
                {
                    "Model": rows["model"],
                    "Trained with": rows["trained_with"],
                    "Run with": rows["run_with"],
                    "Top-1 (%)": rows["top1"].astype(float),
                    "95% from": low.astype(float),
                    "to": high.astype(float),
                    "Retained (%)": rows["retained"],
                    "Top-5 (%)": rows["top5"].astype(float),
                    "Loss": rows["loss"].astype(float),
                    "Correct": _whole(rows["correct"]),
                    "Images/s": rows["infer_samples_per_sec"].astype(float),
                    "Data": setting,
                }
            )
        )
    found = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    empty = [name for name in found if found[name].isna().all()]
    return found.drop(columns=empty)


def numerics_table(table: pd.DataFrame) -> pd.DataFrame:
    """How each model saw its images and in which numbers it computed: one row per combination."""
    columns = ["run", "model", *(name for name in _NUMERICS if name in table)]
    rows = table.reindex(columns=columns)
    if (
        "param_count" in rows
    ):  # some mechanisms have parameters of their own: the fewest to the most
        alike = rows.groupby([c for c in columns if c != "param_count"], dropna=False, sort=False)
        ends = [alike["param_count"].transform(how) for how in ("min", "max")]
        words = [_span(low, high) for low, high in zip(*ends, strict=True)]
        rows = rows.assign(param_count=pd.Series(words, rows.index, dtype=object))
    rows = rows.drop_duplicates()
    titles = {
        "run": "Run",
        "model": "Model",
        "arch": "Architecture",
        "param_count": "Parameters (M)",
        "img_size": "Image size",
        "crop_pct": "Crop",
        "interpolation": "Interpolation",
        "batch_size": "Batch",
        "device": "Device",
        "dtype": "Number format",
        "seed": "Seed",
    }
    for name in ("batch_size", "seed"):
        if name in rows:
            rows = rows.assign(**{name: _whole(rows[name])})
    if "img_size" in rows:  # one number, or words where it is not a square
        whole = [str(int(v)) if isinstance(v, float) and v == v else v for v in rows["img_size"]]
        rows = rows.assign(img_size=whole)
    return rows.rename(columns=titles)


def _span(low: float, high: float) -> str | None:
    if pd.isna(low):
        return None
    return f"{low:.3f}" if low == high else f"{low:.3f} to {high:.3f}".replace(" ", "\u00a0")


def sentences(table: pd.DataFrame) -> list[str]:
    """The outcome in words."""
    said = []
    for setting, rows in _matrices(table):
        said += _swap_sentences(setting, rows)
    swept, overlaps = sweeps(table), FIGURES.get("overlap")().panels(table)
    # Beyond a handful, the tables and figures say it better.
    said += [_sweep_sentence(sweep) for sweep in swept] if len(swept) <= _FEW else []
    said += [_overlap_sentence(panel) for panel in overlaps] if len(overlaps) <= _FEW else []
    repeated = repeats(table)
    if repeated:
        said.append(
            f"{_n(repeated, 'row')} measured more than once; figures and tables show the last one, "
            "rows.csv has all."
        )
    return said


def _n(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _swap_sentences(setting: str, rows: pd.DataFrame) -> list[str]:
    """What was measured, and the swaps that keep most and least of a model's accuracy."""
    models = len(rows[["model", "trained_with"]].drop_duplicates())
    said = [
        f"{_n(models, 'trained model')} and {_n(rows['run_with'].nunique(), 'mechanism')}, "
        f"{_n(len(rows), 'combination')}, measured on {setting}."
    ]
    swapped = rows[~rows["own"] & rows["retained"].notna()]
    swapped = swapped.sort_values(by=["retained"], kind="stable")
    ends = {"most": swapped.tail(1), "least": swapped.head(1) if len(swapped) > 1 else rows.head(0)}
    for word, end in ends.items():
        for _, row in end.iterrows():
            own = rows[
                rows["own"]
                & (rows["model"] == row["model"])
                & (rows["trained_with"] == row["trained_with"])
            ].iloc[-1]
            said.append(
                f"The swap that keeps {word} accuracy: {row['model']}, trained with "
                f"{row['trained_with']} and run with {row['run_with']}, has {row['top1']:.1f}% "
                f"instead of {own['top1']:.1f}%, {row['retained']:.1f}% of it{_apart(own, row)}."
            )
    return said


def _apart(one: pd.Series, other: pd.Series) -> str:
    low = max(one["top1_low"], other["top1_low"])
    high = min(one["top1_high"], other["top1_high"])
    if pd.isna([low, high, one["top1_low"], one["top1_high"]]).any():
        return ""
    return f" (95% intervals {'overlap' if low <= high else 'do not overlap'})"


def _overlap_sentence(panel: Panel) -> str:
    ranked = panel.data.sort_values(by=["Mean IoU"], kind="stable")
    low, high = ranked.iloc[0], ranked.iloc[-1]
    return (
        f"{panel.heading}: experts overlap most with the queries routed to them in layer "
        f"{high['Layer']:.0f} (mean IoU {high['Mean IoU']:.3f}, chance {high['Chance']:.3f}) and "
        f"least in layer {low['Layer']:.0f} ({low['Mean IoU']:.3f})."
    )


def _sweep_sentence(sweep: Sweep) -> str:
    best, top1 = list(sweep.cells.items())[-1]
    name = ", ".join([f"{sweep.model} with {sweep.mechanism}", *_fixed(sweep)])
    text = (
        f"{name}: {_n(len(sweep.cells), 'setting')}, the best is {_at(sweep, best)} with "
        f"{top1:.1f}%"
    )
    if sweep.baseline is None:
        return f"{text}; the accuracy as trained was not measured."
    text += (
        f"; {_reach(_count(sweep, 1.0))} the baseline of {sweep.baseline:.1f}% and "
        f"{_reach(_count(sweep, NEAR))} 99% of it"
    )
    near = sweep.at_least(NEAR)
    kept = [cell for cell in sweep.cells if near.loc[cell]]
    if kept and sweep.y and all(isinstance(v, (int, float)) for cell in kept for v in cell):
        smallest = min(kept, key=lambda cell: (sum(cell), cell))
        options = f"{sweep.y[1]} + {sweep.x[1]}"
        text += f", with the smallest {options} at {_at(sweep, smallest)}"
    return text + "."
