"""What MiTA reads all tokens for: landmarks, their scores of the keys, the queries' routes."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from mitaswap.kernels.mita_parts import (
    head_offset,
    landmark_scores,
    load_marks,
    load_rows,
    product_onto,
    routing_scores,
    split,
)


@triton.jit
def pool_kernel(
    q, sums, low, sqb, sqh, sqn, H, M, P, first, height, width, A, B,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Averages of the query rows over windows of the grid, each as P partial sums.

    Grid (BH * M * P). q [B, H, N, D]; sums float32 [BH, M, P, D]; with P = 1 also low, the
    same in q's dtype. Window (i, j) of the A x B
    windows spans rows floor(i h / A) to ceil((i + 1) h / A), as in adaptive pooling.
    """
    pid = tl.program_id(0)
    part = pid % P
    window = pid // P % M
    bh = pid // P // M
    i = window // B
    j = window % B
    top = i * height // A
    left = j * width // B
    rows = ((i + 1) * height + A - 1) // A - top
    columns = ((j + 1) * width + B - 1) // B - left
    count = rows * columns
    share = (count + P - 1) // P
    end = tl.minimum((part + 1) * share, count)
    base = q + head_offset(bh, H, sqb, sqh)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(part * share, end, BLOCK_R):
        at = start + tl.arange(0, BLOCK_R)
        token = first + (top + at // columns) * width + left + at % columns
        acc += load_rows(base, token, sqn, at < end, D, BLOCK_D).to(tl.float32)
    d = tl.arange(0, BLOCK_D)
    mark = tl.sum(acc, 0) / count
    tl.store(sums + pid.to(tl.int64) * D + d, mark, mask=d < D)
    if P == 1:
        tl.store(low + pid.to(tl.int64) * D + d, mark.to(low.dtype.element_ty), mask=d < D)


@triton.jit
def marks_kernel(sums, marks, low, P, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Landmarks from their P parts. Grid (BH * M); sums float32 [BH, M, P, D], marks float32 and
    low (q's dtype) [BH, M, D].
    """
    pid = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mark = tl.zeros([BLOCK_D], tl.float32)
    for part in range(P):
        mark += tl.load(sums + (pid * P + part) * D + d, mask=d < D, other=0.0)
    tl.store(marks + pid * D + d, mark, mask=d < D)
    tl.store(low + pid * D + d, mark.to(low.dtype.element_ty), mask=d < D)


@triton.jit
def nearest(r, first, M, last, taken, best, expert, S: tl.constexpr, BLOCK_M: tl.constexpr):
    """The best routing score so far and its expert, after the scores r [N, BLOCK_M] of experts
    first ...; only those that come after the one taken last, equals by position.
    """
    column = first + tl.arange(0, BLOCK_M)[None, :]
    allowed = column < M
    if S > 1:
        after = (r == last[:, None]) & (column > taken[:, None])
        allowed = allowed & ((r < last[:, None]) | after)
    r = tl.where(allowed, r, float("-inf"))
    peak = tl.max(r, 1)
    place = tl.min(tl.where(r == peak[:, None], column, M - 1), 1)
    return tl.maximum(best, peak), tl.where(peak > best, place, expert)


@triton.jit
def count_up(expert, ok, first, counts, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Ranks [BLOCK_N] of these choices among all of the same expert so far, and the new counts.

    Only choices of the experts first ... first + BLOCK_M are counted. A product with a triangle of
    ones sums on the tensor cores; counts below 2^24 are exact in float32.
    """
    mine = (expert[:, None] == first + tl.arange(0, BLOCK_M)[None, :]) & ok[:, None]
    i = tl.arange(0, BLOCK_N)
    triangle = (i[None, :] < i[:, None]).to(tl.float16)
    before = tl.dot(triangle, mine.to(tl.float16)).to(tl.int32) + counts[None, :]
    rank = tl.sum(tl.where(mine, before, 0), 1)
    return rank, counts + tl.sum(mine.to(tl.int32), 0)


@triton.jit
def score_tile(
    k, v, marks, scores, peaks, part_v, part_top, part_sum, skn, svn, N, M, groups, scale,
    block, begin, end, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROUTED: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Landmark scores of the keys begin ... end of one head, and their part of V~, for one block
    of landmarks; arguments are the head's own.
    """
    dtype: tl.constexpr = k.dtype.element_ty
    hi, mid, lo = split(load_marks(marks, block * BLOCK_M, M, 1, D, BLOCK_M, BLOCK_D), dtype)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        keys = load_rows(k, n, skn, n < N, D, BLOCK_D)
        s = landmark_scores(hi, mid, lo, keys) * scale
        s = tl.where((n < N)[None, :], s, float("-inf"))
        if ROUTED:
            at = row.to(tl.int64)[:, None] * N + n[None, :]
            tl.store(scores + at, s, mask=(row < M)[:, None] & (n < N)[None, :])
            if G > 1:
                peak = tl.max(tl.reshape(s, [BLOCK_M, BLOCK_N // G, G]), 2)
                g = start // G + tl.arange(0, BLOCK_N // G)
                at = row.to(tl.int64)[:, None] * groups + g[None, :]
                tl.store(peaks + at, peak, mask=(row < M)[:, None] & (g < groups)[None, :])
        if SHARED:
            values = load_rows(v, n, svn, n < N, D, BLOCK_D)
            higher = tl.maximum(top, tl.max(s, 1))
            weights = tl.exp(s - higher[:, None])
            shrink = tl.exp(top - higher)
            total = total * shrink + tl.sum(weights, 1)
            acc *= shrink[:, None]
            acc = product_onto(weights.to(dtype), values, acc)
            top = higher
    if SHARED:
        d = tl.arange(0, BLOCK_D)
        tl.store(part_top + row, top, mask=row < M)
        tl.store(part_sum + row, total, mask=row < M)
        at = row[:, None] * D + d[None, :]
        tl.store(part_v + at, acc, mask=(row < M)[:, None] & (d < D)[None, :])


@triton.jit
def route_tile(
    q, marks, choice, ranks, hist, sqn, N, M, begin, end,
    S: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCKS_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Routes of the queries begin ... end of one head; arguments are the head's own."""
    dtype: tl.constexpr = q.dtype.element_ty
    hi, mid, lo = split(load_marks(marks, 0, M, 1, D, BLOCK_M, BLOCK_D), dtype)
    counts = tl.zeros([BLOCK_M], tl.int32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        queries = load_rows(q, n, sqn, n < N, D, BLOCK_D)
        last = tl.full([BLOCK_N], float("inf"), tl.float32)
        taken = tl.full([BLOCK_N], -1, tl.int32)
        for j in tl.static_range(S):
            best = tl.full([BLOCK_N], float("-inf"), tl.float32)
            expert = tl.zeros([BLOCK_N], tl.int32)
            if BLOCKS_M == 1:
                r = routing_scores(queries, hi, mid, lo)
                best, expert = nearest(r, 0, M, last, taken, best, expert, S, BLOCK_M)
            else:
                for b in range(BLOCKS_M):
                    some = load_marks(marks, b * BLOCK_M, M, 1, D, BLOCK_M, BLOCK_D)
                    one, two, three = split(some, dtype)
                    r = routing_scores(queries, one, two, three)
                    best, expert = nearest(r, b * BLOCK_M, M, last, taken, best, expert, S, BLOCK_M)
            tl.store(choice + j * N + n, expert, mask=n < N)
            if BLOCKS_M == 1:
                rank, counts = count_up(expert, n < N, 0, counts, BLOCK_N, BLOCK_M)
                tl.store(ranks + j * N + n, rank, mask=n < N)
            last = best
            taken = expert
    if BLOCKS_M == 1:
        column = tl.arange(0, BLOCK_M)
        tl.store(hist + column, counts, mask=column < M)
    else:
        tl.debug_barrier()  # the choices are read back by other threads
        for b in range(BLOCKS_M):
            column = b * BLOCK_M + tl.arange(0, BLOCK_M)
            counts = tl.zeros([BLOCK_M], tl.int32)
            for start in range(begin, end, BLOCK_N):
                n = start + tl.arange(0, BLOCK_N)
                for j in range(S):
                    expert = tl.load(choice + j * N + n, mask=n < N, other=-1)
                    rank, counts = count_up(expert, n < N, b * BLOCK_M, counts, BLOCK_N, BLOCK_M)
                    mine = (n < N) & (expert // BLOCK_M == b)
                    tl.store(ranks + j * N + n, rank, mask=mine)
            tl.store(hist + column, counts, mask=column < M)


@triton.jit
def probe_kernel(
    q, k, v, marks, scores, peaks, part_v, part_top, part_sum, choice, ranks, hist,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn,
    H, N, M, tiles, groups, first_head, scale,
    S: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCKS_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr,
    ROUTED: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """One tile of tokens: landmark scores of its keys, their share of V~, routes of its queries.

    Grid (heads of this chunk * tiles, BLOCKS_M + 1 if ROUTED): a block of landmarks each, then the
    routes. The chunk's scores float32 [heads, M, N] and
    peaks (maxima of G neighbours) [heads, M, groups]; all heads' part_v float32
    [BH, tiles, M, D], part_top and part_sum [BH, tiles, M]; choice and ranks (among the tile's
    queries of that expert) int32 [BH, S, N], hist int32 [BH, tiles, M].
    """
    pid = tl.program_id(0)
    tile = pid % tiles
    local = (pid // tiles).to(tl.int64)
    bh = pid // tiles + first_head
    head = bh.to(tl.int64)
    block = tl.program_id(1)
    marks += head * M * D
    begin = tile * TILE
    end = tl.minimum(begin + TILE, N)
    at = head * tiles + tile
    if block < BLOCKS_M:
        score_tile(
            k + head_offset(bh, H, skb, skh), v + head_offset(bh, H, svb, svh), marks,
            scores + local * M * N, peaks + local * M * groups,
            part_v + at * M * D, part_top + at * M, part_sum + at * M, skn, svn,
            N, M, groups, scale, block, begin, end,
            G, D, BLOCK_D, BLOCK_M, BLOCK_N, ROUTED, SHARED,
        )  # fmt: skip
    else:
        route_tile(
            q + head_offset(bh, H, sqb, sqh), marks, choice + head * S * N, ranks + head * S * N,
            hist + at * M, sqn, N, M, begin, end, S, D, BLOCK_D, BLOCK_M, BLOCKS_M, BLOCK_N,
        )  # fmt: skip
