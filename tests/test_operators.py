"""Building blocks of the mechanisms: exact top-k, pooling, merged branches, experts by blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mitaswap.errors import MitaswapError
from mitaswap.operators import experts
from mitaswap.operators.experts import attend, attend_experts, merge, take
from mitaswap.operators.pool import landmarks, pool_shape, pool_tokens
from mitaswap.operators.precision import outside_autocast, working
from mitaswap.operators.select import best_indices, best_with, top_indices
from mitaswap.tokens import TokenLayout

QUICK = settings(max_examples=40, deadline=None, derandomize=True)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ----------------------------------------------------------------------------------------- select

#: scores from few values, so that ties are common
SCORES = st.lists(
    st.sampled_from([-2.0, -0.0, 0.0, 0.5, 3.0, float("-inf")]), min_size=1, max_size=70
)
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def ranking(scores: list[float]) -> list[int]:
    """Positions, best first, the lowest first among equals."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


@QUICK
@given(SCORES, st.data())
def test_top_indices_take_the_lowest_of_equals(scores: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(scores)))
    dtype = data.draw(st.sampled_from(TYPES))
    got = top_indices(torch.tensor([scores, scores[::-1]], dtype=dtype), k)
    assert got.dtype == torch.int64
    assert got.tolist() == [sorted(ranking(row)[:k]) for row in (scores, scores[::-1])]


@QUICK
@given(SCORES.filter(lambda row: float("-inf") not in row), st.data())
def test_best_indices_take_the_lowest_of_equals(scores: list[float], data: st.DataObject) -> None:
    s = data.draw(st.integers(1, len(scores)))
    tensor = torch.tensor([scores])
    got = best_indices(tensor, s)
    assert got.dtype == torch.int64
    assert got.tolist() == [ranking(scores)[:s]]
    assert tensor.tolist() == [scores], "the scores are left as they were"


@QUICK
@given(SCORES.filter(lambda row: float("-inf") not in row), st.data())
def test_best_with_picks_what_is_fixed_once_and_the_best_others(
    scores: list[float], data: st.DataObject
) -> None:
    s = data.draw(st.integers(1, len(scores)))
    always = data.draw(st.lists(st.integers(0, len(scores) - 1), max_size=s))
    got = best_with(torch.tensor([scores]), torch.tensor(always, dtype=torch.int64), s)
    fixed = sorted(set(always))
    others = [i for i in ranking(scores) if i not in fixed]
    assert got.tolist() == [[*fixed, *others][:s]]


def test_choices_have_no_gradient() -> None:
    scores = randn(2, 9).requires_grad_()
    assert not top_indices(scores, 3).requires_grad
    assert not best_indices(scores, 3).requires_grad
    assert not best_with(scores, torch.tensor([4]), 3).requires_grad


# ------------------------------------------------------------------------------------------- pool


@pytest.mark.parametrize(
    ("count", "grid", "shape"),
    [
        (25, (14, 14), (5, 5)),
        (49, (14, 14), (7, 7)),
        (1, (3, 5), (1, 1)),
        (15, (3, 5), (3, 5)),
        (6, (3, 5), (2, 3)),
        (6, (5, 3), (3, 2)),
        (7, (3, 7), (1, 7)),
        (8, (16, 4), (4, 2)),  # 4x2 and 8x1 give windows of 4x2 and 2x4 patches: fewer rows win
        (12, (10, 40), (2, 6)),
        (10, (16, 16), (2, 5)),
        (40, (16, 16), (5, 8)),
        (6, (16, 16), (2, 3)),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_auto_windows_are_the_most_square(
    count: int, grid: tuple[int, int], shape: tuple[int, int]
) -> None:
    a, b = pool_shape(count, grid)
    assert a * b == count

    def elongation(rows: int, columns: int) -> float:
        sides = grid[0] / rows, grid[1] / columns
        return max(sides) / min(sides)

    assert elongation(a, b) == pytest.approx(elongation(*shape), abs=1e-9)
    assert (a, b) == shape


@QUICK
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 12))
def test_windows_fit_or_the_error_names_a_count_that_does(count: int, h: int, w: int) -> None:
    try:
        a, b = pool_shape(count, (h, w))
    except MitaswapError as error:
        nearest = int(str(error).rsplit(" ", 1)[1])
        a, b = pool_shape(nearest, (h, w))
        assert a * b == nearest != count
        for nearer in range(count - abs(nearest - count) + 1, count + abs(nearest - count)):
            with pytest.raises(MitaswapError):
                pool_shape(nearer, (h, w))
    else:
        assert a * b == count and a <= h and b <= w


