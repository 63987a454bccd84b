"""The command line: what each verb prints, writes and keeps when it is stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import encoded
from safetensors.torch import load_file

import mitaswap
from mitaswap.checkpoint import KEY, open_network, trained_with
from mitaswap.errors import MitaswapError
from mitaswap.mechanisms import MECHANISMS, WRAPPERS, SiteShape, learned_numbers, mechanism
from mitaswap.results import load_plan, load_provenance, load_rows
from mitaswap.surgery import swapped_sites
from mitaswap.tokens import TokenLayout

Command = Callable[..., Any]
MITA = "mita(m=9,k=9)"
DIGITS = ("--data", "digits", "--limit", "40", "--device", "cpu")
TIMES = ["seconds", "infer_samples_per_sec"]


def words(text: str) -> str:
    return " ".join(text.split())


def numbers(directory: Path) -> list[dict[str, Any]]:
    """The rows of a run without what differs from one measurement to the next."""
    lines = (directory / "rows.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def cells(directory: Path) -> list[tuple[str, str, str]]:
    rows = load_rows(directory).drop_duplicates("cell")
    return list(zip(rows["study"], rows["model"], rows["run_with"], strict=True))


# --- ls, walk, help ------------------------------------------------------------------------------


def test_ls_fits_80_columns_and_cuts_no_word(cli: Command) -> None:
    done = cli("ls", "--all")
    assert (done.code, done.err) == (0, "")
    assert max(map(len, done.out.splitlines())) <= 80
    for word in (
        *("standard", "linear", "agent", "mita", "needs", "learned", "+dwc", "+window"),
        *("several-to-one", "N-to-blocks", "light-weight", "finetuning", "SViTE", "ViT-5"),
        *("compression", "kernelization", "probing", "all-to-one", "N-to-m"),
        *("strategy", "count", "construction", "topology", "MLP", "shared"),
        *("variant: full | route-only | compress-only", "embedded models", "digits"),
        *("overlap: IoU", "matrix: Cross-mechanism matrix", "Wen et al. 2026"),
    ):
        assert word in done.out, word


def test_ls_of_one_mechanism_tells_all_about_it(cli: Command) -> None:
    done = cli("ls", "nsa")
    assert (done.code, done.err) == (0, "")
    assert max(map(len, done.out.splitlines())) <= 80
    for word in ("Yuan et al. 2025", "needs", "q, k, v, grid, x", "usable", "parameters for 3"):
        assert word in done.out, word
    part = mechanism("nsa")
    cost = part.cost(SiteShape(6, 64, TokenLayout(1, (64, 64))))  # the paper's sizes exceed 14x14
    told = " ".join(done.out.split())
    assert f"{cost.flops / 1e6:.1f} MFLOPs (a multiply-add is two; empty slots of the ref" in told
    assert f"reference: {cost.padding / 1e6:.1f} more), {cost.bytes() / 1e6:.2f} MB moved" in told
    for option in fields(part.options):  # each with its meaning
        line = next(x for x in done.out.splitlines() if x.strip().startswith(f"{option.name}:"))
        assert len(line.split()) > 4, line


@pytest.mark.parametrize(
    ("asked", "at", "fits"),
    [
        ("nsa", "1 + 64x64", "nsa(block=4,k=6,window=5,blocks=windows,span=3,stride=2)"),
        ("spark", "1 + 64x64", "spark(k=50)"),
        ("spark(r=9)+dwc", "1 + 64x64", "spark(k=50,r=9)"),
        ("dsa(k=300)", "1 + 64x64", ""),
        ("spark(k=9)", "1 + 14x14", ""),
        ("mita", "1 + 14x14", ""),
    ],
)
def test_ls_tells_what_fits_a_vit_and_where_its_numbers_are_from(
    cli: Command, asked: str, at: str, fits: str
) -> None:
    shown = words(cli("ls", asked).out)
    assert f"heads of 64 at {at} tokens" in shown
    assert ("at 14x14 patches" in shown) == bool(fits)
    assert fits.replace(",", "") in shown.replace(",", "").replace("= ", "=")


@pytest.mark.parametrize("name", MECHANISMS.names())
def test_ls_of_every_mechanism_has_its_equation_and_its_address(cli: Command, name: str) -> None:
    done = cli("ls", name)
    assert (done.code, done.err) == (0, "")
    formula = done.out.partition("about")[0]
    assert re.search(r"\w.* = .*\w", formula), formula
    number = re.search(r"arXiv ([0-9.]+[0-9])", MECHANISMS.get(name).card.source)
    assert number is None or f"https://arxiv.org/abs/{number[1]}" in done.out


def test_ls_of_mita_writes_its_equations_out(cli: Command) -> None:
    shown = words(cli("ls", "mita").out)
    for equation in ("S = Q~ K^T / sqrt(d)", "V~ = softmax(S) V", "[V~, V_e1, ..., V_es]"):
        assert equation in shown


def test_ls_of_wrapped_mechanisms_tells_about_each_part(cli: Command) -> None:
    done = cli("ls", "mita(m=9,k=9)+dwc(kernel=5)+gate")
    assert (done.code, done.err) == (0, "") and max(map(len, done.out.splitlines())) <= 80
    shown = words(done.out)
    places = [shown.index(part) for part in ("mita(m=9,k=9)+dwc(kernel=5)+gate", " +dwc O + DWC(V)",
                                             " +gate 2 sigmoid(W x + b)")]  # fmt: skip
    assert places == sorted(places)
    for said in (
        *("needs q, k, v, grid, x", "arxiv.org/abs/2308.00442", "arxiv.org/abs/2505.06708"),
        *("learned 0 parameters", "learned 4,992 parameters", "learned 37,056 parameters"),
        *("learned 42,048 parameters", "kernel: int 3", "per: channel | head"),
    ):
        assert said in shown, said


@pytest.mark.parametrize("name", WRAPPERS.names())
def test_ls_of_a_wrapper(cli: Command, name: str) -> None:
    for asked in (name, f"+{name}"):
        done = cli("ls", asked)
        assert (done.code, done.err) == (0, "") and done.out.startswith(f"+{name}\n")
        assert words(WRAPPERS.get(name).summary) in words(done.out)
        assert "needs" in done.out and "strategy" not in done.out
    options = [f.name for f in fields(WRAPPERS.get(name).options_type)]
    assert all(f" {option}: " in done.out for option in options)


def test_wrappers_apply_from_left_to_right_as_ls_says(cli: Command) -> None:
    shown = words(cli("ls", "prefix").out)
    assert "from left to right" in words(cli("ls").out) and "from left to right" in shown
    assert "in mita+gate+prefix the gate is for patches only, in mita+prefix+gate for all" in shown
    layout = mitaswap.TokenLayout(1, (4, 4))
    q, x = torch.randn(1, 2, 17, 8), torch.randn(1, 17, 16)
    for order, open_to_special in (("gate+prefix", True), ("prefix+gate", False)):
        part = mechanism(f"linear+{order}")
        part(q, q, q, layout=layout, x=x)
        with torch.no_grad():
            for name, parameter in part.named_parameters():
                parameter.fill_(-100.0 if name.endswith("bias") else 0.0)  # shut
            out = part(q, q, q, layout=layout, x=x)
        assert bool(out[:, :, 0].abs().max() > 0.01) == open_to_special
        assert out[:, :, 1:].abs().max() < 1e-6


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("mita(k=0)", "k=0 must be between 1 and the 197 tokens"),
        ("dat(groups=5)", "groups=5"),
        ("window(size=4)", "size=4 must be odd"),
        ("dwc(kernl=3)", "unknown option of dwc 'kernl'. Did you mean 'kernel'?"),
        ("linear+window", "linear has no softmax that a window could join"),
        ("MiTA", "unknown mechanism 'MiTA'. Did you mean 'mita'?"),
        ("mita(M=9)", "unknown option of mita 'M'. Did you mean 'm'?"),
        ("+dwcc", "unknown wrapper 'dwcc'. Did you mean 'dwc'?"),
    ],
)
def test_ls_of_what_is_impossible_prints_the_error_alone(
    cli: Command, asked: str, says: str
) -> None:
    done = cli("ls", asked)
    assert (done.code, done.out) == (2, "") and says in done.err


@pytest.mark.parametrize("name", ["svite", "ViT-5", "vit5"])
def test_what_is_no_mechanism_says_so(cli: Command, name: str) -> None:
    done = cli("ls", name)
    assert done.code == 2 and "is not an attention mechanism but" in done.err


def test_ls_without_options_is_short(cli: Command) -> None:
    short, full = cli("ls").out, cli("ls", "--all").out
    assert "Sources" not in short and "SViTE" not in short and len(short) < len(full) / 1.5
    for name in MECHANISMS.names():
        assert f" {name} " in short


@pytest.mark.parametrize(
    "verb", ["", "ls", "walk", "convert", "eval", "report", "train", "finetune", "bench"], ids=str
)
def test_help_of_every_verb(cli: Command, verb: str) -> None:
    done = cli(*verb.split(), "--help")
    assert (done.code, done.err) == (0, "")
    assert "Usage: mitaswap" in done.out and (not verb or "Example:" in done.out)


def test_version_and_no_arguments(cli: Command) -> None:
    assert cli("--version").out == f"mitaswap {mitaswap.__version__}\n"
    done = cli()
    assert done.code == 2 and "Usage: mitaswap" in done.out + done.err


def test_walk_shows_the_sites(cli: Command, tiny: str) -> None:
    done = cli("walk", tiny)
    assert done.code == 0
    assert "tokens = prefix + h x w" in done.out
    assert "1 blocks.1.attn 2 12 65 = 1 + 8x8 none yes" in words(done.out)
    assert "2 of 2 sites can be swapped." in done.out


def test_walk_at_another_size(cli: Command, tiny: str, hf_dir: Path) -> None:
    dynamic = tiny.replace("pretrained=", "dynamic_img_size=true,pretrained=")
    assert "193 = 1 + 12x16" in cli("walk", dynamic, "--img-size", 24, 32).out


def test_walk_of_directories(cli: Command, hf_dir: Path, timm_dir: Path, tmp_path: Path) -> None:
    for name in (hf_dir, f"hf:{hf_dir}"):
        done = cli("walk", name)
        assert "17 = 1 + 4x4" in done.out and "2 of 2 sites can be swapped." in done.out
    cli("convert", timm_dir, "--to", MITA, "--layers", "1", "-o", tmp_path / "one")
    shown = words(cli("walk", tmp_path / "one").out)
    assert "0 blocks.0.attn 2 12 65 = 1 + 8x8 none yes" in shown
    assert f"1 blocks.1.attn 2 12 65 = 1 + 8x8 none {MITA}" in shown


def test_walk_says_why_not(cli: Command) -> None:
    done = cli("walk", "timm:swin_tiny_patch4_window7_224(pretrained=false,depths=(1,1,1,1))")
    assert done.code == 0 and max(map(len, done.out.splitlines()[1:])) <= 80
    assert "not 0: attention inside windows (64 sequences of 49 per image)" in done.out
    assert "0 of 4 sites can be swapped." in done.out


def test_walk_takes_names_as_they_are(cli: Command, timm_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "[bold]net=a"
    folder.symlink_to(timm_dir)
    assert f"{folder}: 2 attention sites" in cli("walk", folder).out


# --- eval ----------------------------------------------------------------------------------------


@pytest.fixture
def own(timm_dir: Path, tmp_path: Path) -> Path:
    """A directory that says that it was trained with MiTA."""
    return mitaswap.save(mitaswap.load(timm_dir), tmp_path / "own", trained_by=MITA)


def test_matrix_of_two_models(cli: Command, timm_dir: Path, own: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    models = (own, f"agent(n=9)={timm_dir}")
    done = cli("eval", *models, *DIGITS, "--run", "standard,linear", "-o", run)
    assert done.code == 0
    assert cells(run) == [
        ("matrix", "own", MITA),
        ("matrix", "own", "standard"),
        ("matrix", "own", "linear"),
        ("matrix", "agent(n=9)", "agent(n=9)"),
        ("matrix", "agent(n=9)", "standard"),
        ("matrix", "agent(n=9)", "linear"),
    ]
    rows = load_rows(run)
    assert rows.groupby("model")["trained_with"].unique().map(list).to_dict() == {
        "own": [MITA],
        "agent(n=9)": ["agent(n=9)"],
    }
    # trained with one thing and run with another: the same weights, other numbers
    assert rows["loss"].round(6).nunique() == 4  # standard and linear are alike for both
    expected = mitaswap.evaluate(
        mitaswap.convert(mitaswap.load(timm_dir), MITA), "digits", limit=40
    )
    assert rows["loss"][0] == pytest.approx(expected["loss"], rel=1e-6)
    # the table at the end
    assert max(map(len, done.out.splitlines()[:-1])) <= 80
    assert "top-1 on digits, 40 images" in done.out and "95% range" in done.out
    for row in rows.to_dict("records"):
        line = (
            f"{row['model']} {row['trained_with']} {row['run_with']} {row['top1']:.2f} "
            f"{row['top1_low']:.1f}-{row['top1_high']:.1f} {row['infer_samples_per_sec']:.0f}"
        )
        assert line in words(done.out)
    assert f"report: mitaswap report {run}" in done.out
    assert done.err.count("done: ") == 6


FEW = ("--data", "digits", "--limit", "4", "--device", "cpu")


@pytest.mark.parametrize("group", ["usable", "parameter-free", "untrained", "all"])
def test_groups_of_mechanisms(cli: Command, timm_dir: Path, tmp_path: Path, group: str) -> None:
    """Each with options that fit the model; nobody has to know them."""
    cards = {name: cls.card for name, cls in MECHANISMS.items()}
    expected = {
        name
        for name, card in cards.items()
        if group == "all"
        or (group != "parameter-free" and card.untrained == "usable")
        or (group != "usable" and not learned_numbers(mechanism(name)))
    }
    done = cli("eval", timm_dir, *FEW, "--run", group, "-o", tmp_path / "run")
    assert done.code == 0
    rows = numbers(tmp_path / "run")
    assert {row["mechanism"] for row in rows} == expected | {"standard"}
    assert len(rows) == len({row["run_with"] for row in rows})


def test_what_cannot_run_is_left_out_of_a_group_aloud(
    cli: Command, timm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(self: Any, layout: Any, head_dim: int) -> None:
        raise MitaswapError("topk: not today")

    monkeypatch.setattr(MECHANISMS.get("topk"), "check", check)
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("mitaswap.studies._groups.logger.warning", lambda t, *a: said.append(t % a))
        done = cli("eval", timm_dir, *FEW, "--run", "usable", "-o", tmp_path / "run")
    assert done.code == 0 and "topk" not in {row["mechanism"] for row in numbers(tmp_path / "run")}
    assert len(said) == 1 and "is left out: blocks.0.attn: topk: not today" in said[0]
    done = cli("eval", timm_dir, *FEW, "--run", "topk", "-o", tmp_path / "one")  # asked for by name
    assert done.code == 2 and "not today" in done.err


def test_wrapped_mechanisms_are_measured(cli: Command, timm_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = cli("eval", timm_dir, *FEW, "--run", "linear+dwc(kernel=5),linear,mita(m=4,k=4)+gate",
               "-o", run)  # fmt: skip
    assert done.code == 0
    rows = {row["run_with"]: row for row in numbers(run)}
    assert set(rows) == {"standard", "linear+dwc(kernel=5)", "linear", "mita(m=4,k=4)+gate"}
    wrapped = rows["linear+dwc(kernel=5)"]
    assert (wrapped["mechanism"], wrapped["dwc_kernel"]) == ("linear+dwc", 5)
    assert wrapped["top1"] == rows["linear"]["top1"]  # its convolution starts at zero
    assert wrapped["attn_gmacs"] > rows["linear"]["attn_gmacs"]
    assert wrapped["param_count"] > rows["linear"]["param_count"]


def test_columns_of_the_rows(cli: Command, own: Path, tmp_path: Path) -> None:
    cli("eval", own, *DIGITS, "--run", MITA, "-o", tmp_path / "run")
    (row,) = numbers(tmp_path / "run")
    correct = row.pop("correct")
    assert row.pop("top1") == pytest.approx(100 * correct / 40)
    assert row.pop("top1_low") < row.pop("top1_high") and row.pop("top5") + row.pop("top5_err")
    assert row.pop("top1_err") == pytest.approx(100 - 100 * correct / 40) and row.pop("loss") > 0
    card = MECHANISMS.get("mita").card
    for field in fields(card):
        assert row.pop(field.name) == getattr(card, field.name)
    assert 0 < row.pop("attn_gmacs") < row["gmacs"] < row.pop("gmacs_executed")
    assert row.pop("gmacs") and row.pop("attn_mbytes") > 0
    assert row == {
        "study": "matrix", "model": "own", "model_name": str(own),
        "arch": "vit_tiny_patch16_224", "trained_with": MITA,
        "run_with": MITA, "mechanism": "mita", "impl": "auto", "m": 9, "k": 9, "s": 1,
        "variant": "full", "pool": "auto", "shared_scale": "paper", "landmark_tokens": "paper",
        "layers": "*", "data": "digits", "split": "test", "param_count": 0.017, "img_size": 16,
        "crop_pct": 0.9, "interpolation": "bicubic", "batch_size": 64, "device": "cpu",
        "dtype": "float32", "seed": 0, "images": 40, "cell": f"matrix/own/{MITA}", "cell_rows": 1,
    }  # fmt: skip
    plan, origin = load_plan(tmp_path / "run"), load_provenance(tmp_path / "run")
    assert plan["models"] == {"own": str(own)} and plan["limit"] == 40
    assert re.fullmatch("[0-9a-f]{16}", plan["weights"]["own"])
    assert origin["command"].startswith("mitaswap eval ") and origin["versions"]["torch"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # N: squares up to the grid's 8 x 8 patches; K: squares up to the 65 tokens
        (["--grid", "K,N"], {(k * k, m * m) for k in range(1, 9) for m in range(1, 9)}),
        (["--grid", "K=4,9", "--grid", "N=4,6"], {(4, 4), (4, 6), (9, 4), (9, 6)}),
        # the model's own mechanism is swept, m stays as it was trained
        (["--grid", "K=4,4,7"], {(4, 9), (7, 9)}),
    ],
    ids=["defaults", "values-not-square", "one-axis"],
)
def test_grid_of_mita(
    cli: Command,
    own: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    expected: set[tuple[int, int]],
) -> None:
    # which cells there are is the question here, not what they give
    def measure(network: Any, *_: Any) -> dict[str, Any]:
        return {
            "images": 40, "top1": 1.0, "top1_low": 0.0, "top1_high": 2.0,
            "infer_samples_per_sec": 1.0,
        }  # fmt: skip

    monkeypatch.setattr("mitaswap.studies._workbench.measure", measure)
    assert cli("eval", own, *DIGITS, *arguments, "-o", tmp_path / "run").code == 0
    rows = load_rows(tmp_path / "run")
    grid = rows[rows["study"] == "grid"]
    assert set(zip(grid["k"], grid["m"], strict=True)) == expected
    assert len(grid) == len(expected)
    assert (grid["axis_K"] == grid["k"]).all() and set(grid["axis_K_name"]) == {"k"}
    assert ("axis_N" in grid) == (len(set(grid["m"])) > 1)
    # the training cell is measured beside it, as the baseline
    assert ("matrix", "own", MITA) in cells(tmp_path / "run")


def test_grid_of_other_options(cli: Command, timm_dir: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    cli("eval", timm_dir, *DIGITS, "--run", MITA, "--grid", "s=1,2", "-o", a)
    grid = load_rows(a).query("study == 'grid'")
    assert list(grid["run_with"]) == [MITA, "mita(m=9,k=9,s=2)"] and grid["loss"].nunique() == 2
    cli("eval", timm_dir, *DIGITS, "--run", "agent,linear", "--grid", "n=4,6", "-o", b)
    grid = load_rows(b).query("study == 'grid'")
    assert list(grid["run_with"]) == ["agent(n=4)", "agent(n=6)"]  # linear has no such option
    assert list(grid["axis_n"]) == [4, 6]


def test_overlap(cli: Command, timm_dir: Path, own: Path, tmp_path: Path) -> None:
    done = cli("eval", own, timm_dir, *DIGITS, "--stats", "overlap", "-o", tmp_path / "run")
    assert done.code == 0
    rows = load_rows(tmp_path / "run").query("study == 'overlap'")
    # its own mechanism where that routes, else MiTA as in the paper
    found = rows.groupby(["model", "run_with"])[["layer", "head"]].nunique()
    assert list(found.index) == [("own", MITA), ("tiny", "mita(m=25,k=25)")]
    assert (found == 2).all().all()
    assert ((rows["low"] <= rows["value"]) & (rows["value"] <= rows["high"])).all()
    assert rows["chance"].between(0.005, 0.3).all()
    assert set(rows["width"]) == {9, 25} and set(rows["tokens"]) == {65}
    by_layer = rows[rows["model"] == "own"].groupby("layer")["value"].mean()
    for layer, value in enumerate(by_layer, start=1):
        assert f"own {MITA} {layer} {value:.3f}" in words(done.out)


def test_overlap_of_a_grid_too_small_for_the_default(
    cli: Command, tiny: str, tmp_path: Path
) -> None:
    small = tiny.replace("img_size=16", "img_size=8")
    done = cli("eval", small, *DIGITS, "--stats", "overlap", "-o", tmp_path / "run")
    assert done.code == 0, done.err
    rows = load_rows(tmp_path / "run")
    routed = set(rows.query("study == 'overlap'")["run_with"])
    assert routed == {name for name in rows["run_with"] if name.startswith("mita")}
    assert routed and "mita(m=25,k=25)" not in routed


def test_labels(cli: Command, timm_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "lr=0.1").mkdir()
    other = mitaswap.save(mitaswap.load(timm_dir), tmp_path / "lr=0.1" / timm_dir.name)
    models = (other, timm_dir, f"mine={timm_dir}")
    done = cli("eval", *models, *DIGITS, "--run", "standard", "-o", tmp_path / "run")
    assert done.code == 0, done.err
    assert load_plan(tmp_path / "run")["models"] == {
        str(other): str(other),
        str(timm_dir): str(timm_dir),
        "mine": str(timm_dir),
    }
    assert set(load_rows(tmp_path / "run")["trained_with"]) == {"standard"}


# --- going on ------------------------------------------------------------------------------------


@pytest.fixture
def command(own: Path, timm_dir: Path) -> list[object]:
    """A matrix, a grid and a statistic: 2 + 4 + 2 cells."""
    return [
        "eval", own, timm_dir, *DIGITS, "--run", MITA, "--grid", "K=4,7", "--stats", "overlap",
    ]  # fmt: skip


def stop_at(monkeypatch: pytest.MonkeyPatch, cell: int, error: type[BaseException]) -> None:
    """Let the cell of this number (from 1) end in the middle of its images."""
    from mitaswap.studies import _workbench, overlap

    count = iter(range(1, 100))

    def stopping(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if next(count) == cell:
                raise error
            return real(*args, **kwargs)

        return wrapped

    for module, name in ((_workbench, "measure"), (overlap, "observe_routing")):
        monkeypatch.setattr(module, name, stopping(getattr(module, name)))


@pytest.fixture
def whole(cli: Command, command: list[object], tmp_path: Path) -> Path:
    """The run of the command, never interrupted."""
    assert cli(*command, "-o", tmp_path / "whole").code == 0
    return tmp_path / "whole"


def test_the_same_command_recomputes_nothing(
    cli: Command, command: list[object], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in whole.iterdir()}
    stop_at(monkeypatch, 1, AssertionError)
    done = cli(*command, "-o", whole)
    assert done.code == 0 and "it has 9 of 9 cells" in done.err
    assert {file.name: file.read_bytes() for file in whole.iterdir()} == before
    assert "top-1 on digits" in done.out and "overlap" in done.out


@pytest.mark.parametrize("cell", [1, 4, 9])
def test_ctrl_c_keeps_rows_and_the_command_goes_on(
    cli: Command,
    command: list[object],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cell: int,
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, cell, KeyboardInterrupt)
        done = cli(*command, "-o", run)
    assert done.code == 2 and "Traceback" not in done.err
    if cell == 1:
        assert "stopped: no cell was finished; the same command starts again." in done.err
        assert not run.exists()
    else:
        says = f"stopped: {cell - 1} of 9 cells are in {run}; the same command continues there."
        assert says in done.err
        assert numbers(run) == numbers(whole)[: len(numbers(run))]
        assert len({row["cell"] for row in numbers(run)}) == cell - 1
    again = cli(*command, "-o", run)
    assert again.code == 0
    assert (f"it has {cell - 1} of 9 cells" in again.err) == (cell > 1)
    assert numbers(run) == numbers(whole)


@pytest.mark.parametrize("layers", ["*", "1"])
def test_a_cell_of_two_studies_is_measured_once_also_when_the_run_goes_on(
    cli: Command, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: str
) -> None:
    from mitaswap.studies import _workbench

    real, made, run = _workbench.measure, [], tmp_path / "run"

    def measure(*args: Any, **kwargs: Any) -> Any:
        if len(made) == 1 and not again:
            raise KeyboardInterrupt
        made.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(_workbench, "measure", measure)
    again = False
    base = ("eval", own, *DIGITS, "--layers", layers, "--run", MITA, "--grid", "K=9,4", "-o", run)
    assert cli(*base).code == 2
    again = True
    assert cli(*base).code == 0
    found = {(row["study"], row["run_with"], row["layers"]): row for row in numbers(run)}
    shared = [row for (_, spec, where), row in found.items() if (spec, where) == (MITA, layers)]
    assert len(shared) == 2 and len(made) == len({key[1:] for key in found})
    columns = {"cell", "study", "axis_K", "axis_K_name"}
    one, other = ({k: v for k, v in row.items() if k not in columns} for row in shared)
    assert one == other and {"axis_K", "axis_K_name"} & set(shared[1]) == set()


def test_ctrl_c_while_models_are_opened(
    cli: Command, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("mitaswap.evaluation.open_network", stop)
    done = cli("eval", own, *DIGITS, "-o", tmp_path / "run")
    assert done.code == 2 and done.err.startswith("stopped: ")
    assert not (tmp_path / "run").exists()


def test_ctrl_c_while_the_verbs_are_imported(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("mitaswap.cli._app.importlib.import_module", stop)
    done = cli("ls")
    assert (done.code, done.out) == (2, "")
    assert done.err == "stopped: give the same command again.\n"


SIGNAL = """
import os, signal, sys
from mitaswap import evaluation
from mitaswap.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if a script runs the tests by &
seen, real = [], evaluation.Network.logits

