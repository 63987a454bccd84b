"""Pretrained networks by name; one file per library they come from.

Knows nothing of mechanisms or swapping.
"""

from mitaswap.models._base import SOURCES, Network, Preprocess, Request, source
from mitaswap.models._open import open_model, wrap
from mitaswap.models.embedded import embedded_names

__all__ = [
    "SOURCES",
    "Network",
    "Preprocess",
    "Request",
    "embedded_names",
    "open_model",
    "source",
    "wrap",
]
