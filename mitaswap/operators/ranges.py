"""Options within their limits, or an error that names the nearest value that is."""

from __future__ import annotations

from typing import Protocol

from mitaswap.errors import MitaswapError
from mitaswap.spec import Spec

Number = int | float

#: the widest kernel that a paper has by default: allowed on any grid
WIDE = 33

#: the largest eps: it is added to sums whose terms are about one
EPS = 1_000_000

#: the largest seed that every generator takes
SEED = 2**63 - 1


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


def at_least(
    asker: Asker,
    name: str,
    value: Number,
    low: Number,
    why: str = "",
    most: Number = float("inf"),
    limit: str = "",
) -> None:
    """Raise `MitaswapError` unless low <= value <= most, and finite.

    Args:
        asker: whose option it is.
        name, value: the option.
        low: smallest value allowed.
        why: if any, what follows this limit.
        most: where numbers cease to be of use: above it sums overflow, or memory does.
        limit: if any, what follows that limit.
    """
    if low <= value <= most and value < float("inf"):  # written so that nan is refused too
        return
    if value > most:
        raise MitaswapError(
            f"{asker.spec}: {name}={value} must be at most {most}{limit and f', {limit}'}; use "
            f"{name}={most}"
        )
    raise MitaswapError(
        f"{asker.spec}: {name}={value} must be {low} or more{why and f', {why}'}; use {name}={low}"
    )


def seeds(asker: Asker, value: int) -> None:
    """Raise `MitaswapError` unless a generator takes `value`."""
    in_range(asker, "seed", value, 0, SEED, "that a generator takes")


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