def logits(network, x):  # in the middle of the images of the fourth cell
    seen.append(1)
    if len(seen) == 3 * 4 + 2:
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
    return real(network, x)

evaluation.Network.logits = logits
main()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill-9", "ctrl-c"])
def test_a_real_signal_loses_at_most_the_cell_under_way(
    cli: Command, command: list[object], tmp_path: Path, number: signal.Signals
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    small = [*command, "-b", 14]  # three batches of each cell
    process = subprocess.run(
        [sys.executable, "-c", SIGNAL, *map(str, small), "-o", str(run)],
        env={**os.environ, "SIGNAL": str(int(number)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 2, process.stderr
        assert process.stderr.strip().endswith("the same command continues there.")
        assert "Traceback" not in process.stderr
    assert cli(*small, "-o", whole).code == 0
    assert len({row["cell"] for row in numbers(run)}) == 4
    assert "it has 4 of 9 cells" in cli(*small, "-o", run).err
    for one, other in zip(numbers(run), numbers(whole), strict=True):
        assert {k: v for k, v in one.items() if not isinstance(v, float)} == {
            k: v for k, v in other.items() if not isinstance(v, float)
        }
        for name in ("top1", "loss", "value", "chance"):
            assert (name in one) == (name in other)
            assert one.get(name, 0) == pytest.approx(other.get(name, 0), rel=1e-4)


# --- report --------------------------------------------------------------------------------------


def test_report(cli: Command, whole: Path, tmp_path: Path) -> None:
    done = cli("report", whole)
    assert (done.code, done.err) == (0, "")
    page = whole / "report" / "index.html"
    assert words(done.out) == f"report: {page}"
    assert "mita(m=9,k=9)" in page.read_text() and (whole / "report" / "rows.csv").exists()
    # the report inside the run is no obstacle to either command
    assert cli("report", whole).code == 0
    assert cli("report", whole, whole, "-o", tmp_path / "both").code == 0
    assert (tmp_path / "both" / "index.html").exists()


# --- train, finetune -----------------------------------------------------------------------------


FAST = ("--no-aug", "--epochs", 2, "-b", 20, "--warmup-epochs", 0, "-j", 0, "--device", "cpu")


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """A folder of three classes, six images each for training and three for validation."""
    for split, count in (("train", 6), ("val", 3)):
        for label in range(3):
            for number in range(count):
                path = tmp_path / "colours" / split / f"class{label}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded(40 + 70 * label + number))
    return tmp_path / "colours"


def test_train_stop_and_go_on(
    cli: Command, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mitaswap.train import loop

    real, whole, run = loop.validate, tmp_path / "whole", tmp_path / "run"
    base = ("train", tiny, "--to", MITA, "--data", "digits", "--limit", 60, *FAST)
    done = cli(*base, "-o", whole)
    assert done.code == 0
    assert "after 2 epochs, trained with mita(m=9,k=9); written to" in words(done.out)
    calls = iter(range(9))

    def validate(*args: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "validate", validate)
        stopped = cli(*base, "-o", run)
    assert stopped.code == 2
    assert "the same command continues there." in words(stopped.err)
    assert not (run / "model.safetensors").exists()
    assert cli(*base, "-o", run).code == 0
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, run))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first.keys() == open_network(tiny, swapped=False).module.state_dict().keys()

    # what was trained is known to what evaluates it
    assert trained_with(open_network(str(run))) == MITA
    assert {str(p.spec) for p in swapped_sites(mitaswap.load(run)).values()} == {MITA}
    cli("eval", run, *DIGITS, "--run", "standard", "-o", tmp_path / "rows")
    rows = load_rows(tmp_path / "rows")
    assert list(rows["trained_with"]) == [MITA, MITA]
    assert list(rows["run_with"]) == [MITA, "standard"]


def test_train_draws_its_weights_from_the_seed(cli: Command, tiny: str, tmp_path: Path) -> None:
    found: list[torch.Tensor] = []
    for seed in (0, 0, 1):
        folder = tmp_path / str(len(found))
        base = ("train", tiny, "--data", "digits", "--limit", 20, *FAST, "--epochs", 1)
        assert cli(*base, "--seed", seed, "-o", folder).code == 0
        found.append(load_file(folder / "model.safetensors")["head.weight"])
        assert json.loads((folder / "config.json").read_text())[KEY]["trained_with"] == "standard"
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("library", ["timm", "hf"])
def test_finetune_replaces_the_head(
    request: pytest.FixtureRequest, cli: Command, colours: Path, tmp_path: Path, library: str
) -> None:
    folder, out = request.getfixturevalue(f"{library}_dir"), tmp_path / "tuned"
    base = ("finetune", folder, "--to", "agent(n=4)", "--data", colours, *FAST, "-b", 6)
    done = cli(*base, "--lr", 1e-4, "-o", out)
    assert done.code == 0, done.err
    before, after = (load_file(f / "model.safetensors") for f in (folder, out))
    head = "head.weight" if library == "timm" else "classifier.weight"
    assert (before[head].shape[0], after[head].shape[0]) == (10, 3)
    moved = [name for name in before if not name.startswith(head.partition(".")[0])]
    # pretrained weights, and a little further
    assert all(np.allclose(before[name], after[name], atol=0.01) for name in moved)
    assert not all(torch.equal(before[name], after[name]) for name in moved)
    network = open_network(str(out))
    assert trained_with(network) == "agent(n=4)" and network.num_classes == 3
    cli("eval", out, "--data", colours, "--run", "standard", "-o", tmp_path / "run")
    assert list(load_rows(tmp_path / "run")["trained_with"]) == ["agent(n=4)"] * 2


def test_finetune_of_some_layers(
    cli: Command, timm_dir: Path, tmp_path: Path, colours: Path
) -> None:
    base = ("finetune", timm_dir, "--data", colours, *FAST, "-b", 6, "--epochs", 1)
    assert cli(*base, "--to", MITA, "--layers", "1", "-o", tmp_path / "a").code == 0
    name = f"blocks.1.attn: {MITA}"
    assert trained_with(open_network(str(tmp_path / "a"))) == name
    # its own mechanism goes on being the one that is trained
    again = ("finetune", tmp_path / "a", "--data", colours, *FAST, "-b", 6, "--epochs", 1)
    assert cli(*again, "-o", tmp_path / "b").code == 0
    assert list(swapped_sites(mitaswap.load(tmp_path / "b"))) == ["blocks.1.attn"]
    done = cli("eval", tmp_path / "b", "--data", colours, "--run", "standard", "-o", tmp_path / "r")
    assert done.code == 0
    assert list(load_rows(tmp_path / "r")["run_with"]) == [name, "standard"]
    done = cli(*base, "--layers", "1", "-o", tmp_path / "c")
    assert (done.code, words(done.err)) == (2, "error: --layers goes with --to MECHANISM")
