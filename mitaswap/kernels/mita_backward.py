"""Gradients of MiTA by recomputation, exact through everything but the discrete choices.

Every sum has one fixed order and nothing is added atomically, so the gradients are deterministic.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from mitaswap.kernels.mita_attend import find_tile, load_entries, load_items
from mitaswap.kernels.mita_parts import (
    LOG2E,
    head_offset,
    load_rows,
    product,
    product_onto,
    routing_scores,
    split,
    store_rows,
)


@triton.jit
def shared_backward_kernel(
    q, out, grad, marks, values, lse, delta, part_m, part_v,
    sqb, sqh, sqn, sob, soh, son, sgb, sgh, sgn, H, N, M, splits, share, again,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """delta = grad . out of each query, and what the shared expert's entries get from `share`
    queries.

    Grid (BH * splits, blocks of M). q, out, grad [B, H, N, D]; marks, values [BH, M, D]; lse
    (base 2), delta float32 [BH, N]; part_m, part_v float32 [BH, splits, M, D].
    """
    pid = tl.program_id(0)
    bh = pid // splits
    head = bh.to(tl.int64)
    block = tl.program_id(1)
    begin = pid % splits * share
    end = tl.minimum(begin + share, N)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    qb = q + head_offset(bh, H, sqb, sqh)
    ob = out + head_offset(bh, H, sob, soh)
    gb = grad + head_offset(bh, H, sgb, sgh)
    mark = load_rows(marks + head * M * D, row, D, row < M, D, BLOCK_D)
    value = load_rows(values + head * M * D, row, D, row < M, D, BLOCK_D)
    dtype: tl.constexpr = q.dtype.element_ty
    dm = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        ok = n < end
        g = load_rows(gb, n, sgn, ok, D, BLOCK_D)
        o = load_rows(ob, n, son, ok, D, BLOCK_D)
        dot = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
        if block == 0:
            tl.store(delta + head * N + n, dot, mask=ok)
        if SHARED:
            queries = load_rows(qb, n, sqn, ok, D, BLOCK_D)
            logits = product(queries, tl.trans(mark)) * (again * LOG2E)
            total = tl.load(lse + head * N + n, mask=ok, other=float("inf"))
            weights = tl.exp2(logits - total[:, None])
            dv = product_onto(tl.trans(weights.to(dtype)), g, dv)
            ds = weights * (product(g, tl.trans(value)) - dot[:, None]) * again
            dm = product_onto(tl.trans(ds.to(dtype)), queries, dm)
    if SHARED:
        base = (head * splits + pid % splits) * M * D
        store_rows(part_m + base, row, D, row < M, dm, D, BLOCK_D)
        store_rows(part_v + base, row, D, row < M, dv, D, BLOCK_D)


@triton.jit
def expert_backward_kernel(
    q, k, v, grad, members, starts, order, lse, delta, dkeys, dvalues,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sgb, sgh, sgn, H, N, M, scale,
    K: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Gradients of one expert's keys and values from all its queries.

    Grid (BH * M, blocks of K). dkeys, dvalues [BH, M, K, D] in q's dtype.
    """
    pid = tl.program_id(0)
    bh = pid // M
    head = bh.to(tl.int64)
    expert = pid % M
    slot = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    held = slot < K
    index = tl.load(members + (head * M + expert) * K + slot, mask=held, other=0)
    key = load_rows(k + head_offset(bh, H, skb, skh), index, skn, held, D, BLOCK_D)
    value = load_rows(v + head_offset(bh, H, svb, svh), index, svn, held, D, BLOCK_D)
    qb = q + head_offset(bh, H, sqb, sqh)
    gb = grad + head_offset(bh, H, sgb, sgh)
    begin = tl.load(starts + head * (M + 1) + expert)
    end = tl.load(starts + head * (M + 1) + expert + 1)
    dtype: tl.constexpr = q.dtype.element_ty
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(begin, end, T):
        lane = start + tl.arange(0, T)
        ok = lane < end
        n = tl.load(order + head * S * N + lane, mask=ok, other=0) % N
        queries = load_rows(qb, n, sqn, ok, D, BLOCK_D)
        g = load_rows(gb, n, sgn, ok, D, BLOCK_D)
        total = tl.load(lse + head * N + n, mask=ok, other=float("inf"))
        dot = tl.load(delta + head * N + n, mask=ok, other=0.0)
        logits = product(queries, tl.trans(key)) * (scale * LOG2E)
        weights = tl.exp2(logits - total[:, None])
        dv = product_onto(tl.trans(weights.to(dtype)), g, dv)
        ds = weights * (product(g, tl.trans(value)) - dot[:, None]) * scale
        dk = product_onto(tl.trans(ds.to(dtype)), queries, dk)
    base = (head * M + expert) * K * D
    store_rows(dkeys + base, slot, D, held, dk, D, BLOCK_D)
    store_rows(dvalues + base, slot, D, held, dv, D, BLOCK_D)


