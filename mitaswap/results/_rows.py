"""Reading: what of a run directory is complete, as plain values or as one table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple, Union

import pandas as pd

from mitaswap.errors import MitaswapError

Row = dict[str, Union[str, int, float, bool, None]]

PLAN, ROWS = "run.json", "rows.jsonl"
_NEXT = "Give a directory that `mitaswap eval -o` made."


class Stored(NamedTuple):
    """The complete cells of a rows file."""

    rows: list[dict[str, Any]]
    cells: set[str]
    length: int  # bytes up to the end of the last complete cell


def read_rows(path: Path) -> Stored:
    """All complete cells; what a killed writer left behind the last of them is passed over.

    Raises:
        MitaswapError: damage in the middle, which no crash of ours can cause.
    """
    data = path.read_bytes() if path.exists() else b""
    rows: list[dict[str, Any]] = []
    cells: set[str] = set()
    pending: list[dict[str, Any]] = []
    good = offset = 0
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        offset += len(line)
        try:
            row = json.loads(line)
            key = row["cell"], row["cell_rows"]
        except (ValueError, KeyError, TypeError):
            if offset == len(data):
                break
            raise _damaged(path, number) from None
        if pending and key != (pending[0]["cell"], pending[0]["cell_rows"]):
            raise _damaged(path, number)
        if not line.endswith(b"\n"):
            break
        pending.append(row)
        if len(pending) == key[1]:
            rows += pending
            cells.add(key[0])
            pending, good = [], offset
    return Stored(rows, cells, good)


def _damaged(path: Path, number: int) -> MitaswapError:
    return MitaswapError(
        f"{str(path)!r} is damaged at line {number}, in the middle of the file (a killed run only "
        "ever leaves an unfinished end). Restore the file, or delete all lines of the cell there."
    )


def read_run(directory: Path) -> dict[str, dict[str, Any]]:
    """The `plan` and the `provenance` of a run directory.

    Raises:
        MitaswapError: not a run directory, or its `run.json` cannot be read.
    """
    if not directory.is_dir():
        raise MitaswapError(f"{str(directory)!r} is not a directory. {_NEXT}")
    try:
        stored = json.loads((directory / PLAN).read_text(encoding="utf-8"))
        return {"plan": dict(stored["plan"]), "provenance": dict(stored["provenance"])}
    except FileNotFoundError:
        raise MitaswapError(
            f"{str(directory)!r} is not a run directory: it has no {PLAN}. {_NEXT}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MitaswapError(f"cannot read {str(directory / PLAN)!r}: {error!r}. {_NEXT}") from None


def load_plan(directory: str | Path) -> dict[str, Any]:
    """What a run was asked for.

    Raises:
        MitaswapError: not a run directory, or its `run.json` cannot be read.
    """
    return read_run(Path(directory))["plan"]


def load_provenance(directory: str | Path) -> dict[str, Any]:
    """How a run was measured: its first session; later ones stand under `sessions`.

    Raises:
        MitaswapError: not a run directory, or its `run.json` cannot be read.
    """
    return read_run(Path(directory))["provenance"]


def run_names(*directories: str | Path) -> dict[str, Path]:
    """Name to directory, in the order given, each directory once.

    The name is that of the directory itself, or the path as given where two share a name.
    """
    unique = {Path(directory).resolve(): Path(directory) for directory in directories}
    names = [path.name for path in unique]
    return {
        path.name if names.count(path.name) == 1 else str(given): given
        for path, given in unique.items()
    }


def load_rows(*directories: str | Path) -> pd.DataFrame:
    """The rows of one or more runs as one table, in the order given; nothing on disk is changed.

    A row has its own columns (NaN where it lacks one) and `run`, the name of its directory (the
    path as given where two share a name). The unfinished end of a run that was killed, or that
    still goes on, is left out.

    Raises:
        MitaswapError: no directory given, not a run directory, or a run without a finished cell.
    """
    if not directories:
        raise MitaswapError(f"no run directory given. {_NEXT}")
    table: list[dict[str, Any]] = []
    for name, directory in run_names(*directories).items():
        read_run(directory)
        rows = read_rows(directory / ROWS).rows
        if not rows:
            raise MitaswapError(
                f"the run {str(directory)!r} has no finished cell yet. Give the command that made "
                "it again: it continues."
            )
        # A file name may hold bytes that are no UTF-8; a data frame cannot.
        table += [{k: _text(v) for k, v in {**row, "run": name}.items()} for row in rows]
    return pd.DataFrame(table)


def _text(value: Any) -> Any:
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def wilson(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a proportion, (low, high) in percent.

    Args:
        correct: successes, 0 <= correct <= n.
        n: trials; without any, the interval is (0, 100).
        z: normal quantile; the default gives 95%.
    """
    if not 0 <= correct <= n:
        raise ValueError(f"wilson needs 0 <= correct <= n, got correct={correct}, n={n}")
    if n == 0:
        return 0.0, 100.0
    share, z2 = correct / n, z * z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # With none or all correct one bound is 0 or 1 exactly; rounding would miss it by 1e-17.
    low = 0.0 if correct == 0 else centre - half
    high = 1.0 if correct == n else centre + half
    return 100 * low, 100 * high
