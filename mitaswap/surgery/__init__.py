"""Putting mechanisms into networks and taking them out again: the only code that touches a network.

`witness` watches one dry forward, `sites` judges what it saw, `fit` asks whether a mechanism can go
to a site, `seam` makes the class whose attention call is diverted (`divert` rewrites its source,
`interface` is Hugging Face's way) to `attend`, `swap` applies and undoes it, `known` lists the
modules that look like attention and are not.
"""

from mitaswap.surgery.fit import ask
from mitaswap.surgery.sites import Site, walk
from mitaswap.surgery.swap import Handle, convert, recipe_of, revert, swap, swapped_sites

__all__ = [
    "Handle",
    "Site",
    "ask",
    "convert",
    "recipe_of",
    "revert",
    "swap",
    "swapped_sites",
    "walk",
]
