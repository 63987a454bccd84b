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
def grid_of(L: tl.constexpr, W: tl.constexpr):
    """Positions 0 ... L - 1 as rows of W, [W, R]: with one along the threads of a program, each of
    these has a column of its own.
    """
    WIDTH: tl.constexpr = min(L, W)
    return tl.arange(0, WIDTH)[:, None] + tl.arange(0, L // WIDTH)[None, :] * WIDTH


@triton.jit
def count(flags):
    """How many: columns as floats, of which one instruction compares and one adds."""
    return tl.sum(tl.sum(tl.where(flags, 1.0, 0.0), 1).to(tl.int32), 0)


@triton.jit
def earlier(flags):
    """How many of the flags [W, R] come before each, row after row."""
    one = flags.to(tl.int32)
    if flags.shape[0] <= 32 and flags.shape[1] >= 4:
        # counts of four rows, 128 at most, are bytes of one number: a quarter of the scans
        shift = tl.arange(0, 4)[None, None, :] * 8
        four = tl.sum(tl.reshape(one, [flags.shape[0], flags.shape[1] // 4, 4]) << shift, 2)
        rows = tl.sum(four, 0)
        all = (rows & 255) + ((rows >> 8) & 255) + ((rows >> 16) & 255) + ((rows >> 24) & 255)
        rows = (rows << 8) + (rows << 16) + (rows << 24)
        before = tl.cumsum(four, 0) - four + rows[None, :]
        out = ((before[:, :, None] >> shift) & 255) + (tl.cumsum(all, 0) - all)[None, :, None]
        out = tl.reshape(out, flags.shape)
    else:
        rows = tl.sum(one, 0)
        out = tl.cumsum(one, 0) - one + (tl.cumsum(rows, 0) - rows)[None, :]
    return out


@triton.jit
def largest(x, ok, K):
    """Mask of the K largest of x [W, R] where ok, -inf elsewhere; among equals the first. At least
    K must be ok.
    """
    # invariant: count(x >= low) >= K > count(x >= high); halve the range of values, where real
    # scores are spread evenly, until exactly K are left above or nothing is between
    low = tl.min(tl.where(ok, x, float("inf")))
    high = key_value(order_key(tl.max(x)) + 1)
    turn = 0
    while turn < 20:
        guess = 0.5 * low + 0.5 * high
        between = (guess > low) & (guess < high)
        above = count(x >= guess)
        low = tl.where(between & (above >= K), guess, low)
        high = tl.where(between & (above < K), guess, high)
        turn = tl.where(between & (above != K), turn + 1, 20)
    chosen = ok & (x >= low)
    found = count(chosen)
    if found != K:
        # equals at the K-th place, too wide a range, or fewer numbers than K: halve the range of
        # keys, which ends for sure
        key = tl.where(ok, order_key(x), -2147483648)
        least = tl.where(found > K, order_key(low), tl.min(tl.where(ok, key, 2147483647)))
        most = tl.max(key)
        while least < most:
            guess = (least | most) - ((least ^ most) >> 1)  # half way up, without overflow
            enough = count(key >= guess) >= K
            least = tl.where(enough, guess, least)
            most = tl.where(enough, most, guess - 1)
        tied = ok & (key == least)
        room = K - count(ok & (key > least))
        chosen = ok & ((key > least) | (tied & (earlier(tied) < room)))
    return chosen


@triton.jit
def write_list(to, chosen, at, K):
    """Positions `at` of the chosen, in order, into K places."""
    slot = earlier(chosen)
    tl.store(to + slot, at, mask=chosen & (slot < K))


@triton.jit
def select_row(
    scores, peaks, picked, members, N, groups, K: tl.constexpr, G: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """The K largest of one row of N scores, ascending by position, into members.

    With G > 1, in two steps: the top K entries always lie in the K groups (of G neighbours) with
    the largest maxima, ties by position on both levels.
    """
    c = grid_of(BLOCK_L, THREADS)
    if G == 1:
        x = tl.load(scores + c, mask=c < N, other=float("-inf"))
        write_list(members, largest(x, c < N, K), c, K)
    else:
        x = tl.load(peaks + c, mask=c < groups, other=float("-inf"))
        write_list(picked, largest(x, c < groups, K), c, K)
        tl.debug_barrier()  # read back by other threads
        c = grid_of(BLOCK_C, THREADS)
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
    tl.store(values + d, (acc * (1.0 / total)).to(values.dtype.element_ty), mask=d < D)
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


# rows of scores are read an element a thread, as they are written: not four, which a known multiple
# of 16 would make of it
@triton.jit(do_not_specialize=["sn", "sg"])
def settle_kernel(
    scores, peaks, picked, members, part_v, part_top, part_sum, values, lse,
    choice, ranks, hist, base, starts, order,
    sn, sg, N, M, groups, tiles, TILE, rows, first_head, scale,
    K: tl.constexpr, S: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr,
    ROUTED: tl.constexpr, GATHER: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """All that follows the probe, of a chunk of heads, in one launch of independent programs.

    Grid (rows + heads * tiles if ROUTED), rows = heads * M: a landmark's keys and (GATHER) its row
    of V~ each, then a tile of the sort each. The chunk's scores, peaks and picked (scratch) int32
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
                members + row * K, N, groups, K, G, BLOCK_L, BLOCK_C, THREADS,
            )  # fmt: skip
        if GATHER:
            part = (pid // M + first_head).to(tl.int64) * tiles * M + pid % M
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
