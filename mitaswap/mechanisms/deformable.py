"""Deformable attention: every query reads a few points near itself, whose offsets and weights it
predicts (Zhu et al. 2021).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mitaswap.mechanisms._base import MECHANISMS, Mechanism, Options
from mitaswap.mechanisms._card import Card, Cost, SiteShape
from mitaswap.operators.counting import product_flops
from mitaswap.operators.precision import outside_autocast, working
from mitaswap.operators.ranges import in_range
from mitaswap.operators.routed import special_flops, with_special
from mitaswap.operators.sampling import bilinear, raster
from mitaswap.tokens import TokenLayout


@dataclass(frozen=True)
class DeformableOptions(Options):
    """Options of deformable attention.

    Args:
        points: sampling points per query and head.
    """

    points: int = 4


@MECHANISMS.register("deformable")
class Deformable(Mechanism):
    """o(q) = sum_k A_k V(p + dp_k) for the query at patch p, single scale.

    The K weights A (a softmax) and the K offsets dp are linear in x, the attention module's input
    at the query; V between patches is bilinear, outside the grid it is zero. Patches' own queries
    and keys are not read.

    The paper knows no special tokens. Here each joins every patch's softmax as one more key, with
    the logit scale * q k, and as a query attends to all N keys.

    Parameters:
        offset_weight [H * K * 2, C]: zero.
        offset_bias [H * K * 2]: (column, row) of each head's points. Head m looks along the angle
            2 pi m / H, its point k is k + 1 patches out (along rows or columns, whichever is
            farther), as in the released code.
        logit_weight [H * K, C], logit_bias [H * K]: zero, so the weights are uniform.
    """

    options_type = DeformableOptions
    options: DeformableOptions
    card = Card(
        strategy="routing",
        expert_type="MLP",
        expert_count="N",
        construction="offset predicting",
        topology="N times one-to-one",
        source="Zhu et al. 2021, arXiv 2010.04159, Eq. 2",
        cost="N (K d + K C)",
        untrained="needs finetuning",
    )
    samples = ({}, {"points": 2}, {"points": 7})
    traits = frozenset({"linear", "scaled", "special-set"})
    needs = frozenset({"grid", "x"})
    axes = (("K", "points"),)

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        most = max(self._built(layout).patches, DeformableOptions.points)
        in_range(self, "points", self.options.points, 1, most, f"patches (tokens {layout})")

    def build(self, site: SiteShape) -> None:
        points = self.options.points
        angles = [2 * math.pi * head / site.heads for head in range(site.heads)]
        ways = torch.tensor([[math.cos(angle), math.sin(angle)] for angle in angles])
        ways = ways / ways.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, points + 1).view(points, 1)
        self.offset_weight = nn.Parameter(torch.zeros(site.heads * points * 2, site.width))
        self.offset_bias = nn.Parameter((ways.unsqueeze(1) * steps).flatten())
        self.logit_weight = nn.Parameter(torch.zeros(site.heads * points, site.width))
        self.logit_bias = nn.Parameter(torch.zeros(site.heads * points))

    def cost(self, site: SiteShape) -> Cost:
        patches, points = site.layout.patches, self.options.points
        flops = product_flops(patches, site.width, 3 * points)  # offsets and weights
        flops += product_flops(patches, points, site.value_dim)
        flops += special_flops(site.layout, site.head_dim, site.value_dim)
        return self._cost(site, flops)

    @outside_autocast
    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Tensor:
        dtype = q.dtype
        q, k, v = working(q, k, v)
        x = extra["x"][:, layout.patch_slice].to(q.dtype)
        samples = self._sampled(x, v[:, :, layout.patch_slice], layout)  # [B, H, Dv, P, K]
        logits = self._of_heads(x, self.logit_weight, self.logit_bias, 1).squeeze(-1)
        out = torch.einsum("bhdpk,bhpk->bhpd", samples, logits.softmax(dim=-1))
        near = out, logits.logsumexp(dim=-1, keepdim=True)
        return with_special(q, k, v, [near], layout, scale)[0].to(dtype)

    def _sampled(self, x: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        """V at each query's points: [B, H, Dv, P, K]."""
        batch, heads, patches, dim = v.shape
        offsets = self._of_heads(x, self.offset_weight, self.offset_bias, 2)
        rows, columns = (cells.unsqueeze(-1) for cells in raster(layout.grid, v))
        maps = v.transpose(-1, -2).reshape(batch * heads, dim, *layout.grid)
        rows, columns = rows + offsets[..., 1], columns + offsets[..., 0]
        found = bilinear(maps, rows.flatten(0, 1), columns.flatten(0, 1))
        return found.view(batch, heads, dim, patches, self.options.points)

    def _of_heads(self, x: Tensor, weight: Tensor, bias: Tensor, parts: int) -> Tensor:
        """What queries predict of their points: [B, H, P, K, parts]."""
        told = F.linear(x, weight.to(x.dtype), bias.to(x.dtype))
        batch, patches, numbers = told.shape
        heads = numbers // (self.options.points * parts)
        return told.view(batch, patches, heads, self.options.points, parts).transpose(1, 2)
