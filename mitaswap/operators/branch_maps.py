"""Keys or values of several branches, each a learned map of the same ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BranchMaps(nn.Module):
    """A linear map for each branch, of the channels of all heads together, that starts as identity.

    Parameters:
        weight: [branches, width, width], rows in, columns out; the width is that of all heads.
    """

    def __init__(self, branches: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width).repeat(branches, 1, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Each branch's own, [B, H, N, D], of x [B, H, N, D]."""
        heads = x.shape[1]
        rows = x.transpose(1, 2).flatten(2)  # [B, N, H D]
        mapped = ((rows @ weight) for weight in self.weight.to(x.dtype))
        return [y.unflatten(2, (heads, -1)).transpose(1, 2).contiguous() for y in mapped]
