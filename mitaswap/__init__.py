"""mitaswap: put another attention mechanism into a pretrained vision transformer and measure what
that does.

The public names below load on first use, so that `import mitaswap` stays instant and a report can
be rebuilt from its rows on a machine without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "MitaswapError": "mitaswap.errors",
    "Recipe": "mitaswap.spec",
    "Spec": "mitaswap.spec",
    "TokenLayout": "mitaswap.tokens",
    "convert": "mitaswap.surgery",
    "evaluate": "mitaswap.evaluation",
    "load": "mitaswap.checkpoint",
    "mechanism": "mitaswap.mechanisms",
    "revert": "mitaswap.surgery",
    "save": "mitaswap.checkpoint",
    "swap": "mitaswap.surgery",
    "walk": "mitaswap.surgery",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mitaswap' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
