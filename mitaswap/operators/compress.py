"""A block of tokens as one token, by a learned map of all of them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mitaswap.operators.windows import Slots


class BlockMap(nn.Module):
    """phi(block) = the block's average + an MLP of its tokens, that starts at zero.

    A whole block is a raster of rows x columns slots, and the MLP has one weight matrix for each
    slot. Blocks at another grid may be smaller: their tokens take the first rows and columns.

    Parameters:
        position: added to the token in each slot, [slots, width], zero.
        weight_in, bias_in: [width, slots, width] normal from a seed, and [width] zero.
        weight_out, bias_out: [width, width] and [width], zero.
    """

    def __init__(self, raster: tuple[int, int], width: int) -> None:
        super().__init__()
        self.raster = raster
        slots = math.prod(raster)
        generator = torch.Generator().manual_seed(0)
        spread = torch.randn(width, slots, width, generator=generator) / math.sqrt(slots * width)
        self.position = nn.Parameter(torch.zeros(slots, width))
        self.weight_in = nn.Parameter(spread)
        self.bias_in = nn.Parameter(torch.zeros(width))
        self.weight_out = nn.Parameter(torch.zeros(width, width))
        self.bias_out = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, windows: Slots, raster: tuple[int, int]) -> Tensor:
        """One token for each of the windows of x [B, H, N, width], whose slots are `raster`: [B, H,
        M, width].
        """
        down, across = (torch.arange(n, device=x.device) for n in raster)
        slots = (down[:, None] * self.raster[1] + across).flatten()
        position = self.position[slots].to(x.dtype)
        weight = self.weight_in[:, slots].flatten(1).to(x.dtype)
        filled = (windows.split(x) + position) * windows.inside[..., None].to(x.dtype)
        hidden = F.gelu(F.linear(filled.flatten(3), weight, self.bias_in.to(x.dtype)))
        out = F.linear(hidden, self.weight_out.to(x.dtype), self.bias_out.to(x.dtype))
        return windows.means(x) + out
