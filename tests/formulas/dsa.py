"""DeepSeek Sparse Attention, DeepSeek-AI 2025, Eq. 1-2: a lightning indexer picks the keys."""

from __future__ import annotations

import torch
from torch import Tensor

from formulas._case import BARE, BOTH, DEEP, TAIL, Case, Formula, Inputs, largest


def normalised(key: Tensor, gain: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm of one index key."""
    centred = key - key.sum() / len(key)
    return centred / torch.sqrt((centred * centred).sum() / len(key) + eps) * gain + bias


def dsa(
    count: int,
    index_heads: int,
    from_x: bool = False,
    norm: bool = False,
    rectified: bool = True,
) -> Formula:
    """softmax over the k keys of largest I = sum_j w_j ReLU(q^I_j . k^I), the same for all heads.

    Args:
        count: k, keys per query.
        index_heads: heads of the indexer.
        from_x: the indexer reads the module's input, not the heads' queries and keys.
        norm: LayerNorm of the index keys.
        rectified: False leaves ReLU out: not the paper, a control.
    """

    def formula(at: Inputs) -> Tensor:
        q, k, v, of = at.q, at.k, at.v, at.params
        batches = []
        for b in range(q.shape[0]):
            out: list[list[Tensor]] = [[] for _ in range(q.shape[1])]
            tokens = range(q.shape[2])
            if from_x:
                asking = asked = [at.x[b, t].detach() for t in tokens]
            else:  # heads side by side
                asking = [torch.cat([head[t] for head in q[b]]).detach() for t in tokens]
                asked = [torch.cat([head[t] for head in k[b]]).detach() for t in tokens]
            index_keys = [of["index_keys"] @ token for token in asked]
            if norm:
                index_keys = [
                    normalised(key, of["norm_weight"], of["norm_bias"]) for key in index_keys
                ]
            stacked = torch.stack(index_keys)
            size = stacked.shape[1]
            for t in tokens:
                index = torch.zeros(len(tokens), dtype=q.dtype)
                for j in range(index_heads):
                    query = of["index_queries"][j * size : (j + 1) * size] @ asking[t]
                    match = (stacked * query).sum(1)
                    if rectified:
                        match = torch.where(match > 0, match, torch.zeros_like(match))
                    gate = (of["head_weights"][j] * asking[t]).sum() + of["head_bias"][j]
                    index = index + gate * match
                kept = largest(index.detach(), count)
                for h in range(q.shape[1]):
                    logits = at.scale * (k[b, h, kept] * q[b, h, t]).sum(1)
                    logits = logits + index[kept] - index[kept].detach()  # zero, for its gradient
                    weights = torch.exp(logits - logits.detach().max())
                    weights = weights / weights.sum()
                    out[h].append((weights[:, None] * v[b, h, kept]).sum(0))
            batches.append(torch.stack([torch.stack(rows) for rows in out]))
        return torch.stack(batches)

    return formula


CASES = [
    Case("dsa(k=5)", dsa(5, 3)),
    Case("dsa(k=7,index_dim=16)", dsa(7, 3), TAIL, 24),
    Case("dsa(k=6,index_heads=1,index_dim=8)", dsa(6, 1), DEEP),
    Case("dsa(k=6,index_heads=2)", dsa(6, 2), BOTH, scale=0.6),
    Case("dsa(k=4,index_heads=5,index_dim=3)", dsa(4, 5), BARE, 72),
    # one key has weight one: gradients of the indexer are zero but for rounding
    Case("dsa(k=1,index_dim=5)", dsa(1, 3), BARE, scale=0.2, room=1e-9),
    Case("dsa(k=16)", dsa(16, 3)),
    Case("dsa(k=5,norm=true,index_dim=12)", dsa(5, 3, norm=True), DEEP, 24, scale=0.3),
    Case("dsa(k=5,index_from=x)", dsa(5, 3, from_x=True)),
    Case("dsa(k=8,index_from=x,index_heads=2,index_dim=9)", dsa(8, 2, from_x=True), BOTH),
    Case("dsa(k=6,norm=true,index_from=x,seed=3)", dsa(6, 3, from_x=True, norm=True), TAIL),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "one key more": Case("dsa(k=5)", dsa(6, 3)),
    "no ReLU": Case("dsa(k=5)", dsa(5, 3, rectified=False)),
    "one index head fewer": Case("dsa(k=5)", dsa(5, 2)),
    "no norm": Case("dsa(k=5,norm=true)", dsa(5, 3)),
}
