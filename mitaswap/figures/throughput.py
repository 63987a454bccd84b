"""Images per second of whole networks against the size of the images."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from mitaswap.figures._base import FIGURES, Chart, Panel, Theme, stem
from mitaswap.figures._curves import curves
from mitaswap.figures._speed import conditions, speeds


@FIGURES.register("throughput")
class Throughput(Chart):
    """Images per second over image size, one line per mechanism."""

    title = "Throughput of whole networks"
    caption = (
        "Images per second of a network with each mechanism in all of its attention layers, and "
        "untouched, on random images. The networks were called in turn, round by round; lines are "
        "medians over the rounds, bands reach from the 20% to the 80% quantile. Forward+backward "
        "has all gradients of the weights and no optimiser step. With the best batch, each network "
        "runs with the power of two that gave it the most images per second, searched without "
        "torch.compile, and for compiled networks on from there with it. In the table, × untouched "
        "is the ratio of images per second, the median of those within one round. Every attention "
        "core had agreed with its formula in float64 before it was timed; one that does not, and "
        "one for which memory ended, has no point."
    )
    rank = 52

    def find(self, table: pd.DataFrame) -> list[Panel]:
        panels = []
        for name, heading, rows in conditions(speeds(table, "model")):
            rows = rows.sort_values("pixels", kind="stable")
            timed = rows[rows["rate"].notna()]
            if timed.empty:
                continue
            panels.append(
                Panel(stem("speed", name), heading, _alt(timed), _numbers(rows), 2, content=timed)
            )
        return panels

    def paint(self, panel: Panel, theme: Theme) -> Figure:
        quantiles = ("samples_per_sec_q20", "rate", "samples_per_sec_q80")
        return curves(panel, theme, "pixels", quantiles, "Image size (pixels)", "Images per second")


def _numbers(rows: pd.DataFrame) -> pd.DataFrame:
    data = pd.DataFrame(
        {
            "Mechanism": rows["run_with"],
            "Image size": rows["img_size"],
            "Tokens": rows["tokens"].astype(int),
            "Batch": rows["batch_size"].astype("Float64").astype("Int64"),
            "Images/s": rows["rate"].astype(float),
            "20%": rows["samples_per_sec_q20"].astype(float),
            "80%": rows["samples_per_sec_q80"].astype(float),
            "ms per batch": rows["ms_q50"].astype(float),
            "× untouched": rows["ratio"].astype(float),
            "Peak (MiB)": rows["peak_mib"].astype(float),
            "By": rows["implementation"],
            "Status": rows["status"],
        }
    )
    if data["Peak (MiB)"].isna().all():  # not measured on a CPU
        data = data.drop(columns="Peak (MiB)")
    return data.reset_index(drop=True)


def _alt(timed: pd.DataFrame) -> str:
    last = timed[timed["pixels"] == timed["pixels"].max()].sort_values("rate", kind="stable")
    order = ", ".join(f"{row['run_with']} {row['rate']:.3g}" for _, row in last.iterrows())
    return (
        f"Line chart, both axes logarithmic, of images per second of {timed['run_with'].nunique()} "
        f"variants over {timed['pixels'].nunique()} image sizes. At the largest size: {order}. "
        "The table below it has every number."
    )
