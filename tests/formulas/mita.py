"""MiTA, Wen et al. 2026, Eq. 5 to 12."""

from __future__ import annotations

import torch
from torch import Tensor

from formulas._case import (
    BARE,
    BOTH,
    DEEP,
    TAIL,
    Case,
    Formula,
    Inputs,
    each_head,
    largest,
    read,
    windows,
)
from mitaswap import TokenLayout


def mita(
    pool: tuple[int, int],
    width: int,
    routed: int = 1,
    shared: bool = True,
    landmark_twice: bool = False,
    from_first_token: bool = False,
    count_twice: bool = True,
) -> Formula:
    """Eq. 5 to 12.

    Args:
        pool: a x b windows, so m = a * b landmarks.
        width: k, keys per routed expert.
        routed: s, routed experts per query; 0 leaves them out (compress-only).
        shared: whether the shared expert takes part (False: route-only).
        landmark_twice: the released code's shared logits, scaled once more.
        from_first_token: the released code's windows over the first h * w tokens.
        count_twice: False drops a key that another chosen expert has brought already: not the
            paper, a control.
    """

    def formula(at: Inputs) -> Tensor:
        scale, layout = at.scale, at.layout

        def head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            marks = windows(q, 0 if from_first_token else layout.prefix, layout.grid, pool)
            held = [largest((k * mark).detach().sum(1) * scale, width) for mark in marks]
            compressed = torch.stack([read(mark, k, v, [scale] * len(k)) for mark in marks])
            rows = []
            for row in q:
                keys, values, factors = [], [], []
                if shared:
                    keys, values = list(marks), list(compressed)
                    factors = [scale * scale if landmark_twice else scale] * len(marks)
                seen: set[int] = set()
                for expert in largest((marks * row).detach().sum(1), routed):
                    for j in held[expert]:
                        if count_twice or j not in seen:
                            keys.append(k[j])
                            values.append(v[j])
                            factors.append(scale)
                        seen.add(j)
                rows.append(read(row, torch.stack(keys), torch.stack(values), factors))
            return torch.stack(rows)

        return each_head(head, at.q, at.k, at.v)

    return formula


CASES = [
    Case("mita(m=6,k=5)", mita((2, 3), 5)),
    Case("mita(m=6,k=5)", mita((2, 3), 5), TAIL, 24),
    Case("mita(m=6,k=4)", mita((2, 3), 4), DEEP, 72),
    Case("mita(m=6,k=7)", mita((2, 3), 7), BARE, scale=0.7),
    Case("mita(m=15,k=1)", mita((3, 5), 1), TokenLayout(1, (3, 5), 2)),
    Case("mita(m=1,k=3)", mita((1, 1), 3)),
    Case("mita(m=6,k=16)", mita((2, 3), 16)),
    Case("mita(m=6,k=5,s=2)", mita((2, 3), 5, 2), BOTH),
    Case("mita(m=6,k=12,s=3)", mita((2, 3), 12, 3)),
    Case("mita(m=4,k=5,s=4)", mita((2, 2), 5, 4), DEEP),
    Case("mita(m=8,k=6,pool=2x4)", mita((2, 4), 6), TAIL),
    Case("mita(m=8,k=6,pool=4x2)", mita((4, 2), 6), TAIL),
    Case("mita(m=6,k=5,variant=route-only)", mita((2, 3), 5, shared=False), BOTH),
    Case("mita(m=6,k=5,s=3,variant=route-only)", mita((2, 3), 5, 3, shared=False), DEEP),
    Case("mita(m=6,k=5,variant=compress-only)", mita((2, 3), 5, 0), BOTH, scale=0.5),
    Case("mita(m=6,k=5,shared_scale=released)", mita((2, 3), 5, landmark_twice=True), TAIL),
    Case(
        "mita(m=6,k=5,s=2,shared_scale=released)",
        mita((2, 3), 5, 2, landmark_twice=True),
        scale=0.6,
    ),
    Case("mita(m=6,k=5,landmark_tokens=released)", mita((2, 3), 5, from_first_token=True), DEEP),
    Case(
        "mita(m=6,k=5,shared_scale=released,landmark_tokens=released)",
        mita((2, 3), 5, landmark_twice=True, from_first_token=True),
        BOTH,
    ),
    Case("mita(m=6,k=5)", mita((2, 3), 5), TAIL, 8, 0.25, "constant"),
    Case("mita(m=6,k=5,s=3)", mita((2, 3), 5, 3), BOTH, 8, 0.25, "constant"),
    Case("mita(m=6,k=5)", mita((2, 3), 5), BOTH, 8, None, "crowd"),
    Case("mita(m=6,k=5,s=2)", mita((2, 3), 5, 2), DEEP, 8, None, "crowd"),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "windows transposed": Case("mita(m=8,k=6,pool=2x4)", mita((4, 2), 6), TAIL),
    "one key fewer": Case("mita(m=6,k=5)", mita((2, 3), 4)),
    "one expert more": Case("mita(m=6,k=5)", mita((2, 3), 5, 2)),
    "landmarks scaled twice": Case("mita(m=6,k=5)", mita((2, 3), 5, landmark_twice=True)),
    "landmarks with class token": Case("mita(m=6,k=5)", mita((2, 3), 5, from_first_token=True)),
    "no shared expert": Case("mita(m=6,k=5)", mita((2, 3), 5, shared=False)),
    "no routed expert": Case("mita(m=6,k=5)", mita((2, 3), 5, 0)),
    "doubled key counted once": Case("mita(m=6,k=12,s=3)", mita((2, 3), 12, 3, count_twice=False)),
}
