"""The channels of all heads at once."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def norm_over_heads(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm of each token of x [B, H, N, D] over its H D channels, with weight and bias [H D],
    head after head.
    """
    rows = x.transpose(1, 2)  # [B, N, H, D]
    normed = F.layer_norm(rows.flatten(2), weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)
    return normed.view_as(rows).transpose(1, 2)
