"""Nystrom attention: the softmax matrix from its columns and rows at m landmarks (Xiong et al.
2021).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mitaswap.errors import MitaswapError
from mitaswap.mechanisms._base import MECHANISMS, Mechanism, Options
from mitaswap.mechanisms._card import Card, Cost, SiteShape
from mitaswap.operators.counting import attend_flops, product_flops
from mitaswap.operators.experts import attend
from mitaswap.operators.pool import pool_shape, pool_tokens
from mitaswap.operators.precision import outside_autocast, working
from mitaswap.operators.ranges import in_range, odd
from mitaswap.spec import Value
from mitaswap.tokens import TokenLayout


@dataclass(frozen=True)
class NystromOptions(Options):
    """Options of Nystrom attention.

    Args:
        m: number of landmarks; 64 are the paper's.
        landmarks: `segments` averages m runs of the sequence, special tokens among them (the
            paper); `windows` averages m windows of the patch grid.
        inverse: `iterative` approximates the pseudoinverse by matrix products (the paper), and so
            leaves the smallest singular values damped; `exact` inverts them, noise as well.
        iterations: of `iterative`.
        scaling: start of the iteration, A^T / (|A|_1 |A|_inf). The norms are each matrix's own in
            the `paper`; in the `released` code the largest of the whole batch, so that an image's
            output depends on the images beside it.
        conv: size of the kernel, odd, of the paper's skip connection (its Fig. 4), a depthwise
            convolution of V along the sequence; it starts at zero. The paper gives no size; 33 is
            the released language model's (35 for Long Range Arena; none, by default, in its vision
            transformer). 0 leaves the convolution out, as Alg. 1 does.
    """

    m: int = 64
    landmarks: Literal["segments", "windows"] = "segments"
    inverse: Literal["iterative", "exact"] = "iterative"
    iterations: int = 6
    scaling: Literal["paper", "released"] = "paper"
    conv: int = 33


@MECHANISMS.register("nystrom")
class Nystrom(Mechanism):
    """O = softmax(Q K~^T scale) pinv(A) softmax(Q~ K^T scale) V + C, A = softmax(Q~ K~^T scale).

    Landmarks Q~, K~ [m, D] are means of queries and of keys over the same tokens. Exact for m = N.
    Special tokens are queries and keys as all others; whether landmarks contain them is an option.
    Where m does not divide the sequence, neighbouring segments share a token.

    pinv(A) is Z after some iterations of Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4.

    C_i = sum_t w_t V_(i + t) over the `conv` tokens around token i, with V zero beyond both ends of
    the sequence. As in the released code there is one kernel w per head, for all its channels, and
    no bias. The sequence is as the network has it: patches row by row, special tokens neighbours of
    those beside them. (`+dwc` convolves over the grid instead, with a kernel per channel.)

    Parameters, of no grid:
        conv_weight [H, conv]: w of each head; 0. Not with conv=0.
    """

    options_type = NystromOptions
    options: NystromOptions
    card = Card(
        strategy="compression",
        expert_type="MLP",
        expert_count="1 shared",
        construction="landmark probing",
        topology="all-to-one",
        source="Xiong et al. 2021, arXiv 2102.03902, Alg. 1 and Fig. 4 (not by equation)",
        cost="N m d + m^3",
        untrained="usable",
    )
    limits = (
        ("nystrom(m={tokens},inverse=exact)", "standard"),
        ("nystrom(m={tokens},iterations=30)", "standard"),
        ("nystrom(m=9,conv=0)", "nystrom(m=9)"),
    )
    samples = (
        {"m": 9},
        {"m": 9, "conv": 0},
        {"m": 6, "landmarks": "windows", "iterations": 4, "conv": 0},
        {"m": 12, "inverse": "exact", "conv": 5},
        {"m": 6, "landmarks": "windows", "conv": 35},
    )
    axes = (("N", "m"),)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"grid"} if self.options.landmarks == "windows" else ())

    @property
    def traits(self) -> frozenset[str]:  # type: ignore[override]
        # a kernel of zeros breaks none of them
        held = {"linear", "scaled"}
        if self.options.inverse == "exact":
            held |= {"averages"}
        if self.options.inverse == "exact" or self.options.scaling == "paper":
            held |= {"heads"}
        if self.options.landmarks == "windows":
            held |= {"special-set", "mirror"}
        return frozenset(held)

    @classmethod
    def suggest(cls, layout: TokenLayout) -> dict[str, Value]:
        few = layout.patches < 2 * NystromOptions.m
        return {"m": max(1, layout.patches // 4)} if few else {}

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        o = self.options
        windows = o.landmarks == "windows"
        most, of = (layout.patches, "patches") if windows else (layout.tokens, "tokens")
        if self.site is None:  # once it is settled, landmarks follow the grid
            in_range(self, "m", o.m, 1, most, f"{of} (tokens {layout})")
            self._shape(layout)
        in_range(self, "iterations", o.iterations, 1, 100, "iterations that are allowed")
        length, why = self._built(layout).tokens, ", or the convolution is not centred"
        odd(self, "conv", o.conv, length, why, zero=True)

    def _shape(self, layout: TokenLayout) -> tuple[int, int]:
        """Rows and columns of the landmarks: m of them where they fit, else as many as tokens, or
        as many rows and columns of windows as the grid has.
        """
        o = self.options
        if o.landmarks == "segments":
            return 1, min(o.m, layout.tokens)
        try:
            return pool_shape(o.m, layout.grid, asker=self)
        except MitaswapError:
            if self.site is None:
                raise
        built, grid = self._shape(self.site.layout), layout.grid
        return min(built[0], grid[0]), min(built[1], grid[1])

    def build(self, site: SiteShape) -> None:
        if self.options.conv:
            self.conv_weight = nn.Parameter(torch.zeros(site.heads, self.options.conv))

    def cost(self, site: SiteShape) -> Cost:
        o, n, d, dv = self.options, site.layout.tokens, site.head_dim, site.value_dim
        m = math.prod(self._shape(site.layout))
        flops = 2 * attend_flops(n, m, d, dv)
        flops += product_flops(m, d, m) + product_flops(m, m, dv)
        if o.inverse == "iterative":
            flops += 4 * o.iterations * product_flops(m, m, m)
        flops += product_flops(n, o.conv, dv)
        return self._cost(site, flops, between=m * (2 * d + dv))

    @outside_autocast
    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Tensor:
        dtype = q.dtype
        q, k, v = (x.contiguous() for x in working(q, k, v))
        queries, keys = (self._landmarks(x, layout) for x in (q, k))  # Q~, K~ [B, H, m, D]
        columns = ((q * scale) @ keys.transpose(-1, -2)).softmax(dim=-1)
        core = ((queries * scale) @ keys.transpose(-1, -2)).softmax(dim=-1)
        values, _ = attend(queries, k, v, scale)
        out = columns @ (self._inverse(core) @ values)
        if self.options.conv:
            out = out + self._skip(v)
        return out.to(dtype)

    def _skip(self, v: Tensor) -> Tensor:
        """V [B, H, N, Dv] convolved along the sequence: each head is an image N x Dv and its kernel
        one column wide.
        """
        heads, size = self.conv_weight.shape
        kernels = self.conv_weight.to(v.dtype).view(heads, 1, size, 1)
        return F.conv2d(v, kernels, padding=(size // 2, 0), groups=heads)

    def _landmarks(self, x: Tensor, layout: TokenLayout) -> Tensor:
        if self.options.landmarks == "windows":
            return pool_tokens(x, layout.prefix, layout.grid, self._shape(layout))
        return pool_tokens(x, 0, (1, layout.tokens), self._shape(layout))

    def _inverse(self, core: Tensor) -> Tensor:
        if self.options.inverse == "exact":
            return torch.linalg.pinv(core)
        # rows of a softmax sum to one: |A|_inf is 1, |A|_1 the largest sum of a column
        norm = core.sum(dim=-2, keepdim=True).amax(dim=-1, keepdim=True)
        if self.options.scaling == "released" and norm.numel():
            norm = norm.amax()
        inverse = core.transpose(-1, -2) / norm
        one = torch.eye(core.shape[-1], dtype=core.dtype, device=core.device)
        for _ in range(self.options.iterations):
            product = core @ inverse
            inner = 15 * one - product @ (7 * one - product)
            inverse = inverse @ (13 * one - product @ inner) / 4
        return inverse