@triton.jit
def wide_product(a, b, PRECISION: tl.constexpr):
    """Product of float32 tiles: weights of many keys and their gradients are too small for
    float16, so half-precision inputs use tf32 here.
    """
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def landmark_backward_kernel(
    k, v, marks, probe_lse, dread, dprobe, sorted_keys, places, bounds, dkeys, dvalues,
    dk, dv, part_m, skb, skh, skn, svb, svh, svn, sab, sah, san, sbb, sbh, sbn,
    H, N, M, splits, share, tiles, listed, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCKS_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    ROUTED: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of all keys and values: through V~, and from the experts that hold them.

    Grid (BH * splits). marks, dread (gradient of V~) float32 [BH, M, D]; probe_lse, dprobe
    (dread . V~) float32 [BH, M]; the `listed` = M * K members of a head in order of position in
    sorted_keys int32, and their places in `members`, int64 [BH, listed]; bounds int64
    [BH, tiles + 1]: where each tile of BLOCK_N keys begins among them; part_m float32
    [BH, splits, M, D].
    """
    pid = tl.program_id(0)
    bh = pid // splits
    head = bh.to(tl.int64)
    dtype: tl.constexpr = k.dtype.element_ty
    kb = k + head_offset(bh, H, skb, skh)
    vb = v + head_offset(bh, H, svb, svh)
    marks += head * M * D
    dread += head * M * D
    part = part_m + (head * splits + pid % splits) * M * D
    dm = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin = pid % splits * share
    for start in range(begin, tl.minimum(begin + share, N), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        ok = n < N
        dkey = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dvalue = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        if SHARED:
            keys = load_rows(kb, n, skn, ok, D, BLOCK_D)
            values = load_rows(vb, n, svn, ok, D, BLOCK_D)
            for b in range(BLOCKS_M):
                row = b * BLOCK_M + tl.arange(0, BLOCK_M)
                mark = load_rows(marks, row, D, row < M, D, BLOCK_D)
                hi, mid, lo = split(mark, dtype)
                read = load_rows(dread, row, D, row < M, D, BLOCK_D)
                total = tl.load(probe_lse + head * M + row, mask=row < M, other=float("inf"))
                dot = tl.load(dprobe + head * M + row, mask=row < M, other=0.0)
                s = routing_scores(keys, hi, mid, lo, tl.zeros([1, BLOCK_M], tl.float32))
                logits = s * (scale * LOG2E) - (total * LOG2E)[None, :]
                weights = tl.where(ok[:, None], tl.exp2(logits), 0.0)
                dvalue += wide_product(weights, read, PRECISION)
                dp = wide_product(values.to(tl.float32), tl.trans(read), PRECISION)
                ds = weights * (dp - dot[None, :]) * scale
                dkey += wide_product(ds, mark, PRECISION)
                step = wide_product(tl.trans(ds), keys.to(tl.float32), PRECISION)
                if BLOCKS_M == 1:
                    dm += step
                else:  # only this program touches its part
                    if start > begin:
                        step += load_rows(part, row, D, row < M, D, BLOCK_D)
                    store_rows(part, row, D, row < M, step, D, BLOCK_D)
        if ROUTED:
            at = bounds + head * (tiles + 1) + start // BLOCK_N
            first = tl.load(at).to(tl.int32)
            last = tl.load(at + 1).to(tl.int32)
            for c0 in range(first, last, BLOCK_C):
                c = c0 + tl.arange(0, BLOCK_C)
                key = tl.load(sorted_keys + head * listed + c, mask=c < last, other=-1)
                place = tl.load(places + head * listed + c, mask=c < last, other=0)
                mine = (n[:, None] == key[None, :]).to(tl.float32).to(dtype)
                base = head * listed * D
                rows = load_rows(dkeys + base, place, D, c < last, D, BLOCK_D)
                dkey = product_onto(mine, rows, dkey)
                rows = load_rows(dvalues + base, place, D, c < last, D, BLOCK_D)
                dvalue = product_onto(mine, rows, dvalue)
        store_rows(dk + head_offset(bh, H, sab, sah), n, san, ok, dkey, D, BLOCK_D)
        store_rows(dv + head_offset(bh, H, sbb, sbh), n, sbn, ok, dvalue, D, BLOCK_D)
    if SHARED and BLOCKS_M == 1:
        row = tl.arange(0, BLOCK_M)
        store_rows(part, row, D, row < M, dm, D, BLOCK_D)


@triton.jit
def query_backward_kernel(
    q, k, v, grad, marks, values, members, starts, order, lse, delta, dmarks, dq,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sgb, sgh, sgn, sob, soh, son, soj,
    H, N, tiles, first, height, width, A, B, scale, again,
    M: tl.constexpr, K: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
    ROUTED: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Gradients of T queries of one expert: through their logits and through the landmarks.

    Grid (BH * tiles), as `attend_kernel`. dmarks float32 [BH, M, D]: gradient of the landmarks;
    dq [S, B, H, N, D], one part per choice.
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
    g = load_rows(grad + head_offset(bh, H, sgb, sgh), n, sgn, ok, D, BLOCK_D)
    total = tl.load(lse + head * N + n, mask=ok, other=float("inf"))
    dot = tl.load(delta + head * N + n, mask=ok, other=0.0)
    members += (head * M + expert) * K
    kb = k + head_offset(bh, H, skb, skh)
    vb = v + head_offset(bh, H, svb, svh)
    acc = tl.zeros([T, BLOCK_D], tl.float32)
    shared: tl.constexpr = M if SHARED else 0
    entries: tl.constexpr = shared + K
    for start in range(0, entries, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        factor = tl.where(c < shared, again, scale)
        key, value = load_entries(
            c, marks + head * M * D, values + head * M * D, members, kb, vb, skn, svn,
            shared, entries, D, BLOCK_D, ROUTED,
        )  # fmt: skip
        logits = product(queries, tl.trans(key)) * (factor * LOG2E)[None, :]
        seen = (c < entries)[None, :]
        if S > 1:
            seen = seen & ((item < N)[:, None] | (c >= shared)[None, :])
        weights = tl.where(seen, tl.exp2(logits - total[:, None]), 0.0)
        ds = weights * (product(g, tl.trans(value)) - dot[:, None]) * factor[None, :]
        acc = product_onto(ds.to(key.dtype), key, acc)
    if SHARED:
        # a row of the grid lies in the window floor(row * A / height), and in the next as well
        # where windows overlap
        row = (n - first) // width
        column = (n - first) % width
        patch = ok & (n >= first) & (n < first + height * width) & (item < N)
        for di in tl.static_range(2):
            i = row * A // height + di
            top = i * height // A
            bottom = ((i + 1) * height + A - 1) // A
            for dj in tl.static_range(2):
                j = column * B // width + dj
                left = j * width // B
                right = ((j + 1) * width + B - 1) // B
                inside = patch & (i < A) & (j < B) & (row >= top) & (column >= left)
                share = 1.0 / tl.where(inside, (bottom - top) * (right - left), 1).to(tl.float32)
                mark = load_rows(dmarks + head * M * D, i * B + j, D, inside, D, BLOCK_D)
                acc += mark * share[:, None]
    base = dq + head_offset(bh, H, sob, soh)
    d = tl.arange(0, BLOCK_D)
    at = (item // N).to(tl.int64) * soj + n.to(tl.int64) * son
    mask = ok[:, None] & (d < D)[None, :]
    tl.store(base + at[:, None] + d[None, :], acc.to(dq.dtype.element_ty), mask=mask)
