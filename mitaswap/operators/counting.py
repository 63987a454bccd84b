"""Counting operations: FLOPs of matrix products (a multiply-add is two) and of attention."""

from __future__ import annotations


def product_flops(rows: int, inner: int, columns: int) -> int:
    """FLOPs of a matrix product [rows, inner] x [inner, columns]."""
    return 2 * rows * inner * columns


def attend_flops(queries: int, keys: int, dim: int, value_dim: int) -> int:
    """FLOPs of the two products of softmax attention, q k^T and weights times v."""
    return product_flops(queries, dim, keys) + product_flops(queries, keys, value_dim)


def depthwise_flops(positions: int, channels: int, kernel: int) -> int:
    """FLOPs of a depth-wise kernel x kernel convolution over `positions`."""
    return 2 * positions * channels * kernel * kernel
