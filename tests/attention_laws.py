"""What the tests of the mechanisms share: the declared samples, layouts for them, random inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mitaswap import Spec, TokenLayout, mechanism
from mitaswap.mechanisms import MECHANISMS

#: every option set that the mechanisms declare, as call strings
SPECS = [str(Spec(name, sample)) for name, cls in MECHANISMS.items() for sample in cls.samples]
#: those whose queries choose experts
ROUTED = [spec for spec in SPECS if mechanism(spec).routes]
#: mechanisms that attend to every pair of tokens: N x N work by definition
EXACT = ("standard",)

LAYOUT = TokenLayout(1, (8, 7))
LAYOUTS = [LAYOUT, TokenLayout(0, (7, 9), suffix=2), TokenLayout(5, (9, 8))]

each = pytest.mark.parametrize("spec", SPECS)


def draw(
    layout: TokenLayout = LAYOUT,
    batch: int = 2,
    heads: int = 3,
    dim: int = 8,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v [B, H, N, D]: the same numbers for the same seed, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, batch, heads, layout.tokens, dim)
    q, k, v = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).unbind()
    return q, k, v


def same(got: Tensor, want: Tensor, room: float = 1e-11) -> None:
    """Assert equality up to rounding."""
    torch.testing.assert_close(got, want, rtol=room, atol=room)


def differ(one: Tensor, other: Tensor) -> bool:
    """Negative control: far more apart than `same` allows."""
    return bool((one - other).abs().max() > 1e-4)
