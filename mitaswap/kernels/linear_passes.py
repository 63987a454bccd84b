"""The passes of linear attention, forward and backward, one kernel each.

The memory is phi(K)^T V [D, D], and beside it one number per feature, its norm: the sum of phi(k)
over the tokens, or with softmax features the log-sum-exp (base 2) of k over them.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from mitaswap.kernels.tiles import (
    add_product,
    head_of,
    load_tile,
    part_rows,
    product,
    store_tile,
    total_of,
)

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def load_columns(base, rows, stride, end, block, D: tl.constexpr, BLOCK_V: tl.constexpr):
    """Of rows of a [N, D] view one block of columns: [R, BLOCK_V], as `load_tile`."""
    e = block * BLOCK_V + tl.arange(0, BLOCK_V)
    at = base + (rows.to(tl.int64) * stride)[:, None] * 8 + e[None, :]
    if D % BLOCK_V == 0:
        out = tl.load(at, mask=(rows < end)[:, None], other=0.0)
    else:
        out = tl.load(at, mask=(rows < end)[:, None] & (e < D)[None, :], other=0.0)
    return out


@triton.jit
def store_columns(base, rows, stride, end, x, block, D: tl.constexpr, BLOCK_V: tl.constexpr):
    """Write x [R, BLOCK_V] to one block of columns; the counterpart of `load_columns`."""
    e = block * BLOCK_V + tl.arange(0, BLOCK_V)
    at = base + (rows.to(tl.int64) * stride)[:, None] * 8 + e[None, :]
    x = x.to(base.dtype.element_ty)
    if D % BLOCK_V == 0:
        tl.store(at, x, mask=(rows < end)[:, None])
    else:
        tl.store(at, x, mask=(rows < end)[:, None] & (e < D)[None, :])


@triton.jit
def feature(x, FEATURE: tl.constexpr):
    """phi(x) of float32 x, for the features that are functions of single numbers."""
    if FEATURE == "elu":
        out = tl.where(x > 0, x + 1.0, tl.exp2(tl.minimum(x, 0.0) * LOG2E))
    else:
        out = tl.maximum(x, 0.0)
    return out


@triton.jit
def slope(x, FEATURE: tl.constexpr):
    """The derivative of `feature`."""
    out = tl.where(x > 0, 1.0, 0.0)
    if FEATURE == "elu":
        out = tl.exp2(tl.minimum(x, 0.0) * LOG2E)
    return out


@triton.jit
def query_features(x, factor, FEATURE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """phi of queries x [T, BLOCK_D] times `factor`, float32; softmax is over the D features."""
    x = x.to(tl.float32) * factor
    if FEATURE == "softmax":
        x = tl.where((tl.arange(0, BLOCK_D) < D)[None, :], x * LOG2E, float("-inf"))
        weights = tl.exp2(x - tl.max(x, 1)[:, None])
        out = weights / tl.sum(weights, 1)[:, None]
    else:
        out = feature(x, FEATURE)
    return out


@triton.jit
def key_features(x, ok, norms, bits, FEATURE: tl.constexpr):
    """phi of keys x [T, BLOCK_D], float32, zero where not `ok` [T]; softmax is over all tokens,
    whose log-sum-exps `norms` [BLOCK_D] are, and comes 2^bits times larger.
    """
    x = x.to(tl.float32)
    if FEATURE == "softmax":
        x = x * LOG2E - norms[None, :] + bits
        out = tl.exp2(tl.where(ok[:, None], x, float("-inf")))
    else:
        out = tl.where(ok[:, None], feature(x, FEATURE), 0.0)
    return out


@triton.jit
def memory_kernel(
    k, v, memory, norms, part_m, part_z, part_top,
    skb, skh, skn, svb, svh, svn, H, N, parts, each, shrink,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    FEATURE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """phi(K)^T V of `each` of the tokens. Grid (BH * parts, blocks of value columns).

    To memory [BH, D, D] and norms float32 [BH, D] as `settle_memory_kernel` says, or, with SPLIT,
    to part_m float32 [BH, parts, D, D], part_z and part_top (softmax: maxima, base 2)
    [BH, parts, D].
    """
    pid = tl.program_id(0)
    part = pid % parts
    bh = pid // parts
    block = tl.program_id(1)
    k = head_of(k, bh, H, skb, skh)
    v = head_of(v, bh, H, svb, svh)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    top = tl.full([BLOCK_D], float("-inf"), tl.float32)
    z = tl.zeros([BLOCK_D], tl.float32)
    acc = tl.zeros([BLOCK_D, BLOCK_V], tl.float32)
    for start in range(part * each, tl.minimum(part * each + each, N), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        keys = load_tile(k, n, skn, N, D, BLOCK_D)
        x = load_columns(v, n, svn, N, block, D, BLOCK_V)
        if FEATURE == "softmax":
            f = tl.where((n < N)[:, None], keys.to(tl.float32) * LOG2E, float("-inf"))
            higher = tl.maximum(top, tl.max(f, 0))
            f = tl.exp2(f - higher[None, :]).to(keys.dtype)
            shrunk = tl.exp2(top - higher)
            top = higher
            z *= shrunk
            acc *= shrunk[:, None]
        else:
            f = key_features(keys, n < N, z, 0, FEATURE).to(keys.dtype)
        # the features as rounded for the product, so that weights still sum to one
        z += tl.sum(f.to(tl.float32), 0)
        acc = add_product(acc, tl.trans(f), x)
    column = block * BLOCK_V + e
    inside = (d < D)[:, None] & (column < D)[None, :]
    if SPLIT:
        at = (bh.to(tl.int64) * parts + part) * D
        tl.store(part_m + at * D + d[:, None] * D + column[None, :], acc, mask=inside)
        if block == 0:
            tl.store(part_z + at + d, z, mask=d < D)
            if FEATURE == "softmax":
                tl.store(part_top + at + d, top, mask=d < D)
    else:
        head = bh.to(tl.int64) * D
        if FEATURE == "softmax":
            acc /= z[:, None]
            z = top + tl.log2(z)
        else:
            acc *= shrink
            z *= shrink
        at = memory + head * D + d[:, None] * D + column[None, :]
        tl.store(at, acc.to(memory.dtype.element_ty), mask=inside)
        if block == 0:
            tl.store(norms + head + d, z, mask=d < D)


@triton.jit
def settle_memory_kernel(
    part_m, part_z, part_top, memory, norms, parts, shrink,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
    FEATURE: tl.constexpr,
):  # fmt: skip
    """The memory out of the parts. Grid (BH, blocks of features).

    Memory and norms come times `shrink`, about 1 / N, which keeps them within float16's range;
    softmax features sum to one over the tokens already.
    """
    head = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    part_m += head * parts * D * D
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    z = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(0, parts, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        at = head * parts * D + p[:, None] * D + r[None, :]
        ok = (p < parts)[:, None] & (r < D)[None, :]
        rows = part_rows(part_m, p, parts, r, D, D, BLOCK_D)
        share = tl.load(part_z + at, mask=ok, other=0.0)
        if FEATURE == "softmax":
            x = tl.load(part_top + at, mask=ok, other=float("-inf"))
            x = tl.where((r < D)[None, :], x, 0.0)
            higher = tl.maximum(top, tl.max(x, 0))
            weight = tl.exp2(x - higher[None, :])
            shrunk = tl.exp2(top - higher)
            z = z * shrunk + tl.sum(weight * share, 0)
            acc = acc * shrunk[:, None] + tl.sum(rows * weight[:, :, None], 0)
            top = higher
        else:
            z += tl.sum(share, 0)
            acc += tl.sum(rows, 0)
    if FEATURE == "softmax":
        acc /= z[:, None]
        z = top + tl.log2(z)
    else:
        acc *= shrink
        z *= shrink
    store_tile(memory + head * D * D, r, D // 8, D, acc, D, BLOCK_D)
    tl.store(norms + head * D + r, z, mask=r < D)


@triton.jit
def load_memory(memory, block, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr):
    """One block of the columns of a head's memory: [BLOCK_D, BLOCK_V]; zero beyond D."""
    d = tl.arange(0, BLOCK_D)[:, None]
    e = block * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    return tl.load(memory + d * D + e, mask=(d < D) & (e < D), other=0.0)


