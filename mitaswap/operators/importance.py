"""Softmax attention whose weights are of use themselves: they say which keys matter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mitaswap.operators.experts import Branch

#: pairs of a query and a key, for each head, whose scores exist at once: keys may grow with N
PAIRS = 2**18


def attend_and_pick(
    q: Tensor, k: Tensor, v: Tensor, scale: float, pick: Callable[[slice, Tensor], Tensor]
) -> tuple[Branch, Tensor]:
    """Softmax attention of q [B, H, Q, D] over k, v [B, H, M, D], and what `pick` makes of it.

    Args:
        q, k, v: queries, keys and values.
        scale: factor of q k^T.
        pick: is given which queries a chunk holds and their weights [B, H, rows, M], cut from the
            graph; returns [B, H, rows, s].

    Returns:
        Output and log-sum-exp, as of `experts.attend`, and what was picked, [B, H, Q, s].
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    many = max(1, PAIRS // k.shape[2])
    for start in range(0, q.shape[2], many):
        rows = slice(start, min(start + many, q.shape[2]))
        scores = (q[:, :, rows] * scale) @ k.transpose(-1, -2)
        lse, weights = scores.logsumexp(dim=-1, keepdim=True), scores.softmax(dim=-1)
        found.append((weights @ v, lse, pick(rows, weights.detach())))
    out, lse, picked = (torch.cat(x, dim=2) for x in zip(*found, strict=True))
    return (out, lse), picked
