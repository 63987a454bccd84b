"""Put a report together and on disk, all of it or nothing."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from mitaswap import __version__
from mitaswap.errors import MitaswapError
from mitaswap.figures import DARK, LIGHT
from mitaswap.report import _summary
from mitaswap.report._drawings import Drawing, charts, drawings
from mitaswap.report._table import Table
from mitaswap.report._taxonomy import linked, taxonomy_table
from mitaswap.results import load_plan, load_provenance, load_rows
from mitaswap.results._rows import run_names

_PAGE, _TEXT, _TABLE, _FIGURES = "index.html", "report.md", "rows.csv", "figures"
_GENERATOR = '<meta name="generator" content="mitaswap'
_ROOM = 2_500_000  # bytes of drawings and files in the page, which should stay below 3 MB
# Not allowed in XML or not writable as UTF-8; JSON can hold them all.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def write_report(directories: Sequence[str | Path], output: str | Path) -> Path:
    """Write the report of one or more runs.

    Args:
        directories: run directories; their rows are shown together.
        output: directory to write: `index.html`, `report.md`, `rows.csv` and `figures/`. It is new,
            empty, or holds an earlier report, which is replaced once the new one is complete.

    Returns:
        The path of `index.html`.

    Raises:
        MitaswapError: not a run, a run without rows, an output directory with other content, or a
            disk that cannot be written. An earlier report is then as it was.
    """
    target = Path(output)
    table = load_rows(*directories).map(_printable)
    names = run_names(*directories)
    runs = [_run(name, directory) for name, directory in names.items()]
    _refuse_foreign(target)
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    try:
        (partial / _FIGURES).mkdir(parents=True)
        _fill(partial, table, runs)
        _replace(target, partial)
    except OSError as error:
        raise MitaswapError(
            f"cannot write the report to {str(target)!r}: {error.strerror or error}. What was "
            "there before is unchanged. Free some space, or choose another directory with -o."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target / _PAGE


def _fill(directory: Path, table: pd.DataFrame, runs: list[dict[str, Any]]) -> None:
    taken: set[str] = set()
    sections = []
    every: list[Drawing] = []
    for chart in charts(table):
        drawn = drawings(chart, table, directory / _FIGURES, taken)
        every += drawn
        shown = [(item, Table.of(item.panel.data, item.panel.decimals)) for item in drawn]
        sections.append({"chart": chart, "drawings": shown})
    table.to_csv(directory / _TABLE, index=False)
    attached = _attached(directory, every)
    models = list(dict.fromkeys(table["model"].dropna())) if "model" in table else []
    content = {
        "version": __version__,
        "subject": ", ".join(map(str, models[:6])) + (" and others" if len(models) > 6 else ""),
        "sentences": _summary.sentences(table),
        "swaps": Table.of(_summary.swap_table(table)),
        "grids": Table.of(_summary.grid_table(table)),
        "sections": sections,
        "taxonomy": Table.of(taxonomy_table(table)),
        "accuracy": Table.of(_summary.accuracy_table(table)),
        "numerics": Table.of(_summary.numerics_table(table), 3),
        "runs": runs,
        "rows": len(table),
        "attached": attached,
        "light": LIGHT,
        "dark": DARK,
    }
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("mitaswap"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"md": _markdown, "linked": linked}
    for template, name in (("report.html", _PAGE), ("report.md", _TEXT)):
        text = templates.get_template(template).render(content)
        (directory / name).write_text(text, encoding="utf-8")


def _attached(directory: Path, drawn: list[Drawing]) -> dict[str, str]:
    """Files of the report as data URIs, by name: a page that is sent alone offers them, too.

    Those that would make it too large are left out; PNGs always are, the SVG is sharper.
    """
    room = _ROOM - sum(len(item.light.encode()) + len(item.dark.encode()) for item in drawn)
    found = {}
    names = {_TABLE: "text/csv", **{f"{_FIGURES}/{d.stem}.svg": "image/svg+xml" for d in drawn}}
    for name, kind in names.items():
        path = directory / name
        if 4 * path.stat().st_size // 3 < room:
            found[name] = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
            room -= len(found[name])
    return found


def _run(name: str, directory: Path) -> dict[str, Any]:
    """What a run's `run.json` says, as (title, text) pairs, sessions and the plan."""
    origin = load_provenance(directory)
    sessions = origin.get("sessions") or []
    plan = json.dumps(load_plan(directory), indent=2, ensure_ascii=False)
    return {
        "name": _printable(name),
        "facts": _facts(origin),
        "sessions": [_facts(session) for session in sessions],
        "plan": "\n".join(_printable(line) for line in plan.splitlines()),
    }


def _facts(origin: dict[str, Any]) -> list[tuple[str, str]]:
    versions = origin.get("versions") or {}
    known = {
        "Command": origin.get("command"),
        "Started (UTC)": origin.get("started"),
        "Commit": origin.get("commit"),
        "Device": origin.get("device"),
        "Number format": origin.get("dtype"),
        "Seed": origin.get("seed"),
        "Platform": origin.get("platform"),
        "CPU cores": origin.get("cpu_count"),
        "Versions": ", ".join(f"{package} {version}" for package, version in versions.items()),
    }
    return [
        (title, _printable("not recorded" if value in (None, "") else str(value)))
        for title, value in known.items()
    ]


def _printable(value: Any) -> Any:
    return _UNPRINTABLE.sub("\ufffd", value) if isinstance(value, str) else value


def _markdown(text: object) -> str:
    """User text inside a line or table cell of Markdown, shown as it is."""
    flat = " ".join(str(text).split())
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#|!~$])", r"\\\1", flat)


def _refuse_foreign(target: Path) -> None:
    """Only an earlier report may be replaced: nobody's other files are in it."""
    if target.exists() and not target.is_dir():
        raise MitaswapError(f"{str(target)!r} is a file. Choose another directory with -o.")
    names = {entry.name for entry in target.iterdir()} if target.exists() else set()
    if not names:
        return
    page = target / _PAGE
    ours = page.is_file() and _GENERATOR in page.read_text(encoding="utf-8", errors="replace")
    foreign = names - {_PAGE, _TEXT, _TABLE, _FIGURES}
    if (target / _FIGURES).is_dir():
        drawn = (target / _FIGURES).iterdir()
        foreign |= {entry.name for entry in drawn if entry.suffix not in (".svg", ".png")}
    if not ours or foreign:
        held = ", ".join(sorted(foreign or names)[:5])
        raise MitaswapError(
            f"{str(target)!r} holds something that is no report of mitaswap ({held}), so it is not "
            "replaced. Choose a new directory with -o."
        )


def _replace(target: Path, partial: Path) -> None:
    old = partial.with_suffix(".old")
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(partial, target)
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
