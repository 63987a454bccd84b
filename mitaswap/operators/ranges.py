"""Options within their limits, or an error that names the nearest value that is."""

from __future__ import annotations

from typing import Protocol

from mitaswap.errors import MitaswapError
from mitaswap.spec import Spec

Number = int | float

#: the widest kernel that a paper has by default: allowed on any grid
WIDE = 33


class Asker(Protocol):
    """Whose options they are: errors begin with its call string."""

    @property
    def spec(self) -> Spec: ...


def in_range(
    asker: Asker,
    name: str,
    value: Number,
    low: Number,
    high: Number,
    of: str,
    fits: tuple[Number, Number] | None = None,
) -> None:
    """Raise `MitaswapError` unless low <= value <= high.

    Args:
        asker: whose option it is.
        name, value: the option.
        low, high: smallest and largest value allowed.
        of: what there are `high` of, for instance "patches (tokens 1 + 14x14)".
        fits: where other options allow less, the lowest and highest value that suits them too:
            these are what is suggested.
    """
    if not low <= value <= high:  # written so that nan is refused too
        least, most = fits or (low, high)
        raise MitaswapError(
            f"{asker.spec}: {name}={value} must be between {low} and the {high} {of}; use "
            f"{name}={least if not value >= low else most}"
        )


def at_least(asker: Asker, name: str, value: Number, low: Number, why: str = "") -> None:
    """Raise `MitaswapError` unless low <= value < infinity; `why`, if any, follows the limit."""
    if not low <= value < float("inf"):
        raise MitaswapError(
            f"{asker.spec}: {name}={value} must be {low} or more{why and f', {why}'}; use "
            f"{name}={low}"
        )


def odd(asker: Asker, name: str, value: int, length: int, why: str, zero: bool = False) -> None:
    """Raise `MitaswapError` unless a kernel's side is odd and no wider than can be of use.

    Args:
        asker: whose option it is.
        name, value: the option.
        length: places along the (longer) side that the kernel moves along: 2 length - 1 reach from
            one end to the other.
        why: it must be odd, from the comma on.
        zero: whether 0 leaves the kernel out.
    """
    if zero:
        at_least(asker, name, value, 0, "which leaves out the convolution")
        if value == 0:
            return
    most = max(2 * length - 1, WIDE)
    if value < 1 or value % 2 == 0:
        near = min(max(value + 1, 1), most)
        out = f", or {name}=0 to leave it out" if zero else ""
        raise MitaswapError(
            f"{asker.spec}: {name}={value} must be odd{why}; use {name}={near}{out}"
        )
    if value > most:
        raise MitaswapError(
            f"{asker.spec}: {name}={value} must be at most {most}, as {2 * length - 1} reach from "
            f"one end of {length} places to the other; use {name}={most}"
        )
