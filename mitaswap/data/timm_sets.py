"""What timm's `create_dataset` opens: sets of torchvision, the hub, TensorFlow, WebDataset."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from mitaswap.data._base import SETS, ImageSet
from mitaswap.data._image import SampleError, load_image
from mitaswap.errors import MitaswapError
from mitaswap.spec import Value

_log = logging.getLogger(__name__)

#: timm's prefixes -> the package that each needs
_NEEDS = {
    "torch": "torchvision",
    "hfds": "datasets",
    "hfids": "datasets",
    "tfds": "tensorflow_datasets",
    "wds": "webdataset",
}
_STREAMS = ("hfids", "tfds", "wds")
#: options that say where the files are, not what
_PLACES = ("root", "download", "cache_dir")
# what `split=None` tries; the readers of the hub refuse a split that does not exist
_HELD_OUT = ("validation", "test")


@SETS.register("timm")
class TimmSet(ImageSet):
    """A data set by timm's name: `torch/cifar10(root=DIR)`, `hfds/mnist`, `wds/NAME(root=DIR)`.

    timm's own wrapper replaces an image that it cannot read by its neighbour; here that is an
    error. Streams (`hfids/`, `tfds/`, `wds/`) have no random access: they can be decoded, not
    trained on.

    Args:
        split: timm's; None means validation, or test where there is no validation.
        dataset: timm's name of the set.
        num_classes: needed where the set does not tell, as WebDataset's.
        options: for `create_dataset` (`root`, `download`, `input_key`, `target_key`, `class_map`,
            `num_samples`, ...).

    Raises:
        MitaswapError: a package is missing, or timm cannot open the set. `torch/` and `hfids/`
            download only with `download=true`; `hfds/` fetches what is not in the hub's cache.
    """

    def __init__(
        self, split: str | None, *, dataset: str, num_classes: int | None = None, **options: Any
    ) -> None:
        prefix, slash, rest = dataset.partition("/")
        prefix = prefix.lower()
        if not slash or not rest or prefix not in _NEEDS:
            raise MitaswapError(
                f"{dataset!r} is no data set of timm; its names are PREFIX/NAME with one of the "
                f"prefixes {', '.join(_NEEDS)}, for instance torch/cifar10."
            )
        if importlib.util.find_spec(_NEEDS[prefix]) is None:
            raise MitaswapError(
                f"{dataset} needs the package {_NEEDS[prefix]}, which is not installed: pip "
                f"install {_NEEDS[prefix]}"
            )
        self._dataset = dataset
        self._options = options
        taken, self._timm = _create(dataset, prefix, split, options)
        self.random_access = prefix not in _STREAMS
        #: timm's reader; torchvision's sets have none
        self._reader = getattr(self._timm, "reader", None)
        names = _class_names(self._timm if self._reader is None else self._reader)
        size = len(self._timm)
        if size == 0 and not self.random_access:
            raise MitaswapError(
                f"the number of images in {dataset}, split {taken!r}, is unknown. Give it: "
                f"{dataset}(num_samples=...)"
            )
        if num_classes is None:
            num_classes = len(names) if names else self._count_classes()
        super().__init__(taken, size, num_classes, names)

    @classmethod
    def claims(cls, name: str) -> dict[str, Value] | None:
        """Names with one of timm's prefixes."""
        prefix, slash, _ = name.partition("/")
        return {"dataset": name} if slash and prefix.lower() in _NEEDS else None

    def _count_classes(self) -> int:
        labels: Any = getattr(self._timm, "targets", None)
        if labels is None and hasattr(self._reader, "iter_targets"):
            labels = list(self._reader.iter_targets())  # type: ignore[union-attr]
        try:
            highest = int(np.max(np.asarray(labels)))
        except (TypeError, ValueError):
            raise MitaswapError(
                f"{self._dataset} does not tell its number of classes. Give it: "
                f"{self._dataset}(num_classes=...)"
            ) from None
        return highest + 1

    def _sample(self, index: int) -> tuple[Image.Image, Any]:
        where = self._where(index)
        try:
            image, label = self._timm[index] if self._reader is None else self._reader[index]
        except Exception as error:  # readers raise what their format's library raises
            raise SampleError(f"{where} cannot be read: {error}") from None
        if isinstance(image, Image.Image):
            return image.convert("RGB"), label
        return load_image(image, where), label

    def samples(self) -> Iterator[tuple[Image.Image, int]]:
        """All samples in order; from a stream only those that `limit` chose.

        Raises:
            SampleError: the stream holds another number of images than it says. timm's readers
                leave out what they cannot read, so a stream that ends early has damaged samples.
        """
        if self.random_access:
            yield from super().samples()
            return
        wanted = range(self._size) if self._chosen is None else self._chosen.tolist()
        chosen = iter(wanted)
        following = next(chosen)
        stream = iter(self._timm)
        for index in range(wanted[-1] + 1):
            try:
                image, label = next(stream)
            except StopIteration:
                raise SampleError(
                    f"{self._dataset} ended after {index} of {self._size} images. Damaged samples "
                    "are left out by its reader (see the log), or num_samples is too high."
                ) from None
            except Exception as error:  # as above
                raise SampleError(f"{self._where(index)} cannot be read: {error}") from None
            if index == following:
                yield image.convert("RGB"), self._checked(label, index)
                following = next(chosen, -1)
        if self._chosen is None and next(stream, None) is not None:
            raise SampleError(
                f"{self._dataset} holds more than the {self._size} images it was said to. Correct "
                "num_samples, or use a limit to take a part."
            )

    def _identity(self) -> Any:
        # where its files are says nothing about the images; the name of one that an option points
        # to does
        options = {key: v for key, v in self._options.items() if key not in _PLACES}
        for key, value in options.items():
            if isinstance(value, str) and os.path.exists(value):
                options[key] = os.path.basename(os.path.abspath(value))
        return [self._dataset, options]

    def _where(self, index: int | None) -> str:
        return self._dataset if index is None else f"image {index} of {self._dataset}"


