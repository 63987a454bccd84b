"""Softmax attention of each query over keys of its own choice, by masked rows of scores.

Every query holds another set of keys. To gather them would copy k rows for each of N queries, more
than the N scores of a row take; so the scores of all keys are made, for a chunk of queries at a
time, and those of keys that were not chosen are masked. Without gradients memory is linear in N.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mitaswap.operators.experts import Branch, average
from mitaswap.operators.select import top_indices

#: queries whose scores with all keys exist at once
CHUNK = 1024


def chunks(queries: int) -> Iterator[slice]:
    """Slices of at most `CHUNK` that together cover `queries` rows."""
    return (slice(i, min(i + CHUNK, queries)) for i in range(0, queries, CHUNK))


def attend_chosen(
    q: Tensor, k: Tensor, v: Tensor, scale: float, choose: Callable[[slice, Tensor], Tensor]
) -> Branch:
    """Softmax attention of q [B, H, Q, D] over the keys of k, v [B, H, N, D] that `choose` leaves.

    Args:
        q, k, v: queries, keys and values.
        scale: factor of q k^T.
        choose: is given which queries a chunk holds and their logits [B, H, rows, N]; returns the
            logits, with -inf for keys that were not chosen, never in a whole row.

    Returns:
        Output [B, H, Q, Dv] and log-sum-exp [B, H, Q, 1], as of `experts.attend`.
    """
    parts = []
    for rows in chunks(q.shape[2]):
        logits = (q[:, :, rows] * scale) @ k.transpose(-1, -2)
        parts.append(average(choose(rows, logits), v))
    out, lse = (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
    return out, lse


def attend_all(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Branch:
    """`experts.attend` of q [B, H, Q, D] over all of k, v [B, H, N, D], in chunks of queries."""
    return attend_chosen(q, k, v, scale, lambda _, logits: logits)


def keep_top(logits: Tensor, scores: Tensor, count: int) -> Tensor:
    """`logits` [..., N] where `scores` are among the `count` largest of their row, -inf elsewhere;
    of equal scores the lowest positions are kept.

    The kept keys are a discrete choice. So that what computes the scores can learn, they get the
    gradient that they would have as a term of the logits, while the value stays as it is.
    """
    if scores.requires_grad:
        logits = logits + (scores - scores.detach())
    dropped = torch.ones_like(scores, dtype=torch.bool)
    dropped = dropped.scatter(-1, top_indices(scores, count), False)
    return logits.masked_fill(dropped, float("-inf"))


def sparse(x: Tensor, count: int, threshold: float) -> Tensor:
    """x [..., N] with zeros where an entry is not among the `count` largest of its row, or no
    larger than a positive `threshold` in magnitude.
    """
    if count < x.shape[-1]:
        x = x * torch.zeros_like(x).scatter(-1, top_indices(x, count), 1.0)
    return x * (x.detach().abs() > threshold) if threshold > 0 else x


def own_choice(members: Tensor) -> Tensor:
    """Choice [B, H, N, 1] where every query is an expert of its own, holding `members` [B, H, N,
    K].
    """
    own = torch.arange(members.shape[2], device=members.device)
    return own[:, None].expand(*members.shape[:3], 1)
