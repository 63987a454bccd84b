"""Exact top-k with a fixed rule for ties, so that every implementation picks the same keys."""

from __future__ import annotations

import torch
from torch import Tensor


def top_indices(scores: Tensor, k: int) -> Tensor:
    """Positions of the k largest entries along the last axis; among equals the lowest positions
    win.

    `torch.topk` leaves ties open, and in low precision ties at the k-th place are common.

    Args:
        scores: [..., N], any float dtype.
        k: how many, 1 <= k <= N.

    Returns:
        int64 [..., k], in ascending order of position.
    """
    scores = scores.detach()
    if k == scores.shape[-1]:
        return torch.arange(k, device=scores.device).expand(*scores.shape[:-1], k)
    threshold = scores.topk(k, dim=-1).values[..., -1:]
    above = scores > threshold
    tied = scores == threshold
    room = k - above.sum(-1, keepdim=True)
    chosen = above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= room))
    # exactly k are chosen: each goes to the slot of its rank, all others to one that is cut off
    # (a list of the chosen without sorting and without a data-dependent shape)
    slot = torch.where(chosen, chosen.cumsum(-1) - 1, k)
    position = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    listed = position.new_zeros(*scores.shape[:-1], k + 1).scatter(-1, slot, position)
    return listed[..., :k]


def best_indices(scores: Tensor, s: int) -> Tensor:
    """Positions of the s largest entries along the last axis, best first; among equals the lowest
    position first.

    For a few of few (routing): s passes of argmax, which returns the first of equals.

    Args:
        scores: [..., M].
        s: how many, 1 <= s <= M.

    Returns:
        int64 [..., s].
    """
    scores = scores.detach()
    picked = []
    for i in range(s):
        best = scores.argmax(dim=-1, keepdim=True)
        picked.append(best)
        if i + 1 < s:
            scores = scores.scatter(-1, best, float("-inf"))
    return torch.cat(picked, dim=-1)


def best_with(scores: Tensor, always: Tensor, s: int) -> Tensor:
    """`best_indices`, but some positions are among the s whatever their scores, and come first.

    Args:
        scores: [..., M].
        always: these positions, at most s different ones in a row; the same one may stand there
            twice and is still picked once. int64 [..., n], broadcast over leading axes.
        s: how many, 1 <= s <= M.
    """
    always = always.expand(*scores.shape[:-1], -1)
    return best_indices(scores.scatter(-1, always, float("inf")), s)
