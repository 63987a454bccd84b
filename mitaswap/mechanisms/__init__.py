"""Attention mechanisms, one file each: options, the paper's formula in PyTorch, the card of its
taxonomy.

A mechanism turns q, k, v into an output and knows nothing of models. `_base` holds what they share,
`_card` what can be known of one before it runs.
"""

from mitaswap.mechanisms._base import MECHANISMS, Mechanism, Options
from mitaswap.mechanisms._build import learned_numbers, mechanism, spelled_out, usual_site
from mitaswap.mechanisms._card import TRAITS, Card, Cost, Routing, SiteShape
from mitaswap.mechanisms._outside import OUTSIDE
from mitaswap.mechanisms._wrapper import WRAPPERS, Wrapper

__all__ = [
    "MECHANISMS",
    "OUTSIDE",
    "TRAITS",
    "WRAPPERS",
    "Card",
    "Cost",
    "Mechanism",
    "Options",
    "Routing",
    "SiteShape",
    "Wrapper",
    "learned_numbers",
    "mechanism",
    "spelled_out",
    "usual_site",
]
