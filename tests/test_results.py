"""Rows survive kill -9, a full disk and a second process; a run never mixes two plans."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mitaswap import results
from mitaswap.errors import MitaswapError
from mitaswap.results import Run, load_plan, load_provenance, load_rows, provenance, wilson

PLAN: dict[str, Any] = {"models": ["tiny"], "grid": {"K": [1, 4], "N": [9]}, "limit": 100}
HOW: dict[str, Any] = {"device": "cpu", "dtype": "float32", "seed": 0}


def start(script: str, *args: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def line(cell: str, size: int, **columns: Any) -> str:
    return json.dumps({"cell": cell, "cell_rows": size, **columns}) + "\n"


def run_with(directory: Path, tail: str) -> Path:
    """A run with the complete cell "a" (two rows), then `tail`; returns its rows file."""
    with Run.open(directory, PLAN, HOW) as run:
        run.append("a", [{"top1": 1.0}, {"top1": 2.0}])
    rows = directory / "rows.jsonl"
    with rows.open("a") as file:
        file.write(tail)
    return rows


def test_rows_come_back_with_plan_and_provenance(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", PLAN, HOW) as run:
        run.append("a", [{"model": "vit", "top1": 73.1, "own": True, "note": None}])
        run.append("b", [{"model": "vit", "layer": 0}, {"model": "vit", "layer": 1}])
        assert run.done == {"a", "b"}
    table = load_rows(tmp_path / "run")
    assert table["cell"].tolist() == ["a", "b", "b"]
    assert table["cell_rows"].tolist() == [1, 2, 2]
    assert table["run"].unique().tolist() == ["run"]
    assert table["top1"][0] == 73.1 and table["top1"].isna().tolist() == [False, True, True]
    assert table["own"][0] is True and pd.isna(table["note"][0])
    assert load_plan(tmp_path / "run") == PLAN
    assert load_provenance(tmp_path / "run") == {**HOW, "sessions": []}


def test_numpy_scalars_are_plain_values_and_infinities_are_null(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", PLAN, HOW) as run:
        run.append("a", [{"n": np.int64(3), "x": np.float32(0.5), "loss": math.nan, "y": math.inf}])
    stored = json.loads((tmp_path / "run" / "rows.jsonl").read_text())
    assert (stored["n"], stored["x"], stored["loss"], stored["y"]) == (3, 0.5, None, None)


def test_names_that_are_no_utf_8_can_be_stored(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")  # a file name in Latin-1
    for _ in range(2):
        with Run.open(tmp_path / "run", {"model": name}, HOW) as run:
            if name not in run.done:
                run.append(name, [{"model": name}])
    assert load_rows(tmp_path / "run")["model"].tolist() == ["caf?"]


def test_a_value_that_is_no_plain_value_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", PLAN, HOW) as run:
        with pytest.raises(TypeError, match="column 'grid' holds a list"):
            run.append("a", [{"grid": [1, 2]}])
        assert run.done == set()
    assert (tmp_path / "run" / "rows.jsonl").read_bytes() == b""


def test_a_cell_is_written_once_and_is_never_empty(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", PLAN, HOW) as run:
        run.append("a", [{"top1": 1.0}])
        with pytest.raises(ValueError, match="'a' is written already"):
            run.append("a", [{"top1": 2.0}])
        with pytest.raises(ValueError, match="'b' has no rows"):
            run.append("b", [])


def test_the_same_plan_continues_and_notes_the_session_with_its_first_cell(tmp_path: Path) -> None:
    where = tmp_path / "run"
    with Run.open(where, {**PLAN, "size": (224, 224)}, HOW) as run:
        run.append("a", [{"top1": 1.0}])
    later = {**HOW, "device": "cuda"}
    with Run.open(where, {**PLAN, "size": [224, 224]}, later) as run:  # tuples are JSON lists
        assert run.done == {"a"}
        assert load_provenance(where)["sessions"] == []
        run.append("b", [{"top1": 2.0}])
        run.append("c", [{"top1": 3.0}])
    assert load_provenance(where) == {**HOW, "sessions": [later]}
    assert load_rows(where)["cell"].tolist() == ["a", "b", "c"]


def test_another_plan_is_refused_with_exactly_the_fields_that_differ(tmp_path: Path) -> None:
    where = tmp_path / "run"
    with Run.open(where, PLAN, HOW) as run:
        run.append("a", [{"top1": 1.0}])
    before = {path.name: path.read_bytes() for path in where.iterdir()}
    asked = {"models": ["tiny"], "grid": {"K": [1, 9], "N": [9]}, "stats": ["overlap"]}
    with pytest.raises(MitaswapError) as caught:
        Run.open(where, asked, HOW)
    text = str(caught.value)
    listed = [row.strip() for row in text.splitlines() if row.startswith("  ")]
    assert listed == [
        "grid.K: there [1, 4], asked now [1, 9]",
        "limit: there 100, asked now not set",
        'stats: there not set, asked now ["overlap"]',
    ]
    assert "Choose another directory with -o" in text and str(where) in text
    assert {path.name: path.read_bytes() for path in where.iterdir()} == before
    Run.open(where, PLAN, HOW).close()  # and the lock was released


def test_a_directory_with_other_content_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(MitaswapError, match="not empty and not a run directory"):
        Run.open(tmp_path, PLAN, HOW)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_way_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(MitaswapError, match=r"cannot write to .*File exists"):
        Run.open(tmp_path / "run", PLAN, HOW)


@pytest.mark.parametrize("left", [["rows.jsonl"], ["rows.jsonl", "run.json.partial"]], ids="+".join)
def test_a_process_killed_while_it_made_the_directory_does_no_harm(
    tmp_path: Path, left: list[str]
) -> None:
    for name in left:
        (tmp_path / name).write_text("" if name == "rows.jsonl" else '{"pl')
    with Run.open(tmp_path, PLAN, HOW) as run:
        run.append("a", [{"top1": 1.0}])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "run.json"]


@pytest.mark.parametrize(
    "tail",
    [
        '{"cell": "b", "cell_r',
        line("b", 1).rstrip("\n"),
        line("b", 3) + line("b", 3),
        line("b", 3) + '{"cell": "b',
        "\0\0\0\0",
    ],
    ids=["half a line", "no newline", "two rows of three", "one and a half of three", "zeros"],
)
def test_an_unfinished_end_is_cut_off(tmp_path: Path, tail: str) -> None:
    rows = run_with(tmp_path / "run", tail)
    dirty = rows.read_bytes()
    assert load_rows(tmp_path / "run")["cell"].tolist() == ["a", "a"]
    assert rows.read_bytes() == dirty, "reading must not change the file"
    with Run.open(tmp_path / "run", PLAN, HOW) as run:
        assert run.done == {"a"}
        run.append("b", [{"top1": 3.0}])
    assert load_rows(tmp_path / "run")["cell"].tolist() == ["a", "a", "b"]


@pytest.mark.parametrize(
    "tail",
    ["garbage\n" + line("b", 1), line("b", 2) + line("c", 1)],
    ids=["unreadable line", "cell with too few rows"],
)
def test_damage_in_the_middle_is_reported_and_nothing_is_cut(tmp_path: Path, tail: str) -> None:
    rows = run_with(tmp_path / "run", tail)
    dirty = rows.read_bytes()
    number = 3 if tail.startswith("garbage") else 4
    with pytest.raises(MitaswapError, match=f"damaged at line {number}, in the middle"):
        load_rows(tmp_path / "run")
    with pytest.raises(MitaswapError, match=f"damaged at line {number}, in the middle"):
        Run.open(tmp_path / "run", PLAN, HOW)
    assert rows.read_bytes() == dirty


def test_kill_9_loses_at_most_the_cell_under_way(tmp_path: Path) -> None:
    script = """
        import sys
        from mitaswap.results import Run
        with Run.open(sys.argv[1], {"loop": 1}, {}) as run:
            for i in range(1_000_000):
                run.append(f"c{i}", [{"i": i, "pad": "x" * 3000} for _ in range(5)])
                print(i, flush=True)
    """
    where = tmp_path / "run"
    for wait in (0.02, 0.037):  # different moments within a write
        process = start(script, where)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        told = process.communicate()[0].split()
        if where.joinpath("rows.jsonl").stat().st_size == 0:
            pytest.fail("the writer wrote nothing")
        with Run.open(where, {"loop": 1}, {}) as run:
            done = set(run.done)
        table = load_rows(where)
        assert (table.groupby("cell").size() == 5).all(), "a half cell survived"
        assert set(table["cell"]) == done
        assert {f"c{i}" for i in told} <= done, "a cell that was reported as written is lost"
        for path in where.iterdir():
            path.unlink()


def test_a_torn_write_at_every_length_leaves_whole_cells_only(tmp_path: Path) -> None:
    rows = run_with(tmp_path / "run", "")
    whole = rows.read_bytes()
    for length in range(len(whole)):
        rows.write_bytes(whole[:length])
        with Run.open(tmp_path / "run", PLAN, HOW) as run:
            assert run.done == set()
        assert rows.read_bytes() == b""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_keeps_all_rows_and_the_same_command_continues(tmp_path: Path) -> None:
    script = """
        import resource, signal, sys
        from mitaswap.errors import MitaswapError
        from mitaswap.results import Run
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with Run.open(sys.argv[1], {}, {}) as run:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
            try:
                for i in range(10):
                    run.append(f"c{i}", [{"pad": "x" * 600}, {"pad": "y" * 600}])
            except MitaswapError as error:
                print(error)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            print(len(run.done))
            run.append("after", [{"pad": ""}])
    """
    out, err = start(script, tmp_path / "run").communicate()
    assert not err, err
    message, count = out.splitlines()
    assert "cannot write cell 'c3'" in message and "the disk is full" in message
    assert "(cells: 3)" in message and "same command again: it continues" in message
    assert count == "3"
    cells = load_rows(tmp_path / "run")["cell"].tolist()
    assert cells == ["c0"] * 2 + ["c1"] * 2 + ["c2"] * 2 + ["after"]


@pytest.mark.parametrize("cause", [OSError(errno.EIO, "I/O error"), KeyboardInterrupt()], ids=repr)
def test_an_interrupted_write_leaves_no_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: BaseException
) -> None:
    with Run.open(tmp_path / "run", PLAN, HOW) as run:
        run.append("a", [{"top1": 1.0}])
        good = (tmp_path / "run" / "rows.jsonl").read_bytes()

        def fail(descriptor: int) -> None:
            raise cause

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)  # the bytes are in the file already
            expected = MitaswapError if isinstance(cause, OSError) else KeyboardInterrupt
            with pytest.raises(expected) as caught:
                run.append("b", [{"top1": 2.0}])
        if isinstance(cause, OSError):
            assert "the disk cannot be written (I/O error)" in str(caught.value)
        assert (tmp_path / "run" / "rows.jsonl").read_bytes() == good
        run.append("b", [{"top1": 2.0}])
    assert load_rows(tmp_path / "run")["cell"].tolist() == ["a", "b"]


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    with Run.open(tmp_path / "run", PLAN, HOW) as run, monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
        run.append("a", [{"top1": 1.0}, {"top1": 2.0}])
    assert load_rows(tmp_path / "run")["top1"].tolist() == [1.0, 2.0]


def test_a_run_without_a_cell_is_discarded_with_what_it_made(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for directory in (tmp_path / "a" / "b", tmp_path / "mine"):
        with Run.open(directory, {}, {}) as run:
            run.discard()
        assert [path.name for path in tmp_path.rglob("*")] == ["mine"]
    with Run.open(tmp_path / "mine", {}, {}) as run:
        run.append("cell", [{"a": 1}])
        run.discard()
    with Run.open(tmp_path / "mine", {}, {}) as run:
        run.discard()
        assert run.done == {"cell"} and [row["a"] for row in run.rows] == [1]
    assert len(load_rows(tmp_path / "mine")) == 1


def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    script = """
        import sys
        from mitaswap.results import Run
        with Run.open(sys.argv[1], {"models": ["tiny"]}, {}):
            print("open", flush=True)
            sys.stdin.readline()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "open\n"
    with pytest.raises(MitaswapError, match=r"another process has the run .* open"):
        Run.open(tmp_path / "run", {"models": ["tiny"]}, {})
    process.communicate("\n")
    Run.open(tmp_path / "run", {"models": ["tiny"]}, {}).close()


