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

    def held(x: Tensor) -> Tensor:
        return take(x.flatten(3), blocks.owner).unflatten(3, x.shape[3:])

    queries = take(q, blocks.source).unflatten(2, (blocks.owner.shape[2], -1))
    out, lse = attend(queries, held(k), held(v), scale)
    return take(out.flatten(2, 3), blocks.back), take(lse.flatten(2, 3), blocks.back)
