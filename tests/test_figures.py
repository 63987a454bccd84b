"""Figures show the right numbers, frames and gaps, on values of the paper's Figs. 5, 7a and 8."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from speed_rows import speed_rows

from mitaswap.figures import DARK, FIGURES, LIGHT, Chart, Theme
from mitaswap.figures._base import distinct, stem, wrap
from mitaswap.figures._heatmap import border
from mitaswap.figures._labels import spread
from mitaswap.figures._numbers import repeats, same_spec
from mitaswap.figures._sweeps import sweeps
from mitaswap.figures.pareto import front

HERE = {"data": "imagenet-1k", "split": "val", "images": 50000}
MITA = "mita(m=25,k=25)"

# Fig. 7a, an excerpt: m rows, k columns, top-1.
FIG_7A = {
    16: {16: 73.5, 25: 75.5, 36: 76.3, 49: 76.6},
    25: {16: 75.9, 25: 77.1, 36: 77.6, 49: 77.6},
    36: {16: 76.2, 25: 77.4, 36: 77.7, 49: 77.6},
    64: {16: 76.0, 25: 76.8, 36: 77.2, 49: 77.1},
}
# Fig. 8, Tiny: trained with, run with, top-1.
FIG_8 = [
    ("standard", "standard", 73.1),
    ("agent(n=49)", "standard", 18.5),
    (MITA, "standard", 62.4),
    ("standard", "agent(n=49)", 24.2),
    ("agent(n=49)", "agent(n=49)", 71.7),
    (MITA, "agent(n=49)", 41.7),
    ("standard", MITA, 57.3),
    ("agent(n=49)", MITA, 16.7),
    (MITA, MITA, 72.9),
]
# Fig. 5: mean, min, max of the first three layers.
FIG_5 = [(0.064, 0.0, 0.532), (0.312, 0.0, 0.578), (0.221, 0.0, 0.607)]


def grid_rows(trained_with: str = MITA, model: str = "ViT-T", **columns: Any) -> list[dict]:
    return [
        {
            **HERE,
            "study": "grid",
            "model": model,
            "trained_with": trained_with,
            "run_with": f"mita(m={m},k={k})",
            "mechanism": "mita",
            "m": m,
            "k": k,
            "axis_N": m,
            "axis_N_name": "m",
            "axis_K": k,
            "axis_K_name": "k",
            "top1": top1,
            **columns,
        }
        for m, row in FIG_7A.items()
        for k, top1 in row.items()
    ]


def matrix_rows() -> list[dict]:
    return [
        {
            **HERE,
            "study": "matrix",
            "model": f"tiny-{trained.partition('(')[0]}",
            "trained_with": trained,
            "run_with": run,
            "mechanism": run.partition("(")[0],
            "top1": top1,
            "top1_low": top1 - 0.4,
            "top1_high": top1 + 0.4,
        }
        for trained, run, top1 in FIG_8
    ]


def overlap_rows() -> list[dict]:
    return [
        {
            **HERE,
            "study": "overlap",
            "statistic": "overlap",
            "model": "ViT-T",
            "run_with": MITA,
            "layer": layer,
            "path": f"blocks.{layer}.attn",
            "head": head,
            # Heads lie around the mean, so that the mean over heads is tested.
            "value": mean + 0.01 * (head - 1),
            "low": low if head == 0 else mean,
            "high": high if head == 2 else mean,
            "chance": 0.03,
        }
        for layer, (mean, low, high) in enumerate(FIG_5)
        for head in range(3)
    ]


BOTH = "compression & routing"
# run with, strategy, GMACs of the attention cores, top-1, needs finetuning; the own is standard.
SWAPS = [
    ("linear", "compression", 0.06, 4.0, True),
    ("standard", "none (N-wide MLP)", 0.18, 80.0, False),
    ("dat", "routing", 0.05, 8.0, False),
    ("moba(n=14)", "routing", 0.046, 72.0, False),
    (f"{MITA}+dwc", BOTH, 0.1, 64.0, False),
    ("topk(k=100)", "routing", 0.13, 79.2, False),
    ("performer", "compression", 0.5, 6.0, True),
    ("nsa", BOTH, 0.17, 76.0, False),
]
BODY = 1.08  # GMACs of the rest of the network


def swap_rows(model: str = "ViT-M", size: float = 1.0, **columns: Any) -> list[dict]:
    """One model with many mechanisms, whose rows say what they cost and how they save it."""
    return [
        {
            **HERE,
            "study": "matrix",
            "model": model,
            "trained_with": "standard",
            "run_with": run,
            "mechanism": run.replace("(m=25,k=25)", "").partition("(")[0],
            "top1": top1,
            "top1_low": top1 - 2.0,
            "top1_high": top1 + 1.0,
            "gmacs": size * (BODY + cores),
            "attn_gmacs": size * cores,
            "param_count": 5.7,
            "strategy": strategy,
            "untrained": "needs finetuning" if finetune else "usable",
            **columns,
        }
        for run, strategy, cores, top1, finetune in SWAPS
    ]


def without(rows: list[dict], *columns: str) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in columns} for row in rows]


def many_rows(count: int) -> list[dict]:
    """One model with `count` mechanisms, some of them close to each other."""
    costs = np.round(0.02 * 30 ** (np.sin(np.arange(count)) ** 2), 4)
    return [
        {**row, "run_with": f"topk(k={i})", "attn_gmacs": cost, "gmacs": BODY + cost, "top1": top1}
        for i, cost in enumerate(costs)
        for row, top1 in [(swap_rows()[0], 80 * abs(np.cos(i // 2)))]
    ] + swap_rows()[1:2]


def chart(name: str) -> Chart:
    return FIGURES.get(name)()


def draw(name: str, rows: list[dict], theme: Theme = LIGHT) -> list[tuple[str, Figure]]:
    return chart(name).draw(pd.DataFrame(rows), theme)


def only(drawn: list[tuple[str, Figure]]) -> Figure:
    assert len(drawn) == 1
    return drawn[0][1]


def numbers(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for key in figure.legends for text in key.get_texts()]


def lines(ax: Axes) -> list[LineCollection]:
    return [item for item in ax.collections if isinstance(item, LineCollection)]


def hatched(ax: Axes) -> set[tuple[int, int]]:
    """(row, column) of the hatched cells."""
    corners = [p.get_xy() for p in ax.patches if isinstance(p, Rectangle) and p.get_hatch()]
    return {(int(y), int(x)) for x, y in corners}


def covered(ax: Axes, colour: str, dashed: bool) -> set[tuple[int, int]]:
    """(row, column) of the cells inside a frame, by the even-odd rule on its upright segments."""
    upright = []
    for item in lines(ax):
        drawn: Any = item  # the stubs know one colour and one line style, not a list of them
        same = mpl.colors.same_color(drawn.get_color()[0], colour)
        if same and (drawn.get_linestyle()[0][1] is not None) == dashed:
            upright += [s for s in item.get_segments() if s[0][0] == s[1][0] and s[0][1] != s[1][1]]
    inside = set()
    for i in range(len(FIG_7A)):
        for j in range(4):
            spans = [s for s in upright if min(s[:, 1]) < i + 0.5 < max(s[:, 1])]
            if sum(s[0][0] < j + 0.5 for s in spans) % 2:
                inside.add((i, j))
    return inside


def cells(at_least: float) -> set[tuple[int, int]]:
    values = [list(row.values()) for row in FIG_7A.values()]
    return {(i, j) for i in range(4) for j in range(4) if values[i][j] >= at_least}


# --- grid ---------------------------------------------------------------------------------------


def test_grid_shows_every_number_with_m_down_and_k_across() -> None:
    ax = only(draw("grid", grid_rows())).axes[0]
    assert numbers(ax) == [f"{v:.1f}" for row in FIG_7A.values() for v in row.values()]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["16", "25", "36", "64"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["16", "25", "36", "49"]
    assert ax.get_xlabel() == "K: keys per expert (k)"
    assert ax.get_ylabel() == "N: number of experts (m)"


def test_grid_frames_training_cell_baseline_and_99_percent() -> None:
    figure = only(draw("grid", grid_rows()))
    ax = figure.axes[0]
    assert covered(ax, "#d55e00", dashed=False) == {(1, 1)}
    assert covered(ax, "black", dashed=False) == cells(77.1)
    assert covered(ax, "black", dashed=True) == cells(0.99 * 77.1)
    assert cells(77.1) < cells(0.99 * 77.1) < cells(0)
    assert legend(figure) == [
        "trained here, the baseline: m = 25, k = 25",
        "at or above the baseline, 77.1%",
        "at or above 99% of it, 76.3%",
    ]


@pytest.mark.parametrize("trained", ["mita(k=25,m=25)", "mita(m=25,k=25,s=1)"])
def test_training_cell_is_found_however_the_spec_is_written(trained: str) -> None:
    (sweep,) = sweeps(pd.DataFrame(grid_rows(trained, s=1)))
    assert (sweep.training, sweep.baseline) == ((25, 25), 77.1)


@pytest.mark.parametrize("trained", ["mita(m=25,k=25,s=2)", "mita(m=25,k=30)", "agent(n=25)"])
def test_no_training_cell_when_the_model_was_trained_otherwise(trained: str) -> None:
    (sweep,) = sweeps(pd.DataFrame(grid_rows(trained, s=1)))
    assert (sweep.training, sweep.baseline) == (None, None)
    figure = only(draw("grid", grid_rows(trained, s=1)))
    assert lines(figure.axes[0]) == []
    assert legend(figure) == ["no frames: the model's own mechanism was not measured"]


def test_baseline_of_a_model_trained_with_another_mechanism_is_its_own_accuracy() -> None:
    own = {**matrix_rows()[0], "model": "ViT-T", "top1": 77.5}
    elsewhere = [{**own, "top1": 1.0, "data": "other"}, {**own, "top1": 2.0, "model": "other"}]
    figure = only(draw("grid", [own, *elsewhere, *grid_rows("standard")]))
    assert covered(figure.axes[0], "black", dashed=False) == cells(77.5)
    assert covered(figure.axes[0], "#d55e00", dashed=False) == set()
    assert legend(figure)[0] == "baseline: 77.5%, run with standard as in training"


def test_cells_that_were_not_measured_are_hatched_and_never_framed() -> None:
    rows = [row for row in grid_rows() if (row["m"], row["k"]) not in {(64, 49), (16, 16)}]
    rows += [{**row, "top1": None} for row in grid_rows() if (row["m"], row["k"]) == (64, 49)]
    figure = only(draw("grid", rows))
    ax = figure.axes[0]
    assert len(numbers(ax)) == 14
    assert hatched(ax) == {(3, 3), (0, 0)}
    assert legend(figure)[-1] == "not measured"
    assert covered(ax, "black", dashed=False) == cells(77.1) - {(3, 3)}
    assert len(sweeps(pd.DataFrame(rows))[0].cells) == 14


def test_one_grid_per_model_and_further_axis() -> None:
    rows = [*grid_rows(), *grid_rows(model="b/c"), *grid_rows(model="b-c")]
    rows += grid_rows(model="ViT-S", axis_s=1, axis_s_name="s", s=1)
    rows += grid_rows(model="ViT-S", axis_s=2, axis_s_name="s", s=2)
    drawn = draw("grid", rows)
    assert [name for name, _ in drawn] == [
        "grid-ViT-T-mita",
        "grid-b-c-mita",
        "grid-b-c-mita-2",
        "grid-ViT-S-mita-s1",
        "grid-ViT-S-mita-s2",
    ]
    assert "s = 2" in drawn[-1][1].axes[0].get_title(loc="left")


def with_s(s: int, **columns: Any) -> list[dict]:
    """The grid as the study writes it for s routed experts: its specs leave the default 1 out."""
    tail = f",s={s})" if s > 1 else ")"
    rows = grid_rows(s=s, **columns)
    return [{**row, "run_with": row["run_with"].replace(")", tail), "s": s} for row in rows]


@pytest.mark.parametrize("column", [True, False], ids=["column", "spec alone"])
def test_sweeps_of_one_mechanism_with_other_options_are_not_mixed(column: bool) -> None:
    rows = [*with_s(1), *({**row, "top1": row["top1"] / 2} for row in with_s(2))]
    if not column:
        rows = [{k: v for k, v in row.items() if k != "s"} for row in rows]
    names = ["1", "2"] if column else ["default", "2"]
    drawn = draw("grid", rows)
    assert [name for name, _ in drawn] == [f"grid-ViT-T-mita-s{name}" for name in names]
    for (_, figure), name in zip(drawn, names, strict=True):
        assert f"mita, s = {name} (" in figure.axes[0].get_title(loc="left").replace("\n", " ")
    one, two = sweeps(pd.DataFrame(rows))
    assert (one.cells[25, 25], two.cells[25, 25]) == (77.1, 77.1 / 2)
    assert (one.training, two.training) == ((25, 25), None), "trained with s = 1"
    assert one.baseline == two.baseline == 77.1
    panels = chart("grid").panels(pd.DataFrame(rows))
    assert "settings of mita, s = 2, from" in panels[1].alt


def test_sweeps_over_other_axes_are_not_mixed() -> None:
    strip = [{k: v for k, v in row.items() if k != "axis_N"} for row in grid_rows()[4:8]]
    cube = [row for s in (1, 2) for row in with_s(s, axis_s=s, axis_s_name="s")]
    found = sweeps(pd.DataFrame([*grid_rows(), *strip, *cube]))
    assert [(sweep.values.size, sweep.fixed) for sweep in found] == [
        (16, {}),
        (4, {}),
        (16, {"s": 1}),
        (16, {"s": 2}),
    ]


def test_a_sweep_of_one_option_is_a_strip() -> None:
    rows = [row for row in grid_rows() if row["m"] == 25]
    rows = [{k: v for k, v in row.items() if not k.startswith("axis_N")} for row in rows]
    ax = only(draw("grid", rows)).axes[0]
    assert numbers(ax) == ["75.9", "77.1", "77.6", "77.6"]
    assert ax.get_xlabel() == "K: keys per expert (k)" and ax.get_ylabel() == ""


def test_later_rows_replace_earlier_ones_and_are_counted() -> None:
    again = [{**row, "top1": 10.0} for row in grid_rows()[:1]]
    table = pd.DataFrame([*grid_rows(), *again])
    assert sweeps(table)[0].values.loc[16, 16] == 10.0
    assert repeats(table) == 1 and repeats(pd.DataFrame(grid_rows())) == 0


def wrapped(kernel: int, tail: str) -> list[dict]:
    """The grid of MiTA inside a convolution, as the study writes it."""
    rows = grid_rows(f"{MITA}+dwc", mechanism="mita+dwc", dwc_kernel=kernel)
    return [{**row, "run_with": f"{row['run_with']}{tail}"} for row in rows]


def test_training_cell_of_a_wrapped_mechanism_is_found() -> None:
    (sweep,) = sweeps(pd.DataFrame(wrapped(3, "+dwc")))
    assert (sweep.mechanism, sweep.training, sweep.baseline) == ("mita+dwc", (25, 25), 77.1)
    stated = [
        {**row, "trained_with": "mita(k=25,m=25)+dwc(kernel=3)"} for row in wrapped(3, "+dwc")
    ]
    assert sweeps(pd.DataFrame(stated))[0].training == (25, 25), "the default is stated"
    other = [{**row, "trained_with": "mita(k=25,m=25)+dwc(kernel=5)"} for row in wrapped(3, "+dwc")]
    assert sweeps(pd.DataFrame(other))[0].training is None
    bare = [{**row, "trained_with": MITA} for row in wrapped(3, "+dwc")]
    assert sweeps(pd.DataFrame(bare))[0].training is None, "trained without the wrapper"


def test_sweeps_with_other_options_of_a_wrapper_are_not_mixed() -> None:
    rows = [*wrapped(3, "+dwc"), *wrapped(5, "+dwc(kernel=5)")]
    three, five = sweeps(pd.DataFrame(rows))
    assert (three.fixed, five.fixed) == ({"dwc_kernel": 3}, {"dwc_kernel": 5})
    assert (three.training, five.training) == ((25, 25), None)
    plain, outer = sweeps(pd.DataFrame([*grid_rows(), *wrapped(3, "+dwc")]))
    assert (plain.mechanism, outer.mechanism) == ("mita", "mita+dwc")


def test_a_mechanisms_own_seed_is_not_that_of_the_run() -> None:
    rows = [
        {**row, "run_with": row["run_with"].replace(")", f",seed={seed})"), "mita_seed": seed}
        for seed in (1, 2)
        for row in grid_rows("mita(m=25,k=25,seed=2)", seed=0)
    ]
    one, two = sweeps(pd.DataFrame(rows))
    assert (one.fixed, two.fixed) == ({"mita_seed": 1}, {"mita_seed": 2})
    assert (one.training, two.training) == (None, (25, 25))


def square(rows: int, columns: int) -> list[dict]:
    """A grid whose training cell is in a corner of both regions."""
    return [
        {
            **grid_rows("mita(m=1,k=4)")[0],
            "run_with": f"mita(m={m},k={k})",
            **{"m": m, "k": k, "axis_N": m, "axis_K": k},
            "top1": 70.0 + (5.0 if k == 4 and m == 1 else 6.0 if k >= 4 else 4.5 if m > 1 else 0.0),
        }
        for m in [i * i for i in range(1, rows + 1)]
        for k in [i * i for i in range(1, columns + 1)]
    ]


def boxes(ax: Axes) -> list[np.ndarray]:
    """For each outline with its casing the boxes (left, low, right, high) of its sides, in points
    on the page.
    """
    found = []
    for casing in lines(ax)[::2]:
        half = float(casing.get_linewidth()[0]) / 2
        ends = np.array([ax.transData.transform(s) for s in casing.get_segments()])
        ends = ends * 72 / ax.figure.dpi
        found.append(np.hstack([ends.min(axis=1) - half, ends.max(axis=1) + half]))
    return found


def meet(a: np.ndarray, b: np.ndarray) -> bool:
    apart = (a[:, None, :2] > b[None, :, 2:]) | (b[None, :, :2] > a[:, None, 2:])
    return bool((~apart.any(axis=2)).any())


@pytest.mark.parametrize("size", [(1, 2), (2, 2), (16, 16), (20, 3), (3, 20)], ids=str)
@pytest.mark.parametrize("heading", [1, 4], ids=["short", "long"])
def test_outlines_of_training_cell_and_regions_never_cover_each_other(
    size: tuple[int, int], heading: int
) -> None:
    rows = [{**row, "model": "vit_tiny-" * heading} for row in square(*size)]
    figure = only(draw("grid", rows))
    with mpl.rc_context(LIGHT.rc):
        figure.draw_without_rendering()
    ax = figure.axes[0]
    frames = boxes(ax)
    assert len(frames) == len(legend(figure)) == 3
    for i, one in enumerate(frames):
        for other in frames[i + 1 :]:
            assert meet(one, one) and not meet(one, other)
    # nor do they cover the number of the cell, even one of five signs
    text = ax.texts[1]
    text.set_text("100.0")
    number = text.get_window_extent().get_points().ravel()[None] * 72 / figure.dpi
    number += [[0, 2, 0, -2]]  # the descent, which digits have not
    assert not any(meet(frame, number) for frame in frames)


@pytest.mark.parametrize("inset", [(0.0, 0.0), (0.1, 0.05)], ids=["on the border", "inside"])
def test_border_of_a_set_of_cells_is_closed(inset: tuple[float, float]) -> None:
    # An L: one concave corner.
    found = border(np.array([[True, False], [True, True]]), inset)
    ends = [tuple(end) for segment in found for end in np.round(segment, 9)]
    assert all(ends.count(end) == 2 for end in ends), "every end meets exactly one other"
    x = np.array(ends)[:, 0]
    assert x.min() == pytest.approx(inset[0]) and x.max() == pytest.approx(2 - inset[0])


def test_border_of_nothing_is_nothing() -> None:
    assert border(np.zeros((2, 2), dtype=bool)) == []


# --- matrix -------------------------------------------------------------------------------------


def test_matrix_has_own_mechanisms_on_the_diagonal_and_retained_beside() -> None:
    figure = only(draw("matrix", matrix_rows()))
    top1, kept = figure.axes[:2]
    assert numbers(top1) == ["73.1", "18.5", "62.4", "24.2", "71.7", "41.7", "57.3", "16.7", "72.9"]
    assert [numbers(kept)[i] for i in (0, 4, 8)] == ["100.0"] * 3
    assert numbers(kept)[6] == f"{100 * 57.3 / 73.1:.1f}"  # trained standard, run with mita
    assert (top1.get_xlabel(), top1.get_ylabel()) == ("Trained with", "Run with")
    assert [t.get_text() for t in top1.get_yticklabels()] == ["standard", "agent(n=49)", MITA]
    assert legend(figure) == ["own mechanism"]


def test_matrix_diagonal_does_not_depend_on_the_order_of_the_rows() -> None:
    kept = only(draw("matrix", matrix_rows()[::-1])).axes[1]
    assert [numbers(kept)[i] for i in (0, 4, 8)] == ["100.0"] * 3


def test_matrix_without_some_cells_hatches_them() -> None:
    rows = [row for row in matrix_rows() if row["top1"] not in (24.2, 71.7)]
    figure = only(draw("matrix", rows))
    top1, kept = figure.axes[:2]
    assert len(numbers(top1)) == 7 and hatched(top1) == {(1, 0), (1, 1)}
    assert len(numbers(kept)) == 5, "without its own accuracy a model retains nothing known"
    assert "not measured" in legend(figure)


def test_matrix_without_any_own_accuracy_has_one_panel() -> None:
    rows = [row for row in matrix_rows() if row["trained_with"] != row["run_with"]]
    figure = only(draw("matrix", rows))
    assert [ax.get_title(loc="left") for ax in figure.axes if ax.texts] == ["Top-1 accuracy"]


def test_data_sets_never_share_a_matrix() -> None:
    other = [{**row, "data": "digits", "images": 797} for row in matrix_rows()]
    names = [name for name, _ in draw("matrix", [*matrix_rows(), *other])]
    assert names == ["matrix-imagenet-1k-val", "matrix-digits-val"]


def test_many_models_are_stacked_not_squeezed() -> None:
    rows = [{**row, "model": f"{row['model']}-{i}"} for row in matrix_rows() for i in range(4)]
    figure = only(draw("matrix", rows))
    assert figure.axes[0].get_position().y0 > figure.axes[1].get_position().y1


def test_a_matrix_of_many_mechanisms_is_ordered_and_dense() -> None:
    rows = [*swap_rows(), *(r for m in "xy" for r in swap_rows(m, trained_with="dat"))]
    extra = [{**rows[0], "run_with": f"topk(k={k})", "top1": 8.0 * k} for k in range(1, 8)]
    figure = only(draw("matrix", [*rows, *extra]))
    assert len(figure.axes) == 2, "no colour bars: each cell has its number"
    names = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert names[:2] == ["standard", "dat"], "own mechanisms first"
    (panel,) = chart("matrix").panels(pd.DataFrame([*rows, *extra]))
    means = panel.data.groupby("Run with")["Retained (%)"].mean()
    assert names[2:] == list(means.drop(["standard", "dat"]).sort_values(ascending=False).index)
    assert len(names) == 15 and numbers(figure.axes[0])[0] == "80.0"
    assert not any(t.get_visible() for t in figure.axes[1].get_yticklabels()), "names stand once"
    lower = only(draw("matrix", swap_rows())).get_figheight() / len(SWAPS)
    assert figure.get_figheight() / 15 < 0.8 * lower


def test_numbers_of_a_heatmap_are_readable_on_their_cells() -> None:
    ax = only(draw("grid", grid_rows())).axes[0]
    mesh = ax.collections[0]
    values = [value for row in FIG_7A.values() for value in row.values()]
    for text, value in zip(ax.texts, values, strict=True):
        cell = mpl.colors.to_hex(mesh.cmap(mesh.norm(value)))
        assert contrast(mpl.colors.to_hex(text.get_color()), cell) >= 4.5


# --- cost and ranking ---------------------------------------------------------------------------


def pareto(rows: list[dict]) -> pd.DataFrame:
    (panel,) = chart("pareto").panels(pd.DataFrame(rows))
    return panel.data.set_index("Mechanism")


def test_pareto_front_is_what_no_other_mechanism_beats() -> None:
    data = pareto(swap_rows())
    members = data.index[data["Pareto front"] == "yes"]
    assert [*members] == ["standard", "topk(k=100)", "moba(n=14)"], "in the order of accuracy"
    (panel,) = chart("pareto").panels(pd.DataFrame(swap_rows()))
    assert (
        "front from the cheapest: moba(n=14) (0.046 GMACs, 90.0%), topk(k=100) (0.13 GMACs, "
        "99.0%), standard (0.18 GMACs, 100.0%)." in panel.alt
    )


def test_front_with_equal_points() -> None:
    rng = np.random.default_rng(0)
    cost, gain = rng.integers(0, 6, 40).astype(float), rng.integers(0, 6, 40).astype(float)
    points = list(zip(cost, gain, strict=True))
    expected = [
        not any(c <= cost_ and g >= gain_ and (c, g) != (cost_, gain_) for c, g in points)
        for cost_, gain_ in points
    ]
    assert front(cost, gain).tolist() == expected
    assert front(np.array([1.0, 1.0]), np.array([2.0, 2.0])).tolist() == [True, True]


def test_pareto_shows_cores_below_and_the_whole_network_above() -> None:
    figure = only(draw("pareto", swap_rows()))
    ax = figure.axes[0]
    assert "attention cores\n(GMACs, multiply-adds × 10⁹)" in ax.get_xlabel()
    (above,) = ax.child_axes
    assert above.get_xlabel() == "Whole network (GMACs): 1.08 + cores"
    below = [float(t.get_text()) for t in ax.get_xticklabels()]
    sums = [float(t.get_text()) for t in above.get_xticklabels()]
    assert len(below) >= 3 and sums == pytest.approx([BODY + x for x in below], abs=0.006)
    data = pareto(swap_rows())
    assert data.loc["dat", "Attention cores (GMACs)"] == 0.05
    assert data.loc["dat", "Whole network (GMACs)"] == pytest.approx(1.13)
    small = pareto(swap_rows(size=0.01))
    assert small.loc["dat", "Attention cores (MMACs)"] == pytest.approx(0.5)


def test_pareto_table_has_what_is_executed_and_moved_where_rows_tell() -> None:
    """Rows of older runs do not; beside new ones their cells are empty."""
    old, new = swap_rows()[:2], swap_rows(gmacs_executed=1.5, attn_mbytes=0.6)[2:]
    assert pareto(swap_rows()).filter(regex="Executed|Moved").empty
    data = pareto(old + new).filter(regex="Executed|Moved")
    assert [*data] == ["Executed, with empty slots (GMACs)", "Moved by attention (MB)"]
    known = ~data.index.isin([row["run_with"] for row in old])
    assert (data[known] == [1.5, 0.6]).all(axis=None) and data[~known].isna().all(axis=None)


@pytest.mark.parametrize("case", ["cores unknown", "another body"])
def test_pareto_shows_the_whole_network_where_the_cores_cannot_be_told_apart(case: str) -> None:
    rows = swap_rows()
    rows[0] = {**rows[0], **({"attn_gmacs": None} if case == "cores unknown" else {"gmacs": 2.0})}
    ax = only(draw("pareto", rows)).axes[0]
    assert ax.get_xlabel() == "Cost of one image (GMACs, multiply-adds × 10⁹)"
    assert ax.child_axes == []
    assert pareto(rows).filter(like="cores").empty


def test_pareto_intervals_are_in_percent_of_the_own_accuracy() -> None:
    data = pareto(swap_rows())
    kept = data.loc["topk(k=100)", ["95% from", "Retained (%)", "to"]]
    assert [*kept] == pytest.approx([100 * v / 80 for v in (77.2, 79.2, 80.2)])
    ax = only(draw("pareto", swap_rows())).axes[0]
    bars = [
        np.asarray(line.get_data(), dtype=float)
        for line in ax.lines
        if len(line.get_data()[0]) == 2
    ]
    assert any(np.allclose(bar, [[0.13, 0.13], [96.5, 100.25]]) for bar in bars)


def test_every_point_has_its_rank_beside_it_and_in_the_list() -> None:
    ax, side = only(draw("pareto", swap_rows())).axes
    ranks = [str(rank) for rank in range(1, len(SWAPS) + 1)]
    assert sorted(numbers(ax)) == ranks
    listed = numbers(side)
    assert listed[:6] == ["1", "standard", "100.0", "2", "topk(k=100)", "99.0"]
    bold = [t.get_text() for t in ax.texts if t.get_fontweight() == "bold"]
    assert bold == ["1", "2", "4"], "the front"
    stars = [line for line in ax.lines if line.get_marker() == "*"]
    assert [line.get_data() for line in stars] == [([0.18], [100.0])]


def test_labels_of_thirty_points_neither_meet_nor_leave_the_plot() -> None:
    ax = only(draw("pareto", many_rows(30))).axes[0]
    figure = ax.figure
    with mpl.rc_context(LIGHT.rc):
        figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert len(boxes) == 31
    frame = ax.get_window_extent()
    assert all(frame.x0 <= b.x0 and b.x1 <= frame.x1 for b in boxes)
    assert all(frame.y0 <= b.y0 and b.y1 <= frame.y1 for b in boxes)
    met = sum(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert met == 0


def test_spread_puts_labels_near_and_apart() -> None:
    grid = [[40.0 + 7 * i, 40.0 + 6 * j] for i in range(3) for j in range(4)]
    points = np.array([*grid, [2.0, 2.0]])
    sizes, box = np.full((13, 2), [14.0, 8.0]), np.array([[0.0, 0.0], [100.0, 100.0]])
    centres = spread(points, sizes, box, np.full(13, 4.0), np.zeros((0, 2, 2)))
    assert (centres >= [7, 4]).all() and (centres <= [93, 96]).all()
    apart = (np.abs(centres[:, None] - centres[None]) / [14, 8]).max(axis=2)
    assert (apart[~np.eye(13, dtype=bool)] >= 1).all()
    assert (np.linalg.norm(centres - points, axis=1) < 40).all()


@pytest.mark.parametrize(
    ("rows", "ranking", "pareto"),
    [
        (swap_rows(), True, True),
        (swap_rows()[:4], False, True),
        (swap_rows()[:3], False, False),
        (without(swap_rows(), "gmacs"), True, False),
        (without(swap_rows(), "attn_gmacs", "param_count", "untrained"), True, True),
        (without(swap_rows(), "strategy", "untrained"), False, False),
        ([row for row in swap_rows() if row["run_with"] != "standard"], True, False),
        (swap_rows(study="grid"), False, False),
        (without(swap_rows(), "top1_low", "top1_high"), True, True),
    ],
    ids=str,
)
def test_ranking_and_pareto_apply_to_rows_that_say_enough(
    rows: list[dict], ranking: bool, pareto: bool
) -> None:
    for name, expected in (("ranking", ranking), ("pareto", pareto)):
        assert chart(name).applies(pd.DataFrame(rows)) == expected, name
        for _, figure in draw(name, rows):
            with mpl.rc_context(LIGHT.rc):
                figure.canvas.draw()


def test_ranking_is_sorted_with_the_own_accuracy_and_hollow_markers() -> None:
    figure = only(draw("ranking", swap_rows()))
    ax = figure.axes[0]
    order = [run for run, *_ in sorted(SWAPS, key=lambda swap: -swap[3])]
    assert [t.get_text() for t in ax.get_yticklabels()] == order
    places = {place: run for place, run in zip(ax.get_yticks(), order, strict=True)}
    dots = {places[line.get_ydata()[0]]: line for line in ax.lines if len(line.get_ydata()) == 1}
    tops = {run: top1 for run, _, _, top1, _ in SWAPS}
    assert {run: dot.get_xdata()[0] for run, dot in dots.items()} == tops
    hollow = {r for r, dot in dots.items() if dot.get_markerfacecolor() != dot.get_color()}
    assert hollow == {"linear", "performer"}
    kinds: dict[str, set[tuple[str, str]]] = {}
    for run, strategy, *_ in SWAPS:
        if run != "standard":
            kinds.setdefault(strategy, set()).add((dots[run].get_marker(), dots[run].get_color()))
    assert [len(looks) for looks in kinds.values()] == [1, 1, 1], "one look per strategy"
    assert len(set.union(*kinds.values())) == len({m for k in kinds.values() for m, _ in k}) == 3
    assert dots["standard"].get_marker() == "*"
    (line,) = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert [*line.get_xdata()] == [80.0, 80.0]
    assert "its accuracy, 80.0%" in legend(figure) and "hollow: needs finetuning" in legend(figure)


def test_what_a_model_was_trained_with_needs_no_finetuning() -> None:
    rows = swap_rows(trained_with="linear")
    (panel,) = chart("ranking").panels(pd.DataFrame(rows))
    needs = panel.data.set_index("Mechanism")["Needs finetuning"]
    assert (needs["linear"], needs["performer"], needs["dat"]) == ("no (own)", "yes", "no")
    first = panel.data.iloc[0]
    assert [first[c] for c in ("Rank", "Mechanism", "Top-1 (%)", "95% from", "to")] == [
        *(1, "standard", 80.0, 78.0, 81.0)
    ]
    assert first["Retained (%)"] == pytest.approx(2000.0) and first["GMACs"] == pytest.approx(1.26)
    dots = only(draw("ranking", rows)).axes[0].lines
    (star,) = [dot for dot in dots if dot.get_marker() == "*"]
    assert star.get_markerfacecolor() == star.get_color()


def test_rows_of_unknown_strategy_are_ranked_with_the_others() -> None:
    rows = [*swap_rows(), {**swap_rows()[0], "run_with": "0-5: a; *: b", "strategy": None}]
    rows += [{**swap_rows()[0], "run_with": "own-idea", "strategy": "caching"}]
    (panel,) = chart("ranking").panels(pd.DataFrame(rows))
    assert len(panel.data) == len(rows)
    names = legend(only(draw("ranking", rows)))
    order = ["compression", "routing", BOTH, "caching", "strategy not stated"]
    assert [name for name in names if name in order] == order


def test_accuracy_leaves_out_what_the_ranking_shows() -> None:
    assert not chart("accuracy").applies(pd.DataFrame(swap_rows()))
    (panel,) = chart("accuracy").panels(pd.DataFrame([*swap_rows(), *matrix_rows()]))
    assert set(panel.data["Model"]) == {row["model"] for row in matrix_rows()}
    old = without(swap_rows(), "strategy", "untrained", "gmacs", "attn_gmacs")
    assert len(chart("accuracy").panels(pd.DataFrame(old))[0].data) == len(SWAPS)


def test_each_model_and_setting_has_panels_of_its_own() -> None:
    rows = [*swap_rows("a"), *swap_rows("b"), *swap_rows("a", data="digits")]
    for name in ("ranking", "pareto"):
        stems = [f"{name}-{m}-{d}" for d, m in (("imagenet-1k-val", "a"), ("imagenet-1k-val", "b"))]
        assert [panel.stem for panel in chart(name).panels(pd.DataFrame(rows))] == [
            *stems,
            f"{name}-a-digits-val",
        ]


# --- overlap and accuracy -----------------------------------------------------------------------


def test_overlap_is_the_mean_over_heads_with_the_outermost_range_and_chance() -> None:
    figure = only(draw("overlap", overlap_rows()))
    ax = figure.axes[0]
    mean, chance = ax.lines[:2]
    assert np.asarray(mean.get_xdata()).tolist() == [1, 2, 3], "layers count from 1"
    assert mean.get_ydata() == pytest.approx([0.064, 0.312, 0.221])
    assert chance.get_ydata() == pytest.approx([0.03] * 3) and chance.get_linestyle() == "--"
    band = ax.collections[0].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == pytest.approx((0.0, 0.607))
    assert ax.get_xlabel() == "Layer (1 = first)" and "IoU" in ax.get_ylabel()


def test_other_statistics_are_no_overlap() -> None:
    rows = [{**row, "statistic": "entropy"} for row in overlap_rows()]
    assert not chart("overlap").applies(pd.DataFrame(rows))


def test_overlap_of_a_single_layer_is_visible() -> None:
    ax = only(draw("overlap", overlap_rows()[:3])).axes[0]
    assert ax.containers, "an error bar stands for the band"


def test_accuracy_groups_by_model_and_draws_the_intervals() -> None:
    figure = only(draw("accuracy", matrix_rows()))
    ax = figure.axes[0]
    ticks = ax.get_yticklabels()
    bold = [t.get_text() for t in ticks if t.get_fontweight() == "bold"]
    assert bold == ["tiny-standard", "tiny-agent", "tiny-mita"]
    assert [t.get_text() for t in ticks][:4] == ["tiny-standard", "standard", "agent(n=49)", MITA]
    assert numbers(ax)[:3] == ["73.1", "24.2", "57.3"]
    spans = np.concatenate([np.array(item.get_segments()) for item in lines(ax)])
    assert np.ptp(spans[:, :, 0], axis=1) == pytest.approx(np.full(9, 0.8))
    assert set(legend(figure)) == {"mechanism as trained", "other mechanism"}


def test_accuracy_needs_intervals() -> None:
    table = pd.DataFrame(matrix_rows()).drop(columns="top1_low")
    assert not chart("accuracy").applies(table)
    assert chart("matrix").applies(table)


# --- laws over all figures ----------------------------------------------------------------------

EVERYTHING = [*matrix_rows(), *grid_rows(), *overlap_rows(), *swap_rows(), *speed_rows()]


@pytest.mark.parametrize("name", FIGURES.names())
def test_every_figure_says_what_it_shows_and_applies_only_to_its_rows(name: str) -> None:
    one = chart(name)
    assert one.title and len(one.caption) > 80
    assert one.applies(pd.DataFrame(EVERYTHING))
    assert not one.applies(pd.DataFrame({"study": ["latency"], "seconds": [1.0]}))
    assert not one.applies(pd.DataFrame({"seconds": [1.0]}))
    assert not one.applies(pd.DataFrame())


@pytest.mark.parametrize("name", FIGURES.names())
def test_panels_and_drawings_go_together_and_leave_the_table_alone(name: str) -> None:
    table = pd.DataFrame(EVERYTHING)
    before = table.copy()
    panels, drawn = chart(name).panels(table), chart(name).draw(table, DARK)
    assert [panel.stem for panel in panels] == [stem for stem, _ in drawn]
    assert all(panel.alt and panel.heading and len(panel.data) for panel in panels)
    pd.testing.assert_frame_equal(table, before)


def luminance(colour: str) -> float:
    rgb = np.array(mpl.colors.to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


HEADINGS = (  # of a few long words, and of many short ones
    "deit3_small_patch16_224-finetuned/checkpoint-120 run with mita(m=25,k=25), s = 2 (imagenet",
    "ViT-M 16 MAE run with mita, m = 49, k = 49 (MNIST 10 M, val, 50000 images, WxH = 96 x 96, H",
)


@pytest.mark.parametrize("words", HEADINGS, ids=["long words", "short words"])
@pytest.mark.parametrize("length", (50, 65, 90))
@pytest.mark.parametrize("name", FIGURES.names())
def test_headings_end_inside_the_figure(name: str, length: int, words: str) -> None:
    tables = [grid_rows(), matrix_rows(), overlap_rows(), swap_rows(), many_rows(20), speed_rows()]
    table = next(t for t in map(pd.DataFrame, tables) if chart(name).applies(t))
    panel = chart(name).panels(table)[0]
    heading = words[:length]
    content = panel.content
    if name == "matrix":  # it writes the setting
        content = replace(content, setting=heading)
    with mpl.rc_context(LIGHT.rc):
        figure = chart(name).paint(replace(panel, heading=heading, content=content), LIGHT)
        for dpi in (72, 200):  # SVG, PNG
            figure.set_dpi(dpi)
            figure.draw_without_rendering()
            titles = [t for t in figure.findobj(Text) if t.get_text().startswith(heading[:8])]
            assert titles, "the heading is on the page"
            for title in titles:
                box = title.get_window_extent()
                assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
                assert "".join(title.get_text().split()) == "".join(heading.split())
                assert len(title.get_text().split("\n")[0]) >= 30, "no scraps"


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_text_is_readable_on_the_page(theme: Theme) -> None:
    assert contrast(theme.ink, theme.background) >= 7
    assert contrast(theme.muted, theme.background) >= 3
    for figure in (
        only(draw("grid", grid_rows(), theme)),
        only(draw("accuracy", EVERYTHING, theme)),
    ):
        assert figure.get_facecolor() == mpl.colors.to_rgba(theme.background)
        assert mpl.colors.same_color(figure.axes[0].xaxis.label.get_color(), theme.ink)


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    before = dict(mpl.rcParams)
    draw("grid", grid_rows(), DARK)
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("name", ["a$b$c", "{x}", "%s", "é模", "-", "mita(", "a\nb"])
def test_any_model_name_can_be_drawn(name: str) -> None:
    rows = [{**row, "model": name} for row in EVERYTHING]
    for kind in FIGURES.names():
        for file, figure in draw(kind, rows):
            assert file.isascii() and "/" not in file and not file.startswith(".")
            with mpl.rc_context(LIGHT.rc):
                figure.canvas.draw()


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["../../x"], "x"),
        (["grid", "a/b\\c", "mita(m=25,k=25)"], "grid-a-b-c-mita-m-25-k-25"),
        (["..", "模"], "figure"),
        (["x" * 200], "x" * 80),
    ],
)
def test_stems_are_safe(parts: list[str], expected: str) -> None:
    assert stem(*parts) == expected


def test_stems_are_distinct_also_without_case() -> None:
    assert distinct(["a", "A", "a", "b"]) == ["a", "A-2", "a-3", "b"]


def test_long_labels_break_but_stay_whole() -> None:
    label = "timm:vit_tiny_patch16_224(img_size=32,num_classes=10)"
    assert wrap(label).replace("\n", "") == label
    assert max(map(len, wrap(label).split("\n"))) <= 24


def test_long_labels_break_behind_a_sign() -> None:
    assert (
        wrap("linear(feature=softmax)+dwc(kernel=5)") == "linear(feature=softmax)+\ndwc(kernel=5)"
    )
    assert wrap("timm:vit_tiny_patch16_224", 18) == "timm:vit_tiny_\npatch16_224"
    assert wrap("x" * 30, 12) == "x" * 12 + "\n" + "x" * 12 + "\n" + "x" * 6


def test_specs_are_compared_by_meaning() -> None:
    assert same_spec(
        "mita(m=25,k=9)+dwc(kernel=5,bias=true)", "mita(k=9,m=25)+dwc(bias=true,kernel=5)"
    )
    assert not same_spec("mita(m=25)", "mita(m=25)+dwc")
    assert not same_spec("mita(m=25)+dwc", "mita(m=25)+dwc(kernel=5)")
    assert not same_spec("mita+gate+dwc", "mita+dwc+gate"), "the inner one is applied first"
    assert same_spec("mita(m=25,k=9)", "mita(k=9,m=25)")
    assert not same_spec("mita(m=25,k=9)", "mita(m=9,k=25)")
    assert not same_spec("mita(", "mita")


def test_figures_load_no_torch() -> None:
    script = (
        "import sys; from mitaswap.figures import FIGURES; FIGURES.names(); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
