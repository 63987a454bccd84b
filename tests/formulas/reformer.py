"""LSH attention, Kitaev et al. 2020 (Reformer), Sec. 2 and the several rounds of App. A."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from formulas._case import (
    BARE,
    BOTH,
    DEEP,
    PLAIN,
    TAIL,
    Case,
    Formula,
    Inputs,
    each_head,
    read,
)
from mitaswap import TokenLayout


def bucket(x: Tensor, rotation: Tensor, both_signs: bool = True) -> int:
    """argmax([x R; -x R]), the first of equals."""
    turned = [float((x * rotation[:, c]).sum()) for c in range(rotation.shape[1])]
    if both_signs:
        turned += [-t for t in turned]
    return turned.index(max(turned))


def reformer(
    chunk: int,
    buckets: int = 0,
    rounds: int = 4,
    shared: bool = True,
    ahead: bool = False,
    across: bool = False,
    seed: int = 0,
    built: TokenLayout | None = None,
    wraps: bool = False,
    every_round: bool = False,
    itself: bool = False,
    both_signs: bool = True,
    unit_keys: bool = True,
) -> Formula:
    """Attention within buckets of alike vectors, in chunks of the tokens sorted by bucket.

    Args:
        chunk: m, keys of a chunk.
        buckets: b; 0 for the even number nearest to 2 N / m.
        rounds: hash rounds.
        shared: one vector is query and, at unit length, key.
        ahead: the next chunk is in reach as well.
        across: keys of other buckets in these chunks as well.
        seed: of the rotations.
        built: layout whose N decides the number of buckets.
        wraps: the first chunk's previous one is the last: not the paper, a control.
        every_round: a key counts once for each round in which it is in reach: a control.
        itself: a shared token is its own key: a control.
        both_signs: False hashes by argmax(x R): a control.
        unit_keys: False leaves shared keys at their length: a control.
    """

    def formula(at: Inputs) -> Tensor:
        total, dim = at.q.shape[2:]
        tokens = built.tokens if built else total
        count = buckets or max(2, 2 * math.floor(tokens / chunk + 0.5))
        generator = torch.Generator().manual_seed(seed)
        rotations = torch.randn(rounds, dim, count // 2, generator=generator).double()
        chunks = math.ceil(total / chunk)

        def head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if shared:
                q = k = (q + k) / 2
            reach: list[list[int]] = [[] for _ in range(total)]
            for rotation in rotations:
                of_query = [bucket(x, rotation, both_signs) for x in q.detach()]
                of_key = [bucket(x, rotation, both_signs) for x in k.detach()]
                line = sorted((of_key[j], j) for j in range(total))
                place = {j: s for s, (_, j) in enumerate(line)}
                for i in range(total):
                    stand = sum(entry < (of_query[i], i) for entry in line)
                    own = min(stand, total - 1) // chunk
                    for j in range(total):
                        back = own - place[j] // chunk
                        near = back in ((-1, 0, 1) if ahead else (0, 1))
                        near = near or (wraps and back % chunks == 1)
                        alike = across or of_key[j] == of_query[i]
                        if near and alike and (itself or not shared or i != j):
                            reach[i].append(j)
            if shared and unit_keys:
                k = torch.stack([x / (x**2).sum().sqrt().clamp(min=1e-12) for x in k])
            rows = []
            for i in range(total):
                held = sorted(reach[i] if every_round else set(reach[i]))
                if held:
                    rows.append(read(q[i], k[held], v[held], [at.scale] * len(held)))
                else:
                    rows.append(v[i])
            return torch.stack(rows)

        return each_head(head, at.q, at.k, at.v)

    return formula


WIDER = TokenLayout(1, (4, 6))

CASES = [
    Case("reformer(chunk=4)", reformer(4)),
    Case("reformer(chunk=8,rounds=1)", reformer(8, rounds=1), TAIL, 24),
    Case("reformer(chunk=5,rounds=2)", reformer(5, rounds=2), DEEP, 72),
    Case("reformer(chunk=16,rounds=3)", reformer(16, rounds=3)),
    Case("reformer(chunk=4)", reformer(4), DEEP, scale=0.6),
    Case("reformer(chunk=3,rounds=1,buckets=12)", reformer(3, 12, 1), BARE, 24),
    Case(
        "reformer(chunk=3,rounds=2,look=both,across=true,seed=5)",
        reformer(3, rounds=2, ahead=True, across=True, seed=5),
        BOTH,
    ),
    Case("reformer(chunk=4,seed=3)", reformer(4, seed=3, built=WIDER), built=WIDER),
    Case("reformer(chunk=4,rounds=2)", reformer(4, rounds=2), PLAIN, 8, 0.25, "constant"),
    Case("reformer(chunk=4,share_qk=false)", reformer(4, shared=False)),
    Case("reformer(chunk=8,rounds=1,share_qk=false)", reformer(8, rounds=1, shared=False), TAIL),
    Case(
        "reformer(chunk=5,rounds=2,share_qk=false)", reformer(5, rounds=2, shared=False), DEEP, 72
    ),
    Case("reformer(chunk=16,rounds=3,share_qk=false)", reformer(16, rounds=3, shared=False)),
    Case(
        "reformer(chunk=1,rounds=2,buckets=4,share_qk=false)", reformer(1, 4, 2, shared=False), BARE
    ),
    Case(
        "reformer(chunk=6,buckets=2,share_qk=false)", reformer(6, 2, shared=False), BOTH, scale=0.7
    ),
    Case(
        "reformer(chunk=4,rounds=1,buckets=30,share_qk=false)",
        reformer(4, 30, 1, shared=False),
        DEEP,
    ),
    Case(
        "reformer(chunk=4,rounds=2,look=both,share_qk=false)",
        reformer(4, rounds=2, ahead=True, shared=False),
        BARE,
        24,
    ),
    Case(
        "reformer(chunk=5,rounds=2,across=true,share_qk=false)",
        reformer(5, rounds=2, across=True, shared=False),
        TAIL,
    ),
    Case(
        "reformer(chunk=4,seed=3,share_qk=false)",
        reformer(4, seed=3, shared=False, built=WIDER),
        built=WIDER,
    ),
    Case(
        "reformer(chunk=4,rounds=2,share_qk=false)",
        reformer(4, rounds=2, shared=False),
        PLAIN,
        8,
        0.25,
        "constant",
    ),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "wrap-around": Case(
        "reformer(chunk=4,across=true)", reformer(4, across=True, wraps=True), BOTH
    ),
    "keys counted in every round": Case("reformer(chunk=8)", reformer(8, every_round=True)),
    "keys of other buckets": Case("reformer(chunk=4)", reformer(4, across=True)),
    "next chunk": Case("reformer(chunk=4,buckets=2)", reformer(4, 2, ahead=True)),
    "next chunk, separate keys": Case(
        "reformer(chunk=4,buckets=2,share_qk=false)", reformer(4, 2, ahead=True, shared=False)
    ),
    "other rotations": Case("reformer(chunk=4)", reformer(4, seed=1)),
    "half of the buckets": Case("reformer(chunk=4)", reformer(4, both_signs=False)),
    "separate queries and keys": Case("reformer(chunk=4)", reformer(4, shared=False)),
    "shared token reads itself": Case("reformer(chunk=4)", reformer(4, itself=True)),
    "shared keys at their length": Case("reformer(chunk=4)", reformer(4, unit_keys=False)),
}
