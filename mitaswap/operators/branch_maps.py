"""Several branches of one attention: their keys and values, and the gates that weigh them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
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


def branch_gates(x: Tensor, weight: Tensor, bias: Tensor, branches: int) -> Tensor:
    """Sigmoid gates of each query, head and branch, one over `branches` where weight and bias are
    zero: [B, H, N, branches].

    Args:
        x: the module's input [B, N, C], in working precision.
        weight, bias: [H branches, C] and [H branches], a head's branches beside each other.
        branches: at least two.
    """
    logits = F.linear(x, weight.to(x.dtype), bias.to(x.dtype))
    gates = (logits - math.log(branches - 1)).sigmoid()
    return gates.unflatten(2, (-1, branches)).transpose(1, 2)
