"""Labelled image sets by name, decoded once; one file per source. Knows nothing of models."""

from mitaswap.data._base import SETS, ImageSet, same_classes
from mitaswap.data._decode import Decoded, decode
from mitaswap.data._image import SampleError
from mitaswap.data._open import open_set

__all__ = ["SETS", "Decoded", "ImageSet", "SampleError", "decode", "open_set", "same_classes"]