def _create(
    dataset: str, prefix: str, split: str | None, options: dict[str, Any]
) -> tuple[str, Any]:
    """timm's data set and the split it was opened with."""
    from timm.data import create_dataset

    # torchvision's constructors know validation by timm's synonyms; the other readers list their
    # splits, or fail with them
    tries = [split] if split else list(_HELD_OUT[:1] if prefix == "torch" else _HELD_OUT)
    reason: Exception | None = None
    for name in tries:
        try:
            opened = create_dataset(dataset, split=name, **{"root": None, **options})
            if prefix in _STREAMS:
                next(iter(opened), None)  # a stream looks for its split when it is first read
            return name, opened
        except Exception as error:  # whatever torchvision, datasets, tensorflow, webdataset raise
            _log.debug("timm cannot open %s, split %s", dataset, name, exc_info=True)
            reason = error
            if "split" not in str(error).lower():
                break
    root, hint = options.get("root"), ""
    if root and not os.path.isdir(str(root)):
        hint = f" There is no directory {root!r}."
    elif prefix == "torch" and not options.get("download"):
        hint = f" Give its directory, {dataset}(root=DIR), or fetch it with download=true."
    elif "num_samples" in str(reason):
        hint = f" Here: {dataset}(num_samples=...)."
    text = str(reason).strip().partition("\n")[0].rstrip(".")
    raise MitaswapError(
        f"timm cannot open {dataset}, split {' or '.join(tries)}: "
        f"{text or type(reason).__name__}.{hint}"
    ) from reason


def _class_names(source: Any) -> list[str] | None:
    """The names of the classes by label, if timm's reader or torchvision's set has them."""
    order = getattr(source, "class_to_idx", None)
    classes = getattr(source, "classes", None)
    if classes:
        # ImageNet's are tuples of synonyms
        return [", ".join(name) if isinstance(name, tuple) else str(name) for name in classes]
    if order and sorted(order.values()) == list(range(len(order))):
        return sorted(order, key=order.__getitem__)
    return None
