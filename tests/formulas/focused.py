"""Focused linear attention, Han et al. 2023 (FLatten Transformer), Eq. 4 to 6."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from formulas._case import BARE, BOTH, DEEP, PLAIN, TAIL, Case, Formula, Inputs
from mitaswap import TokenLayout


def powered(x: Tensor, factor: float) -> Tensor:
    """Element-wise x ** factor of numbers that are not negative."""
    ones = torch.ones_like(x)
    return torch.where(x > 0, torch.exp(factor * torch.log(torch.where(x > 0, x, ones))), 0.0 * x)


def length(x: Tensor) -> Tensor:
    return torch.sqrt((x * x).sum())


def along(place: int, size: int, old: int) -> list[tuple[int, float]]:
    """Cells of an axis of `old` cells, and their shares in cell `place` of `size`: linear between
    the centres of cells, flat beyond the first and the last.
    """
    at = min(max((place + 0.5) * old / size - 0.5, 0.0), old - 1.0)
    low = math.floor(at)
    return [(low, 1 - at + low), (min(low + 1, old - 1), at - low)]


def encoding(table: Tensor, layout: TokenLayout, n: int) -> Tensor:
    """What the tables of all heads, [H, D, h, w], add to the key of token n: [H, D]."""
    place, width = n - layout.prefix, layout.grid[1]
    total = torch.zeros_like(table[:, :, 0, 0])
    if not 0 <= place < layout.patches:
        return total
    for i, down in along(place // width, layout.grid[0], table.shape[2]):
        for j, across in along(place % width, width, table.shape[3]):
            total = total + down * across * table[:, :, i, j]
    return total


def focused(
    factor: float = 3.0,
    eps: float = 1e-6,
    width: bool = False,
    scaled: bool = False,
    positions: bool = False,
    floor: float = 0.0,
    mean: bool = False,
    floor_late: bool = False,
    keep_length: bool = True,
    raw_keys: bool = False,
    queries_too: bool = False,
    afterwards: bool = False,
) -> Formula:
    """sum_j (phi(q) . phi(k_j)) v_j / (sum_j phi(q) . phi(k_j) + eps).

    Args:
        factor: the focusing factor p.
        eps: added to the sum of the weights.
        width: norms of a token over all heads' features (released code).
        scaled: features are divided by a learned softplus (released code).
        positions: keys have a learned positional encoding (released code).
        floor: added to every feature behind ReLU (released code).
        mean: eps is added to the mean of the weights, over all tokens (released code).
        floor_late: True adds the floor behind the scale: not the code, a control.
        keep_length: False leaves out f_p's |x|: not the paper, a control.
        raw_keys: True leaves keys without f_p: not the paper, a control.
        queries_too: True adds the encoding to queries as well: nobody's, a control.
        afterwards: True adds it to phi(k): nobody's, a control.
    """

    def formula(at: Inputs) -> Tensor:
        batch, heads, tokens, dim = at.q.shape
        queries = at.q * (at.scale * math.sqrt(dim))

        def features(token: Tensor) -> Tensor:
            """phi of one token, [H, D]."""
            positive = torch.where(token > 0, token, torch.zeros_like(token))
            if not floor_late:
                positive = positive + floor
            if scaled:
                positive = positive / torch.log(1 + torch.exp(at.params["channel_scale"]))
            if floor_late:
                positive = positive + floor
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

        where = torch.zeros_like(at.k[0]).transpose(0, 1)  # [N, H, D]
        if positions:
            table = at.params["position_table"]
            where = torch.stack([encoding(table, at.layout, n) for n in range(tokens)])

        elements = []
        for b in range(batch):
            phi_q = [features(queries[b, :, n]) for n in range(tokens)]
            if queries_too:
                phi_q = [features(queries[b, :, n] + where[n]) for n in range(tokens)]
            phi_k = [features(at.k[b, :, n] + where[n]) for n in range(tokens)]
            if afterwards:
                phi_k = [features(at.k[b, :, n]) + where[n] for n in range(tokens)]
            if raw_keys:
                phi_k = [at.k[b, :, n].clamp(min=0) for n in range(tokens)]
            out = []
            for h in range(heads):
                keys = torch.stack([key[h] for key in phi_k])
                rows = []
                for query in phi_q:
                    weights = (keys * query[h]).sum(1)
                    read = (weights[:, None] * at.v[b, h]).sum(0)
                    if mean:
                        rows.append(read / tokens / (weights.sum() / tokens + eps))
                    else:
                        rows.append(read / (weights.sum() + eps))
                out.append(torch.stack(rows))
            elements.append(torch.stack(out))
        return torch.stack(elements)

    return formula


RELEASED = "focused(norm=width,channel_scale=true,positions=true,floor=1e-6,eps_of=mean)"
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
    Case("focused(positions=true)", focused(positions=True), BARE),
    Case("focused(positions=true,factor=2)", focused(2.0, positions=True), DEEP, 24, scale=0.4),
    Case(
        "focused(positions=true,channel_scale=true,norm=width)",
        focused(width=True, scaled=True, positions=True),
        BOTH,
    ),
    Case("focused(positions=true)", focused(positions=True), BOTH, built=PLAIN),
    Case("focused(positions=true)", focused(positions=True), DEEP, built=TokenLayout(5, (7, 4))),
    Case("focused(eps_of=mean,eps=0.2)", focused(eps=0.2, mean=True), BOTH),
    Case("focused(eps_of=mean)", focused(mean=True), TAIL, 24, scale=0.31),
    Case("focused(floor=0.3)", focused(floor=0.3), DEEP),
    Case("focused(floor=1e-6,factor=2)", focused(2.0, floor=1e-6), TAIL, 24),
    Case("focused(floor=0.2)", focused(floor=0.2), BARE, 8, 0.25, "constant"),
    Case(
        "focused(floor=0.1,channel_scale=true,factor=1)",
        focused(1.0, scaled=True, floor=0.1),
        BOTH,
        scale=0.6,
    ),
    Case(RELEASED, focused(width=True, scaled=True, positions=True, floor=1e-6, mean=True), BARE),
    Case(
        RELEASED,
        focused(width=True, scaled=True, positions=True, floor=1e-6, mean=True),
        BOTH,
        24,
        built=DEEP,
    ),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "another factor": Case("focused", focused(2.9)),
    "length not kept": Case("focused", focused(keep_length=False, eps=0.01)),
    "keys not focused": Case("focused", focused(raw_keys=True)),
    "norms over the width": Case("focused(eps=0.1)", focused(eps=0.1, width=True)),
    "scale left out": Case("focused(channel_scale=true)", focused()),
    "positions left out": Case("focused(positions=true)", focused()),
    "positions of queries too": Case(
        "focused(positions=true)", focused(positions=True, queries_too=True)
    ),
    "positions after the feature map": Case(
        "focused(positions=true,eps=0.1)", focused(eps=0.1, positions=True, afterwards=True)
    ),
    "eps on the sum": Case("focused(eps_of=mean,eps=0.1)", focused(eps=0.1)),
    "eps on the mean": Case("focused(eps=0.1)", focused(eps=0.1, mean=True)),
    "floor left out": Case("focused(floor=0.1)", focused()),
    "floor behind the scale": Case(
        "focused(floor=0.1,channel_scale=true)", focused(scaled=True, floor=0.1, floor_late=True)
    ),
}
