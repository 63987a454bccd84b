"""What every statistic is: fed one routing at a time, read out as rows."""

from __future__ import annotations

from typing import ClassVar

from mitaswap.mechanisms import Routing
from mitaswap.registry import Registry
from mitaswap.tokens import TokenLayout

STATISTICS: Registry[type[Statistic]] = Registry("statistic", "mitaswap.stats")


class Statistic:
    """A statistic of one layer's routing, accumulated over batches."""

    name: ClassVar[str]
    #: one line for `mitaswap ls`
    summary: ClassVar[str]

    def update(self, routing: Routing, layout: TokenLayout) -> None:
        """Take in the routing of one batch."""
        raise NotImplementedError

    def rows(self) -> list[dict[str, float | int | str]]:
        """One row per head: `head`, `value`, `low`, `high`, `chance`, and what the statistic
        adds.
        """
        raise NotImplementedError
