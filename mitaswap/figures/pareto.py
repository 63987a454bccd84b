"""Cost against accuracy: which mechanisms of one model no other one beats in both."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from mitaswap.figures._base import FIGURES, Chart, Panel, Theme, stem
from mitaswap.figures._mechanisms import Comparison, comparisons, needs_finetuning
from mitaswap.figures._scatter import Points, scatter

_FEWEST = 3  # mechanisms besides the own one
_ALIKE = 3e-4  # GMACs by which the rest of a network may seem to vary, by rounding


@FIGURES.register("pareto")
class Pareto(Chart):
    """Retained accuracy over multiply-adds per image, with the Pareto front."""

    title = "Cost and accuracy"
    caption = (
        "What an image costs against the accuracy that a trained model keeps under another "
        "mechanism, in percent of the accuracy with its own (star). A swap changes the attention "
        "cores alone: the products of queries, keys and values, and whatever a mechanism computes "
        "besides. So the lower axis counts these; the upper axis adds the rest of the network, "
        "which is the same for all. (Where the rows do not tell the cores apart, the axis is the "
        "whole network.) The Pareto front (line, bold) holds what no other mechanism beats in cost "
        "or accuracy without losing in the other. Thin bars are 95% intervals of the accuracy, "
        "that of the own mechanism taken as exact. Hollow markers need finetuning: they say what "
        "the swap alone does. Numbers are ranks by accuracy. Multiply-adds come from formulas: "
        "empty slots and masked pairs, on which the PyTorch reference spends more, are not counted "
        "(the table below and the column gmacs_executed have them). Formulas say nothing about "
        "time on a device."
    )
    rank = 14

    def find(self, table: pd.DataFrame) -> list[Panel]:
        panels = []
        for found in comparisons(table):
            points = _points(found)
            if (~points.rows["own"]).sum() < _FEWEST:
                continue
            name = stem("pareto", found.model, found.name)
            data, unit = _table(points), points.unit
            titles = [str(title) for title in data]
            decimals = {title: 3 for title in titles if title.endswith((f"({unit})", "(MB)"))}
            alt = _alt(found, points)
            panels.append(Panel(name, found.heading, alt, data, decimals, content=points))
        return panels

    def paint(self, panel: Panel, theme: Theme) -> Figure:
        return scatter(panel.content, panel.heading, theme)


def front(cost: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """Which points no other point beats: none costs less and gains no less, or gains more and costs
    no more.
    """
    no_worse = (cost[None] <= cost[:, None]) & (gain[None] >= gain[:, None])
    better = (cost[None] < cost[:, None]) | (gain[None] > gain[:, None])
    return np.asarray(~np.any(no_worse & better, axis=1))


def _points(found: Comparison) -> Points:
    rows = found.rows[found.rows["gmacs"].notna() & found.rows["retained"].notna()]
    body = rows["gmacs"] - rows["attn_gmacs"]
    # Cores alone tell most where the rest is known and the same for all.
    alone = bool(body.notna().all() and len(body) and np.ptp(body) <= _ALIKE)
    x = rows["attn_gmacs"] if alone else rows["gmacs"]
    small = bool(len(x)) and x.max() < 0.1
    scale, unit = (1000.0, "MMACs") if small else (1.0, "GMACs")
    rows = rows.assign(
        x=scale * x,
        total=scale * rows["gmacs"],
        executed=scale * rows["gmacs_executed"],
        front=front(x.to_numpy(), rows["retained"].to_numpy()),
    )
    return Points(rows, scale * float(body.median()) if alone else None, unit)


def _table(points: Points) -> pd.DataFrame:
    rows, unit = points.rows, points.unit
    cores = {} if points.body is None else {f"Attention cores ({unit})": rows["x"]}
    known = {
        f"Executed, with empty slots ({unit})": rows["executed"],
        "Moved by attention (MB)": rows["attn_mbytes"],
    }
    known = {title: column for title, column in known.items() if column.notna().any()}
    return pd.DataFrame(
        {
            "Rank": rows["place"],
            "Mechanism": rows["run_with"],
            "Strategy": rows["strategy"],
            **cores,
            f"Whole network ({unit})": rows["total"],
            **known,
            "Parameters (M)": rows["param_count"],
            "Retained (%)": rows["retained"],
            "95% from": rows["kept_low"],
            "to": rows["kept_high"],
            "Pareto front": rows["front"].map({True: "yes", False: "no"}),
            "Needs finetuning": [
                "yes" if needs_finetuning(row) else "no" for _, row in rows.iterrows()
            ],
        }
    ).reset_index(drop=True)


def _alt(found: Comparison, points: Points) -> str:
    rows, unit = points.rows, points.unit
    members = rows[rows["front"]].sort_values("x", kind="stable")
    named = ", ".join(
        f"{row['run_with']} ({row['x']:.3g} {unit}, {row['retained']:.1f}%)"
        for _, row in members.iterrows()
    )
    cost = "the whole network" if points.body is None else "the attention cores"
    return (
        f"Scatter plot of the accuracy that {found.model} keeps under {len(rows)} mechanisms "
        f"against the multiply-adds of {cost}. Pareto front from the cheapest: {named}. "
        "The table below it has every number."
    )
