"""Tiles of rows of strided views, for the kernels that read every token once: how they are laid
out, read, multiplied and written.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import os

import triton
import triton.language as tl
from torch import Tensor

#: Triton's interpreter multiplies the bits of bfloat16 operands, so they are widened for it
WIDEN: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def power(x: int, least: int = 1) -> int:
    """The smallest power of two that is at least x."""
    return max(least, 1 << (x - 1).bit_length())


def ceil(x: int, y: int) -> int:
    """x / y, rounded up."""
    return (x + y - 1) // y


def dense(x: Tensor) -> Tensor:
    """x [B, H, N, D] with a dense last axis and rows that begin at multiples of eight elements:
    itself where it is so, as views of a fused projection are.
    """
    plain = x.stride(3) == 1 and all(x.stride(i) % 8 == 0 for i in range(3) if x.shape[i] > 1)
    return x if plain else x.contiguous()


def eighths(x: Tensor) -> tuple[int, int, int]:
    """Strides of B, H and N in units of eight elements. Multiplied by eight again in the kernel,
    they tell the compiler that rows can be read 16 bytes at a time.
    """
    batch, heads, rows = (0 if x.shape[i] == 1 else x.stride(i) // 8 for i in range(3))
    return batch, heads, rows


def like(x: Tensor) -> Tensor:
    """An empty tensor of x's shape [B, H, N, D], laid out [B, N, H, D] where x is a view of a
    projection: what follows joins the heads, for free then.
    """
    if x.stride(1) < x.stride(2):
        batch, heads, tokens, dim = x.shape
        return x.new_empty(batch, tokens, heads, dim).transpose(1, 2)
    return x.new_empty(x.shape)


def split(tokens: int, others: int, block: int, programs: int) -> tuple[int, int]:
    """Parts that the tokens of each of `others` heads are cut into, and tokens in each (a multiple
    of block): about `programs` parts in all, none of them empty.
    """
    blocks = ceil(tokens, block)
    wanted = min(blocks, max(1, ceil(programs, others)))
    each = ceil(blocks, wanted)
    return ceil(blocks, each), each * block


def shares(parts: int, rows: int) -> tuple[int, int]:
    """Parts and rows that one program adds up at a time: 32 in all, as many parts as there are."""
    block = min(32, power(parts))
    return block, min(32 // block, power(rows))


@triton.jit
def head_of(x, bh, H, sb, sh):
    """Where head `bh` of B * H begins in a [B, H, N, D] view with strides in eighths."""
    return x + ((bh // H).to(tl.int64) * sb + (bh % H).to(tl.int64) * sh) * 8


@triton.jit
def load_tile(base, rows, stride, end, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [R, BLOCK_D] of a view with row stride in eighths; zero from row `end` and beyond D."""
    d = tl.arange(0, BLOCK_D)
    at = base + (rows.to(tl.int64) * stride)[:, None] * 8 + d[None, :]
    if D == BLOCK_D:
        out = tl.load(at, mask=(rows < end)[:, None], other=0.0)
    else:
        out = tl.load(at, mask=(rows < end)[:, None] & (d < D)[None, :], other=0.0)
    return out


@triton.jit
def store_tile(base, rows, stride, end, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write x [R, BLOCK_D] to the rows of a view; the counterpart of `load_tile`."""
    d = tl.arange(0, BLOCK_D)
    at = base + (rows.to(tl.int64) * stride)[:, None] * 8 + d[None, :]
    x = x.to(base.dtype.element_ty)
    if D == BLOCK_D:
        tl.store(at, x, mask=(rows < end)[:, None])
    else:
        tl.store(at, x, mask=(rows < end)[:, None] & (d < D)[None, :])


@triton.jit
def product(a, b):
    """a [M, K] times b [K, N] with float32 sums; exact products for float32 operands."""
    if WIDEN and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def add_product(acc, a, b):
    """acc [M, N] and `product`."""
    if WIDEN and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def part_rows(base, p, P, rows, M, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of parts p of one head's float32 [P, M, D] the rows: [parts, rows, BLOCK_D]."""
    d = tl.arange(0, BLOCK_D)[None, None, :]
    r = rows[None, :, None]
    at = base + (p.to(tl.int64) * M * D)[:, None, None] + r * D + d
    return tl.load(at, mask=(p < P)[:, None, None] & (r < M) & (d < D), other=0.0)


@triton.jit
def total_of(
    base, P, rows, M,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Sum over the P parts of one head's float32 [P, M, D], of these rows: [BLOCK_R, BLOCK_D]."""
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        acc += tl.sum(part_rows(base, p, P, rows, M, D, BLOCK_D), 0)
    return acc
