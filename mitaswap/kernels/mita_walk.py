"""MiTA's attention where few entries are to be read: programs that walk through many tiles."""

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
def walk_kernel(
    q, k, v, marks, values, members, starts, order, out, lse,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son,
    H, N, programs, scale, again,
    M: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    SHARED: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """`attend_kernel` for S = 1 and few queries per expert: a program keeps the shared expert's
    entries and walks through its share of the head's tiles of T queries, one expert each.

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
        queries = load_rows(q, n, sqn, ok, D, BLOCK_D)
        keys = load_rows(k, index, skn, c < K, D, BLOCK_D)
        vals = load_rows(v, index, svn, c < K, D, BLOCK_D)
        logits = product(queries, tl.trans(keys)) * (scale * LOG2E)
        logits = tl.where((c < K)[None, :], logits, float("-inf"))
        top = tl.max(logits, 1)
        if SHARED:
            some = product(queries, mark) * (again * LOG2E)
            some = tl.where((e < M)[None, :], some, float("-inf"))
            top = tl.maximum(top, tl.max(some, 1))
        weights = tl.exp2(logits - top[:, None])
        total = tl.sum(weights, 1)
        acc = product(weights.to(vals.dtype), vals)
        if SHARED:
            weights = tl.exp2(some - top[:, None])
            total += tl.sum(weights, 1)
            acc = product_onto(weights.to(vals.dtype), value, acc)
        store_rows(out, n, son, ok, acc / total[:, None], D, BLOCK_D)
        if SAVE:
            tl.store(lse + n, top + tl.log2(total), mask=ok)
