"""Parquet files in the Hugging Face layout: encoded images in a column, labels in another."""

from __future__ import annotations

import bisect
import hashlib
import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mitaswap.data._base import SETS, ImageSet, file_mark
from mitaswap.data._image import SampleError, load_image
from mitaswap.data._layout import holds_parquet, parquet_shards, pick, split_of
from mitaswap.errors import MitaswapError
from mitaswap.spec import Value

# the names that data sets on the hub use, the usual one first
_IMAGE = ("image", "img")
_LABEL = ("label", "labels", "fine_label")
_CACHE = 256 * 2**20


@SETS.register("parquet")
class Parquet(ImageSet):
    """Rows of one parquet file, or of all shards of a split in a directory.

    Row groups are read when they are needed, and up to 256 MiB of them are kept. So sets up to that
    size are in RAM, larger ones are read quickly in order, and slowly when shuffled.

    Args:
        split: which shards, by the split that their names tell
            (`data/test-00000-of-00001.parquet`).
        root: a parquet file, or a directory of them.
        image: the column of images: structs {bytes, path} or plain bytes; by default `image` or
            `img`.
        label: the column of labels, integers; by default `label`, `labels` or `fine_label`.
        num_classes: number of classes, if neither the file's Hugging Face metadata nor its labels
            tell (the default without metadata is the highest label plus one).
    """

    def __init__(
        self,
        split: str | None,
        *,
        root: str,
        image: str | None = None,
        label: str | None = None,
        num_classes: int | None = None,
    ) -> None:
        self.root = root
        path = Path(root)
        if not path.exists():
            raise MitaswapError(
                f"no file or directory {root!r}. Give a parquet file or a directory of them."
            )
        by_split: dict[str | None, list[Path]] = {}
        for shard in parquet_shards(path) if path.is_dir() else []:
            by_split.setdefault(split_of(shard.relative_to(path)), []).append(shard)
        if path.is_file():
            by_split = {None: [path]}
        named = [name for name in by_split if name]
        own = None if named else split_of(Path(path.name))
        taken = pick(split or own, [own] if own else named, repr(root))
        self._shards = by_split.get(taken) or by_split.get(None, [])

        self._ends: list[int] = []  # for each row group, the number of rows up to its end
        self._groups: list[tuple[Path, int]] = []  # its file, and its number in it
        self._firsts: list[int] = []  # the number of rows before its file
        labels: list[np.ndarray] = []
        names: list[str] | None = None
        for shard in self._shards:
            found = self._scan(shard, image, label)
            if labels and found[1] != names:
                raise MitaswapError(
                    f"{str(shard)!r} and {str(self._shards[0])!r} name different classes. Give one "
                    "data set at a time."
                )
            labels.append(found[0])
            names = found[1]
        #: int64 [rows], the label of each row of the split
        self.labels = np.concatenate(labels) if labels else np.zeros(0, dtype=np.int64)
        if num_classes is None:
            num_classes = len(names) if names else int(self.labels.max(initial=-1)) + 1
        self._cache: OrderedDict[int, pa.Array] = OrderedDict()
        super().__init__(taken, len(self.labels), num_classes, names)
        outside = np.flatnonzero((self.labels < 0) | (self.labels >= num_classes))
        if len(outside):
            self._checked(int(self.labels[outside[0]]), int(outside[0]))

    @classmethod
    def claims(cls, name: str) -> dict[str, Value] | None:
        """Files that end in `.parquet`, and directories that hold some."""
        path = Path(name)
        mine = (
            holds_parquet(path) if path.is_dir() else path.is_file() and path.suffix == ".parquet"
        )
        return {"root": name} if mine else None

    def _scan(
        self, shard: Path, image: str | None, label: str | None
    ) -> tuple[np.ndarray, list[str] | None]:
        """Note the row groups of one shard; return its labels and the names of the classes."""
        try:
            with pq.ParquetFile(shard) as file:
                columns = file.schema_arrow
                self._image = _column(columns, image, _IMAGE, "image", shard)
                self._label = _column(columns, label, _LABEL, "label", shard)
                kind = columns.field(self._label).type
                if not pa.types.is_integer(kind):
                    raise MitaswapError(
                        f"the column {self._label!r} of {str(shard)!r} holds {kind}, but labels "
                        "must be integers. Give another column: parquet(root=...,label=NAME)."
                    )
                values = file.read([self._label], use_threads=False).column(0)
                first = self._ends[-1] if self._ends else 0
                for group in range(file.num_row_groups):
                    start = self._ends[-1] if self._ends else 0
                    self._ends.append(start + file.metadata.row_group(group).num_rows)
                    self._groups.append((shard, group))
                    self._firsts.append(first)
        except (pa.ArrowException, OSError) as error:
            raise MitaswapError(
                f"cannot read the parquet file {str(shard)!r}: {_first_line(error)} Is it "
                "complete? Fetch it again."
            ) from None
        if values.null_count:
            row = values.is_null().index(True).as_py()
            raise SampleError(
                f"row {row} of {str(shard)!r} has no {self._label}. Every image needs one."
            )
        return values.to_numpy().astype(np.int64), _class_names(columns, self._label)

    def _sample(self, index: int) -> tuple[Image.Image, int]:
        group = bisect.bisect_right(self._ends, index)
        start = self._ends[group - 1] if group else 0
        cell: Any = self._column_of(group)[index - start].as_py()
        where = self._where(index)
        label = int(self.labels[index])
        if isinstance(cell, dict):
            path, cell = cell.get("path"), cell.get("bytes")
            if cell is None and path:
                return load_image(
                    self._groups[group][0].parent / path, f"{where}, {path!r},"
                ), label
        if cell is None:
            raise SampleError(f"{where} has no image: the column {self._image!r} is empty there.")
        if not isinstance(cell, bytes):
            raise SampleError(
                f"{where} holds {type(cell).__name__} in the column {self._image!r}, but images "
                "must be encoded bytes or structs {bytes, path}."
            )
        return load_image(cell, where), label

    def _column_of(self, group: int) -> pa.Array:
        """The image column of one row group, from the cache or from the file."""
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        shard, number = self._groups[group]
        try:
            # opened anew each time: no handle is held, so the set can be pickled and its process
            # forked; no threads either, as arrow's do not survive a fork
            with pq.ParquetFile(shard) as file:
                column = file.read_row_group(number, [self._image], use_threads=False).column(0)
        except (pa.ArrowException, OSError) as error:
            raise SampleError(
                f"cannot read row group {number} of the parquet file {str(shard)!r}: "
                f"{_first_line(error)} Fetch it again."
            ) from None
        while self._cache and column.nbytes + sum(c.nbytes for c in self._cache.values()) > _CACHE:
            self._cache.popitem(last=False)
        self._cache[group] = column
        return column

    def _identity(self) -> Any:
        return [self._image, self._label, [[*file_mark(p), _footer(p)] for p in self._shards]]

    def _where(self, index: int | None) -> str:
        if index is None:
            return repr(self.root)
        group = bisect.bisect_right(self._ends, index)
        return f"row {index - self._firsts[group]} of {str(self._groups[group][0])!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}


def _column(
    schema: pa.Schema, asked: str | None, usual: tuple[str, ...], kind: str, shard: Path
) -> str:
    for name in usual if asked is None else (asked,):
        if name in schema.names:
            return name
    raise MitaswapError(
        f"{str(shard)!r} has no column {asked or ' or '.join(usual)!r} of {kind}s. Its columns: "
        f"{', '.join(schema.names)}. Name one: parquet(root=...,{kind}=NAME)."
    )


def _footer(shard: Path) -> str:
    """Digest of the metadata at the end of a parquet file, which is written after the rows."""
    try:
        with shard.open("rb") as file:
            file.seek(-8, os.SEEK_END)
            length = int.from_bytes(file.read(4), "little")
            file.seek(-8 - length, os.SEEK_END)
            return hashlib.sha256(file.read(length)).hexdigest()
    except OSError as error:
        raise SampleError(
            f"cannot read the parquet file {str(shard)!r}: {error.strerror}. Fetch it again."
        ) from None


def _class_names(schema: pa.Schema, label: str) -> list[str] | None:
    """The names in the `huggingface` metadata of the schema, if they are there."""
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])
        names = info["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if names else None


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") + "."
