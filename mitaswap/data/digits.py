"""Real handwritten digits, in the package: the data set that needs nothing.

1797 images of 8 x 8 pixels and 17 grey levels, the test part of "Optical Recognition of Handwritten
Digits" by E. Alpaydin and C. Kaynak (UCI Machine Learning Repository, 1998, doi:10.24432/C50P49),
licence CC BY 4.0, in the form that scikit-learn distributes. `tools/make_digits.py` wrote them to
`digits.parquet`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mitaswap.data._base import SETS, ImageSet
from mitaswap.data._layout import pick
from mitaswap.data.parquet import Parquet
from mitaswap.errors import MitaswapError


@SETS.register("digits")
class Digits(ImageSet):
    """Handwritten digits, 10 classes.

    The split is fixed and stratified: of each class, every fifth image in the original order is a
        test image.

    Args:
        split: `train` (1442 images) or `test` (355).
        size: height and width in pixels; the 8 x 8 original is resized with bilinear interpolation.
    """

    embedded = True

    def __init__(self, split: str | None, *, size: int = 16) -> None:
        if size < 1:
            raise MitaswapError(
                f"digits: size must be at least 1 pixel, got {size}. The originals have 8."
            )
        self._source = Parquet(None, root=str(Path(__file__).with_name("digits.parquet")))
        self._pixels = size
        labels = self._source.labels
        rank = np.empty_like(labels)  # the how-manieth of its class an image is
        for digit in range(self._source.num_classes):
            rows = np.flatnonzero(labels == digit)
            rank[rows] = np.arange(len(rows))
        taken = pick(split, ("train", "test"), "digits")
        self._rows = np.flatnonzero((rank % 5 == 4) == (taken == "test"))
        super().__init__(taken, len(self._rows), self._source.num_classes, self._source.class_names)

    def _sample(self, index: int) -> tuple[Image.Image, int]:
        image, label = self._source.sample(int(self._rows[index]))
        if image.size != (self._pixels, self._pixels):
            image = image.resize((self._pixels, self._pixels), Image.Resampling.BILINEAR)
        return image, label

    def _identity(self) -> Any:
        return self._pixels

    def _where(self, index: int | None) -> str:
        return "digits" if index is None else self._source._where(int(self._rows[index]))
