"""`mitaswap report`: rows become a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from mitaswap.cli._app import app, out


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories of `eval` or `bench`.")
    ],
    output: Annotated[
        Optional[Path],
        typer.Option("-o", "--output", help="Directory to write; default: RUN/report."),
    ] = None,
) -> None:
    """Write one self-contained HTML page with the figures, tables and how every number was made.

    Example: `mitaswap report runs/demo -o report`
    """
    from mitaswap.report import write_report

    page = write_report(runs, output or runs[0] / "report")
    out.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)
