"""What every labelled image set is.

A source is one file: a subclass of `ImageSet` that is registered under a name, whose keyword-only
arguments are its options, and that knows how to give sample number i. Limits, transforms and checks
are done here, once; `_open` finds the source of a name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from mitaswap.data._image import SampleError
from mitaswap.errors import MitaswapError
from mitaswap.registry import Registry
from mitaswap.spec import Value

SETS: Registry[type[ImageSet]] = Registry("data set", "mitaswap.data")


class ImageSet(Dataset[tuple[Any, int]]):
    """Labelled images of one split, by index; picklable, so that `DataLoader` workers can have it.

    A subclass takes `split` (None: its held-out one) and its options as keyword-only arguments,
    calls this constructor, and writes `_sample` and `_where`.

    Args:
        split: name of the split that was really taken.
        size: number of images in it.
        num_classes: labels are 0 .. num_classes - 1.
        class_names: name of each class, where the source knows them.

    Raises:
        MitaswapError: no images, or another number of names than of classes.
    """

    #: the call string that opened the set; on the class, the name of the source
    name: str = ""
    #: the images come with the package: nothing to fetch, no option required
    embedded: ClassVar[bool] = False
    #: whether sample i can be had without those before it; otherwise only `samples()` works
    random_access: bool = True

    def __init__(
        self, split: str, size: int, num_classes: int, class_names: list[str] | None = None
    ) -> None:
        if size < 1:
            raise MitaswapError(
                f"{self._where(None)} holds no images in split {split!r}. Give another split or "
                "path."
            )
        if class_names is not None and len(class_names) != num_classes:
            raise MitaswapError(
                f"{self._where(None)} names {len(class_names)} classes, but "
                f"num_classes={num_classes} was given. Leave num_classes out."
            )
        self.split = split
        self.num_classes = num_classes
        self.class_names = class_names
        #: applied to the PIL image by `__getitem__`; timm's `create_loader` sets it
        self.transform: Callable[[Image.Image], Any] | None = None
        self._size = size
        self._chosen: np.ndarray | None = None

    def _sample(self, index: int) -> tuple[Image.Image, Any]:
        """The RGB image and the label number `index` of the whole split."""
        raise NotImplementedError

    def _where(self, index: int | None) -> str:
        """Which image `index` is (file and row, or path), or the whole set for None."""
        raise NotImplementedError

    def _identity(self) -> Any:
        """What the images are, as JSON holds it: options that make them, marks of their files.

        The same for a relative and an absolute path. By default the name that opened the set.
        """
        return self.name

    @classmethod
    def claims(cls, name: str) -> dict[str, Value] | None:
        """The options that stand for an unregistered `name` this source can open, else None."""
        return None

    def limit(self, count: int | None) -> None:
        """Keep `count` images, spread evenly over the split; all if there are fewer, or for None.

        The choice depends on the number of images and `count` alone. The split is cut into `count`
        runs of equal length, and one image is taken from each, at a place that moves with the
        golden ratio from run to run: a split sorted by class stays balanced, and so does one whose
        labels repeat with a period.

        Raises:
            MitaswapError: `count` is not positive.
        """
        if count is None:
            self._chosen = None
            return
        if count < 1:
            raise MitaswapError(
                f"limit must be at least 1, got {count}. Leave it out to take all images."
            )
        self._chosen = spread(self._size, count) if count < self._size else None

    def fingerprint(self) -> str:
        """A short digest of what the images and labels are, without decoding any: equal where the
        set is the same, whatever the working directory and however the path is written.

        It covers the split, `limit`, the classes and their order, and

        - embedded sets: their options, the seed included;
        - folders: path below the root, size and time of change of every file;
        - parquet: columns, and size, time of change and footer of every file;
        - timm's sets: name and options only, without the directory. That is weaker: other files
          under the same name and of the same number are not noticed. Neither are image files
          that the rows of a parquet file point to.

        Raises:
            SampleError: a file is gone.
        """
        chosen = len(self)  # with the size, it says which ones: see `limit`
        whole = [type(self).name, self.split, self._size, chosen, self.num_classes]
        text = json.dumps([*whole, self.class_names, self._identity()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def sample(self, index: int) -> tuple[Image.Image, int]:
        """The RGB image and the label of one sample, without the transform.

        Raises:
            SampleError: the image is damaged or its label is not one of the classes.
            MitaswapError: the set is a stream.
        """
        if not self.random_access:
            raise MitaswapError(
                f"{self.name} is a stream: its images come one after the other, but image {index} "
                "was asked for. It can be evaluated; for training give a set with random access "
                "(hfds/..., a folder, parquet)."
            )
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} images, no number {index}")
        index = range(len(self))[index]
        place = index if self._chosen is None else int(self._chosen[index])
        image, label = self._sample(place)
        return image, self._checked(label, place)

    def samples(self) -> Iterator[tuple[Image.Image, int]]:
        """All samples in order, without the transform."""
        return (self.sample(index) for index in range(len(self)))

    def _checked(self, label: Any, place: int) -> int:
        try:
            number = int(label)
        except (TypeError, ValueError):
            number = -1
        if not 0 <= number < self.num_classes or number != label:
            raise SampleError(
                f"{self._where(place)} has the label {label!r}, but the labels of "
                f"{self.num_classes} classes are 0 .. {self.num_classes - 1}. Is this split "
                "labelled, and the label column the right one?"
            )
        return number

    def __len__(self) -> int:
        return self._size if self._chosen is None else len(self._chosen)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.sample(index)
        return (image if self.transform is None else self.transform(image)), label

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"<{self.name} {self.split}: {len(self)} images, {self.num_classes} classes>"


def spread(size: int, count: int) -> np.ndarray:
    """`count` different indices below `size`, increasing: int64 [count]. See `ImageSet.limit`."""
    step = np.arange(count, dtype=np.uint64)
    # 2^64 / golden ratio: the product's upper bits walk through [0, 1) with no period (Weyl's
    # sequence), in exact integers, hence alike on every machine
    place = (step * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
    edges = np.array([i * size // count for i in range(count + 1)], dtype=np.uint64)
    chosen = edges[:-1] + ((place * np.diff(edges)) >> np.uint64(32))
    return chosen.astype(np.int64)


def file_mark(path: str | os.PathLike[str]) -> list[int]:
    """Size and time of change of a file, for `ImageSet._identity`.

    Raises:
        SampleError: it is gone.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise SampleError(f"cannot read {os.fspath(path)!r}: {error.strerror}.") from None
    return [found.st_size, found.st_mtime_ns]


def same_classes(model_names: Sequence[str] | None, set_names: Sequence[str] | None) -> None:
    """Check that a model and a data set number their classes alike, where both name them.

    Sets with other names are left alone: the same class goes by many names ("cat", "tabby cat").

    Args:
        model_names, set_names: name of each class by label, or None.

    Raises:
        MitaswapError: the same names in another order; names the first that differs.
    """
    if model_names is None or set_names is None:
        return
    model, data = list(model_names), list(set_names)
    if model == data or sorted(model) != sorted(data):
        return
    label = next(i for i, (a, b) in enumerate(zip(model, data, strict=True)) if a != b)
    raise MitaswapError(
        f"the model and the data have the same classes in another order: class {label} is "
        f"{model[label]!r} for the model, but {data[label]!r} in the data. Every accuracy would be "
        "wrong; give the data in the model's order (a folder takes class_map=FILE)."
    )
