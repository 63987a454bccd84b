"""Time of the attention core against the number of tokens."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from mitaswap.figures._base import FIGURES, Chart, Panel, Theme, stem
from mitaswap.figures._curves import curves
from mitaswap.figures._speed import conditions, crossover, speeds


@FIGURES.register("latency")
class Latency(Chart):
    """Milliseconds over tokens, one line per mechanism, with the floor by memory traffic."""

    title = "Time of the attention core"
    caption = (
        "Milliseconds of one call of the attention core on random q, k and v, against the number "
        "of tokens. All mechanisms of a point were called in turn, round by round; lines are "
        "medians over the rounds, bands reach from the 20% to the 80% quantile. On a GPU each call "
        "is timed by events on the device, behind a write that empties its L2 cache; on a CPU by "
        "the clock. CUDA graph means that a captured call was replayed: the time of the device, "
        "without waiting for launches. The thin dashed line in a mechanism's colour is its floor "
        "by memory traffic: what must be read and written at least (q, k, v, output, and, where a "
        "head does not fit a multiprocessor's shared memory, what all tokens contribute to), "
        "divided by the copy bandwidth measured on the same device in the same run. In the "
        "table, × standard is how many times faster than softmax attention (PyTorch's SDPA), the "
        "median of the ratios within one round; crossover is the number of tokens from which a "
        "mechanism is faster, interpolated in log N; share of floor is the larger one of the "
        "floors by traffic and by operations, divided by the time. Every implementation had "
        "agreed with its formula in float64 before it was timed; one that does not, and one for "
        "which memory ended, has no point."
    )
    rank = 50

    def find(self, table: pd.DataFrame) -> list[Panel]:
        panels = []
        for name, heading, rows in conditions(speeds(table, "core")):
            rows = rows.sort_values("tokens", kind="stable")
            timed = rows[rows["ms_q50"].notna()]
            if timed["tokens"].nunique() < 2:
                continue
            panels.append(
                Panel(stem("latency", name), heading, _alt(timed), _numbers(rows), 3, content=timed)
            )
        return panels

    def paint(self, panel: Panel, theme: Theme) -> Figure:
        return curves(panel, theme, "tokens", ("ms_q20", "ms_q50", "ms_q80"), "Tokens N", "ms")


def _numbers(rows: pd.DataFrame) -> pd.DataFrame:
    crossings = {name: crossover(part) for name, part in rows.groupby("run_with", sort=False)}
    data = pd.DataFrame(
        {
            "Mechanism": rows["run_with"],
            "Tokens": rows["tokens"].astype(int),
            "Batch": rows["batch_size"].astype(int),
            "ms": rows["ms_q50"].astype(float),
            "20%": rows["ms_q20"].astype(float),
            "80%": rows["ms_q80"].astype(float),
            "Rounds": rows["rounds"].astype("Float64").astype("Int64"),
            "× standard": rows["ratio"].astype(float),
            "Crossover": rows["run_with"].map(crossings),
            "Floor by traffic (ms)": rows["bytes_floor_ms"].astype(float),
            "Floor by operations (ms)": rows["flops_floor_ms"].astype(float),
            "Share of floor": rows["floor_share"].astype(float),
            "Peak (MiB)": rows["peak_mib"].astype(float),
            "By": rows["implementation"],
            "Status": rows["status"],
        }
    )
    if data["Peak (MiB)"].isna().all():  # not measured on a CPU
        data = data.drop(columns="Peak (MiB)")
    return data.reset_index(drop=True)


def _alt(timed: pd.DataFrame) -> str:
    last = timed[timed["tokens"] == timed["tokens"].max()].sort_values("ms_q50", kind="stable")
    order = ", ".join(f"{row['run_with']} {row['ms_q50']:.3g} ms" for _, row in last.iterrows())
    return (
        f"Line chart, both axes logarithmic, of the time of {timed['run_with'].nunique()} "
        f"attention cores over {timed['tokens'].nunique()} numbers of tokens. At "
        f"{timed['tokens'].max():,.0f} tokens: {order}. The table below it has every number."
    )
