"""Focused linear attention, Han et al. 2023 (FLatten Transformer), Eq. 4 to 6."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from formulas._case import BARE, BOTH, DEEP, TAIL, Case, Formula, Inputs


def powered(x: Tensor, factor: float) -> Tensor:
    """Element-wise x ** factor of numbers that are not negative."""
    ones = torch.ones_like(x)
    return torch.where(x > 0, torch.exp(factor * torch.log(torch.where(x > 0, x, ones))), 0.0 * x)


def length(x: Tensor) -> Tensor:
    return torch.sqrt((x * x).sum())


def focused(
    factor: float = 3.0,
    eps: float = 1e-6,
    width: bool = False,
    scaled: bool = False,
    keep_length: bool = True,
    raw_keys: bool = False,
) -> Formula:
    """sum_j (phi(q) . phi(k_j)) v_j / (sum_j phi(q) . phi(k_j) + eps).

    Args:
        factor: the focusing factor p.
        eps: added to the sum of the weights.
        width: norms of a token over all heads' features (released code).
        scaled: features are divided by a learned softplus (released code).
        keep_length: False leaves out f_p's |x|: not the paper, a control.
        raw_keys: True leaves keys without f_p: not the paper, a control.
    """

    def formula(at: Inputs) -> Tensor:
        batch, heads, tokens, dim = at.q.shape
        queries = at.q * (at.scale * math.sqrt(dim))

        def features(token: Tensor) -> Tensor:
            """phi of one token, [H, D]."""
            positive = torch.where(token > 0, token, torch.zeros_like(token))
            if scaled:
                positive = positive / torch.log(1 + torch.exp(at.params["channel_scale"]))
            risen = powered(positive, factor)
            groups = [range(heads)] if width else [range(h, h + 1) for h in range(heads)]
            rows = []
            for group in groups:
                before, after = positive[group[0] : group[-1] + 1], risen[group[0] : group[-1] + 1]
                if not bool((before > 0).any()):
                    rows.append(torch.zeros_like(before))
                elif keep_length:
                    rows.append(length(before) / length(after) * after)
                else:
                    rows.append(after / length(after))
            return torch.cat(rows)

        elements = []
        for b in range(batch):
            phi_q = [features(queries[b, :, n]) for n in range(tokens)]
            phi_k = [features(at.k[b, :, n]) for n in range(tokens)]
            if raw_keys:
                phi_k = [at.k[b, :, n].clamp(min=0) for n in range(tokens)]
            out = []
            for h in range(heads):
                keys = torch.stack([key[h] for key in phi_k])
                rows = []
                for query in phi_q:
                    weights = (keys * query[h]).sum(1)
                    rows.append((weights[:, None] * at.v[b, h]).sum(0) / (weights.sum() + eps))
                out.append(torch.stack(rows))
            elements.append(torch.stack(out))
        return torch.stack(elements)

    return formula


CASES = [
    Case("focused", focused()),
    Case("focused", focused(), TAIL, 24, scale=0.31),
    Case("focused", focused(), BOTH, 72),
    Case("focused(factor=1)", focused(1.0), DEEP),
    Case("focused(factor=2.5)", focused(2.5), BARE, 24),
    Case("focused(eps=0.5)", focused(eps=0.5), BOTH),
    Case("focused(norm=width)", focused(width=True), TAIL),
    Case("focused(factor=4,norm=width)", focused(4.0, width=True), DEEP, 24, scale=0.4),
    Case("focused(channel_scale=true)", focused(scaled=True), BOTH),
    Case("focused(channel_scale=true,factor=2)", focused(2.0, scaled=True), TAIL, 24, scale=0.6),
    Case(
        "focused(channel_scale=true,norm=width,eps=0.01)",
        focused(eps=0.01, width=True, scaled=True),
        DEEP,
        72,
    ),
    Case("focused", focused(), BARE, 8, 0.25, "constant"),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "another factor": Case("focused", focused(2.9)),
    "length not kept": Case("focused", focused(keep_length=False, eps=0.01)),
    "keys not focused": Case("focused", focused(raw_keys=True)),
    "norms over the width": Case("focused(eps=0.1)", focused(eps=0.1, width=True)),
    "scale left out": Case("focused(channel_scale=true)", focused()),
}
