"""Timing things against each other: in turn, in one process, medians and quantiles."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPORTS = Path(__file__).parent.parent / "reports" / "benchmarks"


def in_turn(
    runs: dict[str, Callable[[], Any]], rounds: int, warm_up: int = 3
) -> dict[str, np.ndarray]:
    """Seconds of every call: each round calls each of `runs` once, so that drift hits all alike."""
    cuda = torch.cuda.is_available()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-warm_up, rounds):
        # the order turns round too: whoever comes second finds a warmer cache
        for name in list(runs) if turn % 2 else list(runs)[::-1]:
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            runs[name]()
            if cuda:
                torch.cuda.synchronize()
            if turn >= 0:
                samples[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in samples.items()}


def quantiles(seconds: np.ndarray) -> dict[str, float]:
    """20%, 50% and 80% quantiles in milliseconds."""
    low, mid, high = np.quantile(seconds, [0.2, 0.5, 0.8]) * 1e3
    return {"ms_q20": float(low), "ms_q50": float(mid), "ms_q80": float(high)}


def paired_ratio(numerator: np.ndarray, denominator: np.ndarray) -> float:
    """Median of the round-by-round ratios: each pair was measured side by side."""
    return float(np.median(numerator / denominator))


def machine() -> dict[str, str | int]:
    """What a number depends on besides the code."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}


def write_rows(name: str, rows: list[dict[str, Any]], part: str = "") -> Path:
    """Write `rows` with the machine's columns to reports/benchmarks/NAME.jsonl. With `part`, a
    column, earlier rows that have another value there than any of these stay, in its order.
    """
    REPORTS.mkdir(parents=True, exist_ok=True)
    path = REPORTS / f"{name}.jsonl"
    whole = [{**row, **machine()} for row in rows]
    if part and path.exists():
        earlier = map(json.loads, path.read_text().splitlines())
        new = {row[part] for row in rows}
        whole += [row for row in earlier if row[part] not in new]
        whole.sort(key=lambda row: row[part])
    path.write_text("".join(json.dumps(row) + "\n" for row in whole))
    return path