@triton.jit
def read_kernel(
    q, memory, norms, out, sqb, sqh, sqn, sob, soh, son, H, N, parts, each, factor, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    FEATURE: tl.constexpr,
):  # fmt: skip
    """The queries read the memory. Grid (BH * parts, blocks of value columns)."""
    pid = tl.program_id(0)
    part = pid % parts
    bh = pid // parts
    head = bh.to(tl.int64) * D
    block = tl.program_id(1)
    q = head_of(q, bh, H, sqb, sqh)
    out = head_of(out, bh, H, sob, soh)
    d = tl.arange(0, BLOCK_D)
    held = load_memory(memory + head * D, block, D, BLOCK_D, BLOCK_V)
    z = tl.load(norms + head + d, mask=d < D, other=0.0)
    for start in range(part * each, tl.minimum(part * each + each, N), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        x = load_tile(q, n, sqn, N, D, BLOCK_D)
        f = query_features(x, factor, FEATURE, D, BLOCK_D).to(x.dtype)
        acc = product(f, held)
        if FEATURE != "softmax":
            acc /= (tl.sum(f.to(tl.float32) * z[None, :], 1) + eps)[:, None]
        store_columns(out, n, son, N, acc, block, D, BLOCK_V)


@triton.jit
def queries_backward_kernel(
    q, grad, memory, norms, grad_q, part_m, part_z,
    sqb, sqh, sqn, sgb, sgh, sgn, sob, soh, son, H, N, parts, each, factor, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr, FEATURE: tl.constexpr,
):  # fmt: skip
    """Gradients of `each` of the queries, and their sums to the memory and its norms, float32
    [BH, parts, D, D] and [BH, parts, D]. Grid (BH * parts, BLOCKS): one block of value columns
    each, and the first also writes the queries' gradients.
    """
    pid = tl.program_id(0)
    part = pid % parts
    bh = pid // parts
    head = bh.to(tl.int64) * D
    block = tl.program_id(1)
    memory += head * D
    q = head_of(q, bh, H, sqb, sqh)
    grad = head_of(grad, bh, H, sgb, sgh)
    grad_q = head_of(grad_q, bh, H, sob, soh)
    d = tl.arange(0, BLOCK_D)
    held = load_memory(memory, block, D, BLOCK_D, BLOCK_V)
    z = tl.load(norms + head + d, mask=d < D, other=0.0)
    acc = tl.zeros([BLOCK_D, BLOCK_V], tl.float32)
    acc_z = tl.zeros([BLOCK_D], tl.float32)
    for start in range(part * each, tl.minimum(part * each + each, N), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        x = load_tile(q, n, sqn, N, D, BLOCK_D)
        g = load_columns(grad, n, sgn, N, block, D, BLOCK_V)
        f = query_features(x, factor, FEATURE, D, BLOCK_D)
        if FEATURE == "softmax":
            weighted = f
        else:
            over = 1.0 / (tl.sum(f.to(x.dtype).to(tl.float32) * z[None, :], 1) + eps)
            weighted = f * over[:, None]
        acc = add_product(acc, tl.trans(weighted.to(x.dtype)), g)
        if BLOCKS == 1 or block == 0:
            to_f = product(g, tl.trans(held))
            for b in range(1, BLOCKS):
                other = load_memory(memory, b, D, BLOCK_D, BLOCK_V)
                y = load_columns(grad, n, sgn, N, b, D, BLOCK_V)
                to_f = add_product(to_f, y, tl.trans(other))
            # with `weighted`: the output times its gradient
            mean = tl.sum(weighted * to_f, 1)
            if FEATURE == "softmax":
                to_x = f * (to_f - mean[:, None])
            else:
                to_x = (to_f - mean[:, None] * z[None, :]) * over[:, None]
                to_x *= slope(x.to(tl.float32) * factor, FEATURE)
                acc_z -= tl.sum(weighted * mean[:, None], 0)
            store_tile(grad_q, n, son, N, to_x * factor, D, BLOCK_D)
    at = (bh.to(tl.int64) * parts + part) * D
    column = block * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (d < D)[:, None] & (column < D)[None, :]
    tl.store(part_m + at * D + d[:, None] * D + column[None, :], acc, mask=inside)
    if FEATURE != "softmax" and block == 0:
        tl.store(part_z + at + d, acc_z, mask=d < D)


@triton.jit
def settle_gradient_kernel(
    part_m, part_z, memory, grad_memory, grad_norms, parts, shrink, enlarge,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
    FEATURE: tl.constexpr,
):  # fmt: skip
    """The memory's gradient times `shrink` and `enlarge`, in the memory's dtype, and the norms'
    times `shrink`: of softmax, the means that its gradient takes off. Grid (BH, blocks of
    features).
    """
    head = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    part_m += head * parts * D * D
    row = total_of(part_m, parts, r, D, D, BLOCK_D, BLOCK_P, BLOCK_R) * shrink
    if FEATURE == "softmax":
        x = load_tile(memory + head * D * D, r, D // 8, D, D, BLOCK_D).to(tl.float32)
        z = tl.sum(row * x, 1)
    else:
        z = tl.zeros([BLOCK_R], tl.float32)
        for start in range(0, parts, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            at = part_z + head * parts * D + p[:, None] * D + r[None, :]
            ok = (p < parts)[:, None] & (r < D)[None, :]
            z += tl.sum(tl.load(at, mask=ok, other=0.0), 0) * shrink
    tl.store(grad_norms + head * D + r, z, mask=r < D)
    store_tile(grad_memory + head * D * D, r, D // 8, D, row * enlarge, D, BLOCK_D)


@triton.jit
def keys_backward_kernel(
    k, v, norms, grad_memory, grad_norms, grad_k, grad_v,
    skb, skh, skn, svb, svh, svn, sgb, sgh, sgn, swb, swh, swn,
    H, N, parts, each, bits, reduce,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr, FEATURE: tl.constexpr,
):  # fmt: skip
    """Gradients of `each` of the keys and values. Grid (BH * parts). grad_memory comes 1 / reduce
    times too large, and softmax features are taken 2^bits times larger, for it is as much smaller.
    """
    pid = tl.program_id(0)
    part = pid % parts
    bh = pid // parts
    head = bh.to(tl.int64) * D
    grad_memory += head * D
    k = head_of(k, bh, H, skb, skh)
    v = head_of(v, bh, H, svb, svh)
    grad_k = head_of(grad_k, bh, H, sgb, sgh)
    grad_v = head_of(grad_v, bh, H, swb, swh)
    d = tl.arange(0, BLOCK_D)
    z = tl.load(norms + head + d, mask=d < D, other=0.0)
    to_z = tl.load(grad_norms + head + d, mask=d < D, other=0.0)
    held = load_memory(grad_memory, 0, D, BLOCK_D, BLOCK_V)
    for start in range(part * each, tl.minimum(part * each + each, N), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        keys = load_tile(k, n, skn, N, D, BLOCK_D)
        f = key_features(keys, n < N, z, bits, FEATURE)
        rounded = f.to(keys.dtype)
        to_f = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for b in range(BLOCKS):
            if BLOCKS > 1:
                held = load_memory(grad_memory, b, D, BLOCK_D, BLOCK_V)
            x = load_columns(v, n, svn, N, b, D, BLOCK_V)
            to_f = add_product(to_f, x, tl.trans(held))
            to_v = product(rounded, held) * reduce
            store_columns(grad_v, n, swn, N, to_v, b, D, BLOCK_V)
        if FEATURE == "softmax":
            to_k = f * (to_f * reduce - to_z[None, :])
        else:
            to_k = (to_f * reduce + to_z[None, :]) * slope(keys.to(tl.float32), FEATURE)
        store_tile(grad_k, n, sgn, N, to_k, D, BLOCK_D)
