"""The tables at the end of `mitaswap bench`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import pandas as pd
from rich.text import Text

from mitaswap.cli._app import out
from mitaswap.cli._tables import Kind, show

Cells = Sequence[Optional[str]]


def show_speeds(run: Path) -> int:
    """Print the times and crossovers of a run; how many comparisons failed."""
    from mitaswap.figures._speed import conditions, speeds
    from mitaswap.results import load_rows

    table = load_rows(run)
    for bench, print_one in (("core", _core), ("model", _model)):
        for _, words, rows in conditions(speeds(table, bench)):
            print_one(words, rows)
    failed = table[table["status"] == "failed"]
    for error in dict.fromkeys(failed["error"]) if len(failed) else []:
        out.print(Text(f"failed: {error}", "red"), soft_wrap=True)
    return len(failed)


def _core(words: str, rows: pd.DataFrame) -> None:
    from mitaswap.figures._speed import crossover

    lines = rows.sort_values("tokens", kind="stable").to_dict("records")
    columns = {
        "tokens": [f"{row['tokens']:.0f}" for row in lines],
        **_timed(lines, "x SDPA"),
        "floor %": [_shown(100 * row["floor_share"], 0) for row in lines],
    }
    _show(f"attention core, {words}", columns, lines)
    others = rows[rows["run_with"] != "standard"]
    if rows["tokens"].nunique() > 1 and len(others):
        show(
            "faster than SDPA from (tokens, interpolated in log N)",
            {"mechanism": "text", "crossover": "number"},
            [(name, crossover(part)) for name, part in others.groupby("run_with", sort=False)],
        )


def _model(words: str, rows: pd.DataFrame) -> None:
    lines = rows.sort_values("pixels", kind="stable").to_dict("records")
    sizes = [row["img_size"] for row in lines]
    columns = {
        "pixels": [size if isinstance(size, str) else f"{size:.0f}" for size in sizes],
        **_timed(lines, "x untouched"),
        "img/s": [_shown(row["rate"], 1) for row in lines],
    }
    _show(words, columns, lines)


def _show(title: str, columns: dict[str, Cells], lines: list[dict[Any, Any]]) -> None:
    """A table without the columns that nothing is in; the baseline is bold."""
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    kinds: dict[str, Kind] = {name: "text" if name == "mechanism" else "number" for name in shown}
    strong = [row["run_with"] == row["baseline"] for row in lines]
    show(title, kinds, list(zip(*shown.values(), strict=True)), strong)


def _timed(lines: list[dict[Any, Any]], ratio: str) -> dict[str, Cells]:
    """The columns of all tables; in the place of a time, why there is none."""
    short = {"out of memory": "no memory"}
    times = [_digits(row["ms_q50"]) for row in lines]
    spans = [(_digits(row["ms_q20"]), _digits(row["ms_q80"])) for row in lines]
    return {
        "batch": [_shown(row["batch_size"], 0) for row in lines],
        "mechanism": [row["run_with"] for row in lines],
        "ms": [
            ms or short.get(row["status"], row["status"])
            for ms, row in zip(times, lines, strict=True)
        ],
        "20-80%": ["-".join((low, high)) if low and high else None for low, high in spans],
        ratio: [_shown(row["ratio"], 2) for row in lines],
        "MiB": [_shown(row["peak_mib"], 0) for row in lines],
    }


def _digits(ms: float) -> str | None:
    """Three digits, and never an exponent."""
    return _shown(ms, 3 if ms < 1 else 2 if ms < 10 else 1)


def _shown(value: float, decimals: int) -> str | None:
    return None if pd.isna(value) else f"{value:.{decimals}f}"
