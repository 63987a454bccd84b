"""Pieces that MiTA's kernels share: rows by index, landmarks, products exact enough to rank."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import os

import triton
import triton.language as tl

#: Triton's interpreter multiplies the bits of bfloat16 operands, so they are widened for it
WIDEN: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def head_offset(bh, H, sb, sh):
    """Offset of head `bh` of B * H in a [B, H, N, D] view, int64."""
    return (bh // H).to(tl.int64) * sb + (bh % H).to(tl.int64) * sh


@triton.jit
def load_rows(base, rows, stride, ok, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [R, BLOCK_D] of a view whose last axis is dense; zero where not `ok` or beyond D."""
    d = tl.arange(0, BLOCK_D)
    at = base + rows.to(tl.int64)[:, None] * stride + d[None, :]
    if D == BLOCK_D:
        return tl.load(at, mask=ok[:, None], other=0.0)
    else:
        return tl.load(at, mask=ok[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store_rows(base, rows, stride, ok, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write x [R, BLOCK_D] to the rows of a view; the counterpart of `load_rows`."""
    d = tl.arange(0, BLOCK_D)
    at = base + rows.to(tl.int64)[:, None] * stride + d[None, :]
    x = x.to(base.dtype.element_ty)
    if D == BLOCK_D:
        tl.store(at, x, mask=ok[:, None])
    else:
        tl.store(at, x, mask=ok[:, None] & (d < D)[None, :])


@triton.jit
def load_near(base, rows, stride, ok, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """`load_rows` of a view that spans fewer than 2^31 elements: 32-bit offsets, a third of the
    instructions.
    """
    d = tl.arange(0, BLOCK_D)
    at = base + (rows[:, None] * stride + d[None, :])
    if D == BLOCK_D:
        return tl.load(at, mask=ok[:, None], other=0.0)
    else:
        return tl.load(at, mask=ok[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store_near(base, rows, stride, ok, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """`store_rows`, as `load_near`."""
    d = tl.arange(0, BLOCK_D)
    at = base + (rows[:, None] * stride + d[None, :])
    x = x.to(base.dtype.element_ty)
    if D == BLOCK_D:
        tl.store(at, x, mask=ok[:, None])
    else:
        tl.store(at, x, mask=ok[:, None] & (d < D)[None, :])


@triton.jit
def split(x, dtype: tl.constexpr):
    """x (float32) as up to three terms of `dtype` whose products with `dtype` operands can be
    summed in float32 to about float32 precision: a landmark rounded to half precision would pick
    other keys than the reference does.

    float16 keeps 11 bits a term, so two do; the second is scaled by 2^11 out of the subnormals.
    bfloat16 keeps 8 bits, so three do. float32 is its own first term.
    """
    hi = x.to(dtype)
    rest = x - hi.to(tl.float32)
    if dtype == tl.float16:
        mid = (rest * 2048.0).to(dtype)
        lo = mid
    else:
        mid = rest.to(dtype)
        lo = (rest - mid.to(tl.float32)).to(dtype)
    return hi, mid, lo


@triton.jit
def product(a, b):
    """a [M, K] times b [K, N] with float32 sums; exact products for float32 operands."""
    if WIDEN and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def product_onto(a, b, acc):
    """`product` added to acc [M, N]."""
    if WIDEN and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_terms(
    low, rest, apart, m0, M, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """The terms (`split`) of the landmarks m0 ... of one head: the first from low [M, D], the
    others from rest, `apart` numbers from one to the next.
    """
    row = m0 + tl.arange(0, BLOCK_M)
    hi = load_rows(low, row, D, row < M, D, BLOCK_D)
    mid = hi
    lo = hi
    if low.dtype.element_ty != tl.float32:
        mid = load_rows(rest, row, D, row < M, D, BLOCK_D)
    if low.dtype.element_ty == tl.bfloat16:
        lo = load_rows(rest + apart, row, D, row < M, D, BLOCK_D)
    return hi, mid, lo


@triton.jit
def landmark_scores(hi, mid, lo, x, base):
    """Landmarks (split) times the rows of x [N, D], plus base [1, N]: float32 [M, N].

    The base is where the sums begin, so that it costs nothing.
    """
    x = tl.trans(x)
    base = tl.broadcast_to(base, [hi.shape[0], x.shape[1]])
    if x.dtype == tl.float32:
        out = product_onto(hi, x, base)
    elif x.dtype == tl.float16:
        out = product_onto(hi, x, product(mid, x) * (1.0 / 2048.0) + base)
    else:
        out = product_onto(hi, x, product_onto(mid, x, product_onto(lo, x, base)))
    return out


@triton.jit
def routing_scores(x, hi, mid, lo, base):
    """Rows of x [N, D] times the landmarks (split), plus base [1, M]: float32 [N, M]."""
    hi = tl.trans(hi)
    mid = tl.trans(mid)
    base = tl.broadcast_to(base, [x.shape[0], hi.shape[1]])
    if x.dtype == tl.float32:
        out = product_onto(x, hi, base)
    elif x.dtype == tl.float16:
        out = product_onto(x, hi, product(x, mid) * (1.0 / 2048.0) + base)
    else:
        out = product_onto(x, hi, product_onto(x, mid, product_onto(x, tl.trans(lo), base)))
    return out


@triton.jit
def beyond(at, count):
    """What keeps entries at `at` >= count out of a maximum when it is added: 0, or -inf there."""
    return tl.where(at < count, 0.0, float("-inf"))


@triton.jit
def exponent_factor(scale):
    """What unscaled scores that have the scale's sign are multiplied by for `exp2`. Never zero, so
    that -inf stays -inf.
    """
    return tl.maximum(tl.abs(scale) * LOG2E, 1e-30)


@triton.jit
def order_key(x):
    """int32 keys in the order of the float32 x; -0.0 is 0.0, as in a comparison of floats."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_value(key):
    """The float32 that `order_key` maps to `key`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
