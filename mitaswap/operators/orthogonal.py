"""Random matrices with orthonormal rows or columns, for starts that keep products of vectors."""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A random float32 matrix P [rows, columns] such that (P x) . (P y) approximates x . y.

    Its rows are orthonormal times sqrt(columns / rows), so that the product is right on average;
    with as many rows as columns or more its columns are orthonormal, and the product is exact.
    """
    tall, wide = max(rows, columns), min(rows, columns)
    noise = torch.randn(tall, wide, generator=generator, dtype=torch.float64, device="cpu")
    basis, triangle = torch.linalg.qr(noise)
    basis = basis * triangle.diagonal().sign()  # unique, whatever routine computed it
    if rows >= columns:
        return basis.float()
    return (basis.T * (columns / rows) ** 0.5).float().contiguous()
