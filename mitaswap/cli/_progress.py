"""The progress bar: images per second and time left, on standard error, in 80 columns."""

from __future__ import annotations

from types import TracebackType

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from mitaswap.cli._app import err


def progress(*middle: ProgressColumn) -> Progress:
    """A bar with words in the middle and times at the end. Where there is no room for all of it the
    bar is shorter, never a time.
    """

    def whole(width: int | None = None) -> Column:
        return Column(no_wrap=True, min_width=width)

    return Progress(
        TextColumn("{task.description}", markup=False, table_column=whole()),
        BarColumn(bar_width=None, table_column=Column(max_width=24)),
        *middle,
        TimeElapsedColumn(table_column=whole(7)),
        TextColumn("left", table_column=whole()),
        TimeRemainingColumn(table_column=whole(7)),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        known = speed is not None and task.fields.get("rate", True)
        return Text(f"{speed:.0f} img/s" if known else "", style="progress.data.speed")


class Bar:
    """Progress over images; decoding first, then the cells."""

    def __init__(self) -> None:
        self._progress = progress(
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            _Rate(table_column=Column(no_wrap=True)),
        )
        self._decode: TaskID | None = None
        self._cells: TaskID | None = None

    def decoded(self, done: int, total: int) -> None:
        """So many of so many images are decoded."""
        if self._decode is None:
            self._decode = self._progress.add_task("decoding", total=total)
        self._progress.update(self._decode, completed=done, total=total)

    def start(self, images: int, doing: str = "evaluating", rate: bool = True) -> None:
        """The cells begin: forward passes of `images` images in all.

        Args:
            rate: whether they are images, so that images per second mean something.
        """
        self._cells = self._progress.add_task(doing, total=images, rate=rate)

    def images(self, count: int) -> None:
        """`count` more images were evaluated."""
        if self._cells is not None:
            self._progress.advance(self._cells, count)

    def cell(self, label: str) -> None:
        """A cell is done and on disk."""
        if not err.is_terminal:
            err.print(f"done: {label}", markup=False, highlight=False)

    def stop(self) -> None:
        """Take the bar off the screen."""
        self._progress.stop()

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()
