"""MiTA's gradients on short sequences where `mita_head_backward` does not fit: all scores of a
head, and a mask for keys that do not count.

Up to some hundred tokens, gathering each expert's keys costs more than scoring all of them. Three
launches: bits (the lists of keys as bits of one number a key), keys, queries.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mitaswap.kernels.mita_call import Saved, Sizes
from mitaswap.kernels.mita_parts import (
    LOG2E,
    head_offset,
    load_rows,
    product,
    product_onto,
    split,
    store_rows,
)
from mitaswap.kernels.tiles import ceil, power

#: of each side of the product that masks keys: its square is far below all scores
FAR: tl.constexpr = tl.constexpr(60000.0)
#: the smallest factor of scores with which such a mask surely holds
LEAST_SCALE = 1e-4


def fits(q: Tensor, sizes: Sizes, scale: float, again: float) -> bool:
    """Whether these kernels take such a call; what they do not take is for `mita_backward`.

    Experts are bits of one number. Another head dim (40) read illegal addresses on a device in an
    earlier form of these kernels, so only 64 is taken.
    """
    half = q.dtype in (torch.float16, torch.bfloat16)
    few = q.shape[2] <= 256 and sizes.m <= 32 and q.shape[3] == 64
    clear = scale >= LEAST_SCALE and again >= LEAST_SCALE
    return half and few and sizes.s == 1 and sizes.top > 0 and clear


@triton.jit
def bits_kernel(members, bits, M, K, N, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """The experts that hold each key as bits of one number: bits int32 [BH, N], zero before, from
    members int32 [BH, M, K]. Grid (BH).
    """
    head = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_M)[:, None]
    for start in range(0, K, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)[None, :]
        ok = (e < M) & (c < K)
        key = tl.load(members + (head * M + e) * K + c, mask=ok, other=0)
        mine = tl.broadcast_to(1 << e, [BLOCK_M, BLOCK_K])
        tl.atomic_or(bits + head * N + key, mine, mask=ok, sem="relaxed")


@triton.jit
def quotient(x, by):
    """x // by for x >= 0 with x by <= 2^22 and x / by <= 2^8, in two instructions, not twenty."""
    return (x * (((1 << 22) + by - 1) // by)) >> 22


@triton.jit
def windows(n, first, height, width, A, B):
    """The windows of the A x B that token n lies in, as bits of an int32 [N]: those of
    `pool_kernel`, of which a row or column of the grid lies in two at most.
    """
    c = tl.arange(0, 4)[None, :]
    at = n - first
    patch = (at >= 0) & (at < height * width)
    at = tl.where(patch, at, 0)
    row = quotient(at, width)
    column = (at - row * width)[:, None]
    row = row[:, None]
    i = quotient(row * A, height) + c // 2
    j = quotient(column * B, width) + c % 2
    inside = (i < A) & (row >= quotient(i * height, A)) & patch[:, None]
    inside = inside & (j < B) & (column >= quotient(j * width, B))
    # in a sum also lest Triton works this out anew in layouts where each thread has many elements
    return tl.sum(tl.where(inside, 1 << tl.minimum(i * B + j, 31), 0), 1)


@triton.jit
def tokens_of(e, height, width, A, B):
    """Number of tokens in window e, at least 1."""
    i = quotient(e, B)
    j = e - i * B
    rows = quotient((i + 1) * height + A - 1, A) - quotient(i * height, A)
    columns = quotient((j + 1) * width + B - 1, B) - quotient(j * width, B)
    return tl.maximum(rows * columns, 1)


@triton.jit
def bit(numbers, e):
    """Whether bit e of the numbers is set: [N, 1] and [1, E] give [N, E]."""
    return ((numbers >> e) & 1) != 0


@triton.jit
def choices(expert, e, dtype: tl.constexpr):
    """[T, E]: FAR at each query's expert. Times `absences` it is a mask to start the scores from,
    so that no instruction per score is spent on it.
    """
    return tl.where(expert[:, None] == e[None, :], FAR, 0.0).to(dtype)


@triton.jit
def absences(held, e, dtype: tl.constexpr):
    """[E, C]: -FAR where expert e is not among the bits held by a key."""
    return tl.where(bit(held[None, :], e[:, None]), 0.0, -FAR).to(dtype)


@triton.jit
def load_columns(base, columns, stride, ok, D: tl.constexpr):
    """`load_rows`, transposed: [D, R]."""
    at = base + columns.to(tl.int64)[None, :] * stride + tl.arange(0, D)[:, None]
    return tl.load(at, mask=ok[None, :], other=0.0)


@triton.jit
def load_landmarks(exact, e, M, dtype: tl.constexpr, D: tl.constexpr):
    """Landmarks of one head from float32 [M, D], transposed, as terms [D, M] (`split`)."""
    return split(load_columns(exact, e, D, e < M, D), dtype)


@triton.jit
def scores_of(x, hi, mid, lo):
    """Rows of x [N, D] times the landmarks [D, M]: float32 [N, M]."""
    if x.dtype == tl.float16:
        out = product_onto(x, hi, product(x, mid) * (1.0 / 2048.0))
    else:
        out = product_onto(x, hi, product_onto(x, mid, product(x, lo)))
    return out


@triton.jit
def short_keys_kernel(
    q, k, v, out, grad, exact, values, lse, probe_lse, bits, route, rows, experts, dmarks, dk, dv,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son, sgb, sgh, sgn,
    sbb, sbh, sbn, scb, sch, scn, H, N, M, scale, again,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, T: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """Gradients of one head's keys and values (dk, dv) and of its landmarks (dmarks float32
    [BH, M, D]).

    Grid (BH). exact float32 [BH, M, D]: landmarks; route int32 [BH, N]: each query's expert. For
    the next kernel too, so that it reads them without a mask: rows float32 [BH, 2, BLOCK_N]:
    log-sum-exp (infinite beyond N) and delta = grad . out of each query; experts int32
    [BH, BLOCK_N].
    """
    bh = tl.program_id(0)
    head = bh.to(tl.int64)
    e = tl.arange(0, BLOCK_M)
    dtype: tl.constexpr = q.dtype.element_ty
    qb = q + head_offset(bh, H, sqb, sqh)
    kb = k + head_offset(bh, H, skb, skh)
    vb = v + head_offset(bh, H, svb, svh)
    gb = grad + head_offset(bh, H, sgb, sgh)
    ob = out + head_offset(bh, H, sob, soh)
    rows += head * 2 * BLOCK_N
    experts += head * BLOCK_N
    dread = tl.zeros([D, BLOCK_M], tl.float32)
    dmark = tl.zeros([D, BLOCK_M], tl.float32)
    if SHARED:
        hi, mid, lo = load_landmarks(exact + head * M * D, e, M, dtype, D)
        value = load_columns(values + head * M * D, e, D, e < M, D)
    for start in range(0, N, T):
        n = start + tl.arange(0, T)
        g = load_rows(gb, n, sgn, n < N, D, D)
        o = load_rows(ob, n, son, n < N, D, D)
        dot = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
        total = tl.load(lse + head * N + n, mask=n < N, other=float("inf"))
        tl.store(rows + n, total)
        tl.store(rows + BLOCK_N + n, dot)
        tl.store(experts + n, tl.load(route + head * N + n, mask=n < N, other=0))
        if SHARED:
            queries = load_rows(qb, n, sqn, n < N, D, D)
            marked = tl.exp2(scores_of(queries, hi, mid, lo) * (again * LOG2E) - total[:, None])
            marked = tl.where((e < M)[None, :], marked, 0.0)
            dread = product_onto(tl.trans(g), marked.to(dtype), dread)
            ds = marked * (product(g, value) - dot[:, None]) * again
            dmark = product_onto(tl.trans(queries), ds.to(dtype), dmark)
    tl.debug_barrier()  # they are read back by other threads
    if SHARED:
        dprobe = tl.sum(dread * value.to(tl.float32), 0)
        read = dread.to(dtype)
        probe = tl.load(probe_lse + head * M + e, mask=e < M, other=float("inf")) * LOG2E
    for begin in range(0, N, T):
        c = begin + tl.arange(0, T)
        keys = load_rows(kb, c, skn, c < N, D, D)
        vals = load_rows(vb, c, svn, c < N, D, D)
        held = tl.load(bits + head * N + c, mask=c < N, other=0)
        gone = tl.trans(absences(held, e, dtype))
        dkey = tl.zeros([T, D], tl.float32)
        dvalue = tl.zeros([T, D], tl.float32)
        for start in range(0, N, T):
            n = start + tl.arange(0, T)
            queries = load_rows(qb, n, sqn, n < N, D, D)
            g = load_rows(gb, n, sgn, n < N, D, D)
            total = tl.load(rows + n)
            dot = tl.load(rows + BLOCK_N + n)
            expert = tl.load(experts + n)
            scores = product(gone, tl.trans(choices(expert, e, dtype)))
            scores = product_onto(keys, tl.trans(queries), scores)
            weights = tl.exp2(scores * (scale * LOG2E) - total[None, :])
            dvalue = product_onto(weights.to(dtype), g, dvalue)
            ds = weights * (product(vals, tl.trans(g)) - dot[None, :]) * scale
            dkey = product_onto(ds.to(dtype), queries, dkey)
        if SHARED:
            shares = tl.exp2(scores_of(keys, hi, mid, lo) * (scale * LOG2E) - probe[None, :])
            shares = tl.where((c < N)[:, None], shares, 0.0)
            dvalue = product_onto(shares.to(dtype), tl.trans(read), dvalue)
            ds = (shares * (product(vals, read) - dprobe[None, :]) * scale).to(dtype)
            dkey = product_onto(ds, tl.trans(hi), dkey)
            dmark = product_onto(tl.trans(keys), ds, dmark)
        store_rows(dk + head_offset(bh, H, sbb, sbh), c, sbn, c < N, dkey, D, D)
        store_rows(dv + head_offset(bh, H, scb, sch), c, scn, c < N, dvalue, D, D)
    if SHARED:
        at = dmarks + head * M * D + e[None, :] * D + tl.arange(0, D)[:, None]
        tl.store(at, dmark, mask=(e < M)[None, :])


@triton.jit
def short_queries_kernel(
    q, k, v, grad, exact, values, bits, rows, experts, dmarks, dq,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sgb, sgh, sgn, sab, sah, san,
    H, N, M, tiles, first, height, width, A, B, scale, again,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, T: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """Gradients of T queries of one head, through their scores and through the landmarks.

    Grid (BH * tiles); rows, experts and dmarks as `short_keys_kernel` wrote them.
    """
    pid = tl.program_id(0)
    bh = pid // tiles
    head = bh.to(tl.int64)
    n = pid % tiles * T + tl.arange(0, T)
    e = tl.arange(0, BLOCK_M)
    ok = n < N
    dtype: tl.constexpr = q.dtype.element_ty
    queries = load_rows(q + head_offset(bh, H, sqb, sqh), n, sqn, ok, D, D)
    g = load_rows(grad + head_offset(bh, H, sgb, sgh), n, sgn, ok, D, D)
    total = tl.load(rows + head * 2 * BLOCK_N + n)
    dot = tl.load(rows + (head * 2 + 1) * BLOCK_N + n)
    mine = choices(tl.load(experts + head * BLOCK_N + n), e, dtype)
    acc = tl.zeros([T, D], tl.float32)
    if SHARED:
        hi, mid, lo = load_landmarks(exact + head * M * D, e, M, dtype, D)
        value = load_columns(values + head * M * D, e, D, e < M, D)
        marked = tl.exp2(scores_of(queries, hi, mid, lo) * (again * LOG2E) - total[:, None])
        marked = tl.where((e < M)[None, :], marked, 0.0)
        dmarked = marked * (product(g, value) - dot[:, None]) * again
        acc = product_onto(dmarked.to(dtype), tl.trans(hi), acc)
        inside = bit(windows(n, first, height, width, A, B)[:, None], e[None, :])
        share = load_rows(dmarks + head * M * D, e, D, e < M, D, D)
        share = share / tokens_of(e, height, width, A, B)[:, None]
        acc = product_onto(tl.where(inside, 1.0, 0.0).to(dtype), share.to(dtype), acc)
    kb = k + head_offset(bh, H, skb, skh)
    vb = v + head_offset(bh, H, svb, svh)
    for start in range(0, N, T):
        c = start + tl.arange(0, T)
        keys = load_rows(kb, c, skn, c < N, D, D)
        vals = load_rows(vb, c, svn, c < N, D, D)
        held = tl.load(bits + head * N + c, mask=c < N, other=0)
        scores = product_onto(queries, tl.trans(keys), product(mine, absences(held, e, dtype)))
        weights = tl.exp2(scores * (scale * LOG2E) - total[:, None])
        ds = weights * (product(g, tl.trans(vals)) - dot[:, None]) * scale
        acc = product_onto(ds.to(dtype), keys, acc)
    store_rows(dq + head_offset(bh, H, sab, sah), n, san, ok, acc, D, D)


def short_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    *, saved: Saved, sizes: Sizes, scale: float, again: float,
) -> None:  # fmt: skip
    """Write the gradients of q, k and v, where `fits` says so."""
    batch, heads, tokens, dim = q.shape
    bh, m, shared = batch * heads, sizes.m, bool(sizes.shared)
    block_m, block_n, tile = 32, power(tokens, 64), 64
    bits = q.new_zeros(bh, tokens, dtype=torch.int32)
    rows = q.new_empty(bh, 2, block_n, dtype=torch.float32)
    experts = q.new_empty(bh, block_n, dtype=torch.int32)
    dmarks = q.new_empty(bh, m if shared else 0, dim, dtype=torch.float32)
    sq, sk, sv, so, sg, sdq, sdk, sdv = (x.stride()[:3] for x in (q, k, v, out, grad, dq, dk, dv))
    bits_kernel[(bh,)](saved.members, bits, m, sizes.top, tokens, BLOCK_M=block_m, BLOCK_K=32)
    short_keys_kernel[(bh,)](
        q, k, v, out, grad, saved.exact, saved.values, saved.lse, saved.probe_lse, bits,
        saved.route, rows, experts, dmarks, dk, dv, *sq, *sk, *sv, *so, *sg, *sdk, *sdv,
        heads, tokens, m, scale, again,
        D=dim, BLOCK_M=block_m, BLOCK_N=block_n, T=tile, SHARED=shared, num_warps=4, num_stages=2,
    )  # fmt: skip
    tiles = ceil(tokens, tile)
    short_queries_kernel[(bh * tiles,)](
        q, k, v, grad, saved.exact, saved.values, bits, rows, experts, dmarks, dq,
        *sq, *sk, *sv, *sg, *sdq, heads, tokens, m, tiles,
        sizes.first, sizes.height, sizes.width, sizes.a, sizes.b, scale, again,
        D=dim, BLOCK_M=block_m, BLOCK_N=block_n, T=tile, SHARED=shared, num_warps=4, num_stages=2,
    )  # fmt: skip
