"""Performer, Choromanski et al. 2021: FAVOR+, and its ReLU kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from formulas._case import BARE, BOTH, DEEP, TAIL, Case, Formula, Inputs, each_head


def orthonormal(columns: Tensor) -> Tensor:
    """Gram-Schmidt over the columns of a square matrix, twice against rounding."""
    basis: list[Tensor] = []
    for j in range(columns.shape[1]):
        column = columns[:, j]
        for _ in range(2):
            for other in basis:
                column = column - (other @ column) * other
        basis.append(column / column.norm())
    return torch.stack(basis, dim=1)


def directions(dim: int, features: int, orthogonal: bool, seed: int) -> Tensor:
    """The random vectors w_1, ..., w_r as rows, [r, D], rounded to single precision."""
    generator = torch.Generator().manual_seed(seed)
    kind = {"generator": generator, "dtype": torch.float64}
    blocks = torch.randn(math.ceil(features / dim), dim, dim, **kind)
    rows = []
    for block in blocks:
        rows += list(orthonormal(block) if orthogonal else block)
    if orthogonal:  # as long as Gaussian vectors are
        lengths = [row.norm() for row in torch.randn(features, dim, **kind)]
        rows = [row * length for row, length in zip(rows, lengths, strict=False)]
    return torch.stack(rows[:features]).float().double()


def performer(
    features: int = 0,
    kernel: str = "softmax",
    orthogonal: bool = True,
    seed: int = 0,
    eps: float = 1e-3,
    half: float = 0.5,
) -> Formula:
    """sum_j (phi(q) . phi(k_j)) v_j / sum_j phi(q) . phi(k_j) with random features phi.

    Args:
        features: r; 0 for D log D, but at least D.
        kernel: softmax: exp(w . x - |x|^2 / 2); relu: max(w . x, 0) + eps.
        orthogonal: whether the vectors of a block of D are orthogonal.
        seed: of the vectors.
        eps: of the ReLU features.
        half: factor of |x|^2, which is one half: another one is a control.
    """

    def formula(at: Inputs) -> Tensor:
        dim = at.q.shape[3]
        count = features or max(dim, int(dim * math.log(dim)))
        vectors = directions(dim, count, orthogonal, seed)

        def phi(x: Tensor) -> Tensor:
            along = (vectors * x).sum(1)
            if kernel == "relu":
                return torch.where(along > 0, along, torch.zeros_like(along)) + eps
            return torch.exp(along - half * (x * x).sum())

        def head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            root = math.sqrt(at.scale)
            keys = [phi(root * key) for key in k]
            rows = []
            for query in q:
                features_of_query = phi(root * query)
                weights = torch.stack([(features_of_query * key).sum() for key in keys])
                rows.append((weights[:, None] * v).sum(0) / weights.sum())
            return torch.stack(rows)

        return each_head(head, at.q, at.k, at.v)

    return formula


CASES = [
    Case("performer", performer()),
    Case("performer", performer(), TAIL, 24, scale=0.1),
    Case("performer(features=5)", performer(5), BARE),
    Case("performer(features=21,seed=3)", performer(21, seed=3), DEEP, scale=0.6),
    Case("performer(features=80)", performer(80), BARE, 72),
    Case("performer(orthogonal=false)", performer(orthogonal=False), BOTH),
    Case("performer(features=30,orthogonal=false)", performer(30, orthogonal=False), BARE, 24),
    Case("performer(kernel=relu)", performer(kernel="relu"), TAIL),
    Case("performer(kernel=relu,eps=0.2)", performer(kernel="relu", eps=0.2), DEEP, scale=0.5),
    Case(
        "performer(features=11,kernel=relu,orthogonal=false,seed=9)",
        performer(11, "relu", False, 9),
        BARE,
        24,
    ),
    Case("performer", performer(), BOTH, 8, 0.25, "constant"),
]

#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "another seed": Case("performer", performer(seed=1)),
    "not orthogonal": Case("performer", performer(orthogonal=False)),
    "length not halved": Case("performer", performer(half=1.0)),
    "one feature fewer": Case("performer(features=16)", performer(15)),
    "another eps": Case("performer(kernel=relu)", performer(kernel="relu", eps=1e-4)),
}
