"""An image set as one array: each image is decoded once, however often it is evaluated."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mitaswap.data._base import ImageSet
from mitaswap.data._image import SampleError
from mitaswap.errors import MitaswapError

RAM_LIMIT = 2 * 2**30
_BATCH = 64

ToUint8 = Callable[[Image.Image], Tensor]
_Batch = tuple[Tensor, Tensor]


@dataclass
class Decoded:
    """The pixels and labels of an image set.

    Args:
        images: uint8 [n, 3, H, W], in RAM or mapped from a file.
        labels: int64 [n].
        num_classes: labels are 0 .. num_classes - 1.
        class_names: name of each class, or None.
        name: the data set, as it was opened.
        split: its split.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    class_names: list[str] | None
    name: str
    split: str

    def __len__(self) -> int:
        return len(self.labels)


def decode(
    images: ImageSet,
    to_uint8: ToUint8,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
    cache_dir: Path | None = None,
    *,
    ram_limit: int = RAM_LIMIT,
) -> Decoded:
    """Decode every image of a set exactly once.

    Args:
        images: the set; its `transform` is not used.
        to_uint8: from a PIL RGB image to uint8 [3, H, W], the same H and W for all images.
            Picklable, if the workers are started by another method than fork.
        workers: processes that decode; 0 decodes here. Streams are always read here, sample by
            sample.
        progress: called with (images done, images in all).
        cache_dir: where the pixels go when they need more than `ram_limit` bytes; the system's
            temporary directory by default. The file is unlinked at once and its space is given back
            with the last use of the pixels, also when the process is killed.
        ram_limit: bytes of pixels that are held in RAM.

    Raises:
        MitaswapError: a damaged image or bad label (named), images of different sizes, no room on
            the disk.
    """
    total = len(images)
    pixels = torch.empty(0)
    labels = torch.empty(total, dtype=torch.int64)
    done = 0
    failure: SampleError | None = None
    for item in _batches(images, to_uint8, workers):
        if isinstance(item, SampleError):
            failure = item
            break
        batch, targets = item
        if done == 0:
            pixels = _room((total, *batch.shape[1:]), ram_limit, cache_dir)
        if batch.shape[1:] != pixels.shape[1:]:
            failure = _sizes(images.name, pixels.shape[1:], batch.shape[1:])
            break
        pixels[done : done + len(batch)] = batch
        labels[done : done + len(batch)] = targets
        done += len(batch)
        if progress is not None:
            progress(done, total)
    if failure is not None:
        raise failure
    return Decoded(
        pixels, labels, images.num_classes, images.class_names, images.name, images.split
    )


class _Pixels(Dataset["tuple[Tensor, int] | SampleError"]):
    """The set as the workers read it: prepared pixels instead of PIL images.

    What is wrong with a sample comes back as a value. torch's own way to bring an exception out of
    a worker leaves a reference cycle that keeps the workers alive, and their end then blocks the
    process for seconds at some later garbage collection.
    """

    def __init__(self, images: ImageSet, to_uint8: ToUint8) -> None:
        self.images = images
        self.to_uint8 = to_uint8

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | SampleError:
        try:
            image, label = self.images.sample(index)
        except SampleError as error:
            return error.with_traceback(None)
        return self.to_uint8(image), label


def _batches(images: ImageSet, to_uint8: ToUint8, workers: int) -> Iterator[_Batch | SampleError]:
    stack = _Stack(images.name)
    if images.random_access:
        pixels = _Pixels(images, to_uint8)
        yield from DataLoader(pixels, batch_size=_BATCH, num_workers=workers, collate_fn=stack)
        return
    held: list[tuple[Tensor, int] | SampleError] = []
    for image, label in images.samples():
        held.append((to_uint8(image), label))
        if len(held) == _BATCH:
            yield stack(held)
            held = []
    if held:
        yield stack(held)


class _Stack:
    """Collate samples, or say what is wrong with them; runs in the workers."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, samples: list[tuple[Tensor, int] | SampleError]) -> _Batch | SampleError:
        images: list[Tensor] = []
        labels: list[int] = []
        for sample in samples:
            if isinstance(sample, SampleError):
                return sample
            pixels, label = sample
            if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3:
                raise TypeError(
                    f"to_uint8 must give uint8 [3, H, W], got {pixels.dtype} {list(pixels.shape)}"
                )
            images.append(pixels)
            labels.append(label)
            if pixels.shape != images[0].shape:
                return _sizes(self.name, images[0].shape, pixels.shape)
        return torch.stack(images), torch.tensor(labels)


def _sizes(name: str, first: torch.Size, other: torch.Size) -> SampleError:
    return SampleError(
        f"the images of {name} have different sizes after preprocessing, {list(first)} and "
        f"{list(other)}. Prepare them to one size (resize and crop)."
    )


def _room(shape: tuple[int, ...], ram_limit: int, cache_dir: Path | None) -> Tensor:
    """An uninitialised uint8 tensor, in RAM or in a file that is already unlinked."""
    size = torch.Size(shape).numel()
    if size <= ram_limit:
        return torch.empty(shape, dtype=torch.uint8)
    folder = Path(tempfile.gettempdir() if cache_dir is None else cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="mitaswap-", suffix=".pixels") as file:
            # taking the room now makes a full disk an error here; a sparse file would kill the
            # process later
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            elif shutil.disk_usage(folder).free < size:
                raise OSError("the disk is full")
            return torch.from_file(file.name, shared=True, size=size, dtype=torch.uint8).view(shape)
    except (OSError, RuntimeError) as error:
        raise MitaswapError(
            f"the pixels of {shape[0]} images need {size / 2**30:.1f} GiB in {str(folder)!r}: "
            f"{error}. Make room there, give another cache directory, or a limit."
        ) from None
