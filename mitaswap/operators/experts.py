"""Softmax attention in branches: each branch gives an output and its log-sum-exp, and branches
merge exactly.

That is the online softmax: one softmax over a concatenation equals its parts weighted by their
log-sum-exps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: a branch's output [B, H, N, D] and log-sum-exp [B, H, N, 1]
Branch = tuple[Tensor, Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Branch:
    """Softmax attention of q [..., N, D] over k, v [..., K, D], with its log-sum-exp; a bias [...,
    N, K] is added to the logits.
    """
    scores = (q * scale) @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    top = scores.detach().amax(dim=-1, keepdim=True)
    weights = (scores - top).exp()
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


def expert_blocks(tokens: int, experts: int) -> tuple[int, int]:
    """Number of blocks, and queries in each, that `attend_experts` cuts its queries into."""
    block = min(64, max(8, 1 << (tokens // experts).bit_length() - 1))
    return tokens // block + experts, block  # sum of ceil(n_i / block) never exceeds this


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
    batch, heads, tokens, dim = q.shape
    experts, width = k.shape[2:4]
    blocks, block = expert_blocks(tokens, experts)

    order = choice.argsort(dim=-1, stable=True)
    owner = choice.gather(-1, order)
    counts = torch.zeros(batch, heads, experts, dtype=torch.int64, device=q.device)
    counts = counts.scatter_add(-1, choice, torch.ones_like(choice))
    padded = (counts + block - 1) // block
    ends = padded.cumsum(-1)
    # where an expert's queries start, in the sorted list and in the padded blocks
    shift = (ends - padded) * block - (counts.cumsum(-1) - counts)
    slot = torch.arange(tokens, device=q.device) + shift.gather(-1, owner)
    source = torch.zeros(batch, heads, blocks * block, dtype=torch.int64, device=q.device)
    source = source.scatter(
        -1, slot, order
    )  # unfilled slots repeat query 0 and are never read back
    numbers = torch.arange(blocks, device=q.device).expand(batch, heads, blocks).contiguous()
    block_owner = torch.searchsorted(ends, numbers, right=True).clamp(max=experts - 1)

    def of_blocks(x: Tensor) -> Tensor:
        rows = take(x.reshape(batch, heads, experts, width * x.shape[-1]), block_owner)
        return rows.view(batch, heads, blocks, width, x.shape[-1])

    queries = take(q, source).view(batch, heads, blocks, block, dim)
    out, lse = attend(queries, of_blocks(k), of_blocks(v), scale)
    back = torch.zeros_like(choice).scatter(-1, order, slot)
    return take(out.flatten(2, 3), back), take(lse.flatten(2, 3), back)
