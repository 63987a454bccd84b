"""MiTA's attention where few entries are to be read: programs that walk through many tiles."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from mitaswap.kernels.mita_parts import (
    exponent_factor,
    head_offset,
    load_near,
    load_rows,
    product,
    product_onto,
    store_near,
)


@triton.jit
def walk_kernel(
    q, k, v, marks, values, members, starts, order, out, lse,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son,
    H, N, programs, scale, again,
    M: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    SHARED: tl.constexpr, SAVE: tl.constexpr, SIGN: tl.constexpr,
    SHARED_SIGN: tl.constexpr,
):  # fmt: skip
    """`attend_kernel` for S = 1 and few queries per expert: a program keeps the shared expert's
    entries and walks through its share of the head's tiles of T queries, one expert each. SIGN and
    SHARED_SIGN are those of scale and again. Offsets within a head fit 32 bits.

    Grid (BH * programs).
    """
    pid = tl.program_id(0)
    bh = pid // programs
    head = bh.to(tl.int64)
    starts += head * (M + 1)
    order += head * N
    members += head * M * K
    lse += head * N
    q += head_offset(bh, H, sqb, sqh)
    k += head_offset(bh, H, skb, skh)
    v += head_offset(bh, H, svb, svh)
    out += head_offset(bh, H, sob, soh)

    e = tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_K)
    lane = tl.arange(0, T)
    begin = tl.load(starts + e, mask=e < M, other=0)
    count = tl.load(starts + e + 1, mask=e < M, other=0) - begin
    tiles = (count + T - 1) // T
    before = tl.cumsum(tiles, 0) - tiles
    share = (tl.sum(tiles, 0) + programs - 1) // programs
    here = pid % programs * share
    routed = exponent_factor(scale)
    shared = exponent_factor(again)
    if SHARED:
        mark = tl.trans(load_rows(marks + head * M * D, e, D, e < M, D, BLOCK_D))
        value = load_rows(values + head * M * D, e, D, e < M, D, BLOCK_D)
    for j in range(here, tl.minimum(here + share, tl.sum(tiles, 0))):
        mine = (before <= j) & (j < before + tiles)
        skip = (j - before) * T
        expert = tl.sum(tl.where(mine, e, 0), 0)
        place = tl.sum(tl.where(mine, begin + skip, 0), 0)
        left = tl.sum(tl.where(mine, count - skip, 0), 0)
        ok = lane < left
        n = tl.load(order + place + lane, mask=ok, other=0)
        index = tl.load(members + expert * K + c, mask=c < K, other=0)
        queries = load_near(q, n, sqn, ok, D, BLOCK_D)
        keys = load_near(k, index, skn, c < K, D, BLOCK_D)
        vals = load_near(v, index, svn, c < K, D, BLOCK_D)
        # largest before the scale, so that it meets the logits in one multiply-add
        logits = product(queries, tl.trans(keys)) * SIGN
        logits = tl.where((c < K)[None, :], logits, float("-inf"))
        top = tl.max(logits, 1) * routed
        if SHARED:
            some = product(queries, mark) * SHARED_SIGN
            some = tl.where((e < M)[None, :], some, float("-inf"))
            top = tl.maximum(top, tl.max(some, 1) * shared)
        weights = tl.exp2(logits * routed - top[:, None])
        total = tl.sum(weights, 1)
        acc = product(weights.to(vals.dtype), vals)
        if SHARED:
            weights = tl.exp2(some * shared - top[:, None])
            total += tl.sum(weights, 1)
            acc = product_onto(weights.to(vals.dtype), value, acc)
        # one division a query, not one an element
        store_near(out, n, son, ok, acc * (1.0 / total)[:, None], D, BLOCK_D)
        if SAVE:
            tl.store(lse + n, top + tl.log2(total), mask=ok)
