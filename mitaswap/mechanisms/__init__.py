"""Attention mechanisms, one file each: options, the paper's formula in PyTorch, the card of its
taxonomy.

A mechanism turns q, k, v into an output and knows nothing of models. `_base` holds what they share.
"""

from mitaswap.mechanisms._base import MECHANISMS, Card, Mechanism, Options, Routing, mechanism

__all__ = ["MECHANISMS", "Card", "Mechanism", "Options", "Routing", "mechanism"]
