"""The kernels' choice of the largest numbers, alone: imported where Triton is interpreted."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mitaswap.kernels.mita_settle import grid_of, largest


@triton.jit
def _choose(x, chosen, size, count, BLOCK: tl.constexpr, THREADS: tl.constexpr):
    c = grid_of(BLOCK, THREADS)
    row = tl.load(x + c, mask=c < size, other=float("-inf"))
    mask = largest(row, c < size, count)
    tl.store(chosen + c, mask.to(tl.int32), mask=c < size)


def choose(x: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest of x, int32."""
    chosen = torch.zeros(len(x), dtype=torch.int32)
    block = triton.next_power_of_2(len(x))
    _choose[(1,)](x, chosen, len(x), count, BLOCK=block, THREADS=128 if block > 1024 else 32)
    return chosen
