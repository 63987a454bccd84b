"""Softmax attention in branches: each branch gives an output and its log-sum-exp, and branches
merge exactly.

That is the online softmax: one softmax over a concatenation equals its parts weighted by their
log-sum-exps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mitaswap.operators.blocks import owner_blocks

#: a branch's output [B, H, N, D] and log-sum-exp [B, H, N, 1]
Branch = tuple[Tensor, Tensor]

#: pairs of a query and a key, for each head, whose scores exist at once: experts may grow with N
PAIRS = 2**20


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Branch:
    """Softmax attention of q [..., N, D] over k, v [..., K, D], with its log-sum-exp; a bias [...,
    N, K] is added to the logits.
    """
    scores = (q * scale) @ k.transpose(-1, -2)
    return average(scores if bias is None else scores + bias, v)


def average(logits: Tensor, v: Tensor) -> Branch:
    """Values v [..., K, D] weighed by the softmax of `logits` [..., N, K], with its log-sum-exp."""
    top = logits.detach().amax(dim=-1, keepdim=True)
    weights = (logits - top).exp()
    total = weights.sum(dim=-1, keepdim=True)
    return (weights @ v) / total, top + total.log()


def merge(branches: Sequence[Branch]) -> Branch:
    """The softmax over the concatenated keys of all branches."""
    if len(branches) == 1:
        return branches[0]
    parts = torch.cat([lse for _, lse in branches], dim=-1)
    weights = parts.softmax(dim=-1)
    total = branches[0][0] * weights[..., :1]
    for i, (out, _) in enumerate(branches[1:], start=1):
        total = total + out * weights[..., i : i + 1]
    return total, parts.logsumexp(dim=-1, keepdim=True)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x [B, H, N, D] at index [B, H, R] as [B, H, R, D], each a contiguous copy of D
    values.
    """
    batch, heads, rows, dim = x.shape
    start = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * rows
    flat = (index + start).flatten()
    return x.reshape(-1, dim).index_select(0, flat).view(*index.shape, dim)


def attend_experts(q: Tensor, k: Tensor, v: Tensor, choice: Tensor, scale: float) -> Branch:
    """Each query attends to the keys of the one expert it chose.

    Queries are sorted by expert and cut into blocks that belong to one expert each, so that the
    work is a few batched matrix products over (N / block + M) blocks: no N x N matrix, no copy of
    an expert per query, and shapes that do not depend on the data.

    Args:
        q: queries [B, H, N, D].
        k, v: keys and values of the experts [B, H, M, K, D] ([B, H, M, K, Dv]).
        choice: expert of each query, int64 [B, H, N].
        scale: factor of q k^T.
    """
    blocks = owner_blocks(choice, k.shape[2])
    queries = take(q, blocks.source).unflatten(2, (blocks.owner.shape[2], -1))
    out, lse = attend_blocks(queries, k, v, blocks.owner.unsqueeze(-1), scale)
    return take(out.flatten(2, 3), blocks.back), take(lse.flatten(2, 3), blocks.back)


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, read: Tensor, scale: float) -> Branch:
    """Each block of queries attends to the keys of the experts that it reads.

    Experts are copied for the blocks that read them, for a chunk of blocks at a time (of one
    block's queries, where its keys are many). Without gradients memory is linear in N.

    Args:
        q: blocks of queries [B, H, M, L, D].
        k, v: keys and values of the experts [B, H, E, K, D] ([B, H, E, K, Dv]).
        read: experts that each block reads, int64 [B, H, M, R].
        scale: factor of q k^T.

    Returns:
        Output [B, H, M, L, Dv] and log-sum-exp [B, H, M, L, 1].
    """
    count, size, width = *q.shape[2:4], read.shape[3] * k.shape[3]
    few, rows = max(1, PAIRS // (size * width)), max(1, PAIRS // width)

    def held(x: Tensor, some: slice) -> Tensor:
        index = read[:, :, some]
        found = take(x.flatten(3), index.flatten(2))
        return found.view(*index.shape[:3], width, x.shape[4])

    def chunk(some: slice) -> Branch:  # a function: its copies are gone before the next ones
        keys, values = held(k, some), held(v, some)
        queries = q[:, :, some].split(rows, dim=3)
        return _joined([attend(x, keys, values, scale) for x in queries], dim=3)

    return _joined([chunk(slice(i, i + few)) for i in range(0, count, few)], dim=2)


def _joined(parts: Sequence[Branch], dim: int) -> Branch:
    """Branches of other queries each, side by side."""
    if len(parts) == 1:
        return parts[0]
    out, lse = (torch.cat(x, dim=dim) for x in zip(*parts, strict=True))
    return out, lse