@QUICK
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 40))
def test_auto_windows_turn_with_the_grid(h: int, w: int, count: int) -> None:
    """On a grid turned by 90 degrees the windows turn too, or are equally elongated (a tie)."""
    try:
        a, b = pool_shape(count, (h, w))
    except MitaswapError:
        with pytest.raises(MitaswapError):
            pool_shape(count, (w, h))
        return
    c, d = pool_shape(count, (w, h))
    ratio, turned = (h * b) / (w * a), (w * d) / (h * c)
    assert (c, d) == (b, a) or max(ratio, 1 / ratio) == pytest.approx(max(turned, 1 / turned))


@pytest.mark.parametrize(
    ("count", "pool", "message"),
    [
        (6, "4x2", "pool=4x2 must be 'auto' or AxB with A * B = 6; use pool=2x3"),
        (6, "2*3", "pool=2*3 must be 'auto' or AxB with A * B = 6; use pool=2x3"),
        (6, "", "pool= must be 'auto' or AxB with A * B = 6; use pool=2x3"),
        (8, "4x2", "pool=4x2 has more windows than the 3x5 grid has rows or columns; use pool=2x4"),
        (6, "1x6", "pool=1x6 has more windows than the 3x5 grid has rows or columns; use pool=2x3"),
        (
            7,
            "7x1",
            "7 landmarks do not fit a 3x5 grid as a x b windows; the nearest count that does is 6",
        ),
        (
            7,
            "auto",
            "7 landmarks do not fit a 3x5 grid as a x b windows; the nearest count that does is 6",
        ),
    ],
)
def test_impossible_windows(count: int, pool: str, message: str) -> None:
    with pytest.raises(MitaswapError) as error:
        pool_shape(count, (3, 5), pool)
    assert str(error.value) == message


def test_landmarks_never_see_prefix_or_suffix() -> None:
    layout = TokenLayout(2, (3, 5), suffix=3)
    x = randn(1, 2, layout.tokens, 4)
    marks = landmarks(x, layout, 6)
    assert marks.shape == (1, 2, 6, 4)
    changed = x.clone()
    changed[:, :, :2] += 9.0
    changed[:, :, -3:] -= 9.0
    assert torch.equal(landmarks(changed, layout, 6), marks)
    changed[:, :, 2] += 9.0
    assert not torch.equal(landmarks(changed, layout, 6), marks)


def test_one_window_per_patch_is_the_identity() -> None:
    layout = TokenLayout(1, (3, 5))
    x = randn(2, 3, layout.tokens, 4)
    assert torch.equal(landmarks(x, layout, 15), x[:, :, layout.patch_slice])
    assert torch.equal(pool_tokens(x, 0, (3, 5), (3, 5)), x[:, :, :15])


# ---------------------------------------------------------------------------------------- experts


@pytest.mark.parametrize("cuts", [(5,), (1, 1, 3), (2, 3), (4, 1)], ids=str)
def test_merged_branches_are_one_softmax(cuts: tuple[int, ...]) -> None:
    q, k, v = randn(2, 3, 7, 4, seed=1), randn(2, 3, 5, 4, seed=2), randn(2, 3, 5, 6, seed=3)
    keys, values = k.split(list(cuts), dim=2), v.split(list(cuts), dim=2)
    branches = [attend(q, part, value, 0.7) for part, value in zip(keys, values, strict=True)]
    want = F.scaled_dot_product_attention(q, k, v, scale=0.7)
    torch.testing.assert_close(merge(branches)[0], want, rtol=1e-12, atol=1e-13)


def test_merge_survives_scores_far_apart() -> None:
    q = torch.full((1, 1, 1, 1), 1.0)
    near, far = (torch.full((1, 1, 1, 1), x) for x in (900.0, -900.0))
    branches = [attend(q, near, near, 1.0), attend(q, far, far, 1.0)]
    assert merge(branches)[0].item() == 900.0
    assert merge(branches[::-1])[0].item() == 900.0


