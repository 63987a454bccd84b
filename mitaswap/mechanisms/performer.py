"""Performer: softmax attention's exponential kernel approximated by positive random features
(Choromanski et al. 2021).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mitaswap.mechanisms._base import MECHANISMS, Mechanism, Options
from mitaswap.mechanisms._card import Card, Cost, SiteShape
from mitaswap.operators.counting import product_flops
from mitaswap.operators.precision import outside_autocast, working
from mitaswap.operators.ranges import EPS, at_least, in_range, seeds
from mitaswap.tokens import TokenLayout

#: features for each channel that nobody needs more of
MOST = 64


@dataclass(frozen=True)
class PerformerOptions(Options):
    """Options of Performer.

    Args:
        features: number of random features r; 0 takes d ln d, but at least d.
        kernel: `softmax` approximates softmax attention by exponential features; `relu` is the
            paper's generalised attention, another kernel.
        orthogonal: directions orthogonal to each other in blocks of d, for a smaller variance;
            False draws all of them independently.
        seed: of the generator that draws the features, once for all heads.
        eps: added to every feature of `relu`, as in the released code. `softmax` needs none.
    """

    features: int = 0
    kernel: Literal["softmax", "relu"] = "softmax"
    orthogonal: bool = True
    seed: int = 0
    eps: float = 1e-3


@MECHANISMS.register("performer")
class Performer(Mechanism):
    """o(q) = phi(q) [ phi(K)^T V ] / ( phi(q) sum_j phi(k_j) ), with E[ phi(q) phi(k)^T ] =
    exp(scale q k^T).

    phi_i(x) = exp(w_i x^T - |x|^2 / 2) for rows w_i of a random projection and queries and keys
    times the root of `scale`; phi_i(x) = ReLU(w_i x^T) + eps for kernel=relu. Factors that are the
    same for all features or all tokens cancel, and are left out or chosen such that no exponential
    overflows and no denominator vanishes: where the released code adds an eps, nothing is added.
    All tokens are alike.

    Unbiased before the division, but its variance grows as exp(|q + k|^2): with the large scores
    of trained networks it is far from softmax attention until it is finetuned.

    Buffers:
        projection: rows w_i, [r, D], the same for all heads; not saved, drawn from `seed`.
    """

    options_type = PerformerOptions
    options: PerformerOptions
    projection: Tensor
    card = Card(
        strategy="compression",
        expert_type="linear layer",
        expert_count="1 shared",
        construction="kernelization",
        topology="all-to-one",
        source="Choromanski et al. 2021, arXiv 2009.14794, Eq. 4-7",
        cost="N r d",
        untrained="needs finetuning",
    )
    samples = (
        {},
        {"features": 40, "orthogonal": False, "seed": 3},
        {"features": 30, "kernel": "relu"},
    )
    traits = frozenset(
        {"linear", "averages", "convex", "scaled", "heads"}
        | {"key-set", "pointwise", "special-set", "mirror"}
    )

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        # more than tokens, softmax attention itself would be cheaper; d ln d is always allowed
        most = max(self._built(layout).tokens, MOST * head_dim)
        of = f"features, {MOST} for each of the head's channels or one for each token"
        in_range(self, "features", self.options.features, 0, most, of)
        seeds(self, self.options.seed)
        at_least(self, "eps", self.options.eps, 0, most=EPS)

    def _count(self, dim: int) -> int:
        return self.options.features or max(dim, int(dim * math.log(dim)))

    def build(self, site: SiteShape) -> None:
        dim, count = site.head_dim, self._count(site.head_dim)
        generator = torch.Generator(device="cpu").manual_seed(self.options.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

        rows = normal(-(-count // dim), dim, dim)
        if self.options.orthogonal:
            # with the signs of R's diagonal, Q is uniform among the rotations; rows of independent
            # Gaussian vectors' length make each row alone Gaussian again
            directions, upper = torch.linalg.qr(rows)
            directions = directions * upper.diagonal(dim1=-2, dim2=-1).sign()[:, None]
            lengths = normal(count, dim).norm(dim=1, keepdim=True)
            rows = directions.flatten(0, 1)[:count] * lengths
        else:
            rows = rows.flatten(0, 1)[:count]
        self.register_buffer("projection", rows.float(), persistent=False)

    def cost(self, site: SiteShape) -> Cost:
        n, d, dv = site.layout.tokens, site.head_dim, site.value_dim
        r = self._count(d)
        flops = 2 * product_flops(n, d, r) + 2 * product_flops(n, r, dv) + product_flops(n, r, 1)
        return self._cost(site, flops, between=r * (dv + 1))

    @outside_autocast
    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Tensor:
        dtype = q.dtype
        q, k, v = working(q, k, v)
        project, root = self.projection.to(q.dtype).T, math.sqrt(scale)
        q, k = q * root, k * root
        if self.options.kernel == "softmax":
            q, k = _exponential(q @ project, k @ project - k.square().sum(-1, keepdim=True) / 2)
        else:
            q, k = ((x @ project).relu() + self.options.eps for x in (q, k))
        out = q @ (k.transpose(-1, -2) @ v)
        return (out / (q @ k.sum(dim=-2).unsqueeze(-1))).to(dtype)


def _exponential(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Features of queries and keys from their logarithms [B, H, N, r], up to factors that cancel.

    Each feature is divided by its largest value among the keys and multiplied by it again among
    the queries; then each query is divided by its largest feature. So some key has weight one in
    every feature and some feature in every query: all numbers stay in range, all sums above one.
    (|q|^2 / 2, the same for all of a query's features, cancels too.)
    """
    peak = k.detach().amax(dim=-2, keepdim=True)
    q, k = q + peak, k - peak
    return (q - q.detach().amax(dim=-1, keepdim=True)).exp(), k.exp()
