"""Softmax attention over some of the keys: a branch whose pairs may be switched off one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from mitaswap.operators.experts import Branch, average


def attend_masked(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float, offset: Tensor | None = None
) -> Branch:
    """Softmax attention of q [..., N, D] over the allowed of k, v [..., K, D].

    A query with no allowed key gets a finite output and the lowest finite log-sum-exp: merged with
    any other branch it counts for nothing.

    Args:
        q, k, v: queries, keys, values.
        allowed: which pairs count, bool, broadcasts to [..., N, K].
        scale: factor of q k^T.
        offset: added to the logits, broadcasts to [..., N, K]; anything where not allowed.
    """
    scores = (q * scale) @ k.transpose(-1, -2)
    if offset is not None:
        scores = scores + offset
    return average(scores.masked_fill(~allowed, torch.finfo(scores.dtype).min), v)


def fallback(values: Tensor) -> Branch:
    """`values` [..., D] as a branch that counts only where no other branch has an allowed key."""
    lowest = torch.finfo(values.dtype).min / 2  # far below any score, far above no key at all
    return values, torch.full_like(values[..., :1], lowest)
