"""The numbers behind figures and tables of speed: rows that can be compared, and crossovers.

Pure tables in, tables out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pandas as pd

#: what must be equal for two speeds to be compared, besides the size
CONDITIONS = ["model", "device_name", "dtype", "direction", "mode", "batching"]
CONDITIONS += ["memory_format", "heads", "head_dim", "prefix"]
_COLUMNS = ["study", "bench", "run_with", "status", "error", "tokens", "grid", "img_size", "pixels"]
_COLUMNS += ["ms_q20", "ms_q50", "ms_q80", "ratio", "baseline", "peak_mib", "rounds", "batch_size"]
_COLUMNS += ["bytes_floor_ms", "flops_floor_ms", "floor_share", "copy_gb_s", "matmul_tflop_s"]
_COLUMNS += ["infer_samples_per_sec", "train_samples_per_sec"]
_COLUMNS += ["samples_per_sec_q20", "samples_per_sec_q80", "implementation"]


def speeds(table: pd.DataFrame, bench: str) -> pd.DataFrame:
    """Rows of `mitaswap bench` ("core" or "model"), with all known columns and `rate`, images/s."""
    known = [*_COLUMNS, *CONDITIONS]
    table = table.reindex(columns=[*known, *(c for c in table.columns if c not in known)])
    rows = table[(table["study"] == "bench") & (table["bench"] == bench)]
    size = "tokens" if bench == "core" else "pixels"
    rows = rows.drop_duplicates(["run_with", size, "grid", *CONDITIONS], keep="last")
    both = rows["infer_samples_per_sec"].combine_first(rows["train_samples_per_sec"])
    return rows.assign(rate=pd.to_numeric(both))


def conditions(rows: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Rows that differ only in mechanism and size, as (file stem, conditions in words, rows)."""
    for _, part in rows.groupby(CONDITIONS, sort=False, dropna=False):
        first = part[CONDITIONS].iloc[0].dropna()
        words = [f"{first['model']}"] if "model" in first else []
        words += [str(first["direction"]), str(first["dtype"]), _mode(str(first["mode"]))]
        if "memory_format" in first:
            words.append(str(first["memory_format"]))
        if "heads" in first:
            words.append(f"{first['heads']:.0f} heads of {first['head_dim']:.0f}")
        total, tokens, _ = str(first["batching"]).partition(" tokens")
        words.append(f"batches of {int(total):,} tokens" if tokens else str(first["batching"]))
        words.append(str(first["device_name"]))
        yield "-".join(words[:-1]), ", ".join(words), part


def _mode(mode: str) -> str:
    return {"compile": "torch.compile", "cuda-graph": "CUDA graph"}.get(mode, mode)


def crossover(rows: pd.DataFrame) -> str:
    """The number of tokens from which one mechanism is faster than the baseline, in words.

    Args:
        rows: of one mechanism under one condition. Between two sizes, the logarithm of the ratio is
            taken as a straight line over that of the size; the last crossing counts.
    """
    known = rows[rows["ratio"].notna()].sort_values("tokens", kind="stable")
    points = list(zip(known["tokens"].astype(int), known["ratio"].astype(float), strict=True))
    if not points:
        return "–"
    if points[-1][1] < 1.0:
        return f"> {points[-1][0]:,}"
    slower = [i for i, (_, ratio) in enumerate(points) if ratio < 1.0]
    if not slower:
        return f"≤ {points[0][0]:,}"
    (low, before), (high, after) = points[slower[-1]], points[slower[-1] + 1]
    share = -math.log(before) / (math.log(after) - math.log(before))
    return f"{low * (high / low) ** share:,.0f}"
