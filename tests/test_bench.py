"""`mitaswap bench`: the gate refuses what is wrong, and rows, tables and figures tell what was
timed. How fast anything is, no test says.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from speed_rows import speed_rows
from torch import Tensor

from mitaswap.benchmark import (
    CoreShape,
    Effort,
    Failure,
    Rates,
    Refused,
    Times,
    attempt,
    cast,
    core_runs,
    floor,
    gate,
    in_turn,
    squarest,
)
from mitaswap.errors import MitaswapError
from mitaswap.figures import DARK, FIGURES, LIGHT
from mitaswap.figures._speed import crossover
from mitaswap.mechanisms import MECHANISMS, SiteShape, mechanism
from mitaswap.results import load_provenance, load_rows
from mitaswap.spec import Spec
from mitaswap.tokens import TokenLayout

Command = Callable[..., Any]
CPU = torch.device("cpu")
SHORT = ("--seconds", 0, "--num-warm-iter", 1, "--device", "cpu")
CORE = ("--heads", 2, "--head-dim", 8, *SHORT)


def shape(spec_tokens: int = 100, **more: Any) -> CoreShape:
    site = SiteShape(2, 8, squarest(spec_tokens, 0))
    return CoreShape(**{"dtype": torch.float32, "device": CPU, "batch": 2, "site": site, **more})


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], str]]:
    """Registers a variant of agent attention whose kernel is what a test says."""
    MECHANISMS.names()
    taken = dict(MECHANISMS._entries)
    monkeypatch.setattr(MECHANISMS, "_entries", taken)

    def register(kernel: Any) -> str:
        base: Any = MECHANISMS.get("agent")

        def fused(self: Any, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
            return kernel(self.reference, q, k, v, more)

        members = {"name": "tried", "fused": fused, "unfit": lambda *_: ""}
        taken["tried"] = type("Tried", (base,), members)
        return "tried(impl=fused,n=9)"

    yield register


def right(reference: Any, q: Tensor, k: Tensor, v: Tensor, more: dict[str, Any]) -> Tensor:
    return reference(q, k, v, **more)


def last_rows(reference: Any, q: Tensor, k: Tensor, v: Tensor, more: dict[str, Any]) -> Tensor:
    """The last tokens of each head are forgotten, as by a mask that is off by one."""
    out = reference(q, k, v, **more)
    return out * (torch.arange(out.shape[2]) < out.shape[2] - 1)[:, None]


def scaled(reference: Any, q: Tensor, k: Tensor, v: Tensor, more: dict[str, Any]) -> Tensor:
    return reference(q, k, v, **{**more, "scale": 1.02 * more["scale"]})


def backward_only(reference: Any, q: Tensor, k: Tensor, v: Tensor, more: Any) -> Tensor:
    """The output is right, the gradient of k is not."""
    return reference(q, k + 0.05 * (k - k.detach()), v, **more)


def large_only(reference: Any, q: Tensor, k: Tensor, v: Tensor, more: Any) -> Tensor:
    """Right on few tokens."""
    return reference(q, k, v, **more) * (1.0 if q.shape[2] < 100 else 0.9)


def gradient_not_finite(reference: Any, q: Tensor, k: Tensor, v: Tensor, more: Any) -> Tensor:
    return reference(q + 0 * (q - q.detach()).abs().sqrt(), k, v, **more)


def not_finite(reference: Any, q: Tensor, k: Tensor, v: Tensor, more: Any) -> Tensor:
    return reference(q, k, v, **more) / 0


KERNELS = [last_rows, scaled, backward_only, large_only, not_finite, gradient_not_finite]


# --- the gate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "spec", ["standard", "mita(m=9,k=9)", "agent(n=9)+dwc", "nsa(block=3,k=4)"]
)
def test_right_implementations_pass(spec: str, dtype: torch.dtype, backward: bool) -> None:
    asked = shape(dtype=dtype, backward=backward)
    verdict = gate(cast(Spec.parse(spec), asked), asked)
    assert 0 <= verdict.error <= verdict.tolerance < 0.1
    assert verdict.tokens == 100 and verdict.implementation == "reference"


@pytest.mark.parametrize("kernel", KERNELS)
def test_wrong_kernels_are_refused(kernels: Any, kernel: Any) -> None:
    asked = shape(backward=kernel in (backward_only, gradient_not_finite))
    good = cast(Spec.parse(kernels(right)), asked)
    assert gate(good, asked).implementation == "fused"
    bad = cast(Spec.parse(kernels(kernel)), asked)
    with pytest.raises(Refused, match=r"is not timed: its (output|dq|dk) is off by"):
        gate(bad, asked)


def test_large_shapes_are_checked_in_part(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[gate.__module__]  # the package has the function under its name
    for limit in ("_WHOLE", "_LARGE", "_SCORES"):
        monkeypatch.setattr(module, limit, 1000)
    asked = shape(backward=True)
    assert gate(cast(Spec.parse("standard"), asked), asked).tokens == 100
    assert gate(cast(Spec.parse(kernels(right)), asked), asked).tokens == 100
    with pytest.raises(Refused):
        gate(cast(Spec.parse(kernels(large_only)), asked), asked)


def test_without_memory_for_the_asked_shape_the_small_one_stands(kernels: Any) -> None:
    def greedy(reference: Any, q: Tensor, k: Tensor, v: Tensor, more: Any) -> Tensor:
        if q.shape[2] == 100:
            raise torch.OutOfMemoryError("too much")
        return reference(q, k, v, **more)

    asked = shape()
    assert gate(cast(Spec.parse(kernels(greedy)), asked), asked).tokens == 42


# --- the clock -----------------------------------------------------------------------------------


def test_calls_take_turns_and_failures_leave() -> None:
    called: list[str] = []

    def fails() -> None:
        called.append("c")
        if called.count("c") > 2:
            raise torch.OutOfMemoryError("full")

    runs = {"a": lambda: called.append("a"), "b": lambda: called.append("b"), "c": fails}
    found = in_turn(runs, CPU, Effort(seconds=0, warm_up=1, least=6))
    assert isinstance(found["a"], Times) and len(found["a"].ms) == 6
    assert isinstance(found["c"], Failure) and found["c"].status == "out of memory"
    # every round has each of them, and not always the same one comes first
    pairs = ["".join(c for c in called if c != "c")[i : i + 2] for i in range(0, 14, 2)]
    assert {"".join(sorted(pair)) for pair in pairs if len(pair) == 2} == {"ab"}
    assert {"ab", "ba"} <= set(pairs)


def test_a_broken_gpu_ends_the_run() -> None:
    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(MitaswapError, match="cannot be used any more"):
        attempt(lambda: attempt(broken, CPU), CPU)
    assert attempt(lambda: 1 / 0, CPU) == Failure("failed", "ZeroDivisionError: division by zero")


def test_floors_are_bytes_and_operations_at_the_measured_rates() -> None:
    site = SiteShape(6, 64, TokenLayout(0, (32, 32)))
    cost = mechanism("standard").cost(site)
    rates = Rates(copy=3e12, matmul=6e14)
    moved, computed = floor(cost, site, 64, torch.float16, rates, backward=False)
    # issue: 64 x 6 heads of 1,024 tokens: q, k, v read and o written once at 3 TB/s is 0.067 ms
    assert moved == pytest.approx(0.067, abs=0.001)
    assert computed == pytest.approx(64 * 6 * 4 * 1024**2 * 64 / 6e14 * 1e3)
    assert floor(cost, site, 64, torch.float16, rates, backward=True)[0] == pytest.approx(3 * moved)


@pytest.mark.parametrize("side, stays", [(14, True), (32, False)])
def test_intermediates_of_heads_that_fit_the_chip_are_no_traffic(side: int, stays: bool) -> None:
    rates = Rates(copy=3e12, matmul=6e14, on_chip=228 * 1024)
    site = SiteShape(6, 64, TokenLayout(0, (side, side)))
    least, mita = (
        floor(mechanism(spec).cost(site), site, 64, torch.float16, rates, backward=False)[0]
        for spec in ("standard", "mita")
    )
    assert (mita == least) == stays and mita >= least


def test_compiled_calls_are_timed_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: (compiled.append(f), f)[1])
    asked = shape()
    parts = {name: cast(Spec.parse(name), asked) for name in ("standard", "linear", "agent(n=9)")}
    runs = core_runs(parts, asked, compiled=True)
    assert len({f.__code__ for f in compiled}) == len(parts)
    assert not torch.equal(runs["standard"]()[0], runs["linear"]()[0])  # type: ignore[index]


@pytest.mark.parametrize(
    ("tokens", "prefix", "grid"), [(1024, 0, (32, 32)), (197, 1, (14, 14)), (8192, 0, (64, 128))]
)
def test_the_squarest_grid(tokens: int, prefix: int, grid: tuple[int, int]) -> None:
    assert squarest(tokens, prefix) == TokenLayout(prefix, grid)
    with pytest.raises(MitaswapError, match="no raster"):
        squarest(197, 0)


# --- rows and tables -----------------------------------------------------------------------------


def test_crossover_is_interpolated_in_log_n() -> None:
    def at(*points: tuple[int, float | None]) -> str:
        return crossover(pd.DataFrame(points, columns=["tokens", "ratio"]))

    assert at((256, 0.5), (1024, 2.0)) == "512"
    assert at((256, 2.0), (512, 0.5), (1024, 2.0)) == "724"
    assert at((256, 1.5), (1024, 2.0)) == "≤ 256"
    assert at((256, 0.5), (1024, 0.9)) == "> 1,024"
    assert at((256, None), (1024, None)) == "–"


def test_cores_become_rows_and_the_same_command_continues(cli: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    asked = ("--run", "mita(m=4,k=4),linear", "--tokens", "36,6x8", *CORE, "-b", "1,2")
    done = cli("bench", *asked, "--bench", "both", "-o", run)
    assert done.code == 0, done.err
    assert "crossover" in done.out and "mita(m=4,k=4)" in done.out
    lines = [line for line in done.out.splitlines() if "rows:" not in line and "core," not in line]
    assert max(map(len, lines)) <= 80
    rows = load_rows(run)
    assert len(rows) == 2 * 2 * 2 * 3 and set(rows["status"]) == {"ok"}
    assert set(rows["run_with"]) == {"standard", "mita(m=4,k=4)", "linear"}
    assert set(rows["direction"]) == {"forward", "forward+backward"}
    assert (rows["rounds"] == 5).all() and (rows["ms_q20"] <= rows["ms_q80"]).all()
    assert (rows.loc[rows["run_with"] == "standard", "ratio"] == 1).all()
    assert (rows["gate_error"] <= rows["gate_tolerance"]).all()
    assert (rows["floor_share"] > 0).all() and (rows["copy_gb_s"] > 0).all()
    assert rows["peak_mib"].isna().all()
    rates = load_provenance(run)["rates"]["float32"]
    assert rates["copy"] > 0 and rates["matmul"] > 0

    text = (run / "rows.jsonl").read_text()
    lines = text.splitlines(keepends=True)
    (run / "rows.jsonl").write_text("".join(lines[:-3]) + lines[-3][:20])  # killed in a cell
    again = cli("bench", *asked, "--bench", "both", "-o", run)
    assert again.code == 0 and "it has 7 of 8 cells" in again.err
    assert (run / "rows.jsonl").read_text().startswith("".join(lines[:-3]))
    assert len(load_rows(run)) == 24
    other = cli("bench", *asked, "-o", run)
    assert other.code == 2 and "directions" in other.err


def test_a_wrong_kernel_is_no_time_and_exit_code_1(
    cli: Command, tmp_path: Path, kernels: Any
) -> None:
    spec = kernels(scaled)
    done = cli("bench", "--run", f"{spec},linear", "--tokens", "49", *CORE, "-o", tmp_path / "run")
    assert done.code == 1 and "is not timed: its output is off by" in done.out
    rows = load_rows(tmp_path / "run").set_index("run_with")
    bad = rows.loc["tried(impl=fused,n=9)"]
    assert bad["status"] == "failed" and np.isnan(bad["ms_q50"])
    assert rows.loc["linear", "status"] == "ok" and rows.loc["linear", "ms_q50"] > 0
    # the same command again measures nothing, and still says so
    again = cli("bench", "--run", f"{spec},linear", "--tokens", "49", *CORE, "-o", tmp_path / "run")
    assert again.code == 1 and "it has 1 of 1 cells" in again.err


def test_out_of_memory_is_a_row(cli: Command, tmp_path: Path, kernels: Any) -> None:
    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    run = tmp_path / "run"
    done = cli("bench", "--run", kernels(full), "--tokens", "49", *CORE, "-o", run)
    assert done.code == 0 and "no memory" in done.out
    assert set(load_rows(run)["status"]) == {"ok", "out of memory"}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--run", "mita(m=25,k=25)", "--tokens", "16"), "must be between 1 and"),
        (("--run", "mita(m=11,k=4)", "--tokens", "8x8"),
         "error: 6 heads of 64 at 0 + 8x8 tokens: mita(m=11,k=4): 11 landmarks do not"),
        (("--run", "dat(groups=2),dat(groups=3)", "--tokens", "8x8", "--heads", "6,4"),
         "error: 4 heads of 64 at 0 + 8x8 tokens: dat(groups=3): groups=3 must divide"),
        (("embedded:standard", "--run", "dat,dat(groups=5)"),
         "error: blocks.0.attn: dat(groups=5): groups=5 must divide"),
        (("--run", "mitta"), "mita"),
        (("--run", "linear", "--tokens", "many"), "whole numbers"),
        (("--run", "linear", "--img-size", "224"), "give a MODEL"),
        (("--run", "linear", "--channels-last"), "--channels-last is for whole models"),
        (("--run", "linear", "-b", "auto"), "--total-tokens"),
        (("--run", "linear", "--dtype", "half"), "dtype"),
        (("--run", "linear", "--cuda-graph"), "not of device cpu; leave --cuda-graph out"),
        (("timm:vit_tiny_patch16_224", "--run", "linear", "--tokens", "64"), "without MODEL"),
    ],
)  # fmt: skip
def test_bad_input_is_one_message(
    cli: Command, tmp_path: Path, asked: tuple[str, ...], said: str
) -> None:
    done = cli("bench", *asked, *SHORT, "-o", tmp_path / "run")
    assert done.code == 2 and done.err.startswith("error: ") and said in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
def test_graphs_are_replayed_and_allocate_nothing(cli: Command, tmp_path: Path) -> None:
    asked = ("--run", "mita(m=9,k=9)", "--tokens", "1024", "--dtype", "float16", "--cuda-graph")
    done = cli("bench", *asked, "--bench", "both", "--seconds", 0, "-o", tmp_path / "run")
    assert done.code == 0, done.err
    rows = load_rows(tmp_path / "run")
    assert set(rows["status"]) == {"ok"} and set(rows["mode"]) == {"eager", "cuda-graph"}
    peaks = rows.pivot_table("peak_mib", ["run_with", "direction"], "mode")
    assert (peaks["eager"] > 0).all() and np.allclose(peaks["eager"], peaks["cuda-graph"], atol=1)


def test_help_has_examples(cli: Command) -> None:
    done = cli("bench", "--help")
    assert done.code == 0 and "Example:" in done.out and "--img-size" in done.out


def test_whole_models_become_rows(cli: Command, tmp_path: Path, tiny: str) -> None:
    run = tmp_path / "run"
    asked = (tiny, "--run", "mita(m=4,k=4),linear", "--img-size", "16,16x20", "-b", "2", *SHORT)
    done = cli("bench", *asked, "--bench", "both", "-o", run)
    assert done.code == 0, done.err
    rows = load_rows(run)
    assert set(rows["run_with"]) == {"untouched", "mita(m=4,k=4)", "linear"}
    assert set(rows["status"]) == {"ok"} and len(rows) == 12
    assert set(rows["tokens"]) == {65, 81} and set(map(str, rows["img_size"])) == {"16", "16x20"}
    forward = rows[rows["direction"] == "forward"]
    rate = 2e3 / forward["ms_q50"]
    assert np.allclose(forward["infer_samples_per_sec"], rate)
    assert rows.loc[rows["direction"] != "forward", "train_samples_per_sec"].notna().all()


def test_channels_last_is_a_condition_of_its_own(
    cli: Command, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    laid: list[bool] = []

    def look(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        if isinstance(module, torch.nn.Conv2d) and args[0].shape[0] == 3:
            laid.extend(x.is_contiguous(memory_format=torch.channels_last) for x in args)
            laid.append(module.weight.is_contiguous(memory_format=torch.channels_last))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(look)
    asked = (tiny, "--run", "linear", "-b", "3", *SHORT)
    try:
        for name, more, last in (("plain", (), False), ("last", ("--channels-last",), True)):
            laid.clear()
            done = cli("bench", *asked, *more, "-o", tmp_path / name)
            assert done.code == 0, done.err
            assert laid and set(laid) == {last}
            assert ("channels last" in done.out) is last
    finally:
        handle.remove()
    out = tmp_path / "report"
    done = cli("report", tmp_path / "plain", tmp_path / "last", "-o", out)
    assert done.code == 0, done.err
    text = (out / "report.md").read_text()
    assert text.count("eager, channels last") and text.count("eager, 3 images")


def test_the_best_batch_is_searched(
    cli: Command, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mitaswap.benchmark import model

    def rate(network: Any, batch: int, *_: Any) -> float:
        if batch > 4:
            raise torch.OutOfMemoryError("full")
        return float(batch)

    monkeypatch.setattr(model, "_rate", rate)
    run = tmp_path / "run"
    done = cli("bench", tiny, "--run", "linear", "-b", "auto", *SHORT, "-o", run)
    assert done.code == 0, done.err
    rows = load_rows(run)
    assert set(rows["batch_size"]) == {4} and set(rows["batching"]) == {"best batch"}


@pytest.mark.parametrize(
    ("rates", "best"),
    [
        ({4: 10.0, 8: 12.0, 16: 12.1, 2: 99.0}, 8),  # up while it gains 1%, and not down then
        ({4: 10.0, 8: 10.05, 2: 11.0, 1: 12.0}, 1),
        ({4: 10.0, 8: 9.0, 2: 9.0}, 4),
        ({4: 10.0, 2: 9.0}, 4),  # 8 does not fit
        ({8: 1.0}, 8),  # 4 does not compile: its time will say so, or 8 runs
    ],
)
def test_the_best_batch_of_a_compiled_network_is_near(
    monkeypatch: pytest.MonkeyPatch, rates: dict[int, float], best: int
) -> None:
    from mitaswap.benchmark import model

    def rate(network: Any, batch: int, size: Any, like: Any, compiled: bool = False) -> float:
        if not compiled:
            return {1: 1.0, 2: 2.0, 4: 4.0}.get(batch, 4.0)
        if batch not in rates:
            raise torch.OutOfMemoryError("full")
        return rates[batch]

    monkeypatch.setattr(model, "_rate", rate)
    network: Any = None
    setting = model.Setting(dtype=torch.float32, device=torch.device("cpu"))
    assert model.best_batch(network, (8, 8), setting) == 4
    assert model.best_batch(network, (8, 8), setting, compiled=True) == best


# --- figures -------------------------------------------------------------------------------------


def test_figures_and_report_of_both_kinds(cli: Command, tmp_path: Path, tiny: str) -> None:
    core, model = tmp_path / "core", tmp_path / "model"
    cli("bench", "--run", "linear,mita(m=4,k=4)", "--tokens", "36,64", *CORE, "-o", core)
    cli("bench", tiny, "--run", "linear", "--img-size", "16,24", *SHORT, "-o", model)
    table = load_rows(core, model)
    for name, figures in (("latency", 1), ("throughput", 1)):
        chart = FIGURES.get(name)()
        assert chart.applies(table) and len(chart.caption) > 200
        for theme in (LIGHT, DARK):
            drawn = chart.draw(table, theme)
            assert len(drawn) == figures
            (axes,) = drawn[0][1].axes
            assert axes.get_xscale() == axes.get_yscale() == "log"
        assert not chart.applies(table[table["study"] != "bench"])
    assert cli("report", core, model, "-o", tmp_path / "report").code == 0
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    for word in ("Time of the attention core", "Throughput of whole networks", "Crossover"):
        assert word in page


def test_cores_have_no_channels_last() -> None:
    from mitaswap.studies.bench import BenchPlan

    with pytest.raises(MitaswapError, match="attention cores have no images"):
        BenchPlan((Spec("linear"),), channels_last=True)


def test_the_plan_is_json(tmp_path: Path) -> None:
    from mitaswap.studies.bench import BenchPlan

    plan = BenchPlan(run=(Spec("linear"),), layouts=(TokenLayout(1, (4, 4)),), device="cpu")
    stored = json.loads(json.dumps(plan.to_dict()))
    assert stored["tokens"] == ["1 + 4x4"] and stored["bench"] == "core"


@pytest.mark.parametrize(("name", "curves"), [("latency", 3 + 3), ("throughput", 3)])
def test_figures_have_a_line_and_a_floor_per_mechanism(name: str, curves: int) -> None:
    table = pd.DataFrame(speed_rows())
    chart = FIGURES.get(name)()
    (panel,) = chart.panels(table)
    ((_, figure),) = chart.draw(table)
    (axes,) = figure.axes
    assert len(axes.lines) == curves and len(axes.collections) == 3
    assert "$" not in "".join(tick.get_text() for tick in axes.get_yticklabels())
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["standard", "agent(n=49)", "mita(m=25,k=25)"]
    assert len(panel.data) == (9 if name == "latency" else 6)
    if name == "latency":
        assert list(panel.data["Crossover"].unique()) == ["≤ 256", "500", "750"]
