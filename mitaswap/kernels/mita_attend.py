"""MiTA's attention proper: queries sorted by expert, each over the shared and its routed expert."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from mitaswap.kernels.mita_parts import (
    LOG2E,
    head_offset,
    load_rows,
    product,
    product_onto,
    store_rows,
)


@triton.jit
def find_tile(starts, j, M, N, T: tl.constexpr, BLOCK_E: tl.constexpr, ROUTED: tl.constexpr):
    """Expert of a head's j-th tile of T queries, its first place in the sorted order, and how many
    places are left there for it: none, or less, for a tile beyond the last.

    The experts' lists are cut into tiles one after the other.
    """
    if ROUTED:
        e = tl.arange(0, BLOCK_E)
        begin = tl.load(starts + e, mask=e < M, other=0)
        count = tl.load(starts + e + 1, mask=e < M, other=0) - begin
        tiles = (count + T - 1) // T
        before = tl.cumsum(tiles, 0) - tiles
        mine = (before <= j) & (j < before + tiles)
        skip = (j - before) * T
        expert = tl.sum(tl.where(mine, e, 0), 0)
        place = tl.sum(tl.where(mine, begin + skip, 0), 0)
        left = tl.sum(tl.where(mine, count - skip, 0), 0)
    else:
        expert = 0
        place = j * T
        left = N - place
    return expert, place, left


@triton.jit
def load_items(order, place, left, T: tl.constexpr, ROUTED: tl.constexpr):
    """Items (choice * N + query) at T places of the sorted order, and which of them exist."""
    lane = tl.arange(0, T)
    ok = lane < left
    item = tl.load(order + place + lane, mask=ok, other=0) if ROUTED else place + lane
    return item, ok


@triton.jit
def load_entries(
    c, marks, values, members, kb, vb, skn, svn, shared: tl.constexpr, entries: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROUTED: tl.constexpr,
):  # fmt: skip
    """Keys and values [C, BLOCK_D] of the entries c: landmarks and V~ first, then an expert's."""
    if ROUTED:
        d = tl.arange(0, BLOCK_D)[None, :]
        slot = tl.maximum(c - shared, 0)
        index = tl.load(members + slot, mask=(c >= shared) & (c < entries), other=0).to(tl.int64)
        of_shared = (c < shared)[:, None]
        at = (c * D)[:, None]
        keys = tl.where(of_shared, marks + at, kb + (index * skn)[:, None]) + d
        vals = tl.where(of_shared, values + at, vb + (index * svn)[:, None]) + d
        ok = (c < entries)[:, None]
        if D != BLOCK_D:
            ok = ok & (d < D)
        return tl.load(keys, mask=ok, other=0.0), tl.load(vals, mask=ok, other=0.0)
    else:
        key = load_rows(marks, c, D, c < entries, D, BLOCK_D)
        return key, load_rows(values, c, D, c < entries, D, BLOCK_D)


@triton.jit
def fold(top, total, acc, logits, values):
    """One step of the online softmax over entries with `logits` [T, E] (base 2) and values."""
    higher = tl.maximum(top, tl.max(logits, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(logits - safe[:, None])
    shrink = tl.exp2(top - safe)
    total = total * shrink + tl.sum(weights, 1)
    acc = product_onto(weights.to(values.dtype), values, acc * shrink[:, None])
    return higher, total, acc


@triton.jit
def attend_kernel(
    q, k, v, marks, values, members, starts, order, out, lse,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son, soj,
    H, N, tiles, scale, again,
    M: tl.constexpr, K: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
    ROUTED: tl.constexpr, SHARED: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Softmax over the M shared entries and the K keys of one expert, for T queries of it.

    Grid (BH * tiles) with tiles >= sum over experts of ceil(queries / T). marks, values
    [BH, M, D]; members int32 [BH, M, K]; out [S, B, H, N, D]; lse float32 [S, BH, N], base 2.
    With S > 1 these are the parts of each choice; the shared expert is in the first one's.
    """
    pid = tl.program_id(0)
    bh = pid // tiles
    head = bh.to(tl.int64)
    if ROUTED:
        starts += head * (M + 1)
        order += head * S * N
    expert, place, left = find_tile(starts, pid % tiles, M, N, T, BLOCK_E, ROUTED)
    if left <= 0:
        return
    item, ok = load_items(order, place, left, T, ROUTED)
    n = item % N
    queries = load_rows(q + head_offset(bh, H, sqb, sqh), n, sqn, ok, D, BLOCK_D)
    marks += head * M * D
    values += head * M * D
    members += (head * M + expert) * K
    kb = k + head_offset(bh, H, skb, skh)
    vb = v + head_offset(bh, H, svb, svh)
    top = tl.full([T], float("-inf"), tl.float32)
    total = tl.zeros([T], tl.float32)
    acc = tl.zeros([T, BLOCK_D], tl.float32)
    # entries: first the shared expert's M, then the routed expert's K, read as one list
    shared: tl.constexpr = M if SHARED else 0
    entries: tl.constexpr = shared + K
    for start in range(0, entries, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        of_shared = c < shared
        factor = tl.where(of_shared, again, scale) * LOG2E
        key, value = load_entries(
            c, marks, values, members, kb, vb, skn, svn, shared, entries, D, BLOCK_D, ROUTED
        )
        logits = product(queries, tl.trans(key)) * factor[None, :]
        seen = (c < entries)[None, :]
        if S > 1:  # the shared expert is in the part of the first choice
            seen = seen & ((item < N)[:, None] | (c >= shared)[None, :])
        logits = tl.where(seen, logits, float("-inf"))
        top, total, acc = fold(top, total, acc, logits, value)
    base = out + head_offset(bh, H, sob, soh)
    if S > 1:
        d = tl.arange(0, BLOCK_D)
        at = (item // N).to(tl.int64) * soj + n.to(tl.int64) * son
        mask = ok[:, None] & (d < D)[None, :]
        x = (acc * (1.0 / total)[:, None]).to(out.dtype.element_ty)
        tl.store(base + at[:, None] + d[None, :], x, mask=mask)
    else:
        store_rows(base, n, son, ok, acc * (1.0 / total)[:, None], D, BLOCK_D)
    if SAVE:
        at = (item // N).to(tl.int64) * (tl.num_programs(0) // tiles) * N + head * N + n
        tl.store(lse + at, top + tl.log2(total), mask=ok)


@triton.jit
def merge_kernel(
    parts, part_lse, out, lse, sob, soh, son, H, N, BH, tiles,
    S: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One softmax from the parts of S choices. Grid (BH * tiles); parts float32 [S, BH, N, D],
    part_lse float32 [S, BH, N]; out [B, H, N, D], lse float32 [BH, N].
    """
    pid = tl.program_id(0)
    bh = pid // tiles
    head = bh.to(tl.int64)
    n = pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = n < N
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for j in tl.static_range(S):
        x = tl.load(part_lse + (j * BH + head) * N + n, mask=ok, other=0.0)
        top = tl.maximum(top, x)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for j in tl.static_range(S):
        x = tl.load(part_lse + (j * BH + head) * N + n, mask=ok, other=0.0)
        weight = tl.exp2(x - top)
        total += weight
        rows = load_rows(parts + (j * BH + head) * N * D, n, D, ok, D, BLOCK_D)
        acc += rows * weight[:, None]
    base = out + head_offset(bh, H, sob, soh)
    store_rows(base, n, son, ok, acc * (1.0 / total)[:, None], D, BLOCK_D)
    tl.store(lse + head * N + n, top + tl.log2(total), mask=ok)
