"""The kernels' choice of the largest numbers, alone: imported where Triton is interpreted."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mitaswap.kernels.mita_settle import largest


@triton.jit
def _choose(x, chosen, size, count, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    mask = largest(tl.load(x + c, mask=c < size, other=0.0), c < size, count)
    tl.store(chosen + c, mask.to(tl.int32), mask=c < size)


def choose(x: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest of x, int32."""
    chosen = torch.zeros(len(x), dtype=torch.int32)
    _choose[(1,)](x, chosen, len(x), count, BLOCK=triton.next_power_of_2(len(x)))
    return chosen
