"""What MiTA decides from the scores: keys of every expert, V~, and the queries sorted by expert."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from mitaswap.kernels.mita_parts import (
    LOG2E,
    exponent_factor,
    key_value,
    load_rows,
    order_key,
)


@triton.jit
def largest(x, ok, K):
    """Mask of the K largest of x (1-D) where ok; among equals the first. At least K must be ok."""
    x = tl.where(ok, x, float("-inf"))
    # invariant: count(x >= low) >= K > count(x >= high); halve the range of values, where real
    # scores are spread evenly, until exactly K are left above or nothing is between
    low = tl.min(tl.where(ok, x, float("inf")), 0)
    high = key_value(order_key(tl.max(x, 0)) + 1)
    turn = 0
    while turn < 20:
        guess = 0.5 * low + 0.5 * high
        between = (guess > low) & (guess < high)
        count = tl.sum((x >= guess).to(tl.int32), 0)
        low = tl.where(between & (count >= K), guess, low)
        high = tl.where(between & (count < K), guess, high)
        turn = tl.where(between & (count != K), turn + 1, 20)
    chosen = ok & (x >= low)
    found = tl.sum(chosen.to(tl.int32), 0)
    if found != K:
        # equals at the K-th place, too wide a range, or fewer numbers than K: halve the range of
        # keys, which ends for sure
        key = tl.where(ok, order_key(x), -2147483648)
        least = tl.where(found > K, order_key(low), tl.min(tl.where(ok, key, 2147483647), 0))
        most = tl.max(key, 0)
        while least < most:
            guess = (least | most) - ((least ^ most) >> 1)  # half way up, without overflow
            enough = tl.sum((key >= guess).to(tl.int32), 0) >= K
            least = tl.where(enough, guess, least)
            most = tl.where(enough, most, guess - 1)
        tied = ok & (key == least)
        room = K - tl.sum((ok & (key > least)).to(tl.int32), 0)
        chosen = ok & ((key > least) | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= room)))
    return chosen


@triton.jit
def write_list(to, chosen, at, K):
    """Positions `at` of the chosen, in order, into K places."""
    slot = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(to + slot, at, mask=chosen & (slot < K))


@triton.jit
def select_row(
    scores, peaks, picked, members, sn, sg, N, groups, K: tl.constexpr, G: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The K largest of one row of N scores, ascending by position, into members.

    With G > 1, in two steps: the top K entries always lie in the K groups (of G neighbours) with
    the largest maxima, ties by position on both levels.
    """
    c = tl.arange(0, BLOCK_L)
    if G == 1:
        x = tl.load(scores + c, mask=c < sn, other=float("-inf"))
        write_list(members, largest(x, c < N, K), c, K)
    else:
        x = tl.load(peaks + c, mask=c < sg, other=float("-inf"))
        write_list(picked, largest(x, c < groups, K), c, K)
        tl.debug_barrier()  # read back by other threads
        c = tl.arange(0, BLOCK_C)
        at = tl.load(picked + c // G, mask=c < K * G, other=0) * G + c % G
        ok = (c < K * G) & (at < N)
        x = tl.load(scores + at, mask=ok, other=float("-inf"))
        write_list(members, largest(x, ok, K), at, K)


@triton.jit
def gather_row(
    part_v, part_top, part_sum, values, lse, M, tiles, factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One row of V~ from its parts, `M` rows apart, and the log-sum-exp of its scores."""
    d = tl.arange(0, BLOCK_D)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, tiles, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        x = tl.load(part_top + t * M, mask=t < tiles, other=float("-inf"))
        sums = tl.load(part_sum + t * M, mask=t < tiles, other=0.0)
        rows = load_rows(part_v, t * M, D, t < tiles, D, BLOCK_D)
        higher = tl.maximum(top, tl.max(x, 0))
        weight = tl.exp2((x - higher) * factor)
        shrink = tl.exp2((top - higher) * factor)
        total = total * shrink + tl.sum(weight * sums, 0)
        acc = acc * shrink + tl.sum(rows * weight[:, None], 0)
        top = higher
    tl.store(values + d, (acc / total).to(values.dtype.element_ty), mask=d < D)
    tl.store(lse + tl.arange(0, 1), (top * factor + tl.log2(total)) / LOG2E)


@triton.jit
def sort_tile(
    choice, ranks, hist, base, starts, order, tile, N, M, tiles, TILE,
    S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """One tile's part of a counting sort: its queries to their places in `order`."""
    e = tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], tl.int32)
    before = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, tiles, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        seen = (t < tiles)[:, None] & (e < M)[None, :]
        x = tl.load(hist + t[:, None] * M + e[None, :], mask=seen, other=0)
        total += tl.sum(x, 0)
        before += tl.sum(tl.where((t < tile)[:, None], x, 0), 0)
    begin = tl.cumsum(total, 0) - total
    if tile == 0:
        tl.store(starts + e, begin, mask=e < M)
        tl.store(starts + M, S * N)
    base += tile * M
    tl.store(base + e, begin + before, mask=e < M)
    tl.debug_barrier()  # read back by other threads
    end = tl.minimum(tile * TILE + TILE, N)
    for start in range(tile * TILE, end, BLOCK_I):
        n = start + tl.arange(0, BLOCK_I)
        for j in tl.static_range(S):
            expert = tl.load(choice + j * N + n, mask=n < end, other=0)
            rank = tl.load(ranks + j * N + n, mask=n < end, other=0)
            slot = tl.load(base + expert, mask=n < end, other=0) + rank
            tl.store(order + slot, j * N + n, mask=n < end)


@triton.jit
def settle_kernel(
    scores, peaks, picked, members, part_v, part_top, part_sum, values, lse,
    choice, ranks, hist, base, starts, order,
    sn, sg, N, M, groups, tiles, TILE, rows, first_head, scale,
    K: tl.constexpr, S: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr,
    ROUTED: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """All that follows the probe, of a chunk of heads, in one launch of independent programs.

    Grid (rows + heads * tiles if ROUTED), rows = heads * M: a landmark's keys and its row of V~
    each, then a tile of the sort each. The chunk's scores, peaks and picked (scratch) int32
    [heads, M, K]; of all heads members int32 [BH, M, K], part_* and choice, ranks, hist as
    `probe_kernel` wrote them, base (scratch) like hist, values [BH, M, D], lse float32 [BH, M],
    starts int32 [BH, M + 1]: where each expert's queries begin in order int32 [BH, S * N], whose
    entries are j * N + n for the j-th choice of query n.
    """
    pid = tl.program_id(0)
    if pid < rows:
        local = pid.to(tl.int64)
        row = local + first_head * M
        if ROUTED:
            select_row(
                scores + local * sn, peaks + local * sg, picked + local * K,
                members + row * K, sn, sg, N, groups, K, G, BLOCK_L, BLOCK_C,
            )  # fmt: skip
        if SHARED:
            part = row // M * tiles * M + row % M
            gather_row(
                part_v + part * D, part_top + part, part_sum + part, values + row * D, lse + row,
                M, tiles, exponent_factor(scale), D, BLOCK_D, BLOCK_T,
            )  # fmt: skip
    else:
        tile = (pid - rows) % tiles
        head = ((pid - rows) // tiles + first_head).to(tl.int64)
        sort_tile(
            choice + head * S * N, ranks + head * S * N, hist + head * tiles * M,
            base + head * tiles * M, starts + head * (M + 1), order + head * S * N,
            tile, N, M, tiles, TILE, S, BLOCK_E, BLOCK_H, BLOCK_I,
        )  # fmt: skip
