"""What MiTA reads all tokens for: landmarks, their scores of the keys, the queries' routes."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from mitaswap.kernels.mita_parts import (
    LOG2E,
    beyond,
    exponent_factor,
    head_offset,
    landmark_scores,
    load_rows,
    load_terms,
    product_onto,
    routing_scores,
    split,
    store_rows,
)


@triton.jit
def store_terms(low, rest, apart, mark, row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write one landmark [BLOCK_D] as its terms: low [BH, M, D], and rest [terms - 1, BH, M, D] of
    `apart` numbers each.
    """
    d = tl.arange(0, BLOCK_D)
    dtype: tl.constexpr = low.dtype.element_ty
    hi, mid, lo = split(mark, dtype)
    at = row.to(tl.int64) * D + d
    tl.store(low + at, hi, mask=d < D)
    if dtype != tl.float32:
        tl.store(rest + at, mid, mask=d < D)
    if dtype == tl.bfloat16:
        tl.store(rest + apart + at, lo, mask=d < D)


@triton.jit
def pool_kernel(
    q, sums, low, rest, apart, sqb, sqh, sqn, H, M, P, first, height, width, A, B,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Averages of the query rows over windows of the grid, each as P partial sums.

    Grid (BH * M * P). q [B, H, N, D]; sums float32 [BH, M, P, D]; with P = 1 also their terms in
    q's dtype (`store_terms`). Window (i, j) of the A x B windows spans rows floor(i h / A) to
    ceil((i + 1) h / A), as in adaptive pooling.
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
        store_terms(low, rest, apart, mark, pid, D, BLOCK_D)


@triton.jit
def windows_kernel(
    q, sums, low, rest, apart, sqb, sqh, sqn, H, M, first, height, width, A, B,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):  # fmt: skip
    """`pool_kernel` with P = 1 for windows of at most BLOCK_X columns, BLOCK_W of them a program,
    BLOCK_Y of their rows at a time: where windows are small, a program each does little else than
    find out where it is.

    Grid (BH * ceil(M / BLOCK_W)).
    """
    pid = tl.program_id(0)
    blocks = (M + BLOCK_W - 1) // BLOCK_W
    bh = pid // blocks
    w = pid % blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    i = w // B
    j = w % B
    top = i * height // A
    left = j * width // B
    rows = tl.where(w < M, ((i + 1) * height + A - 1) // A - top, 0)
    columns = ((j + 1) * width + B - 1) // B - left
    r = tl.arange(0, BLOCK_Y * BLOCK_X)[None, :]
    x = r % BLOCK_X
    corner = first + top * width + left
    base = q + head_offset(bh, H, sqb, sqh)
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_W, BLOCK_D], tl.float32)
    for start in range(0, (height + A - 1) // A + 1, BLOCK_Y):
        y = start + r // BLOCK_X
        ok = (y < rows[:, None]) & (x < columns[:, None])
        token = (corner[:, None] + y * width + x).to(tl.int64)
        ok = ok[:, :, None] & (d < D)[None, None, :]
        some = tl.load(base + (token * sqn)[:, :, None] + d[None, None, :], mask=ok, other=0.0)
        total += tl.sum(some.to(tl.float32), 1)
    row = bh * M + w
    mark = total * (1.0 / tl.maximum(rows * columns, 1))[:, None]
    store_rows(sums, row, D, w < M, mark, D, BLOCK_D)
    dtype: tl.constexpr = low.dtype.element_ty
    hi, mid, lo = split(mark, dtype)
    store_rows(low, row, D, w < M, hi, D, BLOCK_D)
    if dtype != tl.float32:
        store_rows(rest, row, D, w < M, mid, D, BLOCK_D)
    if dtype == tl.bfloat16:
        store_rows(rest + apart, row, D, w < M, lo, D, BLOCK_D)


@triton.jit
def marks_kernel(sums, marks, low, rest, apart, P, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Landmarks from their P parts. Grid (BH * M); sums float32 [BH, M, P, D], marks float32
    [BH, M, D], and their terms in q's dtype.
    """
    pid = tl.program_id(0)
    row = pid.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mark = tl.zeros([BLOCK_D], tl.float32)
    for part in range(P):
        mark += tl.load(sums + (row * P + part) * D + d, mask=d < D, other=0.0)
    tl.store(marks + row * D + d, mark, mask=d < D)
    store_terms(low, rest, apart, mark, pid, D, BLOCK_D)


@triton.jit
def nearest(r, first, M, last, taken, best, expert, S: tl.constexpr, BLOCK_M: tl.constexpr):
    """The best routing score so far and its expert, after the scores r [N, BLOCK_M] of experts
    first ... (-inf from M on); only those that come after the one taken last, equals by position.
    """
    column = first + tl.arange(0, BLOCK_M)[None, :]
    if S > 1:
        after = (r == last[:, None]) & (column > taken[:, None])
        r = tl.where((r < last[:, None]) | after, r, float("-inf"))
    peak = tl.max(r, 1)
    place = tl.min(tl.where(r == peak[:, None], column, M - 1), 1)
    return tl.maximum(best, peak), tl.where(peak > best, place, expert)


@triton.jit
def count_up(expert, counts, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Ranks [BLOCK_N] of these choices among all of the same expert so far, and the new counts,
    float32 [BLOCK_N, BLOCK_M], the same in all rows.

    Products with a triangle of ones and with ones sum on the tensor cores; counts below 2^24 are
    exact in float32. Choices of no expert are -1.
    """
    mine = expert[:, None] == tl.arange(0, BLOCK_M)[None, :]
    one = tl.where(mine, 1.0, 0.0)
    i = tl.arange(0, BLOCK_N)
    triangle = tl.where(i[None, :] < i[:, None], 1.0, 0.0).to(tl.float16)
    every = tl.full([BLOCK_N, BLOCK_N], 1.0, tl.float16)
    before = tl.dot(triangle, one.to(tl.float16), counts)
    return tl.sum(one * before, 1).to(tl.int32), tl.dot(every, one.to(tl.float16), counts)


@triton.jit
def score_tile(
    k, v, low, rest, apart, scores, peaks, part_v, part_top, part_sum, skn, svn, sn, sg,
    N, M, scale, block, begin, end, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROUTED: tl.constexpr, SHARED: tl.constexpr,
    SIGN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Landmark scores of the keys begin ... end of one head, and their part of V~ (WHOLE: all of
    it), for one block of landmarks; arguments are the head's own.
    """
    hi, mid, lo = load_terms(low, rest, apart, block * BLOCK_M, M, D, BLOCK_M, BLOCK_D)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # scores stay unscaled but for the sign, which is all that a choice of the largest depends on
    factor = exponent_factor(scale)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        keys = load_rows(k, n, skn, n < N, D, BLOCK_D)
        if SIGN == 1:
            s = landmark_scores(hi, mid, lo, keys, beyond(n, N)[None, :])
        else:
            s = landmark_scores(hi, mid, lo, keys, tl.zeros([1, BLOCK_N], tl.float32)) * SIGN
            s += beyond(n, N)[None, :]
        if G > 1:
            several = tl.max(tl.reshape(s, [BLOCK_M, BLOCK_N // G, G]), 2)
        if ROUTED:
            at = row.to(tl.int64)[:, None] * sn + n[None, :]
            tl.store(scores + at, s, mask=(row < M)[:, None] & (n < sn)[None, :])
            if G > 1:
                g = start // G + tl.arange(0, BLOCK_N // G)
                at = row.to(tl.int64)[:, None] * sg + g[None, :]
                tl.store(peaks + at, several, mask=(row < M)[:, None] & (g < sg)[None, :])
        if SHARED:
            values = load_rows(v, n, svn, n < N, D, BLOCK_D)
            # of groups where rows lie in one warp; else their maxima would be exchanged once more
            peak = tl.max(several, 1) if G > 1 and BLOCK_M >= 64 else tl.max(s, 1)
            higher = tl.maximum(top, peak)
            weights = tl.exp2(s * factor - (higher * factor)[:, None])
            shrink = tl.exp2((top - higher) * factor)
            total = total * shrink + tl.sum(weights, 1)
            acc *= shrink[:, None]
            acc = product_onto(weights.to(values.dtype), values, acc)
            top = higher
    if SHARED:
        if WHOLE:
            acc *= (1.0 / total)[:, None]
            top = (top * factor + tl.log2(total)) / LOG2E
        else:
            tl.store(part_sum + row, total, mask=row < M)
        tl.store(part_top + row, top, mask=row < M)
        store_rows(part_v, row, D, row < M, acc, D, BLOCK_D)


@triton.jit
def count_apart(expert, ok, hist, BLOCK_N: tl.constexpr):
    """`count_up` where the experts are too many for a tile of them: the counts so far are in hist.

    Whoever is the last of its expert in this block writes the new count.
    """
    i = tl.arange(0, BLOCK_N)
    same = (expert[:, None] == expert[None, :]) & ok[None, :]
    before = tl.sum((same & (i[None, :] < i[:, None])).to(tl.int32), 1)
    behind = tl.sum((same & (i[None, :] > i[:, None])).to(tl.int32), 1)
    rank = tl.load(hist + expert, mask=ok, other=0) + before
    tl.debug_barrier()  # all have read
    tl.store(hist + expert, rank + 1, mask=ok & (behind == 0))
    tl.debug_barrier()  # and now all have written
    return rank


@triton.jit
def route_tile(
    q, low, rest, apart, choice, ranks, hist, sqn, N, M, begin, end,
    S: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCKS_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Routes of the queries begin ... end of one head; arguments are the head's own."""
    column = tl.arange(0, BLOCK_M)
    if BLOCKS_M == 1:
        hi, mid, lo = load_terms(low, rest, apart, 0, M, D, BLOCK_M, BLOCK_D)
        counts = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        for b in range(BLOCKS_M):
            at = b * BLOCK_M + column
            tl.store(hist + at, tl.zeros([BLOCK_M], tl.int32), mask=at < M)
        tl.debug_barrier()
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        ok = n < N
        queries = load_rows(q, n, sqn, ok, D, BLOCK_D)
        last = tl.full([BLOCK_N], float("inf"), tl.float32)
        taken = tl.full([BLOCK_N], -1, tl.int32)
        for j in tl.static_range(S):
            best = tl.full([BLOCK_N], float("-inf"), tl.float32)
            expert = tl.zeros([BLOCK_N], tl.int32)
            if BLOCKS_M == 1:
                r = routing_scores(queries, hi, mid, lo, beyond(column, M)[None, :])
                best, expert = nearest(r, 0, M, last, taken, best, expert, S, BLOCK_M)
                rank, counts = count_up(tl.where(ok, expert, -1), counts, BLOCK_N, BLOCK_M)
            else:
                for b in range(BLOCKS_M):
                    one, two, three = load_terms(
                        low, rest, apart, b * BLOCK_M, M, D, BLOCK_M, BLOCK_D
                    )
                    base = beyond(b * BLOCK_M + column, M)[None, :]
                    r = routing_scores(queries, one, two, three, base)
                    best, expert = nearest(r, b * BLOCK_M, M, last, taken, best, expert, S, BLOCK_M)
                rank = count_apart(expert, ok, hist, BLOCK_N)
            tl.store(choice + j * N + n, expert, mask=ok)
            tl.store(ranks + j * N + n, rank, mask=ok)
            last = best
            taken = expert
    if BLOCKS_M == 1:
        tl.store(hist + column, tl.max(counts, 0).to(tl.int32), mask=column < M)


@triton.jit
def probe_kernel(
    q, k, v, low, rest, apart, scores, peaks, part_v, part_top, part_sum, choice, ranks, hist,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sn, sg,
    H, N, M, tiles, first_head, scale,
    S: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCKS_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr,
    ROUTED: tl.constexpr, SHARED: tl.constexpr, SIGN: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile of tokens: landmark scores of its keys, their share of V~, routes of its queries.

    Grid (heads of this chunk * tiles, BLOCKS_M + 1 if ROUTED): a block of landmarks each and the
    routes, which come first where they take longest. Terms of the landmarks as `store_terms` wrote
    them. The chunk's scores float32 [heads, M, sn], without the scale but with its SIGN, and peaks
    (maxima of G neighbours) [heads, M, sg], both -inf or nothing beyond N; all heads' part_v
    float32 [BH, tiles, M, D], part_top (unscaled) and part_sum [BH, tiles, M], or, where one tile
    is the WHOLE, V~ itself in q's dtype and the log-sum-exp of the scores; choice and ranks
    (among the tile's queries of that expert) int32 [BH, S, N], hist int32 [BH, tiles, M].
    """
    pid = tl.program_id(0)
    tile = pid % tiles
    local = (pid // tiles).to(tl.int64)
    bh = pid // tiles + first_head
    head = bh.to(tl.int64)
    block = tl.program_id(1)
    if ROUTED and BLOCKS_M > 1:
        block = (block + BLOCKS_M) % (BLOCKS_M + 1)
    low += head * M * D
    rest += head * M * D
    begin = tile * TILE
    end = tl.minimum(begin + TILE, N)
    at = head * tiles + tile
    if block < BLOCKS_M:
        score_tile(
            k + head_offset(bh, H, skb, skh), v + head_offset(bh, H, svb, svh), low, rest, apart,
            scores + local * M * sn, peaks + local * M * sg,
            part_v + at * M * D, part_top + at * M, part_sum + at * M, skn, svn, sn, sg,
            N, M, scale, block, begin, end,
            G, D, BLOCK_D, BLOCK_M, BLOCK_N, ROUTED, SHARED, SIGN, WHOLE,
        )  # fmt: skip
    else:
        route_tile(
            q + head_offset(bh, H, sqb, sqh), low, rest, apart,
            choice + head * S * N, ranks + head * S * N, hist + at * M, sqn, N, M, begin, end,
            S, D, BLOCK_D, BLOCK_M, BLOCKS_M, BLOCK_N,
        )  # fmt: skip
