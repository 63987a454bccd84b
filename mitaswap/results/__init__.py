"""Tidy rows on disk: one directory per run, append-only, safe against kill -9 and a full disk.

A run directory holds `run.json` (the plan, which is what was asked, and the provenance, which is
how it was measured) and `rows.jsonl` (one JSON object per line). A *cell* is the unit of work: it
is written whole or not at all, and a resumed run skips the cells that are there. Neither torch nor
any figure lives here.
"""

from mitaswap.results._provenance import provenance
from mitaswap.results._rows import Row, load_plan, load_provenance, load_rows, wilson
from mitaswap.results._run import Run
from mitaswap.results._sources import addresses

__all__ = [
    "Row",
    "Run",
    "addresses",
    "load_plan",
    "load_provenance",
    "load_rows",
    "provenance",
    "wilson",
]
