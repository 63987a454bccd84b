"""Patches and special tokens apart, and together again: for mechanisms that know the grid."""

from __future__ import annotations

import torch
from torch import Tensor

from mitaswap.tokens import TokenLayout


def split(x: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
    """x [..., N, D] as its patches [..., h * w, D] and its special tokens, prefix first, [..., S,
    D].
    """
    prefix, patches, suffix = x.split([layout.prefix, layout.patches, layout.suffix], dim=-2)
    return patches, torch.cat([prefix, suffix], dim=-2)


def join(patches: Tensor, special: Tensor, layout: TokenLayout) -> Tensor:
    """The sequence [..., N, D] whose parts `split` gave."""
    prefix, suffix = special.split([layout.prefix, layout.suffix], dim=-2)
    return torch.cat([prefix, patches, suffix], dim=-2)
