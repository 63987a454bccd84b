"""The passes of agent attention, forward and backward, one kernel each."""

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
def pool_kernel(
    q, sums, sqb, sqh, sqn, H, P, first, height, width, A, B,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Averages of the query rows over one row of windows, whose tokens are neighbours, as P
    partial sums: float32 [BH, P, A * B, D]. Grid (BH * A * P, blocks of windows).
    """
    pid = tl.program_id(0)
    part = pid % P
    i = pid // P % A
    bh = pid // P // A
    top = i * height // A
    rows = ((i + 1) * height + A - 1) // A - top
    share = (rows * width + P - 1) // P
    end = tl.minimum((part + 1) * share, rows * width)
    base = head_of(q, bh, H, sqb, sqh) + (first + top * width).to(tl.int64) * sqn * 8
    j = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    left = j * width // B
    right = ((j + 1) * width + B - 1) // B
    acc = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for start in range(part * share, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        x = load_tile(base, n, sqn, end, D, BLOCK_D)
        column = (n % width)[None, :]
        inside = (column >= left[:, None]) & (column < right[:, None])
        acc = add_product(acc, inside.to(tl.float32).to(x.dtype), x)
    acc /= (rows * (right - left))[:, None].to(tl.float32)
    sums += (bh.to(tl.int64) * P + part) * A * B * D
    store_tile(sums, i * B + j, D // 8, i * B + B, acc, D, BLOCK_D)


@triton.jit
def keys_kernel(
    k, v, sums, marks, values, lse, part_v, part_top, part_sum,
    skb, skh, skn, svb, svh, svn, H, N, M, P, parts, each, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """The agents read `each` of the keys. Grid (BH * parts, blocks of agents).

    sums float32 [BH, P, M, D] as of `pool_kernel`; their total goes to marks [BH, M, D]. What was
    read goes to values [BH, M, D] and lse float32 [BH, M] (base 2), or, with SPLIT, to part_v
    float32 [BH, parts, M, D], part_top and part_sum [BH, parts, M].
    """
    pid = tl.program_id(0)
    part = pid % parts
    bh = pid // parts
    head = bh.to(tl.int64)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    sums += head * P * M * D
    agents = load_tile(sums, m, D // 8, M, D, BLOCK_D)
    for p in range(1, P):
        agents += load_tile(sums + p * M * D, m, D // 8, M, D, BLOCK_D)
    agents = agents.to(marks.dtype.element_ty)
    if part == 0:
        store_tile(marks + head * M * D, m, D // 8, M, agents, D, BLOCK_D)

    k = head_of(k, bh, H, skb, skh)
    v = head_of(v, bh, H, svb, svh)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(part * each, tl.minimum(part * each + each, N), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        keys = load_tile(k, n, skn, N, D, BLOCK_D)
        x = load_tile(v, n, svn, N, D, BLOCK_D)
        s = product(agents, tl.trans(keys)) * (scale * LOG2E)
        s = tl.where((n < N)[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        weights = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        acc = add_product(acc * shrink[:, None], weights.to(x.dtype), x)
        top = higher
    if SPLIT:
        at = (head * parts + part) * M
        tl.store(part_top + at + m, top, mask=m < M)
        tl.store(part_sum + at + m, total, mask=m < M)
        store_tile(part_v + at * D, m, D // 8, M, acc, D, BLOCK_D)
    else:
        tl.store(lse + head * M + m, top + tl.log2(total), mask=m < M)
        store_tile(values + head * M * D, m, D // 8, M, acc / total[:, None], D, BLOCK_D)


@triton.jit
def gather_kernel(
    part_v, part_top, part_sum, values, lse, M, parts,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One softmax out of those of the parts, which `keys_kernel` left. Grid (BH, blocks of
    agents).
    """
    head = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(0, parts, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        at = head * parts * M + p[:, None] * M + m[None, :]
        ok = (p < parts)[:, None] & (m < M)[None, :]
        x = tl.where((m < M)[None, :], tl.load(part_top + at, mask=ok, other=float("-inf")), 0.0)
        higher = tl.maximum(top, tl.max(x, 0))
        weight = tl.exp2(x - higher[None, :])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weight * tl.load(part_sum + at, mask=ok, other=0.0), 0)
        rows = part_rows(part_v + head * parts * M * D, p, parts, m, M, D, BLOCK_D)
        acc = acc * shrink[:, None] + tl.sum(rows * weight[:, :, None], 0)
        top = higher
    tl.store(lse + head * M + m, top + tl.log2(total), mask=m < M)
    store_tile(values + head * M * D, m, D // 8, M, acc / total[:, None], D, BLOCK_D)


@triton.jit
def logits(x, agents, m, M, scale):
    """Logits (base 2) of the queries x [T, D] with the agents m ...; -inf beyond M."""
    s = product(x, tl.trans(agents)) * (scale * LOG2E)
    return tl.where((m < M)[None, :], s, float("-inf"))


@triton.jit
def read_kernel(
    q, marks, values, out, sqb, sqh, sqn, sob, soh, son, H, N, M, parts, each, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The queries read the agents. Grid (BH * parts); marks, values [BH, M, D]."""
    pid = tl.program_id(0)
    part = pid % parts
    bh = pid // parts
    marks += bh.to(tl.int64) * M * D
    values += bh.to(tl.int64) * M * D
    q = head_of(q, bh, H, sqb, sqh)
    out = head_of(out, bh, H, sob, soh)
    m = tl.arange(0, BLOCK_M)
    agents = load_tile(marks, m, D // 8, M, D, BLOCK_D)
    answers = load_tile(values, m, D // 8, M, D, BLOCK_D)
    for start in range(part * each, tl.minimum(part * each + each, N), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        x = load_tile(q, n, sqn, N, D, BLOCK_D)
        if BLOCKS == 1:
            s = logits(x, agents, m, M, scale)
            weights = tl.exp2(s - tl.max(s, 1)[:, None])
            total = tl.sum(weights, 1)
            acc = product(weights.to(x.dtype), answers)
        else:
            top = tl.full([BLOCK_N], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_N], tl.float32)
            acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            for b in range(BLOCKS):
                r = b * BLOCK_M + m
                s = logits(x, load_tile(marks, r, D // 8, M, D, BLOCK_D), r, M, scale)
                higher = tl.maximum(top, tl.max(s, 1))
                weights = tl.exp2(s - higher[:, None])
                shrink = tl.exp2(top - higher)
                total = total * shrink + tl.sum(weights, 1)
                y = load_tile(values, r, D // 8, M, D, BLOCK_D)
                acc = add_product(acc * shrink[:, None], weights.to(x.dtype), y)
                top = higher
        store_tile(out, n, son, N, acc / total[:, None], D, BLOCK_D)


@triton.jit
def statistics(
    x, g, marks, values, M, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of queries x and gradients g [T, D]: log-sum-exp (base 2) of the logits, and the mean under
    the softmax of its own gradient, [T] each.
    """
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    mean = tl.zeros([BLOCK_N], tl.float32)
    for b in range(BLOCKS):
        m = b * BLOCK_M + tl.arange(0, BLOCK_M)
        s = logits(x, load_tile(marks, m, D // 8, M, D, BLOCK_D), m, M, scale)
        dp = product(g, tl.trans(load_tile(values, m, D // 8, M, D, BLOCK_D)))
        higher = tl.maximum(top, tl.max(s, 1))
        weights = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        mean = mean * shrink + tl.sum(weights * dp, 1)
        top = higher
    return top + tl.log2(total), mean / total


@triton.jit
def softmax_gradient(s, dp, lse, mean, ONE_BLOCK: tl.constexpr):
    """Weights and gradients of the logits s; `lse` and `mean` are read unless these are all."""
    if ONE_BLOCK:
        p = tl.exp2(s - tl.max(s, 1)[:, None])
        p /= tl.sum(p, 1)[:, None]
        mean = tl.sum(p * dp, 1)
    else:
        p = tl.exp2(s - lse[:, None])
    return p, p * (dp - mean[:, None])


@triton.jit
def queries_backward_kernel(
    q, grad, marks, values, part_v, part_m,
    sqb, sqh, sqn, sgb, sgh, sgn, H, N, M, parts, each, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of the values that queries read and of the agents as keys, summed over `each` of
    the queries: float32 [BH, parts, M, D] both. Grid (BH * parts, BLOCKS).
    """
    pid = tl.program_id(0)
    part = pid % parts
    bh = pid // parts
    marks += bh.to(tl.int64) * M * D
    values += bh.to(tl.int64) * M * D
    q = head_of(q, bh, H, sqb, sqh)
    grad = head_of(grad, bh, H, sgb, sgh)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    agents = load_tile(marks, m, D // 8, M, D, BLOCK_D)
    answers = load_tile(values, m, D // 8, M, D, BLOCK_D)
    to_values = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    to_agents = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    lse = tl.zeros([BLOCK_N], tl.float32)
    mean = lse
    for start in range(part * each, tl.minimum(part * each + each, N), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        x = load_tile(q, n, sqn, N, D, BLOCK_D)
        g = load_tile(grad, n, sgn, N, D, BLOCK_D)
        if BLOCKS > 1:
            lse, mean = statistics(
                x, g, marks, values, M, scale, D, BLOCK_D, BLOCK_M, BLOCKS, BLOCK_N
            )
        s = logits(x, agents, m, M, scale)
        dp = product(g, tl.trans(answers))
        p, ds = softmax_gradient(s, dp, lse, mean, BLOCKS == 1)
        to_values = add_product(to_values, tl.trans(p.to(x.dtype)), g)
        to_agents = add_product(to_agents, tl.trans(ds.to(x.dtype)), x)
    at = (bh.to(tl.int64) * parts + part) * M * D
    store_tile(part_v + at, m, D // 8, M, to_values, D, BLOCK_D)
    store_tile(part_m + at, m, D // 8, M, to_agents * scale, D, BLOCK_D)


@triton.jit
def settle_values_kernel(
    part_v, values, grad_values, delta, M, parts, shrink,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Total gradient of the values times `shrink`, in their dtype [BH, M, D], and its product with
    them, float32 [BH, M]. Grid (BH, blocks of agents).
    """
    head = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    part_v += head * parts * M * D
    total = total_of(part_v, parts, m, M, D, BLOCK_D, BLOCK_P, BLOCK_R) * shrink
    x = load_tile(values + head * M * D, m, D // 8, M, D, BLOCK_D).to(tl.float32)
    store_tile(grad_values + head * M * D, m, D // 8, M, total, D, BLOCK_D)
    tl.store(delta + head * M + m, tl.sum(total * x, 1), mask=m < M)


@triton.jit
def key_gradient(k, v, agents, asked, total, mean, ok, scale):
    """Weights of the keys k [T, D] for the agents and gradients of their logits, [T, M] each."""
    s = product(k, tl.trans(agents)) * (scale * LOG2E)
    # rows beyond N have no part in `total`: their weight could be infinite
    p = tl.exp2(tl.where(ok[:, None], s - total[None, :], float("-inf")))
    ds = p * (product(v, tl.trans(asked)) - mean[None, :])
    return p.to(k.dtype), ds.to(k.dtype)


@triton.jit
def keys_backward_kernel(
    k, v, marks, grad_values, lse, delta, grad_k, grad_v, part_m,
    skb, skh, skn, svb, svh, svn, sgb, sgh, sgn, swb, swh, swn,
    H, N, M, parts, each, scale, bits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of `each` of the keys and values, and theirs to the agents, float32
    [BH, parts, M, D]. Grid (BH * parts, BLOCKS): the program of one block of agents collects for
    that block, and the first one writes the keys' and values' for all blocks.

    A weight is about 1 / N, out of float16's range, and grad_values a sum over N: weights are taken
    2^bits times larger, and grad_values and delta come as much smaller.
    """
    pid = tl.program_id(0)
    part = pid % parts
    bh = pid // parts
    head = bh.to(tl.int64)
    marks += head * M * D
    grad_values += head * M * D
    lse += head * M
    delta += head * M
    k = head_of(k, bh, H, skb, skh)
    v = head_of(v, bh, H, svb, svh)
    grad_k = head_of(grad_k, bh, H, sgb, sgh)
    grad_v = head_of(grad_v, bh, H, swb, swh)
    block = tl.program_id(1)
    own = block * BLOCK_M + tl.arange(0, BLOCK_M)
    agents = load_tile(marks, own, D // 8, M, D, BLOCK_D)
    asked = load_tile(grad_values, own, D // 8, M, D, BLOCK_D)
    # a weight of 0 for agents beyond M
    total = tl.load(lse + own, mask=own < M, other=float("inf")) - bits
    mean = tl.load(delta + own, mask=own < M, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(part * each, tl.minimum(part * each + each, N), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        keys = load_tile(k, n, skn, N, D, BLOCK_D)
        x = load_tile(v, n, svn, N, D, BLOCK_D)
        p, ds = key_gradient(keys, x, agents, asked, total, mean, n < N, scale)
        acc = add_product(acc, tl.trans(ds), keys)
        if BLOCKS == 1:
            store_tile(grad_k, n, sgn, N, product(ds, agents) * scale, D, BLOCK_D)
            store_tile(grad_v, n, swn, N, product(p, asked), D, BLOCK_D)
        elif block == 0:
            to_k = product(ds, agents)
            to_v = product(p, asked)
            for b in range(1, BLOCKS):
                m = b * BLOCK_M + tl.arange(0, BLOCK_M)
                a = load_tile(marks, m, D // 8, M, D, BLOCK_D)
                y = load_tile(grad_values, m, D // 8, M, D, BLOCK_D)
                t = tl.load(lse + m, mask=m < M, other=float("inf")) - bits
                c = tl.load(delta + m, mask=m < M, other=0.0)
                p, ds = key_gradient(keys, x, a, y, t, c, n < N, scale)
                to_k = add_product(to_k, ds, a)
                to_v = add_product(to_v, p, y)
            store_tile(grad_k, n, sgn, N, to_k * scale, D, BLOCK_D)
            store_tile(grad_v, n, swn, N, to_v, D, BLOCK_D)
    store_tile(part_m + (head * parts + part) * M * D, own, D // 8, M, acc * scale, D, BLOCK_D)


@triton.jit
def settle_agents_kernel(
    part_q, part_k, grad_marks, M, parts_q, parts_k, height, width, A, B,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Total gradient of the agents over the size of their windows, [BH, M, D]. Grid (BH, blocks of
    agents).
    """
    head = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    part_q += head * parts_q * M * D
    part_k += head * parts_k * M * D
    total = total_of(part_q, parts_q, m, M, D, BLOCK_D, BLOCK_P, BLOCK_R)
    total += total_of(part_k, parts_k, m, M, D, BLOCK_D, BLOCK_P, BLOCK_R)
    i = m // B
    j = m % B
    rows = ((i + 1) * height + A - 1) // A - i * height // A
    columns = ((j + 1) * width + B - 1) // B - j * width // B
    total /= (rows * columns).to(tl.float32)[:, None]
    store_tile(grad_marks + head * M * D, m, D // 8, M, total, D, BLOCK_D)


@triton.jit
def queries_gradient_kernel(
    q, grad, marks, values, grad_marks, grad_q,
    sqb, sqh, sqn, sgb, sgh, sgn, sob, soh, son, H, N, M, parts, each, scale,
    first, height, width, A, B,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries: as readers, and as members of the windows. Grid (BH * parts)."""
    pid = tl.program_id(0)
    part = pid % parts
    bh = pid // parts
    head = bh.to(tl.int64)
    marks += head * M * D
    values += head * M * D
    grad_marks += head * M * D
    q = head_of(q, bh, H, sqb, sqh)
    grad = head_of(grad, bh, H, sgb, sgh)
    grad_q = head_of(grad_q, bh, H, sob, soh)
    m = tl.arange(0, BLOCK_M)
    agents = load_tile(marks, m, D // 8, M, D, BLOCK_D)
    answers = load_tile(values, m, D // 8, M, D, BLOCK_D)
    pooled = load_tile(grad_marks, m, D // 8, M, D, BLOCK_D)
    lse = tl.zeros([BLOCK_N], tl.float32)
    mean = lse
    for start in range(part * each, tl.minimum(part * each + each, N), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        x = load_tile(q, n, sqn, N, D, BLOCK_D)
        g = load_tile(grad, n, sgn, N, D, BLOCK_D)
        if BLOCKS > 1:
            lse, mean = statistics(
                x, g, marks, values, M, scale, D, BLOCK_D, BLOCK_M, BLOCKS, BLOCK_N
            )
        # row and column in the grid; special tokens are in no window
        row = tl.where((n >= first) & (n < first + height * width), (n - first) // width, -1)
        column = (n - first) % width
        acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for b in range(BLOCKS):
            w = b * BLOCK_M + m
            if BLOCKS > 1:
                agents = load_tile(marks, w, D // 8, M, D, BLOCK_D)
                answers = load_tile(values, w, D // 8, M, D, BLOCK_D)
                pooled = load_tile(grad_marks, w, D // 8, M, D, BLOCK_D)
            s = logits(x, agents, w, M, scale)
            dp = product(g, tl.trans(answers))
            _, ds = softmax_gradient(s, dp, lse, mean, BLOCKS == 1)
            acc = add_product(acc, (ds * scale).to(x.dtype), agents)
            i = w // B
            j = w % B
            inside = (row[:, None] >= (i * height // A)[None, :]) & (w < M)[None, :]
            inside &= row[:, None] < (((i + 1) * height + A - 1) // A)[None, :]
            inside &= column[:, None] >= (j * width // B)[None, :]
            inside &= column[:, None] < (((j + 1) * width + B - 1) // B)[None, :]
            acc = add_product(acc, inside.to(tl.float32).to(x.dtype), pooled)
        store_tile(grad_q, n, son, N, acc, D, BLOCK_D)
