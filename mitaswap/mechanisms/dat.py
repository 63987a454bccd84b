"""Deformable attention of DAT: all queries share a few keys and values, sampled where an offset
network points to (Xia et al. 2022).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mitaswap.errors import MitaswapError
from mitaswap.mechanisms._base import MECHANISMS, Mechanism, Options
from mitaswap.mechanisms._card import Card, Cost, SiteShape
from mitaswap.operators.counting import attend_flops, depthwise_flops, product_flops
from mitaswap.operators.precision import outside_autocast, working
from mitaswap.operators.ranges import at_least, in_range, odd
from mitaswap.operators.routed import special_flops, with_special
from mitaswap.operators.sampling import bilinear, raster
from mitaswap.tokens import TokenLayout

#: queries whose weights and biases exist at a time; the number of samples grows with the grid
CHUNK = 512

#: channels of an offset group in the paper's models
GROUP = 128


@dataclass(frozen=True)
class DatOptions(Options):
    """Options of DAT.

    Args:
        stride: patches per sampling point along each axis, r; 2 is the paper's example (49 points
            of a 14 x 14 grid). The released classifiers take 1 there, a point at every patch: all
            pairs, and softmax attention itself until they are trained.
        groups: offset groups; the heads of one share their points. Must divide the heads. 0 is as
            many as leave a group about 128 channels (4 of the paper's heads, 3 to 8 groups at 12 to
            32 heads), of those that divide the heads.
        kernel: width of the offset network's depth-wise convolution, odd.
        reach: farthest offset, s, in halves of the distance between points; 0 lets points go
            anywhere on the grid (DAT++).
        reference_points: from edge to edge of the grid in the `paper`; the `released` code moves
            them by half the distance between points, the last ones out of the grid.
        norm: LayerNorm in the offset network, as in the released code.
        bias: relative position bias.
    """

    stride: int = 2
    groups: int = 0
    kernel: int = 5
    reach: float = 2.0
    reference_points: Literal["paper", "released"] = "paper"
    norm: bool = False
    bias: bool = True


@MECHANISMS.register("dat")
class Dat(Mechanism):
    """softmax(Q K~^T scale + B) V~ with K~ = K(p + dp), V~ = V(p + dp) at N_s = ceil(h / r)
    ceil(w / r) points, N^2 d / r^2 operations.

    Reference points p are a regular grid. A network on the queries of a group (depth-wise
    convolution, GELU, 1 x 1 convolution) gives the offsets dp = s tanh(.); maps are bilinear
    between patches and zero outside. B is a table of relative positions, bilinear as well. The
    paper samples x and projects it; here its projections are sampled, the same for one group.

    Special tokens are keys of every patch, unsampled and without bias; as queries they attend to
    all N keys.

    Parameters, for groups of C_g = H / G * D channels and a grid of h x w at first:
        dwc_weight [C_g, 1, kernel, kernel]: 1 / kernel^2, the mean; dwc_bias [C_g]: zero.
        norm_weight, norm_bias [C_g]: one and zero; only with `norm`.
        offset_weight [2, C_g]: zero, no offsets; row, then column.
        table [H, 2 h - 1, 2 w - 1]: zero; only with `bias`. It spans all displacements of a grid,
            whatever its size.
    """

    options_type = DatOptions
    options: DatOptions
    card = Card(
        strategy="routing",
        expert_type="MLP",
        expert_count="1 shared",
        construction="offset predicting",
        topology="N-to-one",
        source="Xia et al. 2022, arXiv 2201.00520, Eq. 4-9",
        cost="N^2 d / r^2",
        untrained="usable",
    )
    limits = (("dat(stride=1)", "standard"),)
    samples = (
        {},
        {"stride": 1, "bias": False},
        {"stride": 3, "kernel": 3, "norm": True, "reach": 0.0},
        {"reference_points": "released"},
        {"stride": 1, "reference_points": "released"},
    )
    needs = frozenset({"grid"})

    @property
    def traits(self) -> frozenset[str]:  # type: ignore[override]
        o = self.options
        held = {"linear", "scaled", "heads", "special-set"}
        if o.reference_points == "paper":
            held |= {"averages", "convex", "mirror"}
        elif o.stride > 1:  # the last points are far enough out to see nothing
            held |= {"mirror"}
        if o.stride == 1:
            held |= {"every-pair"}
            if o.reference_points == "paper":  # a point at every patch: softmax attention
                held |= {"key-set", "pointwise"}
        return frozenset(held)

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        o, most = self.options, min(layout.grid)
        of = f"patches along the grid's smaller side (tokens {layout})"
        if self.site is None:  # once it is built, points follow the grid
            in_range(self, "stride", o.stride, 1, most, of)
        side = max(self._built(layout).grid)
        odd(self, "kernel", o.kernel, side, ", or the convolution is not centred")
        at_least(self, "groups", o.groups, 0)
        limit = f"from one end of {side} patches to the other"
        at_least(self, "reach", o.reach, 0, "which is no limit", most=2 * side, limit=limit)

    def check_site(self, site: SiteShape) -> None:
        super().check_site(site)
        o = self.options
        if o.groups and site.heads % o.groups:
            near = _divisor(site.heads, o.groups)
            raise MitaswapError(
                f"{self.spec}: groups={o.groups} must divide the {site.heads} heads; use "
                f"groups={near}"
            )

    def _groups(self, heads: int, dim: int) -> int:
        return self.options.groups or _divisor(heads, heads * dim / GROUP)

    def build(self, site: SiteShape) -> None:
        o = self.options
        channels = site.heads // self._groups(site.heads, site.head_dim) * site.head_dim
        mean = torch.full((channels, 1, o.kernel, o.kernel), o.kernel**-2.0)
        self.dwc_weight = nn.Parameter(mean)
        self.dwc_bias = nn.Parameter(torch.zeros(channels))
        if o.norm:
            self.norm_weight = nn.Parameter(torch.ones(channels))
            self.norm_bias = nn.Parameter(torch.zeros(channels))
        self.offset_weight = nn.Parameter(torch.zeros(2, channels))
        if o.bias:
            height, width = site.layout.grid
            self.table = nn.Parameter(torch.zeros(site.heads, 2 * height - 1, 2 * width - 1))

    def cost(self, site: SiteShape) -> Cost:
        d, dv, stride = site.head_dim, site.value_dim, self.options.stride
        height, width = (-(-size // stride) for size in site.layout.grid)
        samples = height * width
        flops = depthwise_flops(samples, d, self.options.kernel) + product_flops(samples, d, 2)
        flops += attend_flops(site.layout.patches, samples, d, dv)
        flops += special_flops(site.layout, d, dv)
        return self._cost(site, flops, between=samples * (d + dv))

    @outside_autocast
    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Tensor:
        dtype = q.dtype
        q, k, v = working(q, k, v)
        queries, keys, values = (x[:, :, layout.patch_slice] for x in (q, k, v))
        rows, columns = self._points(queries, layout)  # [B, G, N_s]
        keys, values = self._sampled(keys, values, rows, columns, layout)

        outs, lses = [], []
        for start in range(0, layout.patches, CHUNK):
            chunk = slice(start, start + CHUNK)
            scores = (queries[:, :, chunk] * scale) @ keys.transpose(-1, -2)
            if self.options.bias:
                scores = scores + self._bias(rows, columns, chunk, layout)
            outs.append(scores.softmax(dim=-1) @ values)
            lses.append(scores.logsumexp(dim=-1, keepdim=True))
        branch = torch.cat(outs, dim=2), torch.cat(lses, dim=2)
        return with_special(q, k, v, [branch], layout, scale)[0].to(dtype)

    def _sampled(
        self, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, layout: TokenLayout
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the patches at the points, [B, H, N_s, D] and [B, H, N_s, Dv]."""
        maps = _maps(torch.cat([k, v], dim=-1), layout.grid, rows.shape[1])
        found = bilinear(maps, rows.flatten(0, 1)[:, None], columns.flatten(0, 1)[:, None])
        width, points = k.shape[-1] + v.shape[-1], rows.shape[-1]
        found = found.view(*k.shape[:2], width, points).transpose(-1, -2)
        keys, values = found.split([k.shape[-1], v.shape[-1]], dim=-1)
        return keys, values

    def _points(self, queries: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """Rows and columns of the sampling points, in patches: two [B, G, N_s]."""
        o, kind = self.options, queries.dtype
        groups = self._groups(queries.shape[1], queries.shape[3])
        hidden = F.conv2d(
            _maps(queries, layout.grid, groups),
            self.dwc_weight.to(kind),
            self.dwc_bias.to(kind),
            stride=o.stride,
            padding=o.kernel // 2,
            groups=self.dwc_weight.shape[0],
        )
        grid = (hidden.shape[2], hidden.shape[3])
        hidden = hidden.flatten(2).transpose(1, 2)
        if o.norm:
            gain, shift = self.norm_weight.to(kind), self.norm_bias.to(kind)
            hidden = F.layer_norm(hidden, gain.shape, gain, shift)
        offsets = F.linear(F.gelu(hidden), self.offset_weight.to(kind))  # [B * G, N_s, 2]
        offsets = offsets.view(queries.shape[0], groups, *offsets.shape[1:])
        rows, columns = (
            self._along(points, offset, count, size)
            for points, offset, count, size in zip(
                raster(grid, queries), offsets.unbind(-1), grid, layout.grid, strict=True
            )
        )
        return rows, columns

    def _along(self, points: Tensor, offset: Tensor, count: int, size: int) -> Tensor:
        """Positions along one axis of `size` patches, of `count` points numbered `points`."""
        gaps, half = max(count - 1, 1), (size - 1) / 2  # half: patches to one normalised unit
        if self.options.reference_points == "released" or count == 1:
            points = points + 0.5
        reference = points * (size - 1) / gaps
        if self.options.reach == 0:
            return (reference + offset * half).clamp(0, size - 1)
        return reference + offset.tanh() * (self.options.reach * half / gaps)

    def _bias(self, rows: Tensor, columns: Tensor, chunk: slice, layout: TokenLayout) -> Tensor:
        """Bias of some queries and all points, from the table of relative positions: [B, H, n,
        N_s].
        """
        (batch, groups), heads = rows.shape[:2], self.table.shape[0]
        table = self.table.to(rows.dtype).unflatten(0, (groups, heads // groups))
        asking = [axis[chunk] for axis in raster(layout.grid, rows)]
        at = []
        for query, points, size, span in zip(
            asking, (rows, columns), layout.grid, table.shape[2:], strict=True
        ):
            # the table is a function of displacements in units of the grid's extent
            middle = (span - 1) // 2
            apart = query[:, None] - points.transpose(0, 1)[:, :, None]  # [G, B, n, N_s]
            at.append((middle + apart * (middle / max(size - 1, 1))).flatten(1, 2))
        # the batch goes along with the queries, so that the table is not copied for it
        bias = bilinear(table, *at).view(heads, batch, asking[0].shape[0], rows.shape[2])
        return bias.transpose(0, 1)


def _maps(x: Tensor, grid: tuple[int, int], groups: int) -> Tensor:
    """Patches x [B, H, P, D] as one map per group, [B * G, H / G * D, h, w]."""
    batch, heads, _, dim = x.shape
    return x.transpose(-1, -2).reshape(batch * groups, heads // groups * dim, *grid)


def _divisor(heads: int, near: float) -> int:
    """The divisor of `heads` nearest to a number, the smaller of two."""
    best = 1
    for n in range(2, heads + 1):  # not min(key=...), which torch 2.11 cannot always trace
        if heads % n == 0 and abs(n - near) < abs(best - near):
            best = n
    return best
