"""Attention to neighbours, masked attention and owners' blocks against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mitaswap.operators.blocks import expert_blocks, owner_blocks
from mitaswap.operators.experts import attend, merge
from mitaswap.operators.masked import attend_masked, fallback
from mitaswap.operators.neighbourhood import attend_near, near_flops


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    ("grid", "radius"),
    [((5, 7), (1, 1)), ((5, 7), (2, 0)), ((1, 20), (0, 4)), ((3, 2), (3, 9)), ((4, 4), (0, 0))],
    ids=str,
)
def test_attend_near_reads_the_patches_around(
    grid: tuple[int, int], radius: tuple[int, int]
) -> None:
    (h, w), (tall, wide) = grid, radius
    q, k, v = draw(3, 2, 1, h * w, 4)
    out, lse = attend_near(q, k, v, grid, radius, 0.7)
    pairs = 0
    for i in range(h * w):
        near = [
            j for j in range(h * w) if abs(j // w - i // w) <= tall and abs(j % w - i % w) <= wide
        ]
        pairs += len(near)
        want, total = attend(q[:, :, i : i + 1], k[:, :, near], v[:, :, near], 0.7)
        torch.testing.assert_close(out[:, :, i : i + 1], want)
        torch.testing.assert_close(lse[:, :, i : i + 1], total)
    flops, padding = near_flops(grid, radius, 4, 6)
    assert flops == 2 * pairs * (4 + 6) and padding >= 0


def test_masked_branches_merge_to_one_softmax() -> None:
    """Rows without any allowed key take the fallback, and only they."""
    q, k, v = draw(3, 1, 1, 6, 4)
    allowed = draw(6, 6) > 0
    allowed[2] = False
    first, second = allowed.clone(), allowed.clone()
    first[:, 3:], second[:, :3] = False, False
    branches = [attend_masked(q, k, v, each, 0.5) for each in (first, second)]
    out = merge([*branches, fallback(v)])[0]
    logits = (0.5 * q @ k.mT).masked_fill(~allowed, float("-inf"))
    want = logits.softmax(-1).nan_to_num() @ v
    want[:, :, 2] = v[:, :, 2]
    torch.testing.assert_close(out, want)
    shifted = attend_masked(q, k, v, allowed, 0.5, torch.full((6, 6), 3.0, dtype=q.dtype))
    torch.testing.assert_close(shifted[0], attend_masked(q, k, v, allowed, 0.5)[0])


@pytest.mark.parametrize("experts", [1, 3, 40])
def test_blocks_have_one_owner_and_hold_every_query(experts: int) -> None:
    choice = torch.randint(experts, (2, 3, 50), generator=torch.Generator().manual_seed(1))
    blocks, (count, block) = owner_blocks(choice, experts), expert_blocks(50, experts)
    assert blocks.owner.shape == (2, 3, count) and blocks.source.shape == (2, 3, count * block)
    queries = torch.arange(50).expand(2, 3, 50)
    assert torch.equal(blocks.source.gather(-1, blocks.back), queries)
    assert torch.equal(blocks.owner.gather(-1, blocks.back // block), choice)
