"""What paths say about a data set: images or parquet shards, and which split lies where."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from mitaswap.errors import MitaswapError

#: split names that mean the same, as timm and torchvision use them; the first that exists is taken
TRAIN = ("train", "training")
EVAL = ("validation", "val", "valid", "eval", "evaluation", "test", "testing")
_WORDS = frozenset(TRAIN + EVAL)
#: the split of a source that has none
WHOLE = "all"


def pick(asked: str | None, available: Iterable[str], where: str) -> str:
    """Choose one of the splits that exist.

    `train`/`training` mean each other, and so do the names of held-out splits (`validation`, `val`,
    `test`, ...), where an exact match goes first. Training and held-out data never stand in for
    each other.

    Args:
        asked: the split asked for; None means the held-out one.
        available: the splits that exist; empty when the source is not split.
        where: the source, for the error message.

    Raises:
        MitaswapError: no such split; or a split of a source that has none, where training and
            evaluation would silently see the same images.
    """
    names = sorted(set(available))
    if not names:
        if asked in (None, WHOLE):
            return WHOLE
        raise MitaswapError(
            f"{where} is not split, so its split {asked!r} is not defined. Leave the split out to "
            "take all of it, or name the parts: sub-directories (or parquet files) called train "
            "and validation."
        )
    if asked in names:
        return str(asked)
    group: tuple[str, ...] = ()
    if asked is None or asked in EVAL:
        group = EVAL
    elif asked in TRAIN:
        group = TRAIN
    for name in group:
        if name in names:
            return name
    wanted = "held-out split (validation, test)" if asked is None else f"split {asked!r}"
    raise MitaswapError(
        f"{where} has no {wanted}. It has: {', '.join(names)}. Ask for one of them."
    )


def split_of(path: Path) -> str | None:
    """The split that a file's path names, if any; its own name goes before its directories'.

    `test` for `cifar10-test.parquet`, `data/test-00000-of-00001.parquet` and `test/0.parquet`.
    """
    for part in (path.stem, *reversed(path.parent.parts)):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _WORDS:
                return word
    return None


def split_directories(root: Path) -> dict[str, Path]:
    """The sub-directories of `root` that are named like a split and hold class folders.

    One that holds images alone is a class: trains are vehicles, too.
    """
    return {
        entry.name.lower(): entry
        for entry in sorted(root.iterdir())
        if entry.name.lower() in _WORDS
        and entry.is_dir()
        and any(inner.is_dir() for inner in entry.iterdir())
    }


def parquet_shards(root: Path) -> list[Path]:
    """All parquet files under `root`, in order of their paths, hidden directories left out."""
    return [
        path
        for path in sorted(root.rglob("*.parquet"))
        if not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]


def holds_parquet(root: Path) -> bool:
    """Whether a directory holds parquet shards rather than image files.

    The first directory with either kind decides: a million image files need not be listed to know.
    """
    from PIL import Image

    images = tuple(Image.registered_extensions())
    for _, directories, files in os.walk(root):
        directories[:] = sorted(d for d in directories if not d.startswith("."))
        if any(name.endswith(".parquet") for name in files):
            return True
        if any(name.lower().endswith(images) for name in files):
            return False
    return False