def test_runs_load_together_under_distinct_names(tmp_path: Path) -> None:
    for name in ("a/run", "b/run", "c/other"):
        with Run.open(tmp_path / name, PLAN, HOW) as run:
            run.append(name, [{"top1": 1.0}])
    paths = [tmp_path / name for name in ("a/run", "b/run", "c/other")]
    table = load_rows(*paths, paths[0])
    assert table["run"].tolist() == [str(paths[0]), str(paths[1]), "other"]


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(MitaswapError, match="no run directory given"):
        load_rows()
    with pytest.raises(MitaswapError, match=r"'.*nowhere' is not a directory"):
        load_rows(tmp_path / "nowhere")
    with pytest.raises(MitaswapError, match=r"not a run directory: it has no run\.json"):
        load_plan(tmp_path)
    Run.open(tmp_path / "empty", PLAN, HOW).close()
    with pytest.raises(MitaswapError, match="no finished cell yet"):
        load_rows(tmp_path / "empty")
    (tmp_path / "empty" / "run.json").write_text("[")
    with pytest.raises(MitaswapError, match=r"cannot read .*run\.json"):
        load_plan(tmp_path / "empty")


@pytest.mark.parametrize(("correct", "n"), [(50, 100), (1, 10), (0, 10), (10, 10), (38550, 50000)])
def test_wilson_bounds_lie_1_96_standard_errors_from_the_share(correct: int, n: int) -> None:
    # Its definition: a bound p is where |share - p| = z sqrt(p (1 - p) / n).
    share = correct / n
    low, high = (bound / 100 for bound in wilson(correct, n))
    assert 0 <= low <= share <= high <= 1 and low < high
    for bound in (low, high):
        distance = 1.959964 * math.sqrt(bound * (1 - bound) / n)
        assert abs(share - bound) == pytest.approx(distance, abs=1e-12)