def test_take_is_a_gather_of_rows() -> None:
    x = randn(2, 3, 11, 4)
    index = torch.randint(0, 11, (2, 3, 17), generator=torch.Generator().manual_seed(0))
    want = x.gather(2, index[..., None].expand(-1, -1, -1, 4))
    assert torch.equal(take(x, index), want)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(take(strided, index), want)


#: which expert each of n queries chooses: balanced, all one, all but one empty, ...
CROWDS = {
    "random": lambda n, m: torch.randint(
        0, m, (2, 2, n), generator=torch.Generator().manual_seed(n)
    ),
    "all first": lambda n, m: torch.zeros(2, 2, n, dtype=torch.int64),
    "all last": lambda n, m: torch.full((2, 2, n), m - 1),
    "two ends": lambda n, m: (torch.arange(n) % 2 * (m - 1)).expand(2, 2, n).contiguous(),
    "in turn": lambda n, m: (torch.arange(n) % m).expand(2, 2, n).contiguous(),
    "one each, rest last": lambda n, m: torch.arange(n).clamp(max=m - 1).expand(2, 2, n).clone(),
}


@pytest.mark.parametrize("crowd", CROWDS)
@pytest.mark.parametrize(
    ("tokens", "experts", "width"),
    [(1, 1, 1), (7, 7, 2), (17, 16, 3), (64, 1, 5), (65, 8, 4), (130, 3, 9), (257, 25, 2)],
)
def test_experts_by_blocks_are_experts_one_by_one(
    crowd: str, tokens: int, experts: int, width: int
) -> None:
    q, k = randn(2, 2, tokens, 4, seed=1), randn(2, 2, experts, width, 4, seed=2)
    v = randn(2, 2, experts, width, 3, seed=3)
    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    choice = CROWDS[crowd](tokens, experts)
    out, lse = attend_experts(q, k, v, choice, 0.6)

    pick = choice[..., None, None]
    keys = k.gather(2, pick.expand(-1, -1, -1, width, 4))  # a copy of an expert per query
    values = v.gather(2, pick.expand(-1, -1, -1, width, 3))
    scores = (q[..., None, :] * keys).sum(-1) * 0.6
    want = (scores.softmax(-1)[..., None] * values).sum(-2)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(lse[..., 0], scores.logsumexp(-1), rtol=1e-12, atol=1e-13)

    probe = randn(*out.shape, seed=4)
    grads = torch.autograd.grad((out * probe).sum() + lse.sum(), leaves)
    wanted = torch.autograd.grad((want * probe).sum() + scores.logsumexp(-1).sum(), leaves)
    for got, reference in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("pairs", [1, 30, 70, 500])
def test_experts_chunk_by_chunk_are_all_at_once(
    monkeypatch: pytest.MonkeyPatch, pairs: int
) -> None:
    q, k = randn(2, 2, 130, 4, seed=1), randn(2, 2, 3, 9, 4, seed=2)
    v = randn(2, 2, 3, 9, 3, seed=3)
    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    choice = CROWDS["random"](130, 3)
    sizes: list[int] = []

    def run() -> list[Tensor]:
        out, lse = attend_experts(q, k, v, choice, 0.6)
        return [out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)]

    def counted(q: Tensor, k: Tensor, *rest: Any) -> experts.Branch:
        sizes.append(q.shape[2] * q.shape[3] * k.shape[3])
        return attend(q, k, *rest)

    whole = run()
    monkeypatch.setattr(experts, "PAIRS", pairs)
    monkeypatch.setattr(experts, "attend", counted)
    for got, want in zip(run(), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    assert len(sizes) > 1 and max(sizes) <= max(pairs, 9)  # one query's keys at least


# -------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("given", "used"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_half_precisions_compute_in_float32(given: torch.dtype, used: torch.dtype) -> None:
    (x,) = working(torch.zeros(3, dtype=given))
    assert x.dtype == used


class Product:
    def plain(self, q: Tensor) -> Tensor:
        return q @ q

    @outside_autocast
    def exact(self, q: Tensor) -> Tensor:
        """Docstrings stay."""
        return q @ q


def test_outside_autocast_keeps_float32_products() -> None:
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert Product().plain(x).dtype == torch.bfloat16
        assert Product().exact(x).dtype == torch.float32
        assert Product().plain(x).dtype == torch.bfloat16, "autocast is on again afterwards"
    assert Product().exact(x.to("meta")).device.type == "meta"
    assert Product.exact.__doc__ == "Docstrings stay."
