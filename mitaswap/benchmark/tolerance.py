"""How far an output may be from its formula in float64.

That is measured. The formula is computed in float64 on the inputs and
on inputs that were moved by as much as rounding to the dtype moves them; a computation that rounds
inside cannot be asked for more than that. Where a change of the last digit changes which keys are
the top k, this shows there, and only there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mitaswap.benchmark.core import CoreShape


def rounding(shape: CoreShape) -> float:
    """Relative error of a long sum in float32 (or better) that is rounded to the dtype once."""
    eps = torch.finfo(shape.dtype).eps
    fine = min(eps, torch.finfo(torch.float32).eps)
    return eps + fine * math.sqrt(shape.site.layout.tokens)


def nudged(given: list[Tensor], shape: CoreShape, draw: int) -> list[Tensor]:
    """Inputs as a rounding, and sums in float32, move them."""
    eps = torch.finfo(shape.dtype).eps
    size = eps / 2 + 8 * min(eps, torch.finfo(torch.float32).eps)
    made = torch.Generator(given[0].device).manual_seed(shape.seed + 1 + draw)

    def noise(like: Tensor) -> Tensor:
        drawn = torch.rand(like.shape, generator=made, device=like.device, dtype=like.dtype)
        return 1 + size * (2 * drawn - 1)

    return [t * noise(t) for t in given]


def distance(one: Tensor | None, truth: Tensor | None) -> tuple[float, float]:
    """Norm of the difference, relative to the truth: of all rows, and of the median row (which few
    rows with other keys among their top k leave alone). An absent gradient is zero.
    """
    if truth is None:
        return 0.0, 0.0
    difference = truth if one is None else one.double() - truth
    norm = truth.norm().clamp(min=1e-30)
    rows = difference.norm(dim=-1).flatten()
    if not rows.isfinite().all():
        return math.inf, math.inf
    return float(rows.norm() / norm), float(rows.median() * math.sqrt(rows.numel()) / norm)
