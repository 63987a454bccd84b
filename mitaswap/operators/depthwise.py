"""A depth-wise convolution of the patches: one kernel for each channel."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mitaswap.tokens import TokenLayout


def convolved(v: Tensor, weight: Tensor, bias: Tensor, layout: TokenLayout) -> Tensor:
    """Each channel of v [B, H, N, D] convolved over the patch grid, zero outside; rows of special
    tokens are zero.

    Args:
        v: the values, in working precision.
        weight: [C, 1, side, side], odd. C is H D, head by head, or D: kernels that all heads share.
        bias: [C].
        layout: token layout of the N tokens.
    """
    batch, heads, _, dim = v.shape
    channels, side = weight.shape[0], weight.shape[-1]
    values = v[:, :, layout.patch_slice].transpose(-1, -2)
    # heads that share their kernels are images of their own
    image = values.reshape(batch * heads * dim // channels, channels, *layout.grid)
    weight, bias = weight.to(v.dtype), bias.to(v.dtype)
    image = F.conv2d(image, weight, bias, padding=side // 2, groups=channels)
    rows = image.view(batch, heads, dim, layout.patches).transpose(-1, -2)
    return F.pad(rows, (0, 0, layout.prefix, layout.suffix))