def test_wilson_is_wider_for_fewer_trials() -> None:
    assert wilson(50, 100) == pytest.approx((40.383, 59.617), abs=1e-3)
    few, many = wilson(5, 10), wilson(500, 1000)
    assert few[0] < many[0] < 50 < many[1] < few[1]


def test_wilson_without_trials_says_nothing() -> None:
    assert wilson(0, 0) == (0.0, 100.0)


def test_wilson_refuses_more_correct_than_trials() -> None:
    with pytest.raises(ValueError, match="correct=3, n=2"):
        wilson(3, 2)


def test_provenance_names_what_is_needed_to_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/opt/x/mitaswap/__main__.py", "eval", "a b", "-o", "run"])
    found = provenance("cpu", "float32", 7)
    assert found["command"] == "mitaswap eval 'a b' -o run"
    assert (found["device"], found["dtype"], found["seed"]) == ("cpu", "float32", 7)
    assert found["versions"]["pandas"] == pd.__version__ and found["versions"]["python"]
    assert {"started", "commit", "platform"} <= found.keys()
    json.dumps(found)


def test_results_load_no_torch() -> None:
    script = "import mitaswap.results, sys; assert 'torch' not in sys.modules"
    assert results.__name__ in script
    process = start(script)
    assert process.wait() == 0, process.communicate()[1]
