"""Writing: an open run directory, to which whole cells are appended."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from mitaswap.errors import MitaswapError
from mitaswap.results._rows import PLAN, ROWS, Stored, read_rows, read_run

_PARTIAL = "run.json.partial"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MISSING = object()
_log = logging.getLogger(__name__)


class Run:
    """An open run directory; use as a context manager.

    Attributes:
        directory: where it lies.
        plan: what was asked, as stored.
        provenance: how its first session measured; later sessions stand under `sessions`.
        done: keys of the cells that are complete on disk.
        rows: theirs, as they were when it was opened.
    """

    def __init__(
        self, directory: Path, descriptor: int, run: dict[str, dict[str, Any]], stored: Stored
    ) -> None:
        self.directory = directory
        self.plan = run["plan"]
        self.provenance = run["provenance"]
        self.done: set[str] = stored.cells
        self.rows = stored.rows
        self._descriptor = descriptor
        self._length = stored.length
        self._session: dict[str, Any] | None = None
        self._made: list[Path] = []

    @classmethod
    def open(
        cls, directory: str | Path, plan: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> Run:
        """Create a run directory, or continue the one that is there if its plan is equal.

        A continued run notes this session's provenance when it appends its first cell.

        Raises:
            MitaswapError: another plan (lists the fields that differ), a directory with other
                content, a run that another process has open, or a disk that cannot be written.
        """
        path = Path(directory)
        asked: dict[str, Any] = json.loads(json.dumps(plan, default=str))
        made = [p for p in (path, *path.parents) if not os.path.exists(p)]
        descriptor = -1
        try:
            path.mkdir(parents=True, exist_ok=True)
            _refuse_foreign(path)
            descriptor = os.open(path / ROWS, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            _lock(descriptor, path)
            fresh = not (path / PLAN).exists()
            if fresh:  # so the files, too, are this process's own: it has the lock
                made = [path / PLAN, path / ROWS, *made]
                run = {"plan": asked, "provenance": {**provenance, "sessions": []}}
                _write_json(path, run)
            else:
                run = read_run(path)
                _refuse_other_plan(path, run["plan"], asked)
            stored = read_rows(path / ROWS)
            os.ftruncate(descriptor, stored.length)
        except BaseException as error:
            if descriptor >= 0:
                os.close(descriptor)
            _remove(made)
            if isinstance(error, OSError):
                raise _unusable(path, error) from None
            raise
        opened = cls(path, descriptor, run, stored)
        opened._session = None if fresh else dict(provenance)
        opened._made = made
        return opened

    def append(self, cell: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write all rows of one cell, durably: after a crash they are all there, or none is.

        Args:
            cell: key of the cell, new to this run.
            rows: at least one row; each gets the columns `cell` and `cell_rows`. A float that is
                not finite becomes null, which reads back as NaN.

        Raises:
            MitaswapError: the disk is full or fails; the file is as it was before the call.
        """
        if cell in self.done:
            raise ValueError(f"cell {cell!r} is written already")
        if not rows:
            raise ValueError(f"cell {cell!r} has no rows, so it could never count as done")
        own = {"cell": cell, "cell_rows": len(rows)}
        lines = []
        for row in rows:
            plain = {column: _plain(value, column) for column, value in row.items()}
            lines.append(json.dumps({**plain, **own}, allow_nan=False) + "\n")
        data = "".join(lines).encode()
        try:
            self._note_session()
            left = memoryview(data)
            while left:  # one write, unless the disk takes only a part of it
                left = left[os.write(self._descriptor, left) :]
            os.fsync(self._descriptor)
        except BaseException as error:
            # Also on Ctrl-C: a cell that `done` does not know must not be in the file.
            os.ftruncate(self._descriptor, self._length)
            if not isinstance(error, OSError):
                raise
            what = "the disk is full" if error.errno in _FULL else "the disk cannot be written"
            raise MitaswapError(
                f"cannot write cell {cell!r} to {str(self.directory)!r}: {what} "
                f"({error.strerror}). All rows before it are kept (cells: {len(self.done)}). Free "
                "some space and give the same command again: it continues there."
            ) from error
        self._length += len(data)
        self.done.add(cell)

    def _note_session(self) -> None:
        if self._session is None:
            return
        sessions = [*self.provenance.get("sessions", []), self._session]
        noted = {**self.provenance, "sessions": sessions}
        _write_json(self.directory, {"plan": self.plan, "provenance": noted})
        self.provenance, self._session = noted, None

    def discard(self) -> None:
        """Remove what opening it made, if no cell came of it: as if it had never been asked for."""
        if not self.done:
            _remove(self._made)

    def close(self) -> None:
        """Release the directory for other processes; closing twice is fine."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _remove(made: Sequence[Path]) -> None:
    """Files, and then the directories that are empty without them."""
    for path in made:
        with suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink()


def _unusable(path: Path, error: OSError) -> MitaswapError:
    return MitaswapError(
        f"cannot write to {str(path)!r}: {error.strerror}. Choose another directory with -o."
    )


def _refuse_foreign(path: Path) -> None:
    names = {entry.name for entry in path.iterdir()}
    if not names or PLAN in names:
        return
    # A process killed while it made the directory leaves an empty rows file, perhaps half a plan.
    if names <= {ROWS, _PARTIAL} and not (ROWS in names and (path / ROWS).stat().st_size):
        return
    raise MitaswapError(
        f"{str(path)!r} is not empty and not a run directory (it has no {PLAN}), so nothing is "
        "written into it. Choose a new directory with -o."
    )


def _refuse_other_plan(path: Path, stored: dict[str, Any], asked: dict[str, Any]) -> None:
    if _verb(stored) != _verb(asked):
        raise MitaswapError(
            f"{str(path)!r} was made by `mitaswap {_verb(stored)}`, and `mitaswap {_verb(asked)}` "
            "writes other rows. Choose another directory with -o."
        )
    lines = _differences(stored, asked)
    if lines:
        raise MitaswapError(
            f"{str(path)!r} holds a run that asked for something else, and rows of two plans are "
            "not mixed. These fields differ:\n  " + "\n  ".join(lines) + "\n"
            "Choose another directory with -o, or repeat the command that made it to continue it."
        )


def _verb(plan: Mapping[str, Any]) -> str:
    return "bench" if "bench" in plan else "eval"


def _differences(stored: Any, asked: Any, field: str = "") -> list[str]:
    """One line for each field in which two plans differ; nested fields with dots."""
    if not (isinstance(stored, dict) and isinstance(asked, dict)):
        old, new = _shown(stored), _shown(asked)
        return [] if old == new else [f"{field}: there {old}, asked now {new}"]
    lines = []
    for key in [*stored, *(key for key in asked if key not in stored)]:
        name = f"{field}.{key}" if field else str(key)
        lines += _differences(stored.get(key, _MISSING), asked.get(key, _MISSING), name)
    return lines


def _shown(value: Any) -> str:
    if value is _MISSING:
        return "not set"
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _plain(value: Any, column: str) -> str | int | float | bool | None:
    if hasattr(value, "item"):  # a NumPy scalar or a tensor of one element
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has neither NaN nor infinity, and strict readers refuse the file
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(
        f"column {column!r} holds a {type(value).__name__}; "
        "a row holds strings, numbers, booleans and None"
    )


def _lock(descriptor: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        _log.warning("no flock on this system: see to it that no second process uses %s", path)
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise MitaswapError(
            f"another process has the run {str(path)!r} open. Wait until it ends, or choose "
            "another directory with -o."
        ) from None
    except OSError as error:  # some network file systems refuse every lock
        _log.warning("cannot lock %s (%s): keep a second process away", path, error.strerror)


def _write_json(directory: Path, run: Mapping[str, Any]) -> None:
    partial = directory / _PARTIAL
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump(run, file, indent=2)  # ASCII: a path may hold bytes that are no UTF-8
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, directory / PLAN)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
