"""A depth-wise convolution of the values, added to the output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mitaswap.mechanisms._card import Cost, SiteShape
from mitaswap.mechanisms._wrapper import WRAPPERS, Wrapper
from mitaswap.operators.counting import depthwise_flops
from mitaswap.operators.depthwise import convolved
from mitaswap.operators.precision import outside_autocast, working
from mitaswap.operators.ranges import odd
from mitaswap.tokens import TokenLayout


@dataclass(frozen=True)
class DwcOptions:
    """Options of the depth-wise convolution.

    Args:
        kernel: side of the kernel, odd: 3 as in MiTA, Agent and InLine attention; FLatten,
            PolaFormer and BiFormer take 5.
        share: one kernel for each channel of a head, which all heads share, as in the released code
            of FLatten and PolaFormer; false: one for each channel of every head, the paper's.
    """

    kernel: int = 3
    share: bool = False


@WRAPPERS.register("dwc")
class Dwc(Wrapper):
    """O + DWC(V): each channel of V is convolved over the patch grid (Han et al. 2023,
    arXiv 2308.00442, Eq. 11).

    Special tokens have no neighbours and get nothing.

    Parameters:
        weight [H * Dv, 1, kernel, kernel], bias [H * Dv]: channels head by head; they start at
            zero, so that a fresh module changes nothing. With `share` [Dv, 1, kernel, kernel] and
            [Dv].
    """

    options_type = DwcOptions
    options: DwcOptions
    summary = "adds a depth-wise convolution of V over the patch grid; starts at zero"
    samples = ({}, {"kernel": 5}, {"share": True})

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner.needs | {"grid"}

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        super().check(layout, head_dim)
        side = max(self._built(layout).grid)
        why = " and at least 1, or the convolution is not centred"
        odd(self, "kernel", self.options.kernel, side, why)

    def build(self, site: SiteShape) -> None:
        channels, kernel = self._kernels(site), self.options.kernel
        self.weight = nn.Parameter(torch.zeros(channels, 1, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(channels))

    def _kernels(self, site: SiteShape) -> int:
        return site.value_dim * (1 if self.options.share else site.heads)

    @outside_autocast
    def around(
        self,
        out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layout: TokenLayout,
        scale: float,
        **extra: Any,
    ) -> Tensor:
        (values,) = working(v)
        return (out + convolved(values, self.weight, self.bias, layout)).to(out.dtype)

    def extra_cost(self, site: SiteShape) -> Cost:
        channels, kernel = site.heads * site.value_dim, self.options.kernel
        flops = depthwise_flops(site.layout.patches, channels, kernel)
        return Cost(flops, self._kernels(site) * (kernel * kernel + 1))
