"""Queries sorted by the expert they go to, in equal blocks that belong to one expert each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """Slots for all queries: enough whatever they choose, so that no shape depends on the data.

    Args:
        source: query of each slot, int64 [B, H, blocks * block]; empty slots repeat query 0.
        owner: expert of each block, int64 [B, H, blocks].
        back: slot of each query, int64 [B, H, N].
    """

    source: Tensor
    owner: Tensor
    back: Tensor


def expert_blocks(tokens: int, experts: int) -> tuple[int, int]:
    """Number of blocks, and queries in each, that `owner_blocks` cuts its queries into."""
    block = min(64, max(8, 1 << (tokens // experts).bit_length() - 1))
    return tokens // block + experts, block  # sum of ceil(n_i / block) never exceeds this


def owner_blocks(choice: Tensor, experts: int) -> Blocks:
    """Blocks for queries with one expert each.

    Args:
        choice: expert of each query, int64 [B, H, N].
        experts: how many there are.
    """
    batch, heads, tokens = choice.shape
    blocks, block = expert_blocks(tokens, experts)
    order = choice.argsort(dim=-1, stable=True)
    counts = torch.zeros(batch, heads, experts, dtype=torch.int64, device=choice.device)
    counts = counts.scatter_add(-1, choice, torch.ones_like(choice))
    padded = (counts + block - 1) // block
    ends = padded.cumsum(-1)
    # from a query's place in the sorted list to its place in the padded blocks
    shift = (ends - padded) * block - (counts.cumsum(-1) - counts)
    slot = torch.arange(tokens, device=choice.device) + shift.gather(-1, choice.gather(-1, order))
    source = torch.zeros(batch, heads, blocks * block, dtype=torch.int64, device=choice.device)
    numbers = torch.arange(blocks, device=choice.device).expand(batch, heads, blocks).contiguous()
    owner = torch.searchsorted(ends, numbers, right=True).clamp(max=experts - 1)
    back = torch.zeros_like(choice).scatter(-1, order, slot)
    return Blocks(source.scatter(-1, slot, order), owner, back)
