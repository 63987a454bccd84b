"""Tables that fit 80 columns: few lines, words that are not cut, text that is never markup."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from rich import box
from rich.table import Table
from rich.text import Text

from mitaswap.cli._app import out

#: words up to this length are never cut; paths may be longer
_WORD = 16

#: what a column holds: text that may be folded, words that may not, or numbers
Kind = Literal["text", "words", "number"]


def show(
    title: str,
    columns: Mapping[str, Kind],
    rows: Iterable[Sequence[object]],
    strong: Sequence[bool] = (),
) -> None:
    """Print a table.

    Args:
        title: stands above it, in one line however long.
        columns: header to what is in the column.
        rows: cells of each row; None gives an empty one.
        strong: whether a row is bold, for each row.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    lines = [[cell if isinstance(cell, Text) else Text(_plain(cell)) for cell in r] for r in rows]
    texts = [[header, *(str(line[i]) for line in lines)] for i, header in enumerate(columns)]
    widths = _widths(texts, list(columns.values()), out.width - 2 * len(columns))
    for (header, kind), width in zip(columns.items(), widths, strict=True):
        table.add_column(
            header,
            justify="right" if kind == "number" else "left",
            overflow="fold",
            no_wrap=kind != "text",
            width=width,
        )
    for number, line in enumerate(lines):
        table.add_row(*line, style="bold" if any(strong[number : number + 1]) else None)
    out.print(Text(title, "bold"), soft_wrap=True)
    out.print(table)


def _widths(columns: Sequence[Sequence[str]], kinds: Sequence[Kind], room: int) -> list[int]:
    """A width for every column: what it wants where there is room, its longest word in any case,
    the rest to those that want few more.
    """
    wanted = [max(map(len, cells)) for cells in columns]
    least = [
        min(max(len(word) for cell in cells for word in cell.split() or [""]), _WORD)
        for cells in columns
    ]
    widths = [
        want if kind != "text" else few
        for want, few, kind in zip(wanted, least, kinds, strict=True)
    ]
    while sum(widths) < room and widths != wanted:
        missing = [want - width for want, width in zip(wanted, widths, strict=True)]
        widths[missing.index(min(m for m in missing if m > 0))] += 1
    return widths


def _plain(cell: object) -> str:
    return "" if cell is None else str(cell)
