"""Scenes of several real digits, generated from a seed; the label needs more than one of them.

The digits are those of `digits`, train scenes made of train digits and test scenes of test digits.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from PIL import Image

from mitaswap.data._base import SETS, ImageSet
from mitaswap.data._layout import pick
from mitaswap.data.digits import Digits
from mitaswap.errors import MitaswapError

_SPLITS = ("train", "test")
_COUNT = {"train": 100_000, "test": 4_000}
_CLASSES = 10
_TRIES = 20
# squares placed at random one after the other get stuck at about 0.56 of the area
_CROWDED = 0.45


@SETS.register("digit-scenes")
class DigitScenes(ImageSet):
    """Several digits at random places of a black canvas, none over another; 10 equal classes.

    Scene i is a function of (split, seed, i) and the options alone, whichever scenes were made
    before it.

    Args:
        split: `train` or `test`.
        seed: of the generator, 0 .. 2^64 - 1.
        digits: digits in a scene, 3 .. 11.
        canvas: height and width of the scene in pixels.
        size: height and width of a digit in pixels (8 is the original); by default the largest
            at which all digits fit: 16 for four of them.
        count: number of scenes; by default 100000 for train and 4000 for test.
        task: what the label is. `twice`: exactly one class occurs twice, in two different source
            images, every other at most once; the label is that class.
        noise: standard deviation of grey Gaussian noise on all pixels, as a share of the full
            range, 0 .. 1.

    Raises:
        MitaswapError: an option out of range, or more digits than the canvas can hold.
    """

    embedded = True

    def __init__(
        self,
        split: str | None,
        *,
        seed: int = 0,
        digits: int = 4,
        canvas: int = 32,
        size: int | None = None,
        count: int | None = None,
        task: Literal["twice"] = "twice",
        noise: float = 0.0,
    ) -> None:
        taken = pick(split, _SPLITS, "digit-scenes")
        count = _COUNT[taken] if count is None else count
        _within("seed", seed, 0, 2**64 - 1)
        _within("digits", digits, 3, _CLASSES + 1)
        _within("count", count, 1, 2**63 - 1)
        _within("noise", noise, 0.0, 1.0)
        size = canvas // (math.isqrt(digits - 1) + 1) if size is None else size
        _within("size", size, 1, 1024)
        if (canvas // size) ** 2 < digits:
            raise MitaswapError(
                f"digit-scenes: {digits} digits of {size} x {size} pixels do not fit on a canvas "
                f"of {canvas} x {canvas} without touching each other. Use a canvas of at least "
                f"{size * int(np.ceil(digits**0.5))}."
            )
        self.task = task
        self._key = np.array([seed, _SPLITS.index(taken)], dtype=np.uint64)
        self._digits, self._canvas, self._side, self._noise = digits, canvas, size, noise
        #: per class, its source images: uint8 [images, size, size]
        self._pool: list[np.ndarray] = _pool(taken, size)
        super().__init__(taken, count, _CLASSES, [str(digit) for digit in range(_CLASSES)])

    def _sample(self, index: int) -> tuple[Image.Image, int]:
        # a counter-based generator: its state is (key, counter), so scene i starts at counter i and
        # needs no other
        counter = np.array([0, 0, 0, index], dtype=np.uint64)
        rng = np.random.Generator(np.random.Philox(key=self._key, counter=counter))
        draws = rng.random(1 + _CLASSES + 2 * self._digits)
        label = int(draws[0] * _CLASSES)
        others = [c for c in np.argsort(draws[1 : _CLASSES + 1]).tolist() if c != label]
        classes = [label, label, *others[: self._digits - 2]]
        which, order = draws[1 + _CLASSES :].reshape(2, self._digits)

        scene = np.zeros((self._canvas, self._canvas), dtype=np.uint8)
        places = self._places(rng)
        first = -1
        # places are drawn one after the other, the later around the earlier: shuffled, no role has
        # a place of its own
        for slot, (digit, place) in enumerate(
            zip(classes, np.argsort(order).tolist(), strict=True)
        ):
            images = self._pool[digit]
            if slot == 1:
                pick_one = int(which[slot] * (len(images) - 1))
                pick_one += pick_one >= first
            else:
                pick_one = int(which[slot] * len(images))
            if slot == 0:
                first = pick_one
            y, x = places[place]
            scene[y : y + self._side, x : x + self._side] = images[pick_one]
        if self._noise:
            grey = scene + rng.standard_normal(scene.shape, dtype=np.float32) * (255 * self._noise)
            scene = np.clip(grey, 0, 255).astype(np.uint8)
        return Image.fromarray(scene).convert("RGB"), label

    def _places(self, rng: np.random.Generator) -> list[tuple[int, int]]:
        """Top left corners of squares that do not overlap."""
        side, range_ = self._side, self._canvas - self._side + 1
        crowded = self._digits * side * side > _CROWDED * self._canvas * self._canvas
        for _ in range(0 if crowded else _TRIES):
            free = np.ones((range_, range_), dtype=bool)
            places: list[tuple[int, int]] = []
            for draw in rng.random(self._digits).tolist():
                open_ = np.flatnonzero(free)
                if not len(open_):
                    break
                y, x = divmod(int(open_[int(draw * len(open_))]), range_)
                places.append((y, x))
                free[max(0, y - side + 1) : y + side, max(0, x - side + 1) : x + side] = False
            else:
                return places
        return self._places_in_cells(rng)

    def _places_in_cells(self, rng: np.random.Generator) -> list[tuple[int, int]]:
        """For crowded canvases, where free placing has dead ends: one digit per cell of a grid."""
        cells = self._canvas // self._side
        chosen = np.argsort(rng.random(cells * cells))[: self._digits].tolist()
        slack = self._canvas // cells - self._side + 1
        jitter = (rng.random((self._digits, 2)) * slack).astype(int).tolist()
        return [
            (cell // cells * self._canvas // cells + dy, cell % cells * self._canvas // cells + dx)
            for cell, (dy, dx) in zip(chosen, jitter, strict=True)
        ]

    def _identity(self) -> Any:
        options = (self._digits, self._canvas, self._side, self._noise)
        return [self.task, self._key.tolist(), *options]

    def _where(self, index: int | None) -> str:
        return "digit-scenes" if index is None else f"scene {index} of digit-scenes"


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise MitaswapError(
            f"digit-scenes: {name}={value} is out of range; it must be {low} .. {high}"
        )


def _pool(split: str, size: int) -> list[np.ndarray]:
    pool: list[list[np.ndarray]] = [[] for _ in range(_CLASSES)]
    for image, label in Digits(split, size=size).samples():
        pool[label].append(np.asarray(image.convert("L")))
    return [np.stack(images) for images in pool]
