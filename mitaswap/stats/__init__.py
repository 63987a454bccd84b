"""Statistics of routings, one file each: they see who holds which keys and who asks whom, nothing
else.
"""

from mitaswap.stats._base import STATISTICS, Statistic

__all__ = ["STATISTICS", "Statistic"]
