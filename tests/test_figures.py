"""Figures show the right numbers, frames and gaps, on values of the paper's Figs. 5, 7a and 8."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mitaswap.figures import DARK, FIGURES, LIGHT, Chart, Theme
from mitaswap.figures._base import distinct, stem, wrap
from mitaswap.figures._heatmap import border
from mitaswap.figures._numbers import repeats, same_spec, sweeps

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

EVERYTHING = [*matrix_rows(), *grid_rows(), *overlap_rows()]


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


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_text_is_readable_on_the_page(theme: Theme) -> None:
    def luminance(colour: str) -> float:
        rgb = np.array(mpl.colors.to_rgb(colour))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

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


def test_specs_are_compared_by_meaning() -> None:
    assert same_spec("mita(m=25,k=9)", "mita(k=9,m=25)")
    assert not same_spec("mita(m=25,k=9)", "mita(m=9,k=25)")
    assert not same_spec("mita(", "mita")


def test_figures_load_no_torch() -> None:
    script = (
        "import sys; from mitaswap.figures import FIGURES; FIGURES.names(); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
