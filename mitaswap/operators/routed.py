"""Patches that are routed by the grid beside special tokens that are not: these are seen by every
query, and see all keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mitaswap.operators.counting import attend_flops
from mitaswap.operators.experts import Branch, attend, merge
from mitaswap.operators.special import join, split
from mitaswap.tokens import TokenLayout


def with_special(
    q: Tensor, k: Tensor, v: Tensor, patches: Sequence[Branch], layout: TokenLayout, scale: float
) -> Branch:
    """The branch of all N tokens from branches of the patches' softmax that hold patch keys alone.

    Every patch reads the special tokens as well, in the same softmax. Every special token reads all
    N keys: a few plain rows of softmax attention.

    Args:
        q, k, v: of all tokens, [B, H, N, D].
        patches: branches of the patch queries, [B, H, patches, D] and [B, H, patches, 1].
        layout: token layout of the N tokens.
        scale: factor of q k^T.
    """
    if layout.tokens == layout.patches:
        return merge(patches)
    queries, special = split(q, layout)
    seen = attend(queries, split(k, layout)[1], split(v, layout)[1], scale)
    return join_special(merge([*patches, seen]), attend(special, k, v, scale), layout)


def join_special(patches: Branch, special: Branch, layout: TokenLayout) -> Branch:
    """The branch of all N tokens from those of the patch queries and of the special queries."""
    out, lse = (join(a, b, layout) for a, b in zip(patches, special, strict=True))
    return out, lse


def special_flops(layout: TokenLayout, dim: int, value_dim: int) -> int:
    """FLOPs that `with_special` adds to the patches' branches."""
    special = layout.tokens - layout.patches
    seen = attend_flops(layout.patches, special, dim, value_dim)
    return seen + attend_flops(special, layout.tokens, dim, value_dim)


def special_routing(members: Tensor, choice: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
    """The routing of all N tokens from the patches' own: special tokens are one expert more.

    Args:
        members: keys that each expert holds, int64 [B, H, M, K].
        choice: experts of the patch queries, int64 [B, H, patches, s].
        layout: token layout.

    Returns:
        Members [B, H, M + 1, K'] and choices [B, H, N, M + 1] with -1 in unused places: patches
        also take the special expert, special queries take all. Unchanged without special tokens.
    """
    count, experts = layout.tokens - layout.patches, members.shape[2]
    if not count:
        return members, choice
    outer = members.shape[:2]
    position = torch.arange(layout.tokens, device=members.device)[:, None]
    special = split(position, layout)[1].T.expand(*outer, 1, count)
    width = max(members.shape[3], count)
    held = [F.pad(x, (0, width - x.shape[3]), value=-1) for x in (members, special)]

    seen = torch.full_like(choice[..., :1], experts)  # best first: every query reads these
    taken = F.pad(torch.cat([seen, choice], -1), (0, experts - choice.shape[3]), value=-1)
    every = torch.arange(experts + 1, device=choice.device).expand(*outer, count, experts + 1)
    return torch.cat(held, dim=2), join(taken, every, layout)


def members_of_each(kept: Tensor, layout: TokenLayout, apart: bool) -> Tensor:
    """Members [B, H, N, K] where each query is an expert of its own, -1 in empty slots: a special
    query holds all keys, a patch what it kept.

    Args:
        kept: keys of the patch queries, int64 [B, H, patches, k]; places among the patches where
            special tokens are `apart`, among all tokens otherwise.
        layout: token layout.
        apart: whether patches hold the special tokens besides.
    """
    every = torch.arange(layout.tokens, device=kept.device)
    special = split(every[:, None], layout)[1].flatten()
    if apart:
        seen = special.expand(*kept.shape[:3], -1)
        kept = torch.cat([kept + layout.prefix, seen], dim=-1)
    if not special.numel():
        return kept
    kept = F.pad(kept, (0, layout.tokens - kept.shape[-1]), value=-1)
    return join(kept, every.expand(*kept.shape[:2], special.numel(), -1), layout)
