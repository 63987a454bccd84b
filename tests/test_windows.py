"""Windows of the patches, and special tokens beside patches that attend by windows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mitaswap import TokenLayout
from mitaswap.operators.experts import attend
from mitaswap.operators.routed import with_special
from mitaswap.operators.spans import spans
from mitaswap.operators.special import split
from mitaswap.operators.windows import Windows, cut, ragged_size, runs

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
CPU = torch.device("cpu")


def owned(windows: Windows) -> list[list[int]]:
    """Token positions of each window, fillers left out."""
    pairs = zip(windows.index, windows.inside, strict=True)
    return [index[inside].tolist() for index, inside in pairs]


@QUICK
@given(st.data())
def test_a_cut_by_its_definition(data: st.DataObject) -> None:
    """Every window lists its own patches in raster order, as bounds computed one by one say."""
    h, w = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    a, b = data.draw(st.tuples(st.integers(1, h), st.integers(1, w)))
    layout = TokenLayout(data.draw(st.integers(0, 2)), (h, w), suffix=data.draw(st.integers(0, 2)))
    windows = cut(layout, (a, b), CPU)
    want = [
        [
            layout.prefix + r * w + c
            for r in range(i * h // a, (i + 1) * h // a)
            for c in range(j * w // b, (j + 1) * w // b)
        ]
        for i in range(a)
        for j in range(b)
    ]
    assert owned(windows) == want
    assert windows.count == a * b and windows.width == max(map(len, want))
    assert windows.ragged == any(len(x) != len(want[0]) for x in want)
    assert (windows.width, windows.ragged) == ragged_size((h, w), (a, b))
    for patch, owner in enumerate(windows.owner.tolist()):
        assert layout.prefix + patch in want[owner]


@QUICK
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_runs_are_consecutive_and_nearly_equal(h: int, w: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, h * w))
    held = owned(runs(TokenLayout(1, (h, w)), count, CPU))
    assert [patch for rows in held for patch in rows] == list(range(1, 1 + h * w))
    assert {len(x) for x in held} <= {h * w // count, math.ceil(h * w / count)}


def test_fixed_windows_of_a_patch() -> None:
    windows = runs(TokenLayout(1, (2, 3)), 3, CPU)  # two patches each
    assert windows.fixed(0, 1).flatten().tolist() == windows.owner.tolist()
    assert windows.fixed(2, 0).tolist() == [[0, 1]] * 6
    assert windows.fixed(1, 2)[::2].tolist() == [[0, 0, 0], [0, 1, 0], [0, 2, 1]]
    assert windows.fixed(0, 0).shape == (6, 0)


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (4, 6), (1, 1)])
def test_split_join_and_means(shape: tuple[int, int]) -> None:
    layout = TokenLayout(2, (4, 6), suffix=1)
    x = torch.randn(2, 3, layout.tokens, 5, dtype=torch.float64)
    windows = cut(layout, shape, CPU)
    assert torch.equal(windows.join(windows.split(x)), x[:, :, layout.patch_slice])
    means = torch.stack([x[:, :, rows].mean(2) for rows in owned(windows)], dim=2)
    torch.testing.assert_close(windows.means(x), means, rtol=1e-13, atol=1e-13)


SIDES = st.integers(1, 15)


@QUICK
@given(SIDES, SIDES, st.integers(1, 6), st.integers(1, 5), st.data())
def test_spans_hold_every_patch_and_share_out_their_weights(
    h: int, w: int, side: int, block: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, side))
    layout, found = TokenLayout(1, (h, w)), spans((h, w), side, stride)
    slots = found.slots(layout, CPU)
    held = [row[inside].tolist() for row, inside in zip(slots.index, slots.inside, strict=True)]
    assert slots.count == math.prod(found.shape) and slots.width == math.prod(found.raster)
    assert slots.ragged == (not slots.inside.all())
    assert {patch for rows in held for patch in rows} == set(range(1, 1 + h * w))
    shape = -(-h // block), -(-w // block)
    weights = torch.rand(2, slots.count, dtype=torch.float64)
    want = torch.zeros(2, math.prod(shape), dtype=torch.float64)
    for i, rows in enumerate(held):
        for owner in cut(layout, shape, CPU).owner[torch.tensor(rows) - 1]:
            want[:, owner] += weights[:, i] / len(rows)
    torch.testing.assert_close(found.shared_out(weights, shape), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", [1, 2, 3, 5])
@pytest.mark.parametrize("grid", [(6, 6), (7, 10), (4, 1), (1, 13)])
def test_spans_without_overlap_are_windows_of_a_cut(side: int, grid: tuple[int, int]) -> None:
    layout = TokenLayout(2, grid)
    windows = cut(layout, (-(-grid[0] // side), -(-grid[1] // side)), CPU)
    slots = spans(grid, side, side).slots(layout, CPU)
    assert torch.equal(slots.index, windows.index) and torch.equal(slots.inside, windows.inside)


@pytest.mark.parametrize(
    ("length", "side", "stride", "block"),
    [(64, 8, 4, 16), (48, 4, 2, 8), (24, 4, 4, 8), (24, 4, 1, 4), (32, 2, 1, 4)],
)
def test_shares_are_nsas_eq_9(length: int, side: int, stride: int, block: int) -> None:
    """p_slc[j] = sum_{m < l' / d} sum_{n < l / d} p_cmp[j l' / d - m - n], counted from 1."""
    found = spans((1, length), side, stride)
    count, blocks = (length - side) // stride + 1, length // block
    assert found.shape == (1, count)
    p = torch.rand(count, dtype=torch.float64)
    want = torch.zeros(blocks, dtype=torch.float64)
    for j in range(1, blocks + 1):
        for m in range(block // stride):
            for n in range(side // stride):
                place = j * block // stride - m - n
                want[j - 1] += p[place - 1] if 1 <= place <= count else 0.0
    got = found.shared_out(p, (1, blocks)) * side / stride
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("strength", [1.0, 1e4])
def test_flag_leaves_fillers_without_weight(dtype: torch.dtype, strength: float) -> None:
    layout = TokenLayout(1, (4, 7))
    windows = cut(layout, (3, 2), CPU)
    assert windows.ragged
    q, k, v = strength * torch.randn(3, 1, 2, layout.tokens, 4, dtype=dtype)
    keys, values = windows.split(k), windows.split(v)
    queries = q[:, :, None, :5].expand(-1, -1, windows.count, -1, -1)
    got, lse = attend(*windows.flag(queries, keys), values, 0.5)
    for i, rows in enumerate(owned(windows)):
        want, total = attend(queries[:, :, i], k[:, :, rows], v[:, :, rows], 0.5)
        torch.testing.assert_close(got[:, :, i], want)
        torch.testing.assert_close(lse[:, :, i], total)


def test_flag_without_fillers_changes_nothing() -> None:
    windows = cut(TokenLayout(0, (4, 6)), (2, 3), CPU)
    q = torch.randn(1, 2, 24, 4)
    keys = windows.split(q)
    same_q, same_k = windows.flag(q, keys)
    assert same_q is q and same_k is keys


@pytest.mark.parametrize("layout", [TokenLayout(2, (3, 4), suffix=1), TokenLayout(0, (3, 4))])
def test_special_tokens_complete_a_softmax(layout: TokenLayout) -> None:
    """Patches that read all patches, and special tokens beside them, are softmax attention."""
    q, k, v = torch.randn(3, 2, 3, layout.tokens, 4, dtype=torch.float64)
    pq, pk, pv = (split(x, layout)[0] for x in (q, k, v))
    patches = attend(pq, pk, pv, 0.5)
    got, _ = with_special(q, k, v, [patches], layout, 0.5)
    torch.testing.assert_close(got, attend(q, k, v, 0.5)[0], rtol=1e-12, atol=1e-12)
