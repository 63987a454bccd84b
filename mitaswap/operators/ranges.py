"""Options within their limits, or an error that names the nearest value that is."""

from __future__ import annotations

from typing import Protocol

from mitaswap.errors import MitaswapError
from mitaswap.spec import Spec

Number = int | float


class Asker(Protocol):
    """Whose options they are: errors begin with its call string."""

    @property
    def spec(self) -> Spec: ...


def in_range(asker: Asker, name: str, value: Number, low: Number, high: Number, of: str) -> None:
    """Raise `MitaswapError` unless low <= value <= high.

    Args:
        asker: whose option it is.
        name, value: the option.
        low, high: smallest and largest value allowed.
        of: what there are `high` of, for instance "patches (tokens 1 + 14x14)".
    """
    if not low <= value <= high:  # written so that nan is refused too
        raise MitaswapError(
            f"{asker.spec}: {name}={value} must be between {low} and the {high} {of}; use "
            f"{name}={low if not value >= low else high}"
        )


def at_least(asker: Asker, name: str, value: Number, low: Number, why: str = "") -> None:
    """Raise `MitaswapError` unless low <= value < infinity; `why`, if any, follows the limit."""
    if not low <= value < float("inf"):
        raise MitaswapError(
            f"{asker.spec}: {name}={value} must be {low} or more{why and f', {why}'}; use "
            f"{name}={low}"
        )
