"""The small networks that come with the package: timm directories under `mitaswap/embedded/`."""

from __future__ import annotations

from pathlib import Path

from mitaswap.errors import unknown
from mitaswap.models._base import Network, Request, source
from mitaswap.models._open import open_directory

FOLDER = Path(__file__).parent.parent / "embedded"


def embedded_names() -> list[str]:
    """Names of the networks in the package, in alphabetical order."""
    return sorted(config.parent.name for config in FOLDER.glob("*/config.json"))


@source("embedded")
def open_embedded(request: Request) -> Network:
    """`embedded:NAME`."""
    names = embedded_names()
    if request.spec.name not in names:
        raise unknown("embedded model", request.spec.name, names, "`mitaswap ls` lists them.")
    return open_directory(FOLDER / request.spec.name, request)
